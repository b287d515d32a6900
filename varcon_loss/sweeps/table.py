"""The sweep where any class may have a share: see `expectation` for the mathematics."""

import torch
from torch import Tensor

from varcon_loss.readable import values_may_be_read
from varcon_loss.rows import Swept
from varcon_loss.soft_labels import SoftLabels
from varcon_loss.sweeps.chunks import TINY, Shared
from varcon_loss.sweeps.objective import row_objective, row_slope


def evaluate_table(
    shared: Shared,
    z: Tensor,
    soft: SoftLabels,
    start: int,
    room: list[Tensor],
    gradient: Tensor | None,
) -> Swept:
    """The rows ``z`` of one chunk, where any class may have a share.

    ``room`` is ``[n, S]``, seven times. Some twenty passes over a chunk that stays in a CPU's
    caches; each counts. Class ``m``, the one that may have more than half of ``p``, has a column
    of its own.
    """
    values = soft.rows(start, start + len(z), z.dtype)
    if shared.present is not None:
        values = values * shared.present
    weighted = values if shared.weight is None else values * shared.weight
    num_others, epsilon = shared.num_others, shared.epsilon
    lowest_tau2 = z.new_full((), shared.temperature - epsilon)
    one, two = z.new_ones(()), z.new_full((), 2.0)

    u = shared.to_logits(z, room[0])
    _, p, minus_a, q_other, divisor, through, spare = room
    every_logit = torch.mv(z, shared.key_sum).unsqueeze(1)
    shift = None
    if shared.shifted:
        p.copy_(u)
        if shared.present is not None:
            p.masked_fill_(~shared.present, -torch.inf)
        shift = p.amax(1, keepdim=True)
        shift.masked_fill_(shift == -torch.inf, 0.0)
        p.sub_(shift).exp_()
    else:
        torch.exp(u, out=p)
        if shared.present is not None:
            p.mul_(shared.present)
    total = p.sum(1, keepdim=True)

    # Which class has more than half? On a CPU a comparison and a product find it faster than
    # argmax. Where none has, any class will do.
    if values_may_be_read(z):
        torch.gt(p, total / 2, out=through)
        m = torch.mv(through, torch.arange(p.shape[1], dtype=z.dtype, device=z.device))
        m = m.long().clamp_max_(p.shape[1] - 1).unsqueeze(1)  # products may be rounded to bfloat16
    else:
        m = p.argmax(1, keepdim=True)
    own_logit, own_share = u.gather(1, m), weighted.gather(1, m)
    p.scatter_(1, m, 0.0)
    lse_others = p.sum(1, keepdim=True).log_()
    lse = total.log()
    if shift is not None:
        lse_others += shift
        lse += shift
    row = row_objective(
        own_logit,
        lse_others,
        every_logit - own_logit,
        num_others,
        shared.temperature,
        epsilon,
    )
    p.mul_(total.clamp_min_(TINY).reciprocal_())

    # a = 1 / tau2, q_other = exp(-a) / (1 + (K - 1) exp(-a)), q_own = 1 / (...)
    torch.add(-lowest_tau2, p, alpha=-2 * epsilon, out=minus_a)
    minus_a.reciprocal_()
    torch.exp(minus_a, out=q_other)
    _add_scaled(one, q_other, num_others, divisor)
    q_other.div_(divisor)
    # through_q = q_other ((K - 1) a + sum_k u_k - K u_r), by nll_r = lse - u_r
    nll = torch.sub(lse, u, out=u)
    _add_scaled(every_logit - (num_others + 1) * lse, nll, num_others + 1, through)
    _add_scaled(through, minus_a, -num_others, through)
    through.mul_(q_other)

    terms, expected = None, None
    nll.scatter_(1, m, row.nll)
    if shared.need_terms:
        p.scatter_(1, m, row.confidence)
        expected = values.sum(1), _dot(values, nll, spare), _dot(values, p, spare)
        p.scatter_(1, m, 0.0)
    # L_r / 2 = nll_r + (log q_own_r - through_q_r) / 2
    half_loss = nll.add_(through, alpha=-0.5)
    through.mul_(p).mul_(minus_a)
    if shared.to_gradient is not None:
        minus_a.div_(divisor)
    half_loss.add_(divisor.log_(), alpha=-0.5).scatter_(1, m, row.loss / 2)
    loss = 2 * _dot(weighted, half_loss, spare)
    if expected is not None:
        mass, expected_nll, confidence = expected
        kl = 2 * _dot(values, half_loss, spare) - expected_nll
        tau2 = lowest_tau2 * mass + 2 * epsilon * confidence
        terms = torch.stack((kl, expected_nll, confidence, tau2))
    if shared.to_gradient is None:
        return Swept(loss=loss, terms=terms)

    slopes = torch.addcmul(two, through, minus_a, value=2 * epsilon, out=through)
    slopes.scatter_(1, m, 0.0)
    q_other.scatter_(1, m, 0.0)
    rest_slope = _dot(weighted, slopes, spare).unsqueeze(1)
    slope = rest_slope + own_share * row_slope(row)
    sum_q_other = _dot(weighted, q_other, spare).unsqueeze(1) + own_share * row.q_other
    _add_scaled(slopes, q_other, -(num_others + 1), slopes)
    dl_du = p.mul_(slope).addcmul_(weighted, slopes, value=-1)
    at_own = rest_slope - torch.sigmoid(row.margin) * slope
    dl_du.scatter_(1, m, at_own + own_share * (row.q_other + row.q_rest))
    dz = shared.to_gradient(dl_du, gradient)
    dz.addcmul_(sum_q_other, shared.key_sum, value=-1)
    return Swept(loss=loss, terms=terms, gradient=dz)


def _dot(a: Tensor, b: Tensor, room: Tensor) -> Tensor:
    """Row by row, ``[n, S]`` -> ``[n]``."""
    return torch.mul(a, b, out=room).sum(1)


def _add_scaled(base: Tensor, x: Tensor, factor: Tensor | float, out: Tensor) -> Tensor:
    """``base + factor * x``, whether the factor is known here or only on the device."""
    if isinstance(factor, Tensor):
        return torch.addcmul(base, x, factor, out=out)
    return torch.add(base, x, alpha=factor, out=out)
