"""The objective from a few numbers per row: no ``[N, K]`` matrix is needed.

``q`` (Eq. 10-12) takes only two values, so the loss of a row follows from the logit of its own
class and from two sums over the *other* classes. The own class stays out of those sums: with it
inside, ``1 - p`` would be a difference of nearly equal numbers as soon as the model is confident.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# softplus(x) - x < 1e-17 beyond this: no digit of a float64 is lost.
SOFTPLUS_LINEAR = 40.0


class RowObjective(NamedTuple):
    """Loss terms of each row, and what its gradient is made of. All ``[N]``."""

    loss: Tensor  # Eq. 7
    kl: Tensor
    nll: Tensor
    confidence: Tensor  # p(y | z), Eq. 8
    tau2: Tensor  # Eq. 13
    lse: Tensor  # logsumexp of u over all classes
    p_rest: Tensor  # 1 - p(y | z)
    q_own: Tensor  # q(y | z), Eq. 10-12
    q_rest: Tensor  # 1 - q(y | z)
    q_other: Tensor  # q(k | z) of each other class


def row_objective(
    own_logit: Tensor,
    lse_others: Tensor,
    sum_others: Tensor,
    num_others: Tensor | int,
    temperature: float,
    epsilon: float,
) -> RowObjective:
    """Eq. 7 from what one sweep over the centroids yields.

    Args:
        own_logit: ``[N]`` ``u_y``.
        lse_others: ``[N]`` logsumexp of ``u_k`` over ``k != y``; ``-inf`` if there is none.
        sum_others: ``[N]`` sum of ``u_k`` over ``k != y``.
        num_others: ``K - 1 >= 0``, 0-d in the dtype of the logits, or a number.
        temperature: ``tau1``.
        epsilon: ``epsilon`` of Eq. 13.
    """
    # 1 - p and 1 - q_y are computed as sigmoids, never by subtraction, and exp(1 / tau2) is never
    # formed: it overflows float32 for tau2 < 0.0113.
    margin = lse_others - own_logit
    p_own, p_rest = torch.sigmoid(-margin), torch.sigmoid(margin)
    nll = F.softplus(margin, threshold=SOFTPLUS_LINEAR)
    lse = own_logit + nll

    tau2 = (p_own * (2 * epsilon)).add_(temperature - epsilon)
    a = tau2.reciprocal()
    if isinstance(num_others, int):
        log_others, divisor = math.log(num_others) if num_others else -math.inf, max(1, num_others)
    else:
        log_others, divisor = num_others.log(), num_others.clamp_min(1)
    b = log_others - a
    # As softplus: logsigmoid wakes a CPU's threads for a few hundred numbers.
    minus_log_q_own = F.softplus(b, threshold=SOFTPLUS_LINEAR)
    q_own, q_rest = torch.sigmoid(-b), torch.sigmoid(b)
    q_other = q_rest / divisor  # K = 1: 0, as q_rest is

    kl = torch.addcmul(q_own * (nll - minus_log_q_own), q_rest, lse - a - minus_log_q_own)
    kl = torch.addcmul(kl, q_other, sum_others, value=-1)
    return RowObjective(kl + nll, kl, nll, p_own, tau2, lse, p_rest, q_own, q_rest, q_other)


def row_slopes(
    row: RowObjective, own_logit: Tensor, sum_others: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivatives of Eq. 7 with respect to the logits, through ``p`` and through ``tau2``.

    Returns:
        ``slope``, ``own_slope`` and ``q_other``, each ``[N]``:
        ``dL/du_k = slope * p_k - q_other`` for ``k != y``, and ``dL/du_y = own_slope``.
    """
    a = row.tau2.reciprocal()
    through_tau2 = torch.addcmul(row.q_other * sum_others, row.q_rest, a - own_logit)
    slope = (through_tau2 * row.q_own * row.confidence * a * a).mul_(2 * epsilon).add_(2)
    own_slope = torch.addcmul(row.q_rest, slope, row.p_rest, value=-1)
    return slope, own_slope, row.q_other
