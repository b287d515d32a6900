"""One sweep over the centroids gives the loss and its gradient, on any device.

With ``u = z . w / tau1``, the derivatives of a row's loss are

    dL/du_k = slope * p_k - q_other   (k != y)        dL/du_y = own_slope

so two matrix products a chunk of rows do everything, ``z -> u`` and ``dL/du -> dL/dz``. The
chunk's logits stay in the cache, and backward is one multiplication by the upstream gradient. One
extra key, the sum of all centroids, makes the first product yield ``sum_k u_k`` and lets the
second apply ``- q_other`` to all classes at once.
"""

import torch
from torch import Tensor

from varcon_loss.objective import row_objective, row_slopes
from varcon_loss.operators import SweepResult, make_operator
from varcon_loss.products import make_linear
from varcon_loss.rows import Rows

# Elements of one chunk's logits and rows. 4 MiB of float32 stay in a CPU's caches (2^18 and 2^22
# were both slower at N = 8192, K = 1000); an accelerator wants fewer, larger launches.
CHUNK_CPU = 2**20
CHUNK_ACCELERATOR = 2**25


def sweep(rows: Rows, temperature: float, epsilon: float, need_grad: bool) -> SweepResult:
    """See `operators`."""
    (_, z, norms), slots, (w, present, num_classes, _), own, *_ = rows
    assert z is not None
    (num_rows, dim), num_slots = z.shape, w.shape[0]
    losses, others = [], []
    gradient = z.new_empty((num_rows, dim) if need_grad else 0)
    scale = z.new_empty(0)

    on_cpu = z.device.type == "cpu"
    budget = CHUNK_CPU if on_cpu else CHUNK_ACCELERATOR
    num_chunks = max(1, -(-num_rows // max(128, budget // (num_slots + dim))))
    chunk = -(-num_rows // num_chunks)
    buffer = z.new_empty(chunk, num_slots + 1)
    keys = z.new_empty(num_slots + 1, dim)  # [S + 1, D]
    torch.div(w, temperature, out=keys[:-1])
    torch.sum(keys[:-1], 0, out=keys[-1])
    # K = 0: no row is valid, but log(-1) would turn the zeros into NaN.
    if on_cpu:
        num_others: Tensor | int = max(0, int(num_classes) - 1)
    else:
        num_others = num_classes.sub(1).clamp_min(0).to(z.dtype)
    bounded = rows.have_small_logits(temperature)
    to_logits = make_linear(keys, chunk)
    to_gradient = make_linear(keys.T, chunk) if need_grad else None

    for start in range(0, num_rows, chunk or 1):
        part = slice(start, start + chunk)
        queries, own_slot = z, slots.unsqueeze(1)
        if num_chunks > 1:  # a small batch feels every slicing
            queries, own_slot = z[part], own_slot[part]
        logits = to_logits(queries, buffer if num_chunks == 1 else buffer[: len(queries)])
        slot_logit = logits.gather(1, own_slot).squeeze(1)
        if own is None:
            own_logit = slot_logit
        else:
            own_logit = (queries * own[part]).sum(1).div_(temperature)
        sum_others = logits[:, -1] - slot_logit

        # From here on the own class is out of the sums, and so is the extra key: exp(-inf) = 0.
        logits[:, -1].fill_(-torch.inf)
        logits.scatter_(1, own_slot, -torch.inf)
        shift = None
        if not bounded:
            if present is not None:
                logits[:, :-1].masked_fill_(~present, -torch.inf)
            shift = logits.amax(1)
            shift = shift.masked_fill_(shift == -torch.inf, 0.0)
            logits.sub_(shift.unsqueeze(1))
        weights = logits.exp_()
        if present is None:
            total = weights.sum(1)
        else:
            total = torch.mv(weights[:, :-1], present.to(z.dtype))
        lse_others = total.log_() if shift is None else total.log_().add_(shift)

        terms = row_objective(own_logit, lse_others, sum_others, num_others, temperature, epsilon)
        losses.append(terms.loss)
        others.append(torch.stack((terms.kl, terms.nll, terms.confidence, terms.tau2)))
        if to_gradient is None:
            continue

        slope, own_slope, q_other = row_slopes(terms, own_logit, sum_others, epsilon)
        if norms is not None:
            length = norms if num_chunks == 1 else norms[part]
            slope, own_slope, q_other = slope / length, own_slope / length, q_other / length
        # weights -> dL/du. The empty slots' keys are zero, whatever their weights.
        to_p = -terms.lse if shift is None else shift - terms.lse
        weights.mul_((slope * to_p.exp_()).unsqueeze(1))
        weights[:, -1] = -q_other
        at_slot = q_other if own is not None else own_slope + q_other
        weights.scatter_(1, own_slot, at_slot.unsqueeze(1))
        out = gradient if num_chunks == 1 else gradient[part]
        g = to_gradient(weights, out)
        if own is not None:
            g.addcmul_(own[part], own_slope.unsqueeze(1), value=1 / temperature)
        if norms is not None:
            # dL/dx = (g - (g . z) z) / |x|
            along = (g * queries).sum(1, keepdim=True)
            g.addcmul_(queries, along, value=-1)
        if g is not out:
            out.copy_(g)
    if len(losses) == 1:
        return losses[0], others[0], gradient, scale
    if not losses:
        return z.new_empty(0), z.new_empty(4, 0), gradient, scale
    return torch.cat(losses), torch.cat(others, dim=1), gradient, scale


# As `reference_terms`, without ``[N, K]`` matrices.
eager_terms = make_operator("varcon_loss::sweep", sweep)
