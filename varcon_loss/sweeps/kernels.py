"""Triton kernels: labels, row lengths, class sums, the sweep. Launched by `fused`.

Rows enter as the caller gave them, in their own dtype. A power of two near a row's length brings
it to about unit size without rounding; what is left of the length, a factor near 1, is applied in
float32 to what comes out of the products. So bfloat16 and float16 operands are the exact features.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
SMALLEST_LABEL = tl.constexpr(-(2**63))
# One program serves every batch: these are not compiled in, not even whether 16 divides them.
SIZES = ("num_rows", "num_slots", "num_blocks", "ignore_index", "num_classes")
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


@triton.jit(do_not_specialize=SIZES)
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
def _read_segment(
    labels_ptr, sorted_ptr, order_ptr, at, num_rows, ignore_index, num_classes,
    HAS_IGNORE: tl.constexpr, HAS_RANGE: tl.constexpr,
):  # fmt: skip
    """Row, label, is it valid, is it in range, does its class start here? Of places ``at``.

    The sorted keys may be narrower than the labels: equal for all that are valid, and that is all.
    """
    inside = at < num_rows
    key = tl.load(sorted_ptr + at, mask=inside, other=0)
    before = tl.load(sorted_ptr + at - 1, mask=inside & (at > 0), other=0)
    row = tl.load(order_ptr + at, mask=inside, other=0)
    label = tl.load(labels_ptr + row, mask=inside, other=0)
    valid = inside
    if HAS_IGNORE:
        valid = valid & (label != ignore_index)
    broken = valid
    if HAS_RANGE:
        in_range = (label >= 0) & (label < num_classes)
        broken = valid & (in_range == 0)
        valid = valid & in_range
    is_first = valid & ((at == 0) | (before != key))
    return row, label, valid, broken, is_first


@triton.jit(do_not_specialize=SIZES)
def count_segments_kernel(
    labels_ptr, sorted_ptr, order_ptr, counts_ptr, num_rows, ignore_index, num_classes,
    HAS_IGNORE: tl.constexpr, HAS_RANGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each block of sorted labels: classes that start, valid labels, the last valid label."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _, label, valid, _, is_first = _read_segment(
        labels_ptr, sorted_ptr, order_ptr, at, num_rows, ignore_index, num_classes,
        HAS_IGNORE, HAS_RANGE,
    )  # fmt: skip
    counts_at = counts_ptr + tl.program_id(0) * 3
    tl.store(counts_at, tl.sum(is_first.to(tl.int64), 0))
    tl.store(counts_at + 1, tl.sum(valid.to(tl.int64), 0))
    tl.store(counts_at + 2, tl.max(tl.where(valid, label, SMALLEST_LABEL), 0))


@triton.jit(do_not_specialize=SIZES)
def segments_kernel(
    labels_ptr, sorted_ptr, order_ptr, counts_ptr, values_ptr, valid_ptr, broken_ptr, slots_ptr,
    runs_ptr, starts_ptr, ends_ptr, classes_ptr, num_present_ptr, divisor_ptr, num_rows, num_slots,
    num_blocks, ignore_index, num_classes,
    HAS_IGNORE: tl.constexpr, HAS_RANGE: tl.constexpr, HAS_COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sorted labels to slots, a block of labels a program; ``counts`` tell what is before it.

    Writes, for each sample: its label (0 where invalid), whether it is valid or out of range, and
    its slot; for each place among the sorted: its slot, -1 where invalid; for each slot: where its
    samples start and end among the sorted ones, and its label.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_rows
    row, label, valid, broken, is_first = _read_segment(
        labels_ptr, sorted_ptr, order_ptr, at, num_rows, ignore_index, num_classes,
        HAS_IGNORE, HAS_RANGE,
    )  # fmt: skip
    key = tl.load(sorted_ptr + at, mask=inside, other=0)
    after = tl.load(sorted_ptr + at + 1, mask=at + 1 < num_rows, other=0)
    is_last = valid & ((at == num_rows - 1) | (after != key))
    if HAS_COUNTS:
        earlier = tl.full([], 0, tl.int64)
        num_present = tl.full([], 0, tl.int64)
        num_valid = tl.full([], 0, tl.int64)
        last_class = tl.full([], SMALLEST_LABEL, tl.int64)
        for start in range(0, num_blocks, BLOCK):
            block = start + tl.arange(0, BLOCK)
            counts_at = counts_ptr + block * 3
            there = block < num_blocks
            firsts = tl.load(counts_at, mask=there, other=0)
            num_present += tl.sum(firsts, 0)
            earlier += tl.sum(tl.where(block < tl.program_id(0), firsts, 0), 0)
            num_valid += tl.sum(tl.load(counts_at + 1, mask=there, other=0), 0)
            last = tl.load(counts_at + 2, mask=there, other=SMALLEST_LABEL)
            last_class = tl.maximum(last_class, tl.max(last, 0))
    else:
        earlier = tl.full([], 0, tl.int64)
        num_present = tl.sum(is_first.to(tl.int64), 0)
        num_valid = tl.sum(valid.to(tl.int64), 0)
        last_class = tl.max(tl.where(valid, label, SMALLEST_LABEL), 0)
    # Triton 3.2's interpreter scans int32 into int64, and would store twice the bytes.
    scanned = tl.cumsum(is_first.to(tl.int32), 0).to(tl.int64).to(tl.int32)
    slot = earlier.to(tl.int32) + scanned - 1
    if HAS_RANGE:
        tl.store(broken_ptr + row, broken, mask=inside)
    tl.store(values_ptr + row, tl.where(valid, label, 0), mask=inside)
    tl.store(valid_ptr + row, valid, mask=inside)
    tl.store(slots_ptr + row, tl.where(valid, slot, 0).to(tl.int64), mask=inside)
    tl.store(runs_ptr + at, tl.where(valid, slot, -1), mask=inside)
    tl.store(starts_ptr + slot, at, mask=is_first)
    tl.store(ends_ptr + slot, at + 1, mask=is_last)
    tl.store(classes_ptr + slot, label, mask=is_first)

    # Empty slots: no samples, and the last label again, so that the labels stay sorted.
    last_class = tl.where(num_present > 0, last_class, 0)
    empty = (at >= num_present) & (at < num_slots)
    tl.store(starts_ptr + at, tl.zeros([BLOCK], tl.int32), mask=empty)
    tl.store(ends_ptr + at, tl.zeros([BLOCK], tl.int32), mask=empty)
    tl.store(classes_ptr + at, tl.zeros([BLOCK], tl.int64) + last_class, mask=empty)
    if tl.program_id(0) == 0:
        tl.store(num_present_ptr, num_present)
        tl.store(divisor_ptr, tl.maximum(num_valid, 1).to(tl.float32))


@triton.jit
def _sum_members(
    x_ptr, order_ptr, norms_ptr, begin, end, dims, dim, stride_row, stride_dim,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Sum of the rows in places ``begin`` to ``end`` of the order, unit rows if ``NORMALIZE``."""
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
    return total


@triton.jit(do_not_specialize=SIZES)
def class_pieces_kernel(
    x_ptr, order_ptr, runs_ptr, starts_ptr, ends_ptr, pieces_ptr, norms_ptr, num_rows, dim,
    stride_row, stride_dim,
    LONG: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Sums over ``LONG`` places of the order, of the classes with more members than that.

    At most two such classes meet in one stretch: one that is there at its start, one that starts
    later. ``pieces`` is ``[stretches, 2, D]``.
    """
    stretch = tl.program_id(0)
    dims = tl.arange(0, BLOCK_D)
    begin = stretch * LONG
    end = tl.minimum(begin + LONG, num_rows)
    for which in range(2):
        slot = tl.load(runs_ptr + tl.where(which == 0, begin, end - 1))
        first = tl.load(starts_ptr + slot, mask=slot >= 0, other=0)
        last = tl.load(ends_ptr + slot, mask=slot >= 0, other=0)
        starts_here = first > begin
        if (last - first > LONG) & (starts_here == (which == 1)):
            total = _sum_members(
                x_ptr, order_ptr, norms_ptr, tl.maximum(first, begin), tl.minimum(last, end),
                dims, dim, stride_row, stride_dim, BLOCK_N, BLOCK_D, NORMALIZE,
            )  # fmt: skip
            at = (stretch.to(tl.int64) * 2 + which) * dim + dims
            tl.store(pieces_ptr + at, total, mask=dims < dim)


@triton.jit(do_not_specialize=SIZES)
def class_sums_kernel(
    x_ptr, order_ptr, starts_ptr, ends_ptr, pieces_ptr, sums_ptr, unit_ptr, counts_ptr, norms_ptr,
    dim, stride_row, stride_dim,
    LONG: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, NORMALIZE: tl.constexpr,
    KEEP_SUMS: tl.constexpr,
):  # fmt: skip
    """Sum of a class, a program each, its members taken in the order of the batch; their lengths.

    No two programs write to one place, so two runs give the same bits. The sum of a class with more
    than ``LONG`` members is that of its pieces.
    """
    slot = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    first, last = tl.load(starts_ptr + slot), tl.load(ends_ptr + slot)
    is_long = last - first > LONG
    total = _sum_members(
        x_ptr, order_ptr, norms_ptr, first, tl.where(is_long, first, last), dims, dim, stride_row,
        stride_dim, BLOCK_N, BLOCK_D, NORMALIZE,
    )  # fmt: skip
    stretches = tl.where(is_long, (last - 1) // LONG + 1, 0)
    for start in range(first // LONG, stretches, BLOCK_N):
        stretch = start + tl.arange(0, BLOCK_N)
        which = (first > stretch * LONG).to(tl.int32)
        at = (stretch * 2 + which).to(tl.int64)[:, None] * dim + dims[None, :]
        mask = (stretch < stretches)[:, None] & (dims < dim)[None, :]
        total += tl.sum(tl.load(pieces_ptr + at, mask=mask, other=0.0), 0)

    scale = _inverse_power_of_two(tl.max(tl.abs(total), 0))
    norm = tl.sum(_lengths(total[None, :]), 0)
    at = slot * dim + dims
    if KEEP_SUMS:
        tl.store(sums_ptr + at, total, mask=dims < dim)
    # A direction; zero if the members cancel out.
    tl.store(unit_ptr + at, total * scale / (norm * scale), mask=dims < dim)
    tl.store(counts_ptr + slot, (last - first).to(tl.float32))


@triton.jit
def _sweep_tile(
    x, slots, to_log2, shift, total, mixed, keys_ptr, present_ptr, start, bound, dims, dim,
    MASKED: tl.constexpr, BLOCK_K: tl.constexpr, HAS_PRESENT: tl.constexpr,
    PLAIN_EXP: tl.constexpr, NEED_GRAD: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of keys: the sums ``total`` of exponentials, and of keys weighed by them."""
    operand = keys_ptr.dtype.element_ty
    slot = start + tl.arange(0, BLOCK_K)
    keys_at = tl.arange(0, BLOCK_K)[:, None] * dim + dims[None, :]
    keys_mask = (dims < dim)[None, :]
    if MASKED:
        keys_mask = keys_mask & (slot < bound)[:, None]
    keys = tl.load(keys_ptr + start.to(tl.int64) * dim + keys_at, mask=keys_mask, other=0.0)
    if UPCAST:
        keys = keys.to(tl.float32)
    logits = tl.dot(x, tl.trans(keys), input_precision=PRECISION) * to_log2[:, None]
    if MASKED:
        # The own class stays out: with it, 1 - p would be lost to rounding.
        taken = slot < bound
        if HAS_PRESENT:
            taken = taken & (tl.load(present_ptr + slot, mask=taken, other=0) != 0)
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
    return shift, total, mixed


@triton.jit(do_not_specialize=SIZES)
def sweep_kernel(
    x_ptr, order_ptr, norms_ptr, valid_ptr, slots_ptr, w_ptr, keys_ptr, key_sum_ptr, present_ptr,
    num_present_ptr, own_ptr, broken_ptr, loss_ptr, terms_ptr, gradient_ptr, scale_ptr,
    num_rows, num_slots, dim, stride_row, stride_dim, temperature, epsilon,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_ORDER: tl.constexpr, HAS_NORMS: tl.constexpr, HAS_VALID: tl.constexpr,
    HAS_PRESENT: tl.constexpr, HAS_OWN: tl.constexpr, HAS_BROKEN: tl.constexpr,
    PACKED: tl.constexpr, PLAIN_EXP: tl.constexpr, NEED_GRAD: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Loss terms of a block of rows and their gradient: one pass over the keys.

    ``w`` are the centroids in float32, ``keys`` the same in the dtype of the rows, ``key_sum`` the
    sum of ``w``. The gradient of row i is ``gradient[i] * scale[i]``: a power of two taken out of
    each row keeps small gradients in the range of float16.
    """
    operand = x_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    inside = rows < num_rows
    slots = tl.load(slots_ptr + rows, mask=inside, other=0).to(tl.int32)
    if HAS_ORDER:
        rows = tl.load(order_ptr + rows, mask=inside, other=0)
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
    if UPCAST:
        x = x.to(tl.float32)

    num_present = tl.load(num_present_ptr)
    if PACKED:
        bound = tl.minimum(num_present, num_slots).to(tl.int32)
    else:
        bound = num_slots
    to_log2 = to_unit * (LOG2_E / temperature)
    shift = tl.full([BLOCK_N], float("-inf"), tl.float32)
    if PLAIN_EXP:
        shift = tl.zeros([BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    mixed = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    # In order of class, only the tiles of keys from `first` to `end` hold own classes of the block:
    # they need a mask, and so does the last one if it is not full. (Scalars that are loaded, not
    # reduced from `slots`: so the compiler knows that they are the same for all threads.)
    num_full = bound // BLOCK_K
    num_tiles = tl.cdiv(bound, BLOCK_K)
    first, end = tl.minimum(bound, 0), num_tiles
    if HAS_ORDER and not HAS_PRESENT:
        block = tl.program_id(0).to(tl.int64) * BLOCK_N
        lowest = tl.load(slots_ptr + block).to(tl.int32)
        highest = tl.load(slots_ptr + tl.minimum(block + BLOCK_N, num_rows) - 1).to(tl.int32)
        first = tl.minimum(lowest // BLOCK_K, num_full)
        end = tl.minimum(highest // BLOCK_K + 1, num_tiles)
        end = tl.maximum(end, first)
        for step in range(0, first + tl.maximum(num_full - end, 0)):
            tile = tl.where(step < first, step, step - first + end)
            shift, total, mixed = _sweep_tile(
                x, slots, to_log2, shift, total, mixed, keys_ptr, present_ptr, tile * BLOCK_K,
                bound, dims, dim, False, BLOCK_K, HAS_PRESENT, PLAIN_EXP, NEED_GRAD, PRECISION,
                UPCAST,
            )  # fmt: skip
    for step in range(0, end - first + num_tiles - tl.maximum(end, num_full)):
        tile = tl.where(first + step < end, first + step, num_full)
        shift, total, mixed = _sweep_tile(
            x, slots, to_log2, shift, total, mixed, keys_ptr, present_ptr, tile * BLOCK_K, bound,
            dims, dim, True, BLOCK_K, HAS_PRESENT, PLAIN_EXP, NEED_GRAD, PRECISION, UPCAST,
        )  # fmt: skip

    # Everything below is float32, a few numbers a row. As in `objective.row_objective`.
    slot_at = slots[:, None].to(tl.int64) * dim + dims[None, :]
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

    num_others = tl.maximum(num_present.to(tl.float32) - 1.0, 0.0)
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
    tl.store(terms_ptr + at, tl.where(taking_part, kl, 0.0), mask=inside)
    at += num_rows
    tl.store(terms_ptr + at, tl.where(taking_part, nll, 0.0), mask=inside)
    at += num_rows
    tl.store(terms_ptr + at, tl.where(taking_part, p_own, 0.0), mask=inside)
    at += num_rows
    tl.store(terms_ptr + at, tl.where(taking_part, tau2, 0.0), mask=inside)

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
