"""The expected loss by the paper's equations, on ``[N, K]`` matrices and under autograd.

For reading, for checking `expectation`, and for derivatives of any order.
"""

import torch
from torch import Tensor

from varcon_loss.soft_labels import SoftLabels


def expected_loss_by_equations(
    z: Tensor,
    soft: SoftLabels,
    w: Tensor,
    absent: Tensor,
    weight: Tensor | None,
    temperature: float,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """Loss ``[N]`` and ``[4, N]`` KL, NLL, confidence and tau2, as `expectation.sweep_soft_labels`.

    Args:
        z: ``[N, D]``; the way of the gradient.
        soft: of the rows, by slot.
        w: ``[S, D]`` centroids, zero rows in empty slots.
        absent: ``[S]`` bool, empty slots.
        weight: ``[S]`` class weights; None: all 1.
        temperature: ``tau1``.
        epsilon: ``epsilon`` of Eq. 13.
    """
    num_others = (~absent).sum().sub(1).clamp_min(0).to(z.dtype)
    values = soft.table(w.shape[0], z.dtype).masked_fill(absent, 0.0)  # [N, S]

    logits = (z @ w.T / temperature).masked_fill(absent, -torch.inf)
    log_p = torch.log_softmax(logits, dim=1).masked_fill(absent, 0.0)  # Eq. 8
    p = log_p.exp()
    # From here on column r is about the loss as if r were the class: tau2, and q of r and of any
    # other class.
    tau2 = (temperature - epsilon) + 2 * epsilon * p  # Eq. 13
    log_sum = torch.logaddexp(1 / tau2, num_others.log())  # Eq. 10-12
    log_q_own, log_q_other = 1 / tau2 - log_sum, -log_sum
    log_p_others = log_p.sum(1, keepdim=True) - log_p
    kl = log_q_own.exp() * (log_q_own - log_p)
    kl = kl + log_q_other.exp() * (num_others * log_q_other - log_p_others)
    weighted = values if weight is None else values * weight
    loss = (weighted * (kl - log_p)).sum(1)  # Eq. 7

    terms = torch.stack([(values * term).sum(1) for term in (kl, -log_p, p, tau2)])
    return loss, terms.detach()
