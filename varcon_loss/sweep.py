"""One pass over the centroids gives the loss and its gradient, in closed form, on any device.

With ``u = z . w / tau1``, and for a sample that has the share ``Y_r`` of class ``r``, whose loss as
if ``r`` were its class is ``L_r`` (Eq. 7) with the slope ``s_r``,

    dL/du_k = A p_k - Y_k s_k + Y_k K q_other_k - B,    A = sum_r Y_r s_r,  B = sum_r Y_r q_other_r

so two matrix products a chunk of rows do everything, ``z -> u`` and ``dL/du -> dL/dz``. An integer
label is one share of 1. The chunk's logits stay in the cache. The sum of all keys yields
``sum_k u_k`` and applies ``- B`` to all classes at once.
"""

import torch
from torch import Tensor

from varcon_loss.objective import RowObjective, from_margin, log1p, row_objective, row_slope
from varcon_loss.readable import values_may_be_read

# Numbers of one chunk's logits and rows. 4 MiB of float32 stay in a CPU's caches (2^18 and 2^22
# were both slower at N = 8192, K = 1000); an accelerator wants fewer, larger launches.
CHUNK_CPU = 2**20
CHUNK_ACCELERATOR = 2**25
SMALLEST = 128
LARGEST_KEPT = 2**25 - 2**16  # bytes; glibc learns nothing from larger blocks
# Sums of 2^31 exponentials of this are finite in float32, and so is their ratio to the least one.
LARGEST_PLAIN_LOGIT = 32.0
# Far below any sum of exponentials here; only where there are none is the sum smaller.
TINY = 1e-30


def sweep(
    z: Tensor, w: Tensor, present: Tensor | None, slots: Tensor | None, shares: Tensor | None,
    own: Tensor | None, temperature: float, epsilon: float, unit: bool, need_grad: bool,
    need_terms: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss ``[N]``; KL, NLL, confidence and tau2 ``[4, N]``; and the gradient ``[N, D]``.

    The arguments are those of `sweep_by_equations`, and three more. With ``unit`` the rows ``z``
    have unit length, or are zero, and the gradient is that of unnormalised rows, times their
    length. Without ``need_grad`` the gradient is empty, without ``need_terms`` the terms are
    ``[4, 0]``.
    """
    keys = w / temperature
    num_others = w.shape[0] - 1 if present is None else present.sum().sub_(1).clamp_min_(0)
    if isinstance(num_others, Tensor):
        num_others = int(num_others) if values_may_be_read(num_others) else num_others.to(z.dtype)
    plain = unit and 1 / temperature <= LARGEST_PLAIN_LOGIT
    constants = (
        keys, keys.sum(0), present, num_others, plain, unit, temperature, epsilon,
        need_grad, need_terms,
    )  # fmt: skip
    num_rows, dim = z.shape
    matrices = 1 if slots is not None else 8  # [n, S] at a time
    budget = (CHUNK_CPU if z.device.type == "cpu" else CHUNK_ACCELERATOR) // matrices
    num_chunks = max(1, -(-num_rows // max(SMALLEST, budget // (w.shape[0] + dim))))
    if num_chunks == 1:
        return _chunk(*constants, None, None, z, slots, shares, own)

    chunk = -(-num_rows // num_chunks)
    if z.device.type == "cpu":
        # A block freed at once, never written, raises what glibc hands back to the system. Else a
        # step has up to 150,000 page faults (half of the time at N = 65,536, K = 1000).
        z.new_empty(min((matrices + 2) * chunk * w.shape[0], LARGEST_KEPT // z.itemsize))
    buffer = z.new_empty(chunk, w.shape[0])
    loss, terms = z.new_empty(num_rows), z.new_empty(4, num_rows if need_terms else 0)
    gradient = z.new_empty(z.shape if need_grad else 0)
    for start in range(0, num_rows, chunk):
        rows = slice(start, start + chunk)
        n = min(chunk, num_rows - start)
        out = gradient[rows] if need_grad else None
        slots_, shares_, own_ = (None if x is None else x[rows] for x in (slots, shares, own))
        part = _chunk(*constants, buffer[:n], out, z[rows], slots_, shares_, own_)
        loss[rows] = part[0]
        if need_terms:
            terms[:, rows] = part[1]
    return loss, terms, gradient


def _chunk(
    keys: Tensor, key_sum: Tensor, present: Tensor | None, num_others: Tensor | int, plain: bool,
    project: bool, temperature: float, epsilon: float, need_grad: bool, need_terms: bool,
    buffer: Tensor | None, gradient: Tensor | None, z: Tensor, slots: Tensor | None,
    shares: Tensor | None, own: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`sweep` of the rows ``z`` ``[n, D]``.

    ``keys`` ``[S, D]`` are the centroids divided by the temperature, ``num_others`` is ``K - 1``.
    With ``plain`` exp is safe with no maximum subtracted: ``|u| <= 1 / tau1``. With ``project`` the
    gradient passes through a normalisation. ``buffer`` and ``gradient`` are room for results.

    Small batches feel every call into torch more than its arithmetic, hence columns ``[n, 1]``
    rather than vectors, and operations in place.
    """
    u = torch.mm(z, keys.T, out=buffer)
    every = torch.mv(z, key_sum).unsqueeze(1)
    at_slots = u if slots is None else u.gather(1, slots)  # [n, M]
    own_logit = at_slots
    if own is not None:
        own_logit = (z * own).sum(1, keepdim=True).div_(temperature)

    # Own classes stay out of the sum over the rest, so that 1 - p is never a subtraction. Where a
    # row has several, each has the other ones added.
    several, shift, own_masked = shares is not None, None, own_logit
    if slots is not None:
        u.scatter_(1, slots, -torch.inf)
    if several and present is not None:
        there = present if slots is None else present[slots]
        own_masked = own_logit.masked_fill(~there, -torch.inf)
    if not plain:
        if slots is not None and present is not None:
            u.masked_fill_(~present, -torch.inf)
        shift = (own_masked if slots is None else u).amax(1, keepdim=True)
        if several:
            shift = torch.maximum(shift, own_masked.amax(1, keepdim=True))
        shift.masked_fill_(shift == -torch.inf, 0.0)
    weights, total = u, own_logit
    if slots is not None:
        weights = (u if shift is None else u.sub_(shift)).exp_()
        if present is None or not plain:
            total = weights.sum(1, keepdim=True)
        else:
            total = torch.mv(weights, present.to(z.dtype)).unsqueeze(1)
    own_weights = rest = top = total
    if several:
        own_weights = (own_masked if shift is None else own_masked - shift).exp()
        top = own_weights.argmax(1, keepdim=True)
        # Of all but the largest at least half of the row is left: a difference loses one bit.
        of_top = _without(own_weights, top)
        rest = (of_top + own_weights.gather(1, top) - own_weights).scatter_(1, top, of_top)
        rest = rest if slots is None else rest.add_(total)
    if several and plain and present is None:  # nothing underflows: a table costs no logarithm
        both = own_weights + rest
        of_p = log1p(rest / own_weights), own_weights / both, rest / both
    else:
        margin = rest.log() - own_logit
        of_p = from_margin(margin if shift is None else margin.add_(shift))

    row = row_objective(own_logit, of_p, every - at_slots, num_others, temperature, epsilon)
    loss, terms = _expected(row, shares, need_terms)
    if not need_grad:
        return loss, terms, z.new_empty(0)

    # weights -> dL/du. The keys of empty rows are zero, whatever their weights.
    slope, p_rest, q_other = row_slope(row, epsilon), row.p_rest, row.q_other
    if shares is None:
        b, at_own = q_other, row.q_rest - (slope.mul_(p_rest)) + q_other
        if slots is not None:
            weights.mul_(slope / total.clamp_min_(TINY))
    else:
        slope, q_other = slope * shares, q_other * shares
        a, b = slope.sum(1, keepdim=True), q_other.sum(1, keepdim=True)
        at_own = row.confidence * a - slope
        # Where the model is confident that is a difference of nearly equal numbers.
        of_top = _without(slope, top) - p_rest.gather(1, top) * a
        is_sure = row.confidence.gather(1, top) > 0.5
        at_own.scatter_(1, top, torch.where(is_sure, of_top, at_own.gather(1, top)))
        at_own.addcmul_(row.q_rest, shares).add_(q_other)
        if slots is not None:
            total = total + own_weights.sum(1, keepdim=True)
            weights.mul_(a / total.clamp_min_(TINY))
    own_weights = at_own if own is None else b
    weights = at_own if slots is None else weights.scatter_(1, slots, own_weights)
    g = torch.mm(weights, keys, out=gradient).addcmul_(b, key_sum, value=-1)
    if own is not None:
        g.addcmul_(own, at_own - b, value=1 / temperature)
    if project:
        # dL/dx = (g - (g . z) z) / |x|
        g.addcmul_(z, (g * z).sum(1, keepdim=True), value=-1)
    return loss, terms, g


def _expected(row: RowObjective, shares: Tensor | None, need_terms: bool) -> tuple[Tensor, Tensor]:
    """Loss ``[n]`` and terms ``[4, n]`` under the shares ``[n, M]`` of classes."""
    loss = row.kl + row.nll
    columns = (row.kl, row.nll, row.confidence, row.tau2) if need_terms else ()
    if shares is None:
        loss = loss.squeeze_(1)  # in place: callers may not change a view
        return loss, torch.cat(columns).view(4, -1) if columns else loss.new_empty(4, 0)
    loss = (loss * shares).sum(1)
    terms = [(x * shares).sum(1) for x in columns]
    return loss, torch.stack(terms) if terms else loss.new_empty(4, 0)


def _without(x: Tensor, column: Tensor) -> Tensor:
    """The sum of each row of ``x`` ``[n, M]`` without its ``column`` ``[n, 1]``, ``[n, 1]``."""
    kept = x.gather(1, column)
    rest = x.scatter_(1, column, 0.0).sum(1, keepdim=True)
    x.scatter_(1, column, kept)
    return rest
