"""Triton kernels: sums by class, and the sweep. `fused` launches them."""

# pyright: reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
TINY = tl.constexpr(1e-30)  # below any sum of exponentials but the empty one
# One program serves every batch: these are not compiled in, not even whether 16 divides them.
SIZES = ("num_rows", "num_slots")


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
def run_sums_kernel(
    x_ptr, order_ptr, borders_ptr, sums_ptr, dim,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HAS_ORDER: tl.constexpr,
):  # fmt: skip
    """Sum of rows ``x[order[borders[i] : borders[i + 1]]]``, a program for each i.

    A program adds its rows one block after the other and writes to one place, so two runs give
    the same bits.
    """
    run = tl.program_id(0).to(tl.int64)
    first, last = tl.load(borders_ptr + run), tl.load(borders_ptr + run + 1)
    dims = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_N):
        places = start + tl.arange(0, BLOCK_N)
        inside = places < last
        rows = places.to(tl.int64)
        if HAS_ORDER:
            rows = tl.load(order_ptr + places, mask=inside, other=0)
        mask = inside[:, None] & (dims < dim)[None, :]
        total += tl.sum(tl.load(x_ptr + rows[:, None] * dim + dims[None, :], mask, other=0.0), 0)
    tl.store(sums_ptr + run * dim + dims, total, mask=dims < dim)


@triton.jit(do_not_specialize=SIZES)
def sweep_kernel(
    z_ptr, w_ptr, keys_ptr, key_sum_ptr, bias_ptr, num_present_ptr, slots_ptr, own_ptr,
    loss_ptr, terms_ptr, gradient_ptr,
    num_rows, num_slots, dim, temperature, epsilon,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_OWN: tl.constexpr, PLAIN_EXP: tl.constexpr, PROJECT: tl.constexpr,
    NEED_GRAD: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Loss, terms and gradient of a block of rows by one pass over the centroids.

    A program holds ``BLOCK_N`` rows ``z`` and reads the centroids in tiles of ``BLOCK_K``:

        u = z keys^T / tau1                   a tile of logits; never written to memory
        e = exp(u - shift), 0 at the own class and at classes that are absent
        total += sum_k e_k                    the softmax's denominator without the own class
        mixed += e keys                       the gradient's sum_k p_k w_k, up to a factor

    ``shift`` is the largest logit so far, and total and mixed are scaled down where it rises (as
    in FlashAttention). ``PLAIN_EXP``: logits are small, and it stays 0.

    The own class stays out of the sums, so that 1 - p is never a difference of nearly equal
    numbers. Its logit and the sum of all logits, ``z . sum_k w_k / tau1``, are computed from
    float32. The loss and its slopes follow from these few numbers a row, as in `objective`:

        dL/dz = (rest_slope mixed / total + own_slope w_y - q_other (sum_k w_k - w_y)) / tau1

    Tensors:
        z_ptr: ``[N, D]`` rows, float32.
        w_ptr: ``[S, D]`` centroids, float32.
        keys_ptr: ``[S, D]`` the same in the dtype that the matrix units multiply.
        key_sum_ptr: ``[D]`` the sum of ``w``.
        bias_ptr: ``[S]`` 0 at classes that are present and -inf at others, float32.
        num_present_ptr: the number of those that are present, int64.
        slots_ptr: ``[N]`` the own class.
        own_ptr: ``[N, D]`` own centroids, with ``HAS_OWN``, in place of ``w[slots]``.
        loss_ptr: ``[N]``.
        terms_ptr: ``[4, N]``: KL, NLL, confidence, tau2.
        gradient_ptr: ``[N, D]``, with ``NEED_GRAD``; with ``PROJECT`` without its part along z.
    """
    operand = keys_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    inside, dim_mask = rows < num_rows, dims < dim
    mask = inside[:, None] & dim_mask[None, :]
    at = rows[:, None] * dim + dims[None, :]
    slots = tl.load(slots_ptr + rows, mask=inside, other=0)
    slot_at = slots[:, None] * dim + dims[None, :]
    slots = slots.to(tl.int32)

    z = tl.load(z_ptr + at, mask=mask, other=0.0)
    key_sum = tl.load(key_sum_ptr + dims, mask=dim_mask, other=0.0)
    w_slot = tl.load(w_ptr + slot_at, mask=mask, other=0.0)
    sum_others = tl.sum(z * (key_sum[None, :] - w_slot), 1) / temperature
    w_own = w_slot
    if HAS_OWN:
        w_own = tl.load(own_ptr + at, mask=mask, other=0.0)
    t = tl.sum(z * w_own, 1) / temperature

    x = z.to(operand)
    if UPCAST:
        x = x.to(tl.float32)
    shift = tl.full([BLOCK_N], 0.0 if PLAIN_EXP else float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    mixed = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    keys_at = tl.arange(0, BLOCK_K)[:, None] * dim + dims[None, :]
    for start in range(0, num_slots, BLOCK_K):
        slot = start + tl.arange(0, BLOCK_K)
        taken = slot < num_slots
        keys = tl.load(keys_ptr + keys_at, mask=taken[:, None] & dim_mask[None, :], other=0.0)
        keys_ptr += BLOCK_K * dim
        if UPCAST:
            keys = keys.to(tl.float32)
        # Triton 3.2 loads nothing but 0 in place of what is masked.
        bias = tl.load(bias_ptr + slot, mask=taken, other=0.0)
        bias = tl.where(taken, bias, float("-inf"))
        logits = tl.dot(x, tl.trans(keys), input_precision=PRECISION) * (LOG2_E / temperature)
        logits += bias[None, :]
        # Written so that the compiler keeps no matrix of differences in registers over the loop.
        is_own = (slots - start)[:, None] == tl.arange(0, BLOCK_K)[None, :]
        logits = tl.where(is_own, float("-inf"), logits)
        if not PLAIN_EXP:
            higher = tl.maximum(shift, tl.max(logits, 1))
            finite = tl.where(higher == float("-inf"), 0.0, higher)
            logits -= finite[:, None]
            rescale = tl.exp2(shift - finite)
            shift = higher
            total *= rescale
            if NEED_GRAD:
                mixed *= rescale[:, None]
        weights = tl.exp2(logits)
        total += tl.sum(weights, 1)
        if NEED_GRAD:
            weights = weights.to(operand)
            if UPCAST:
                weights = weights.to(tl.float32)
            mixed = tl.dot(weights, keys, acc=mixed, input_precision=PRECISION)

    # As in `objective.row_objective`.
    num_others = tl.maximum(tl.load(num_present_ptr).to(tl.float32) - 1.0, 0.0)
    margin = (shift + tl.log2(total)) * LN_2 - t
    p_own, p_rest = _sigmoid(-margin), _sigmoid(margin)
    nll = tl.maximum(margin, 0.0) + _softplus_of_negative(tl.abs(margin))
    rise = 2.0 * epsilon * p_own
    tau2 = (temperature - epsilon) + rise
    a = 1.0 / tau2
    b = a - tl.log(num_others)
    log_q_own = tl.minimum(b, 0.0) - _softplus_of_negative(tl.abs(b))
    q_own, q_rest = _sigmoid(b), _sigmoid(-b)
    q_other = q_rest / tl.maximum(num_others, 1.0)
    through_q = q_other * sum_others + q_rest * (a - t)
    kl = nll + log_q_own - through_q
    tl.store(loss_ptr + rows, kl + nll, mask=inside)
    tl.store(terms_ptr + rows, kl, mask=inside)
    tl.store(terms_ptr + num_rows + rows, nll, mask=inside)
    tl.store(terms_ptr + 2 * num_rows + rows, p_own, mask=inside)
    tl.store(terms_ptr + 3 * num_rows + rows, tau2, mask=inside)

    if NEED_GRAD:
        # As in `objective.row_slope`.
        rest_slope = (2.0 + through_q * q_own * rise * a * a) * p_rest
        own_slope = q_rest - rest_slope
        g = mixed * (rest_slope / tl.maximum(total, TINY))[:, None]
        # Read again: kept from above, they would not fit the registers.
        w_slot = tl.load(w_ptr + slot_at, mask=mask, other=0.0)
        g -= q_other[:, None] * (key_sum[None, :] - w_slot)
        w_own = w_slot
        if HAS_OWN:
            w_own = tl.load(own_ptr + at, mask=mask, other=0.0)
        g += own_slope[:, None] * w_own
        if PROJECT:
            z = tl.load(z_ptr + at, mask=mask, other=0.0)
            g -= tl.sum(g * z, 1)[:, None] * z
        tl.store(gradient_ptr + at, g / temperature, mask=mask)
