"""The sweep where each row has few entries, and perhaps a background share of all other classes.

Mixup and CutMix make such shares, and label smoothing adds the background. The entries are worked
out on ``[n, M]``; without a background the classes beside them cost as little as with integer
labels. See `expectation` for the mathematics.
"""

import torch
from torch import Tensor

from varcon_loss.rows import Swept
from varcon_loss.soft_labels import SoftLabels
from varcon_loss.sweeps.chunks import TINY, Shared
from varcon_loss.sweeps.objective import row_objective, row_slope

# A logarithm costs as much as several products, and the eighth power of so many classes is finite
# in float32. Nobody has more than its fourth root.
MOST_MULTIPLIED = 2**15
# What a row without a background is divided by: far below what counts, and far from overflow.
SMALLEST_BACKGROUND = 1e-25


def evaluate_entries(
    shared: Shared,
    z: Tensor,
    soft: SoftLabels,
    start: int,
    room: list[Tensor],
    gradient: Tensor | None,
) -> Swept:
    """The rows ``z`` of one chunk, whose shares are kept as entries.

    Args:
        shared: as above.
        z: ``[n, D]``.
        soft: entries of all rows.
        start: which row is the first here.
        room: ``[n, S]``, once, or five times where there is a background.
        gradient: ``[n, D]`` where the gradient may go.
    """
    stop = start + len(z)
    values, slots = soft.rows(start, stop, z.dtype), soft.slots_of(start, stop)
    known = None if shared.counted is None else shared.counted[slots]  # 0 for an empty slot
    if known is not None:
        values = values * known
    logits = shared.to_logits(z, room[0])
    slot_logits = logits.gather(1, slots)
    every_logit = torch.mv(z, shared.key_sum).unsqueeze(1)

    # From here on the row's own classes are out of the sums.
    logits.scatter_(1, slots, -torch.inf)
    shift = None
    own_weights = slot_logits
    if shared.shifted:
        if shared.present is not None:
            logits.masked_fill_(~shared.present, -torch.inf)
            own_weights = slot_logits.masked_fill(known == 0, -torch.inf)
        shift = torch.maximum(logits.amax(1), own_weights.amax(1)).unsqueeze(1)
        shift.masked_fill_(shift == -torch.inf, 0.0)
        logits.sub_(shift)
        own_weights = own_weights - shift
    own_weights = own_weights.exp()
    if known is not None:
        own_weights *= known
    weights = torch.exp(logits, out=logits if soft.background is None else room[1])
    total_others = _sum_classes(weights, shared.counted)
    # For each entry over all classes but its own.
    lse_others = (total_others + _sum_of_others(own_weights)).log_()
    if shift is not None:
        lse_others += shift

    row = row_objective(
        slot_logits,
        lse_others,
        every_logit - slot_logits,
        shared.num_others,
        shared.temperature,
        shared.epsilon,
    )
    terms = None
    if shared.need_terms:
        parts = (row.kl, row.nll, row.confidence, row.tau2)
        terms = torch.stack([(values * term).sum(1) for term in parts])
    if shared.weight is not None:
        values = values * shared.weight[slots]
    loss = (values * row.loss).sum(1)
    total = (total_others + own_weights.sum(1, keepdim=True)).clamp_min_(TINY)
    background = soft.background_of(start, stop)
    by_class = None
    slope_of_rest = sum_q_of_rest = 0.0
    if background is not None:
        lse = total.log()
        if shift is not None:
            lse += shift
        by_weight = every_logit
        if shared.weighted_key_sum is not None:
            by_weight = torch.mv(z, shared.weighted_key_sum).unsqueeze(1)
        rest, slope_of_rest, sum_q_of_rest, by_class = _evaluate_rest(
            shared, background, slots, slot_logits, (every_logit, by_weight), lse, shift,
            logits, weights.mul_(total.reciprocal()), room[2:],
        )  # fmt: skip
        loss += rest.loss
        if terms is not None and rest.terms is not None:
            terms += rest.terms
    if shared.to_gradient is None:
        return Swept(loss=loss, terms=terms)

    slopes = values * row_slope(row)
    slope = slopes.sum(1, keepdim=True) + slope_of_rest
    q_others = values * row.q_other
    sum_q_other = q_others.sum(1, keepdim=True) + sum_q_of_rest
    slope_of_others = _sum_of_others(slopes) + slope_of_rest
    at_slots = torch.where(
        row.margin < 0,  # p > 1/2
        slope_of_others - torch.sigmoid(row.margin) * slope,
        row.confidence * slope - slopes,
    )
    at_slots += q_others + values * row.q_rest
    if background is None or by_class is None:
        dl_du = weights.mul_(slope.div_(total)).scatter_(1, slots, at_slots)
        dz = shared.to_gradient(dl_du, gradient)
    else:
        if shared.scale is None:
            at_slots += 2 * background
            sum_q_other += 2 * background
        # Divided by `by_row` until after the product: one pass less.
        by_row = background.clamp_min(SMALLEST_BACKGROUND) * (shared.num_others + 1)
        dl_du = torch.addcmul(by_class, weights, slope.div_(by_row), out=by_class)
        dl_du.scatter_(1, slots, at_slots.div_(by_row))
        dz = shared.to_gradient(dl_du, gradient).mul_(by_row)
    dz.addcmul_(sum_q_other, shared.key_sum, value=-1)
    return Swept(loss=loss, terms=terms, gradient=dz)


def _sum_of_others(entries: Tensor) -> Tensor:
    """For each entry of ``[n, M]`` the sum of the rest of its row, without subtraction."""
    width = entries.shape[1]
    if width == 1:
        return torch.zeros_like(entries)
    if width == 2:
        return entries.flip(1)
    return entries @ (1 - torch.eye(width, dtype=entries.dtype, device=entries.device))


def _evaluate_rest(
    shared: Shared,
    background: Tensor,
    slots: Tensor,
    own_logits: Tensor,
    every_logits: tuple[Tensor, Tensor],
    lse: Tensor,
    shift: Tensor | None,
    u: Tensor,
    p: Tensor,
    room: list[Tensor],
) -> tuple[Swept, Tensor | float, Tensor | float, Tensor | None]:
    """What the classes without an entry add, each with the row's background share.

    Some fifteen passes over a chunk that stays in a CPU's caches; each counts.

    Args:
        shared: as above.
        background: ``[n, 1]``.
        slots: ``[n, M]``.
        own_logits: ``[n, M]``.
        every_logits: ``[n, 1]`` sum of all logits, as they are and by class weight.
        lse: ``[n, 1]`` logsumexp of all logits.
        shift: ``[n, 1]`` or None.
        u: ``[n, S]`` logits less ``shift``, -inf at the entries. Is written to.
        p: ``[n, S]``, 0 there.
        room: ``[n, S]``, three times.

    Returns:
        Loss and terms; and, where there is a gradient, what comes to ``A`` and to ``B``, ``[n, 1]``
        each, and what, times background and K, comes to dL/du beside ``A p - B``, ``[n, S]``.
    """
    minus_a, q_other, divisor = room
    num_others, epsilon = shared.num_others, shared.epsilon
    assert isinstance(num_others, int)  # entries are found on a CPU
    num_classes = num_others + 1

    # a = 1 / tau2, q_other = exp(-a) / (1 + (K - 1) exp(-a)), q_own = 1 / (...)
    lowest_tau2 = shared.temperature - epsilon
    torch.add(p.new_full((), -lowest_tau2), p, alpha=-2 * epsilon, out=minus_a).reciprocal_()
    torch.exp(minus_a, out=q_other)
    torch.add(p.new_ones(()), q_other, alpha=num_others, out=divisor)
    q_other.div_(divisor).scatter_(1, slots, 0.0)
    # through_q = q_other ((K - 1) a + sum_k u_k - K u_r)
    every = every_logits[0] if shift is None else every_logits[0] - num_classes * shift
    through = torch.add(every, u, alpha=-num_classes, out=u).add_(minus_a, alpha=-num_others)
    through.mul_(q_other).scatter_(1, slots, 0.0)
    if shift is not None and shared.counted is not None:
        through.masked_fill_(shared.counted == 0, 0.0)

    def sums(every: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Number of classes, their NLL and their ``through_q`` ``[n, 1]``."""
        if scale is None:
            number, own = u.new_full((), u.shape[1] - slots.shape[1]), own_logits
        else:
            own_scale = scale[slots]
            number = scale.sum() - own_scale.sum(1, keepdim=True)
            own = own_scale * own_logits
        nll = number * lse - (every - own.sum(1, keepdim=True))
        return number, nll, _sum_classes(through, scale)

    number, nll, sum_through = sums(every_logits[1], shared.scale)
    parts = None
    if shared.need_terms:
        count, count_nll, count_through = sums(every_logits[0], shared.counted)
        confidence = _sum_classes(p, shared.counted)
        tau2 = lowest_tau2 * count + 2 * epsilon * confidence
        parts = (count_nll - count_through, count_nll, confidence, tau2)
    through_p = None
    if shared.to_gradient is not None:  # tau2 follows p: a^2 p q_own, less a factor 2 epsilon
        through_p = minus_a.square_().mul_(p).div_(divisor)
    divisor.scatter_(1, slots, 1.0)
    if parts is not None:
        parts[0].sub_(_sum_classes(divisor.log(), shared.counted))
    loss = background * (2 * nll - sum_through - _sum_of_logs(divisor, shared.scale))
    terms = None
    if parts is not None:
        terms = torch.cat([background * term for term in parts], dim=1).T
    swept = Swept(loss=loss.squeeze(1), terms=terms)
    if through_p is None:
        return swept, 0.0, 0.0, None

    sum_q_other = _sum_classes(q_other, shared.scale)
    by_class = q_other.addcmul_(through, through_p, value=-2 * epsilon / num_classes)
    slope = 2 * number + num_classes * (sum_q_other - _sum_classes(by_class, shared.scale))
    if shared.scale is not None:
        by_class.sub_(2 / num_classes).mul_(shared.scale)
    return swept, background * slope, background * sum_q_other, by_class


def _sum_classes(numbers: Tensor, scale: Tensor | None) -> Tensor:
    """``[n, S]`` -> ``[n, 1]``."""
    if scale is None:
        return numbers.sum(1, keepdim=True)
    return torch.mv(numbers, scale).unsqueeze(1)


def _sum_of_logs(numbers: Tensor, scale: Tensor | None) -> Tensor:
    """Of numbers from 1 to K, ``[n, S]`` -> ``[n, 1]``. They are written to."""
    if scale is not None:
        return _sum_classes(numbers.log_(), scale)
    width = numbers.shape[1]
    halvings = 3 if width < MOST_MULTIPLIED else 2
    even = width >> halvings << halvings  # the few beyond it would be factors too many
    rest = numbers[:, even:].log().sum(1, keepdim=True)
    numbers = numbers[:, :even]
    for _ in range(halvings):
        half = numbers.shape[1] // 2
        numbers = numbers[:, :half].mul_(numbers[:, half:])
    return numbers.log_().sum(1, keepdim=True).add_(rest)
