"""The paper's equations, one line each: for reading, for checks, and for second derivatives."""

import torch
from torch import Tensor


def sweep_by_equations(
    z: Tensor, w: Tensor, present: Tensor | None, slots: Tensor | None, shares: Tensor | None,
    own: Tensor | None, temperature: float, epsilon: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss ``[N]`` and KL, NLL, confidence, tau2 ``[4, N]``: Eq. 7-13 on ``[N, K]`` matrices.

    Args:
        z: ``[N, D]`` embeddings; the way of the gradient.
        w: ``[K, D]`` unit centroids, zero rows for classes that are absent.
        present: ``[K]`` bool; None: all are.
        slots: ``[N, M]`` rows of the classes that each sample has a share of; None: of all rows.
        shares: ``[N, M]``; None: 1 of one class.
        own: ``[N, D]`` each sample's own centroid where it is not ``w[slots]`` (leave-one-out).
        temperature: ``tau1``.
        epsilon: ``epsilon`` of Eq. 13.
    """
    absent = (
        torch.zeros(w.shape[0], dtype=torch.bool, device=w.device) if present is None else ~present
    )
    others = (~absent).sum().sub(1).clamp_min(0).to(z.dtype)  # K - 1
    logits = z @ w.T / temperature
    if own is not None and slots is not None:
        logits = logits.scatter(1, slots, (z * own).sum(1, keepdim=True) / temperature)

    log_p = logits.masked_fill(absent, -torch.inf).log_softmax(1).masked_fill(absent, 0.0)  # Eq. 8
    log_p_own = log_p if slots is None else log_p.gather(1, slots)
    tau2 = (temperature - epsilon) + 2 * epsilon * log_p_own.exp()  # Eq. 13
    log_sum = torch.logaddexp(1 / tau2, others.log())
    log_q_own, log_q_other = 1 / tau2 - log_sum, -log_sum  # Eq. 10-12
    log_p_others = log_p.sum(1, keepdim=True) - log_p_own
    kl = log_q_own.exp() * (log_q_own - log_p_own)
    kl = kl + log_q_other.exp() * (others * log_q_other - log_p_others)
    loss = kl - log_p_own  # Eq. 7

    terms = torch.stack((kl, -log_p_own, log_p_own.exp(), tau2)).detach()
    if shares is None:
        return loss.squeeze(1), terms.squeeze(2)
    return (shares * loss).sum(1), (shares * terms).sum(2)
