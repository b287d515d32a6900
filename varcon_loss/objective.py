"""The objective from a few numbers per row: no ``[N, K]`` matrix is needed.

``q`` (Eq. 10-12) takes only two values, so the loss of a row follows from the logit of its own
class and from two sums over the *other* classes. The own class stays out of those sums: with it
inside, ``1 - p`` would be a difference of nearly equal numbers as soon as the model is confident.

With ``a = 1 / tau2``, and because the entries of ``q`` sum to 1,

    KL(q || p) = log q_y - log p_y - [(1 - q_y) (a - u_y) + q_other sum_{k != y} u_k]

and the bracket is also what the gradient through ``tau2`` needs.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# softplus(x) - x < 1e-17 beyond this: no digit of a float64 is lost.
SOFTPLUS_LINEAR = 40.0


class RowObjective(NamedTuple):
    """Loss terms of each row, and what its gradient is made of. All of the logits' shape."""

    loss: Tensor  # Eq. 7
    kl: Tensor
    nll: Tensor
    confidence: Tensor  # p(y | z), Eq. 8
    tau2: Tensor  # Eq. 13
    rise: Tensor  # what the confidence adds to tau2
    a: Tensor  # 1 / tau2
    margin: Tensor  # the log-odds of the other classes, log((1 - p) / p)
    q_log_odds: Tensor  # the same of q
    q_rest: Tensor  # 1 - q(y | z), Eq. 10-12
    q_other: Tensor  # q(k | z) of each other class
    through_q: Tensor  # the part of KL that depends on the logits by q alone


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
        own_logit: ``[N]`` or ``[N, 1]``, as the next two: ``u_y``.
        lse_others: logsumexp of ``u_k`` over ``k != y``; ``-inf`` if there is none.
        sum_others: sum of ``u_k`` over ``k != y``.
        num_others: ``K - 1 >= 0``, 0-d in the dtype of the logits, or a number.
        temperature: ``tau1``.
        epsilon: ``epsilon`` of Eq. 13.
    """
    # 1 - p and 1 - q_y are computed as sigmoids, never by subtraction, and exp(1 / tau2) is never
    # formed: it overflows float32 for tau2 < 0.0113.
    margin = lse_others - own_logit
    nll = F.softplus(margin, threshold=SOFTPLUS_LINEAR)
    p_own = torch.sigmoid(-margin)

    rise = p_own * (2 * epsilon)
    tau2 = rise + (temperature - epsilon)
    a = tau2.reciprocal()
    if isinstance(num_others, int):
        log_others, divisor = math.log(num_others) if num_others else -math.inf, max(1, num_others)
    else:
        log_others, divisor = num_others.log(), num_others.clamp_min(1)
    q_log_odds = log_others - a
    # As softplus: logsigmoid wakes a CPU's threads for a few hundred numbers.
    minus_log_q_own = F.softplus(q_log_odds, threshold=SOFTPLUS_LINEAR)
    q_rest = torch.sigmoid(q_log_odds)
    q_other = q_rest / divisor  # K = 1: 0, as q_rest is

    through_q = torch.addcmul(q_other * sum_others, q_rest, a - own_logit)
    kl = nll - minus_log_q_own - through_q
    return RowObjective(
        loss=kl + nll,
        kl=kl,
        nll=nll,
        confidence=p_own,
        tau2=tau2,
        rise=rise,
        a=a,
        margin=margin,
        q_log_odds=q_log_odds,
        q_rest=q_rest,
        q_other=q_other,
        through_q=through_q,
    )


def row_slopes(row: RowObjective) -> tuple[Tensor, Tensor]:
    """The derivatives of Eq. 7 with respect to the logits, through ``p`` and through ``tau2``.

    Returns:
        ``rest_slope`` and ``own_slope``, of the logits' shape: ``dL/du_y = own_slope``, and
        ``dL/du_k = rest_slope * p_k / (1 - p_y) - q_other`` for ``k != y``.
    """
    q_own = torch.sigmoid(-row.q_log_odds)
    slope = (row.through_q * q_own * row.rise * row.a).mul_(row.a).add_(2)
    rest_slope = slope.mul_(torch.sigmoid(row.margin))
    return rest_slope, row.q_rest - rest_slope
