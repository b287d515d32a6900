"""VarCon's equations written down directly: what a user would otherwise have in a script.

Fixed once: these are the yardsticks of the ``speed`` benchmark.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def authors_operations(
    features: Tensor, labels: Tensor, temperature: float = 0.1, epsilon: float = 0.02
) -> Tensor:
    """With the operations that the authors' implementation uses, all on ``[N, K]`` matrices.

    One-hot centroids, softmax, an explicit ``q`` (safe here only because float32 holds
    ``exp(1 / tau2)`` down to tau2 = 0.0113), ``kl_div``, log_softmax.
    """
    z = F.normalize(features, dim=1)
    classes, slots = torch.unique(labels, return_inverse=True)
    one_hot = F.one_hot(slots, len(classes)).to(z.dtype)  # [N, K]
    with torch.no_grad():
        means = one_hot.T @ z / one_hot.sum(0)[:, None]
        w = F.normalize(means, dim=1)
    logits = z @ w.T / temperature
    p = torch.softmax(logits, dim=1)
    confidence = p.gather(1, slots[:, None])
    tau2 = (temperature - epsilon) + 2 * epsilon * confidence
    scores = torch.where(one_hot.bool(), torch.exp(1 / tau2), 1.0)
    q = scores / scores.sum(1, keepdim=True)
    log_p = F.log_softmax(logits, dim=1)
    kl = F.kl_div(log_p, q, reduction="none").sum(1)
    nll = -(one_hot * log_p).sum(1)
    return (kl + nll).mean()


def authors_operations_on_soft_labels(
    features: Tensor, soft: Tensor, temperature: float = 0.1, epsilon: float = 0.02
) -> Tensor:
    """The same expected under class probabilities ``[N, C]``, by autograd on ``[N, K]`` matrices.

    Entry ``r`` of a row holds the loss as if ``r`` were its class; ``kl_div`` would want
    ``[N, K, K]``, so its sum over the other classes, which share one ``q``, is written out.
    """
    z = F.normalize(features, dim=1)
    mass = soft.sum(0)
    if not bool((mass > 0).all()):
        soft, mass = soft[:, mass > 0], mass[mass > 0]
    num_others = len(mass) - 1
    with torch.no_grad():
        means = soft.T @ z / mass[:, None]
        w = F.normalize(means, dim=1)
    logits = z @ w.T / temperature
    p = torch.softmax(logits, dim=1)
    tau2 = (temperature - epsilon) + 2 * epsilon * p
    score = torch.exp(1 / tau2)
    q_own, q_other = score / (score + num_others), 1 / (score + num_others)
    log_p = F.log_softmax(logits, dim=1)
    log_p_others = log_p.sum(1, keepdim=True) - log_p
    kl = q_own * (q_own.log() - log_p) + q_other * (num_others * q_other.log() - log_p_others)
    return (soft * (kl - log_p)).sum(1).mean()


def lean_log_space(
    features: Tensor,
    labels: Tensor,
    temperature: float = 0.1,
    epsilon: float = 0.02,
    nll_of: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """As few ``[N, K]`` matrices as autograd allows: the logits, their logsumexp, and no ``q``.

    ``nll_of(z, w / temperature, slots)`` may compute the cross-entropy without any.
    """
    z = F.normalize(features, dim=1)
    classes, slots = torch.unique(labels, return_inverse=True)
    num_classes = len(classes)
    with torch.no_grad():
        sums = z.new_zeros(num_classes, z.shape[1]).index_add_(0, slots, z)
        w = F.normalize(sums, dim=1)
        total = w.sum(0)
    if nll_of is None:
        logits = z @ (w.T / temperature)
        own = logits.gather(1, slots[:, None]).squeeze(1)
        nll = torch.logsumexp(logits, dim=1) - own
    else:
        own = (z * w[slots]).sum(1) / temperature
        nll = nll_of(z, w / temperature, slots)
    tau2 = (temperature - epsilon) + 2 * epsilon * (-nll).exp()
    log_normaliser = torch.logaddexp(1 / tau2, tau2.new_full((), max(num_classes - 1, 1e-30)).log())
    log_q_own, log_q_other = 1 / tau2 - log_normaliser, -log_normaliser
    q_own, q_other = log_q_own.exp(), log_q_other.exp()
    others = z @ (total / temperature) - own
    kl = q_own * (log_q_own + nll) + q_other * (
        (num_classes - 1) * (log_q_other + nll + own) - others
    )
    return (kl + nll).mean()


def nll_alone(
    features: Tensor,
    labels: Tensor,
    temperature: float = 0.1,
    cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """The NLL of the loss and no KL, by ``cross_entropy(z, w / temperature, slots)``."""
    z = F.normalize(features, dim=1)
    classes, slots = torch.unique(labels, return_inverse=True)
    with torch.no_grad():
        sums = z.new_zeros(len(classes), z.shape[1]).index_add_(0, slots, z)
        w = F.normalize(sums, dim=1) / temperature
    if cross_entropy is None:
        return F.cross_entropy(z @ w.T, slots)
    return cross_entropy(z, w, slots)
