"""One sweep over the centroids gives the loss and its gradient, on any device.

With ``u = z . w / tau1``, the derivatives of a row's loss are

    dL/du_k = rest_slope * p_k / (1 - p_y) - q_other   (k != y)        dL/du_y = own_slope

so two matrix products a chunk of rows do everything, ``z -> u`` and ``dL/du -> dL/dz``. The
chunk's logits stay in the cache, and backward is one multiplication by the upstream gradient. The
sum of all keys yields ``sum_k u_k`` and applies ``- q_other`` to all classes at once.

Small batches feel every call into torch more than its arithmetic, hence columns ``[N, 1]`` rather
than vectors, and no slicing where one chunk holds all rows.
"""

import torch
from torch import Tensor

from varcon_loss.classes import summarise
from varcon_loss.rows import Implementation, Rows, Swept
from varcon_loss.samples import read
from varcon_loss.soft_labels import SoftLabels
from varcon_loss.sums import sum_slots
from varcon_loss.sweeps.chunks import (
    TINY,
    Shared,
    count_others,
    keep_what_is_freed,
    rows_a_chunk,
)
from varcon_loss.sweeps.expectation import sweep_soft_labels
from varcon_loss.sweeps.objective import row_objective, row_slopes
from varcon_loss.sweeps.operators import gradient_scale, make_operator
from varcon_loss.sweeps.products import make_linear


def sweep(
    rows: Rows, temperature: float, epsilon: float, need_grad: bool, need_terms: bool
) -> Swept:
    """See `operators`."""
    if isinstance(rows.slots, SoftLabels):
        return sweep_soft_labels(rows, rows.slots, temperature, epsilon, need_grad, need_terms)
    anchors, centroids = rows.anchors, rows.centroids
    w, norms, own = centroids.unit, anchors.norms, rows.own
    z = anchors.unit_rows(w.dtype)
    num_rows, num_slots = z.shape[0], w.shape[0]
    chunk = rows_a_chunk(z, num_slots)
    keys = w / temperature  # [S, D]
    shared = Shared(
        to_logits=make_linear(keys, chunk),
        to_gradient=make_linear(keys.T, chunk) if need_grad else None,
        key_sum=keys.sum(0),
        present=centroids.present,
        num_others=count_others(centroids.num_present, z),
        shifted=not rows.have_small_logits(temperature),
        project=norms is not None,
        temperature=temperature,
        epsilon=epsilon,
        need_terms=need_terms,
    )
    own_slot = rows.slots.unsqueeze(1)
    scale = gradient_scale(rows, need_grad)
    if chunk >= num_rows:
        loss, terms, gradient, _ = _sweep_chunk(shared, z, own_slot, own, None, None)
        swept = Swept(loss=loss, terms=terms, gradient=gradient, scale=scale)
        return swept.masked_(anchors)

    keep_what_is_freed(z, 3 * chunk * num_slots)
    buffer = z.new_empty(chunk, num_slots)
    gradient = z.new_empty(z.shape) if need_grad else None  # side by side, as the fake says
    losses, all_terms = [], []
    for start in range(0, num_rows, chunk):
        part = slice(start, start + chunk)
        queries = z[part]
        swept = _sweep_chunk(
            shared,
            queries,
            own_slot[part],
            None if own is None else own[part],
            buffer[: len(queries)],
            None if gradient is None else gradient[part],
        )
        losses.append(swept.loss)
        all_terms.append(swept.terms)
    swept = Swept(
        loss=torch.cat(losses),
        terms=torch.cat(all_terms, dim=1) if need_terms else None,
        gradient=gradient,
        scale=scale,
    )
    return swept.masked_(anchors)


def _sweep_chunk(
    shared: Shared,
    z: Tensor,
    own_slot: Tensor,
    own: Tensor | None,
    buffer: Tensor | None,
    gradient: Tensor | None,
) -> Swept:
    """Rows ``z``, whose gradient is still to be scaled.

    Args:
        shared: as above.
        z: ``[n, D]``.
        own_slot: ``[n, 1]``.
        own: ``[n, D]`` own centroids, where they are not those of the slots.
        buffer: ``[n, S]`` room for the logits.
        gradient: ``[n, D]`` where the gradient goes.
    """
    logits = shared.to_logits(z, buffer)
    every_logit = torch.mv(z, shared.key_sum).unsqueeze(1)
    slot_logit = logits.gather(1, own_slot)
    sum_others = every_logit - slot_logit
    own_logit = slot_logit
    if own is not None:
        own_logit = (z * own).sum(1, keepdim=True).div_(shared.temperature)

    # From here on the own class is out of the sums: exp(-inf) = 0.
    logits.scatter_(1, own_slot, -torch.inf)
    shift = None
    if shared.shifted:
        if shared.present is not None:
            logits.masked_fill_(~shared.present, -torch.inf)
        shift = logits.amax(1, keepdim=True)
        shift.masked_fill_(shift == -torch.inf, 0.0)
        logits.sub_(shift)
    weights = logits.exp_()
    if shared.present is None:
        total = weights.sum(1, keepdim=True)
    else:
        total = torch.mv(weights, shared.present.to(z.dtype)).unsqueeze(1)
    lse_others = total.log() if shift is None else total.log().add_(shift)

    row = row_objective(
        own_logit, lse_others, sum_others, shared.num_others, shared.temperature, shared.epsilon
    )
    loss, terms = row.loss.squeeze_(1), None  # in place: no view, which callers may not change
    if shared.need_terms:
        terms = torch.cat((row.kl, row.nll, row.confidence, row.tau2)).view(4, -1)
    if shared.to_gradient is None:
        return Swept(loss=loss, terms=terms)

    # weights -> dL/du. The empty slots' keys are zero, whatever their weights.
    rest_slope, own_slope = row_slopes(row)
    weights.mul_(rest_slope / total.clamp_min_(TINY))
    at_slot = row.q_other if own is not None else own_slope + row.q_other
    weights.scatter_(1, own_slot, at_slot)
    g = shared.to_gradient(weights, gradient).addcmul_(row.q_other, shared.key_sum, value=-1)
    if own is not None:
        g.addcmul_(own, own_slope, value=1 / shared.temperature)
    if shared.project:
        # dL/dx = (g - (g . z) z) / |x|; the division is left to `operators`.
        g.addcmul_(z, (g * z).sum(1, keepdim=True), value=-1)
    if gradient is not None and g is not gradient:
        gradient.copy_(g)
    return Swept(loss=loss, terms=terms, gradient=g)


EAGER = Implementation(
    name="eager",
    read=read,
    summarise=summarise,
    sum_slots=sum_slots,
    sweep=make_operator("varcon_loss::sweep", sweep),
)
