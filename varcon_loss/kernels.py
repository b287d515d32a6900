"""Triton kernels: row lengths, class sums, and the sweep. Launched by `varcon_loss.fused`.

Rows enter as the caller gave them, in their own dtype. A power of two near a row's length brings
it to about unit size without rounding; what is left of the length, a factor near 1, is applied in
float32 to what comes out of the products. So bfloat16 and float16 operands are the exact features.
"""

# pyright: reportArgumentType=false

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


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
def row_norms_kernel(
    x_ptr, valid_ptr, norms_ptr, num_rows, dim, stride_row, stride_dim,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """Length of each row; infinity for zero rows, NaN for rows that float32 cannot express."""
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    inside = rows < num_rows
    taking_part = inside
    if HAS_VALID:
        taking_part = inside & (tl.load(valid_ptr + rows, mask=inside, other=0) != 0)
    largest = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, dim, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        mask = taking_part[:, None] & (dims < dim)[None, :]
        at = rows[:, None] * stride_row + dims[None, :].to(tl.int64) * stride_dim
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
    scale = _inverse_power_of_two(largest)
    squares = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, dim, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        mask = taking_part[:, None] & (dims < dim)[None, :]
        at = rows[:, None] * stride_row + dims[None, :].to(tl.int64) * stride_dim
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) * scale[:, None]
        squares += tl.sum(x * x, 1)
    norms = tl.sqrt(squares) / scale
    norms = tl.where(norms == float("inf"), float("nan"), norms)
    norms = tl.where(squares == 0.0, float("inf"), norms)
    tl.store(norms_ptr + rows, norms, mask=inside)


@triton.jit
def class_sums_kernel(
    x_ptr, norms_ptr, order_ptr, starts_ptr, sums_ptr, dim, stride_row, stride_dim,
    PIECES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HAS_NORMS: tl.constexpr,
):  # fmt: skip
    """Sum one piece of one class, its members taken in the order of the batch: [S, PIECES, D].

    No two programs write to one place, so two runs give the same bits.
    """
    slot = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    dims = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    first, last = tl.load(starts_ptr + slot), tl.load(starts_ptr + slot + 1)
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
        if HAS_NORMS:
            norms = tl.load(norms_ptr + rows, mask=inside, other=1.0)
            scale = _inverse_power_of_two(norms)
            x = x * scale[:, None] / (norms * scale)[:, None]
        total += tl.sum(x, 0)
    at = (slot * PIECES + piece) * dim + dims
    tl.store(sums_ptr + at, total, mask=dims < dim)


@triton.jit
def sweep_kernel(
    x_ptr, norms_ptr, valid_ptr, slots_ptr, w_ptr, keys_ptr, key_sum_ptr, present_ptr,
    num_classes_ptr, own_ptr, loss_ptr, others_ptr, gradient_ptr, scale_ptr,
    num_rows, num_slots, dim, stride_row, stride_dim, temperature, epsilon,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_NORMS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_PRESENT: tl.constexpr,
    HAS_OWN: tl.constexpr, PACKED: tl.constexpr, PLAIN_EXP: tl.constexpr,
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
    z = x.to(tl.float32) * to_unit[:, None]
    at = slots[:, None] * dim + dims[None, :]
    w_slot = tl.load(w_ptr + at, mask=inside[:, None] & dim_mask[None, :], other=0.0)
    key_sum = tl.load(key_sum_ptr + dims, mask=dim_mask, other=0.0)
    slot_logit = tl.sum(z * w_slot, 1) / temperature
    sum_others = tl.sum(z * key_sum[None, :], 1) / temperature - slot_logit
    t, w_own = slot_logit, w_slot
    if HAS_OWN:
        at = rows[:, None] * dim + dims[None, :]
        w_own = tl.load(own_ptr + at, mask=inside[:, None] & dim_mask[None, :], other=0.0)
        t = tl.sum(z * w_own, 1) / temperature

    num_others = tl.maximum(num_classes.to(tl.float32) - 1.0, 0.0)
    lse_others = (shift + tl.log2(total)) * LN_2
    margin = lse_others - t
    p_own, p_rest = _sigmoid(-margin), _sigmoid(margin)
    nll = tl.where(margin > 0.0, margin, 0.0) + _softplus_of_negative(tl.abs(margin))
    lse = t + nll
    tau2 = (temperature - epsilon) + 2.0 * epsilon * p_own
    a = 1.0 / tau2
    b = a - tl.log(num_others)
    log_q_own = tl.where(b < 0.0, b, 0.0) - _softplus_of_negative(tl.abs(b))
    q_own, q_rest = _sigmoid(b), _sigmoid(-b)
    q_other = q_rest / tl.maximum(num_others, 1.0)
    kl = q_own * (log_q_own + nll) + q_rest * (log_q_own - a + lse) - q_other * sum_others
    tl.store(loss_ptr + rows, kl + nll, mask=inside)
    tl.store(others_ptr + rows, kl, mask=inside)
    tl.store(others_ptr + (rows + num_rows), nll, mask=inside)
    tl.store(others_ptr + (rows + num_rows + num_rows), p_own, mask=inside)
    tl.store(others_ptr + (rows + num_rows + num_rows + num_rows), tau2, mask=inside)

    if NEED_GRAD:
        # As in `objective.row_slopes`.
        through_tau2 = q_other * sum_others + q_rest * (a - t)
        slope = 2.0 + 2.0 * epsilon * through_tau2 * q_own * p_own * a * a
        own_slope = q_rest - slope * p_rest
        g = mixed * (slope * tl.exp2(shift - lse * LOG2_E))[:, None]
        if HAS_OWN:
            g += own_slope[:, None] * w_own + q_other[:, None] * (w_slot - key_sum[None, :])
        else:
            g += (own_slope + q_other)[:, None] * w_slot - q_other[:, None] * key_sum[None, :]
        if HAS_NORMS:
            g -= tl.sum(g * z, 1)[:, None] * z
        g = tl.where(mask, g, 0.0)
        size = _inverse_power_of_two(tl.max(tl.abs(g), 1))
        at = rows[:, None] * dim + dims[None, :]
        g = (g * size[:, None]).to(operand)
        tl.store(gradient_ptr + at, g, mask=inside[:, None] & dim_mask[None, :])
        back = 1.0 / (size * temperature)
        if HAS_NORMS:
            back = back / norms
        tl.store(scale_ptr + rows, tl.where(taking_part, back, 0.0), mask=inside)
