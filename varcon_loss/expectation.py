"""The loss expected under shares of classes, and its gradient, in one sweep over the centroids.

A sample with shares ``Y_r`` has the loss ``L = sum_r Y_r L_r``, where ``L_r`` is Eq. 7 as if ``r``
were its class. With ``s_r`` the `row_slope` of ``L_r``, ``A = sum_r Y_r s_r`` and
``B = sum_r Y_r q_other_r``,

    dL/du_k = A p_k - Y_k s_k + Y_k K q_other_k - B

so there are still two matrix products a chunk of rows. One-hot shares give the paper's loss.

``A p_k - Y_k s_k`` is a difference of nearly equal numbers where the model is confident. There it
is ``(A - Y_k s_k) - (1 - p_k) A``, of sums without class ``k``: for classes with more than half of
``p``, of which a row has one at most.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from varcon_loss import eager
from varcon_loss.objective import row_objective, row_slope
from varcon_loss.products import make_linear
from varcon_loss.shares import Shares

# A logarithm costs as much as several products, and the eighth power of so many classes is finite
# in float32. Nobody has more than its fourth root.
MOST_MULTIPLIED = 2**15


class Expected(NamedTuple):
    """What a sweep yields."""

    loss: Tensor  # [N], under the weighted shares
    others: Tensor | None  # [4, N] KL, NLL, confidence and tau2 under the shares as they are
    gradient: Tensor | None  # [N, D] of the loss; still to be divided by the lengths of the rows


class _Sweep(NamedTuple):
    """What all chunks share."""

    to_logits: Callable[[Tensor, Tensor | None], Tensor]  # [n, D] -> [n, S], or [n, S + 1]
    to_gradient: Callable[[Tensor, Tensor | None], Tensor] | None  # and back; None: not needed
    key_sum: Tensor  # [D] sum of the keys
    weighted_key_sum: Tensor  # [D] the same by class weight
    present: Tensor | None  # [S] bool; None: no slot is empty
    count: Tensor | None  # [S] the same as numbers
    scale: Tensor | None  # [S] the same by class weight; None: all 1
    num_others: Tensor | int  # K - 1
    weight: Tensor | None  # [S] what the loss multiplies the shares by
    shifted: bool  # must a maximum be subtracted before exp?
    project: bool  # does the gradient pass through the normalisation?
    temperature: float
    epsilon: float
    need_terms: bool


def expected_loss(
    z: Tensor,
    shares: Shares,
    w: Tensor,
    present: Tensor | None,
    num_classes: Tensor,
    weight: Tensor | None,
    valid: Tensor | None,
    temperature: float,
    epsilon: float,
    *,
    small_logits: bool,
    project: bool,
    need_grad: bool,
    need_terms: bool,
) -> Expected:
    """Loss, terms and gradient of rows.

    Args:
        z: ``[N, D]``, zero rows where not valid.
        shares: of the rows, by slot. Those of empty slots count for nothing.
        w: ``[S, D]`` centroids, zero rows in empty slots.
        present: ``[S]`` bool; None: no slot is empty.
        num_classes: 0-d int64, K.
        weight: ``[S]`` class weights, in the dtype of ``z``; None: all 1.
        valid: ``[N]`` bool, rows with any share; None: all. The loss and the gradient of the
            others are 0, and so are their terms.
        temperature: ``tau1``.
        epsilon: ``epsilon`` of Eq. 13.
        small_logits: is ``exp(u)`` safe with no maximum subtracted?
        project: are the rows normalised features, of whose gradient only what is at right angles
            to them counts?
        need_grad: otherwise there is no gradient.
        need_terms: otherwise there are no ``others``.
    """
    (num_rows, dim), num_slots = z.shape, w.shape[0]
    on_cpu = z.device.type == "cpu"
    if shares.background is not None and int(num_classes) == 1:
        # The class must come out as 0 exactly, and stand alone for that.
        shares = Shares(shares.table(num_slots, z.dtype), None, None)
    dense = shares.slots is None
    budget = eager.CHUNK_CPU if on_cpu else eager.CHUNK_ACCELERATOR
    chunk = _chunk_rows(num_rows, num_slots + dim, budget, shares.views)
    if on_cpu:
        num_others: Tensor | int = max(0, int(num_classes) - 1)
    else:
        num_others = num_classes.sub(1).clamp_min(0).to(z.dtype)
    count = None if present is None else present.to(z.dtype)
    keys = w / temperature
    key_sum = keys.sum(0)
    products = keys if dense else torch.cat((keys, key_sum.unsqueeze(0)))
    shared = _Sweep(
        make_linear(products, chunk),
        make_linear(products.T, chunk) if need_grad else None,
        key_sum,
        key_sum if weight is None else torch.mv(keys.T, weight),
        present,
        count,
        weight if count is None else count if weight is None else count * weight,
        num_others,
        weight,
        not small_logits,
        project,
        temperature,
        epsilon,
        need_terms,
    )
    evaluate = _evaluate_table if dense else _evaluate_entries
    num_buffers = 7 if dense else 1 if shares.background is None else 5
    room = z.new_empty(num_buffers, chunk, products.shape[0])
    gradient = torch.empty_like(z) if need_grad else None
    losses, others = [], []
    for start in range(0, num_rows, chunk):
        stop = min(start + chunk, num_rows)
        loss, other, dz = evaluate(
            shared,
            z[start:stop],
            shares,
            start,
            room[:, : stop - start],
            None if gradient is None else gradient[start:stop],
        )
        losses.append(loss)
        others.append(other)
        if gradient is not None and dz is not None:
            _finish(shared, z[start:stop], dz, gradient[start:stop])
    loss = torch.cat(losses) if losses else z.new_zeros(0)
    terms = None
    if need_terms:
        terms = torch.cat(others, dim=1) if others else z.new_zeros(4, 0)
    if valid is not None:
        loss = loss.masked_fill_(~valid, 0.0)
        terms = None if terms is None else terms.masked_fill_(~valid, 0.0)
        if gradient is not None:
            gradient.masked_fill_(~valid.unsqueeze(1), 0.0)
    return Expected(loss, terms, gradient)


def _chunk_rows(num_rows: int, width: int, budget: int, views: int) -> int:
    """Rows of a chunk, a multiple of ``views``."""
    num_chunks = max(1, -(-num_rows // max(128, budget // width)))
    chunk = -(-num_rows // num_chunks)
    return max(1, -(-chunk // views) * views)


def _finish(shared: _Sweep, z: Tensor, dz: Tensor, gradient: Tensor) -> None:
    if shared.project:
        # dL/dx = (g - (g . z) z) / |x|; the division is left to `operators`.
        dz.addcmul_(z, (dz * z).sum(1, keepdim=True), value=-1)
    if dz is not gradient:
        gradient.copy_(dz)


def _evaluate_entries(
    shared: _Sweep,
    z: Tensor,
    shares: Shares,
    start: int,
    room: Tensor,
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss ``[n]``, the other terms ``[4, n]`` and ``dL/dz`` ``[n, D]`` of rows with few entries.

    Args:
        shared: as above.
        z: ``[n, D]``.
        shares: entries of all rows.
        start: which row is the first here.
        room: ``[1, n, S + 1]``.
        gradient: ``[n, D]`` where the gradient may go.
    """
    stop = start + len(z)
    values, slots = shares.rows(start, stop, z.dtype), shares.slots_of(start, stop)
    logits = shared.to_logits(z, room[0])
    no_entry = slots == logits.shape[1] - 1
    every_logit = logits[:, -1:].clone()
    slot_logits = logits.gather(1, slots).masked_fill_(no_entry, -torch.inf)

    # From here on the row's own classes are out of the sums, and so is the extra key.
    logits[:, -1] = -torch.inf
    logits.scatter_(1, slots, -torch.inf)
    shift = None
    own_weights = slot_logits
    if shared.shifted:
        if shared.present is not None:
            logits[:, :-1].masked_fill_(~shared.present, -torch.inf)
        shift = torch.maximum(logits.amax(1), slot_logits.amax(1)).unsqueeze(1)
        shift.masked_fill_(shift == -torch.inf, 0.0)
        logits.sub_(shift)
        own_weights = slot_logits - shift
    own_weights = own_weights.exp()
    weights = torch.exp(logits, out=logits if shares.background is None else room[1])
    if shared.count is None:
        total_others = weights.sum(1, keepdim=True)
    else:
        total_others = torch.mv(weights[:, :-1], shared.count).unsqueeze(1)
    # For each entry the sum over all classes but its own.
    rest = total_others + _sum_of_others(own_weights)
    lse_others = rest.log() if shift is None else rest.log().add_(shift)

    slot_logits.masked_fill_(no_entry, 0.0)
    row = row_objective(
        slot_logits,
        lse_others,
        every_logit - slot_logits,
        shared.num_others,
        shared.temperature,
        shared.epsilon,
    )
    others = None
    if shared.need_terms:
        terms = (row.kl, row.nll, row.confidence, row.tau2)
        others = torch.stack([(values * term).sum(1) for term in terms])
    if shared.weight is not None:
        padded = torch.cat((shared.weight, shared.weight.new_zeros(1)))
        values = values * padded[slots]
    loss = (values * row.loss).sum(1)
    total = total_others + own_weights.sum(1, keepdim=True)
    rest = None
    background = shares.background_of(start, stop)
    if background is not None:
        weights.mul_(total.clamp_min(eager.TINY).reciprocal_())
        lse = total.clamp_min(eager.TINY).log_()
        if shift is not None:
            lse += shift
        by_weight = every_logit
        if shared.weight is not None:
            by_weight = torch.mv(z, shared.weighted_key_sum).unsqueeze(1)
        rest = _evaluate_rest(
            shared, background, slots, slot_logits, (every_logit, by_weight), lse, shift,
            logits, weights, room[2:],
        )  # fmt: skip
        loss += rest.loss
        if others is not None:
            others += rest.others
    if shared.to_gradient is None:
        return loss, others, None

    slopes = values * row_slope(row)
    slope = slopes.sum(1, keepdim=True)
    q_others = values * row.q_other
    sum_q_other = q_others.sum(1, keepdim=True)
    slope_of_others = _sum_of_others(slopes)
    if rest is not None:
        slope += rest.slope
        slope_of_others = slope_of_others + rest.slope
        sum_q_other += rest.sum_q_other
    at_slots = torch.where(
        row.margin < 0,  # p > 1/2
        slope_of_others - torch.sigmoid(row.margin) * slope,
        row.confidence * slope - slopes,
    )
    at_slots += q_others + values * row.q_rest
    if rest is None:
        dl_du = weights.mul_(slope / total.clamp_min_(eager.TINY))
    else:
        dl_du = weights.mul_(slope).addcmul_(rest.dl_du, background * (int(shared.num_others) + 1))
        if rest.for_all is not None:
            at_slots += rest.for_all
            sum_q_other += rest.for_all
    dl_du.scatter_(1, slots, at_slots)
    dl_du[:, -1:] = -sum_q_other
    return loss, others, shared.to_gradient(dl_du, gradient)


class _Rest(NamedTuple):
    """What the classes without an entry add, each with the row's background share."""

    loss: Tensor  # [n]
    others: Tensor | None  # [4, n]
    slope: Tensor  # [n, 1], to A
    sum_q_other: Tensor  # [n, 1], to B
    dl_du: Tensor  # [n, S + 1] what comes to ``A p - B``
    for_all: Tensor | None  # [n, 1] the same, what is to come off every class


def _evaluate_rest(
    shared: _Sweep,
    background: Tensor,
    slots: Tensor,
    own_logits: Tensor,
    every_logits: tuple[Tensor, Tensor],
    lse: Tensor,
    shift: Tensor | None,
    u: Tensor,
    p: Tensor,
    room: Tensor,
) -> _Rest:
    """Some fifteen passes over a chunk that stays in a CPU's caches; each counts.

    Args:
        shared: as above.
        background: ``[n, 1]``.
        slots: ``[n, M]``, S where there is no entry.
        own_logits: ``[n, M]``.
        every_logits: ``[n, 1]`` sum of all logits, as they are and by class weight.
        lse: ``[n, 1]`` logsumexp of all logits.
        shift: ``[n, 1]`` or None.
        u: ``[n, S + 1]`` logits less ``shift``, -inf at the entries and in the last column. Is
            written to.
        p: ``[n, S + 1]``, 0 there.
        room: ``[3, n, S + 1]``.
    """
    minus_a, q_other, divisor = room
    num_others, epsilon = shared.num_others, shared.epsilon
    assert isinstance(num_others, int)  # entries are found on a CPU
    num_classes = num_others + 1
    taken = torch.cat((slots, torch.full_like(slots[:, :1], u.shape[1] - 1)), dim=1)

    # a = 1 / tau2, q_other = exp(-a) / (1 + (K - 1) exp(-a)), q_own = 1 / (...)
    lowest_tau2 = shared.temperature - epsilon
    torch.add(p.new_full((), -lowest_tau2), p, alpha=-2 * epsilon, out=minus_a).reciprocal_()
    torch.exp(minus_a, out=q_other)
    torch.add(p.new_ones(()), q_other, alpha=num_others, out=divisor)
    q_other.div_(divisor).scatter_(1, taken, 0.0)
    # through_q = q_other ((K - 1) a + sum_k u_k - K u_r)
    every = every_logits[0] if shift is None else every_logits[0] - num_classes * shift
    through = torch.add(every, u, alpha=-num_classes, out=u).add_(minus_a, alpha=-num_others)
    through.mul_(q_other).scatter_(1, taken, 0.0)
    if shift is not None and shared.count is not None:
        through[:, :-1].masked_fill_(shared.count == 0, 0.0)

    def sums(every: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Number of classes, their NLL and their ``through_q`` ``[n, 1]``."""
        if scale is None:
            own = (slots < u.shape[1] - 1).to(p.dtype)
            number = u.shape[1] - 1 - own.sum(1, keepdim=True)
        else:
            own = torch.cat((scale, scale.new_zeros(1)))[slots]
            number = scale.sum() - own.sum(1, keepdim=True)
        nll = number * lse - (every - (own * own_logits).sum(1, keepdim=True))
        return number, nll, _sum_classes(through, scale)

    number, nll, sum_through = sums(every_logits[1], shared.scale)
    terms = None
    if shared.need_terms:
        count, count_nll, count_through = sums(every_logits[0], shared.count)
        confidence = _sum_classes(p, shared.count)
        tau2 = lowest_tau2 * count + 2 * epsilon * confidence
        terms = (count_nll - count_through, count_nll, confidence, tau2)
    rise = through.mul_(p).mul_(minus_a).mul_(minus_a.div_(divisor))  # less a factor 2 epsilon
    divisor.scatter_(1, taken, 1.0)
    if terms is not None:
        terms[0].sub_(_sum_classes(divisor.log(), shared.count))
    loss = background * (2 * nll - sum_through - _sum_of_logs(divisor, shared.scale))
    others = None
    if terms is not None:
        others = torch.cat([background * term for term in terms], dim=1).T

    slope = background * (2 * number + 2 * epsilon * _sum_classes(rise, shared.scale))
    sum_q_other = background * _sum_classes(q_other, shared.scale)
    by_class = q_other.add_(rise, alpha=-2 * epsilon / num_classes)
    for_all = None
    if shared.scale is None:
        for_all = 2 * background
    else:
        by_class[:, :-1].sub_(2 / num_classes).mul_(shared.scale)
    return _Rest(loss.squeeze(1), others, slope, sum_q_other, by_class, for_all)


def _sum_classes(numbers: Tensor, scale: Tensor | None) -> Tensor:
    """``[n, S + 1]`` -> ``[n, 1]``; the last column is 0."""
    if scale is None:
        return numbers.sum(1, keepdim=True)
    return torch.mv(numbers[:, :-1], scale).unsqueeze(1)


def _sum_of_logs(numbers: Tensor, scale: Tensor | None) -> Tensor:
    """Of numbers from 1 to K, ``[n, S + 1]`` -> ``[n, 1]``. They are written to."""
    if scale is not None:
        return _sum_classes(numbers.log_(), scale)
    for _ in range(3 if numbers.shape[1] < MOST_MULTIPLIED else 2):
        half = numbers.shape[1] // 2
        if half == 0:
            break
        if numbers.shape[1] % 2 == 1:
            numbers[:, :1].mul_(numbers[:, -1:])
        numbers = numbers[:, :half].mul_(numbers[:, half : 2 * half])
    return numbers.log_().sum(1, keepdim=True)


def _sum_of_others(entries: Tensor) -> Tensor:
    """For each entry of ``[n, M]`` the sum of the rest of its row, without subtraction."""
    width = entries.shape[1]
    if width == 1:
        return torch.zeros_like(entries)
    if width == 2:
        return entries.flip(1)
    return entries @ (1 - torch.eye(width, dtype=entries.dtype, device=entries.device))


def _with_no_entry(weight: Tensor) -> Tensor:
    return torch.cat((weight, weight.new_zeros(1)))


def _evaluate_table(
    shared: _Sweep,
    z: Tensor,
    shares: Shares,
    start: int,
    room: Tensor,
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `_evaluate_entries`, where any class may have a share.

    ``room`` is ``[7, n, S]``. Some twenty passes over a chunk that stays in a CPU's caches; each
    counts. Class ``m``, the one that may have more than half of ``p``, has a column of its own.
    """
    values = shares.rows(start, start + len(z), z.dtype)
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

    # Which class has more than half? A comparison and a product find it faster than argmax. Where
    # none has, it is class 0, as good as any.
    torch.gt(p, total / 2, out=through)
    m = torch.mv(through, torch.arange(p.shape[1], device=z.device, dtype=z.dtype))
    m = m.long().unsqueeze(1)
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
    p.mul_(total.clamp_min_(eager.TINY).reciprocal_())

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

    own_p, own_column = row.confidence, m
    others = None
    nll.scatter_(1, own_column, row.nll)
    if shared.need_terms:
        p.scatter_(1, own_column, own_p)
        mass, expected_nll = values.sum(1), _dot(values, nll, spare)
        confidence = _dot(values, p, spare)
        p.scatter_(1, own_column, 0.0)
    # L_r / 2 = nll_r + (log q_own_r - through_q_r) / 2
    half_loss = nll.add_(through, alpha=-0.5)
    through.mul_(p).mul_(minus_a)
    if shared.to_gradient is not None:
        minus_a.div_(divisor)
    half_loss.add_(divisor.log_(), alpha=-0.5).scatter_(1, own_column, row.loss / 2)
    loss = 2 * _dot(weighted, half_loss, spare)
    if shared.need_terms:
        kl = 2 * _dot(values, half_loss, spare) - expected_nll
        tau2 = lowest_tau2 * mass + 2 * epsilon * confidence
        others = torch.stack((kl, expected_nll, confidence, tau2))
    if shared.to_gradient is None:
        return loss, others, None

    slopes = torch.addcmul(two, through, minus_a, value=2 * epsilon, out=through)
    slopes.scatter_(1, own_column, 0.0)
    q_other.scatter_(1, own_column, 0.0)
    rest_slope = _dot(weighted, slopes, spare).unsqueeze(1)
    slope = rest_slope + own_share * row_slope(row)
    sum_q_other = _dot(weighted, q_other, spare).unsqueeze(1) + own_share * row.q_other
    _add_scaled(slopes, q_other, -(num_others + 1), slopes)
    dl_du = p.mul_(slope).addcmul_(weighted, slopes, value=-1)
    at_own = rest_slope - torch.sigmoid(row.margin) * slope
    dl_du.scatter_(1, own_column, at_own + own_share * (row.q_other + row.q_rest))
    dz = shared.to_gradient(dl_du, gradient)
    return loss, others, dz.addcmul_(sum_q_other, shared.key_sum, value=-1)


def _dot(a: Tensor, b: Tensor, room: Tensor) -> Tensor:
    """Row by row, ``[n, S]`` -> ``[n]``."""
    return torch.mul(a, b, out=room).sum(1)


def _add_scaled(base: Tensor, x: Tensor, factor: Tensor | float, out: Tensor) -> Tensor:
    """``base + factor * x``, whether the factor is known here or only on the device."""
    if isinstance(factor, Tensor):
        return torch.addcmul(base, x, factor, out=out)
    return torch.add(base, x, alpha=factor, out=out)
