"""Triton kernels: labels, row lengths, class sums, the sweep. Launched by `varcon_loss.fused`.

Rows enter as the caller gave them, in their own dtype. A power of two near a row's length brings
it to about unit size without rounding; what is left of the length, a factor near 1, is applied in
float32 to what comes out of the products. So bfloat16 and float16 operands are the exact features.
"""

# pyright: reportArgumentType=false

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
SMALLEST_LABEL = tl.constexpr(-(2**63))
TINY = tl.constexpr(1e-30)  # below any sum of exponentials but the empty one


@triton.jit
def _inverse_power_of_two(size):
    """1 / 2^floor(log2(size)), exact, for any positive float32; finite for 0, inf and NaN."""
    exponent = (size.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(exponent, 253)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _softplus_of_negative(x):
    """log(1 + exp(-x)) for x >= 0, to all digits where exp(-x) is far below 1."""
    y = tl.exp(-x)
    u = 1.0 + y
    rest = u - 1.0
    return tl.where(rest == 0.0, y, tl.log(u) * (y / tl.where(rest == 0.0, 1.0, rest)))


@triton.jit
def _sigmoid(x):
    # exp overflows to infinity where the result is 0.
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _lengths(x):
    """Length of each row of a block ``[rows, dims]`` float32.

    Infinity for zero rows, NaN for rows that float32 cannot express, as `varcon_loss.norms`.
    """
    scale = _inverse_power_of_two(tl.max(tl.abs(x), 1))
    scaled = x * scale[:, None]
    squares = tl.sum(scaled * scaled, 1)
    norms = tl.sqrt(squares) / scale
    norms = tl.where(norms == float("inf"), float("nan"), norms)
    return tl.where(squares == 0.0, float("inf"), norms)


@triton.jit
def row_norms_kernel(
    x_ptr, valid_ptr, norms_ptr, num_rows, dim, stride_row, stride_dim,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """Length of each row that takes part; infinity for the others."""
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    inside = rows < num_rows
    taking_part = inside
    if HAS_VALID:
        taking_part = inside & (tl.load(valid_ptr + rows, mask=inside, other=0) != 0)
    at = rows[:, None] * stride_row + dims[None, :].to(tl.int64) * stride_dim
    mask = taking_part[:, None] & (dims < dim)[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(norms_ptr + rows, _lengths(x), mask=inside)


@triton.jit
def segments_kernel(
    sorted_ptr, order_ptr, values_ptr, valid_ptr, broken_ptr, slots_ptr, starts_ptr, ends_ptr,
    classes_ptr, num_present_ptr, divisor_ptr, num_rows, num_slots, ignore_index, num_classes,
    HAS_IGNORE: tl.constexpr, HAS_RANGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sorted labels to slots: one program walks over them with a running count of classes.

    Writes, for each sample: its label (0 where invalid), whether it is valid or out of range, and
    its slot; for each slot: where its samples start and end among the sorted ones, and its label.
    """
    num_present = tl.full([], 0, tl.int32)
    num_valid = tl.full([], 0, tl.int32)
    last_class = tl.full([], SMALLEST_LABEL, tl.int64)
    for start in range(0, num_rows, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < num_rows
        label = tl.load(sorted_ptr + at, mask=inside, other=0)
        before = tl.load(sorted_ptr + at - 1, mask=inside & (at > 0), other=0)
        after = tl.load(sorted_ptr + at + 1, mask=at + 1 < num_rows, other=0)
        row = tl.load(order_ptr + at, mask=inside, other=0)
        valid = inside
        if HAS_IGNORE:
            valid = valid & (label != ignore_index)
        if HAS_RANGE:
            in_range = (label >= 0) & (label < num_classes)
            tl.store(broken_ptr + row, valid & (in_range == 0), mask=inside)
            valid = valid & in_range
        is_first = valid & ((at == 0) | (before != label))
        is_last = valid & ((at == num_rows - 1) | (after != label))
        slot = num_present + tl.cumsum(is_first.to(tl.int32), 0) - 1
        tl.store(values_ptr + row, tl.where(valid, label, 0), mask=inside)
        tl.store(valid_ptr + row, valid, mask=inside)
        tl.store(slots_ptr + row, tl.where(valid, slot, 0).to(tl.int64), mask=inside)
        tl.store(starts_ptr + slot, at, mask=is_first)
        tl.store(ends_ptr + slot, at + 1, mask=is_last)
        tl.store(classes_ptr + slot, label, mask=is_first)
        num_present += tl.sum(is_first.to(tl.int32), 0)
        num_valid += tl.sum(valid.to(tl.int32), 0)
        last_class = tl.maximum(last_class, tl.max(tl.where(valid, label, SMALLEST_LABEL), 0))
    # Empty slots: no samples, and the last label again, so that the labels stay sorted.
    last_class = tl.where(num_present > 0, last_class, 0)
    for start in range(0, num_slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        empty = (slot >= num_present) & (slot < num_slots)
        tl.store(starts_ptr + slot, tl.zeros([BLOCK], tl.int32), mask=empty)
        tl.store(ends_ptr + slot, tl.zeros([BLOCK], tl.int32), mask=empty)
        tl.store(classes_ptr + slot, tl.zeros([BLOCK], tl.int64) + last_class, mask=empty)
    tl.store(num_present_ptr, num_present.to(tl.int64))
    tl.store(divisor_ptr, tl.maximum(num_valid, 1).to(tl.float32))


@triton.jit
def _store_unit(sums_ptr, unit_ptr, at, mask, total):
    """A class sum, and its direction: zero if its members cancel out."""
    scale = _inverse_power_of_two(tl.max(tl.abs(total), 0))
    norm = tl.sum(_lengths(total[None, :]), 0)
    tl.store(sums_ptr + at, total, mask=mask)
    tl.store(unit_ptr + at, total * scale / (norm * scale), mask=mask)


@triton.jit
def class_sums_kernel(
    x_ptr, order_ptr, starts_ptr, ends_ptr, sums_ptr, unit_ptr, counts_ptr, norms_ptr, dim,
    stride_row, stride_dim,
    PIECES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Sum one piece of one class, its members taken in the order of the batch; and their lengths.

    No two programs write to one place, so two runs give the same bits. A class in one piece gets
    its centroid here; else ``sums`` is ``[S, PIECES, D]``, for `join_pieces_kernel`.
    """
    slot = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    dims = tl.arange(0, BLOCK_D)
    first, last = tl.load(starts_ptr + slot), tl.load(ends_ptr + slot)
    length = (last - first + PIECES - 1) // PIECES
    begin = first + piece * length
    end = tl.minimum(begin + length, last)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        members = start + tl.arange(0, BLOCK_N)
        inside = members < end
        rows = tl.load(order_ptr + members, mask=inside, other=0)
        mask = inside[:, None] & (dims < dim)[None, :]
        at = rows[:, None] * stride_row + dims[None, :].to(tl.int64) * stride_dim
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if NORMALIZE:
            norms = _lengths(x)
            tl.store(norms_ptr + rows, norms, mask=inside)
            scale = _inverse_power_of_two(norms)
            x = x * scale[:, None] / (norms * scale)[:, None]
        total += tl.sum(x, 0)
    at = (slot * PIECES + piece) * dim + dims
    if PIECES == 1:
        _store_unit(sums_ptr, unit_ptr, at, dims < dim, total)
    else:
        tl.store(sums_ptr + at, total, mask=dims < dim)
    if piece == 0:
        tl.store(counts_ptr + slot, (last - first).to(tl.float32))


@triton.jit
def join_pieces_kernel(
    pieces_ptr, sums_ptr, unit_ptr, dim, PIECES: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Sums of pieces ``[S, PIECES, D]`` to sums of classes and unit centroids ``[S, D]``."""
    slot = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    mask = dims < dim
    total = tl.zeros([BLOCK_D], tl.float32)
    for piece in range(PIECES):
        at = (slot * PIECES + piece) * dim + dims
        total += tl.load(pieces_ptr + at, mask=mask, other=0.0)
    _store_unit(sums_ptr, unit_ptr, slot * dim + dims, mask, total)


@triton.jit
def sweep_kernel(
    x_ptr, norms_ptr, valid_ptr, slots_ptr, w_ptr, keys_ptr, key_sum_ptr, present_ptr,
    num_classes_ptr, own_ptr, broken_ptr, loss_ptr, others_ptr, gradient_ptr, scale_ptr,
    num_rows, num_slots, dim, stride_row, stride_dim, temperature, epsilon,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_NORMS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_PRESENT: tl.constexpr,
    HAS_OWN: tl.constexpr, HAS_BROKEN: tl.constexpr, PACKED: tl.constexpr, PLAIN_EXP: tl.constexpr,
    NEED_GRAD: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Loss terms of a block of rows and their gradient: one pass over the keys.

    ``w`` are the centroids in float32, ``keys`` the same in the dtype of the rows, ``key_sum`` the
    sum of ``w``. The gradient of row i is ``gradient[i] * scale[i]``: a power of two taken out of
    each row keeps small gradients in the range of float16.
    """
    operand = x_ptr.dtype.element_ty
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    inside = rows < num_rows
    dim_mask = dims < dim
    taking_part = inside
    if HAS_VALID:
        taking_part = inside & (tl.load(valid_ptr + rows, mask=inside, other=0) != 0)
    mask = taking_part[:, None] & dim_mask[None, :]
    at = rows[:, None] * stride_row + dims[None, :].to(tl.int64) * stride_dim
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    if HAS_NORMS:
        norms = tl.load(norms_ptr + rows, mask=taking_part, other=float("inf"))
        scale = _inverse_power_of_two(norms)
        to_unit = 1.0 / (norms * scale)
        x = (x.to(tl.float32) * scale[:, None]).to(operand)
    else:
        norms = tl.full([BLOCK_N], 1.0, tl.float32)
        to_unit = norms
    slots = tl.load(slots_ptr + rows, mask=inside, other=0)
    if UPCAST:
        x = x.to(tl.float32)

    num_classes = tl.load(num_classes_ptr)
    if PACKED:
        bound = tl.minimum(num_classes, num_slots).to(tl.int32)
    else:
        bound = num_slots
    to_log2 = to_unit * (LOG2_E / temperature)
    shift = tl.full([BLOCK_N], float("-inf"), tl.float32)
    if PLAIN_EXP:
        shift = tl.zeros([BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    mixed = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, bound, BLOCK_K):
        slot = start + tl.arange(0, BLOCK_K)
        taken = slot < bound
        keys_at = slot[:, None].to(tl.int64) * dim + dims[None, :]
        keys = tl.load(keys_ptr + keys_at, mask=taken[:, None] & dim_mask[None, :], other=0.0)
        if UPCAST:
            keys = keys.to(tl.float32)
        if HAS_PRESENT:
            taken = taken & (tl.load(present_ptr + slot, mask=taken, other=0) != 0)
        logits = tl.dot(x, tl.trans(keys), input_precision=PRECISION) * to_log2[:, None]
        # The own class stays out: with it, 1 - p would be lost to rounding.
        other = taken[None, :] & (slot[None, :] != slots[:, None])
        logits = tl.where(other, logits, float("-inf"))
        if PLAIN_EXP:
            weights = tl.exp2(logits)
        else:
            higher = tl.maximum(shift, tl.max(logits, 1))
            from_shift = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(logits - from_shift[:, None])
            rescale = tl.exp2(shift - from_shift)
            shift = higher
            total = total * rescale
            if NEED_GRAD:
                mixed = mixed * rescale[:, None]
        total += tl.sum(weights, 1)
        if NEED_GRAD:
            weights = weights.to(operand)
            if UPCAST:
                weights = weights.to(tl.float32)
            mixed = tl.dot(weights, keys, acc=mixed, input_precision=PRECISION)

    # Everything below is float32, a few numbers a row. As in `objective.row_objective`.
    slot_at = slots[:, None] * dim + dims[None, :]
    row_mask = inside[:, None] & dim_mask[None, :]
    own_at = rows[:, None] * dim + dims[None, :]
    w_slot = tl.load(w_ptr + slot_at, mask=row_mask, other=0.0)
    slot_logit = tl.sum(x.to(tl.float32) * w_slot, 1) * to_unit / temperature
    key_sum = tl.load(key_sum_ptr + dims, mask=dim_mask, other=0.0)
    every_logit = tl.sum(x.to(tl.float32) * key_sum[None, :], 1) * to_unit / temperature
    sum_others = every_logit - slot_logit
    t = slot_logit
    if HAS_OWN:
        w_own = tl.load(own_ptr + own_at, mask=row_mask, other=0.0)
        t = tl.sum(x.to(tl.float32) * w_own, 1) * to_unit / temperature

    num_others = tl.maximum(num_classes.to(tl.float32) - 1.0, 0.0)
    lse_others = (shift + tl.log2(total)) * LN_2
    margin = lse_others - t
    p_own, p_rest = _sigmoid(-margin), _sigmoid(margin)
    nll = tl.where(margin > 0.0, margin, 0.0) + _softplus_of_negative(tl.abs(margin))
    rise = 2.0 * epsilon * p_own
    tau2 = (temperature - epsilon) + rise
    a = 1.0 / tau2
    b = a - tl.log(num_others)
    log_q_own = tl.where(b < 0.0, b, 0.0) - _softplus_of_negative(tl.abs(b))
    q_own, q_rest = _sigmoid(b), _sigmoid(-b)
    q_other = q_rest / tl.maximum(num_others, 1.0)
    through_q = q_other * sum_others + q_rest * (a - t)
    kl = nll + log_q_own - through_q
    loss = tl.where(taking_part, kl + nll, 0.0)
    if HAS_BROKEN:
        broken = tl.load(broken_ptr + rows, mask=inside, other=0) != 0
        loss = tl.where(broken, float("nan"), loss)
    tl.store(loss_ptr + rows, loss, mask=inside)
    at = rows
    tl.store(others_ptr + at, tl.where(taking_part, kl, 0.0), mask=inside)
    at += num_rows
    tl.store(others_ptr + at, tl.where(taking_part, nll, 0.0), mask=inside)
    at += num_rows
    tl.store(others_ptr + at, tl.where(taking_part, p_own, 0.0), mask=inside)
    at += num_rows
    tl.store(others_ptr + at, tl.where(taking_part, tau2, 0.0), mask=inside)

    if NEED_GRAD:
        # As in `objective.row_slopes`.
        rest_slope = (2.0 + through_q * q_own * rise * a * a) * p_rest
        own_slope = q_rest - rest_slope
        g = mixed * (rest_slope / tl.maximum(total, TINY))[:, None]
        # Read again: kept from above, the centroids would not fit the registers.
        w_slot = tl.load(w_ptr + slot_at, mask=row_mask, other=0.0)
        if HAS_OWN:
            g += q_other[:, None] * (w_slot - key_sum[None, :])
            w_own = tl.load(own_ptr + own_at, mask=row_mask, other=0.0)
            g += own_slope[:, None] * w_own
        else:
            g += (own_slope + q_other)[:, None] * w_slot - q_other[:, None] * key_sum[None, :]
        if HAS_NORMS:
            z = x.to(tl.float32) * to_unit[:, None]
            g -= tl.sum(g * z, 1)[:, None] * z
        g = tl.where(mask, g, 0.0)
        size = _inverse_power_of_two(tl.max(tl.abs(g), 1))
        g = (g * size[:, None]).to(operand)
        tl.store(gradient_ptr + own_at, g, mask=row_mask)
        back = 1.0 / (size * temperature)
        if HAS_NORMS:
            back = back / norms
        tl.store(scale_ptr + rows, tl.where(taking_part, back, 0.0), mask=inside)
