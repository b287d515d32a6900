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

import torch
from torch import Tensor

from varcon_loss.rows import Rows, Swept
from varcon_loss.soft_labels import SoftLabels
from varcon_loss.sweeps.chunks import Shared, count_others, keep_what_is_freed, rows_a_chunk
from varcon_loss.sweeps.entries import evaluate_entries
from varcon_loss.sweeps.operators import gradient_scale
from varcon_loss.sweeps.products import make_linear
from varcon_loss.sweeps.table import evaluate_table


def sweep_soft_labels(
    rows: Rows,
    soft: SoftLabels,
    temperature: float,
    epsilon: float,
    need_grad: bool,
    need_terms: bool,
) -> Swept:
    """The sweep where labels are ``soft`` by slot: see `operators`. Empty slots have none."""
    anchors, centroids, weight = rows.anchors, rows.centroids, rows.weight
    w, present = centroids.unit, centroids.present
    z = anchors.unit_rows(w.dtype)
    num_rows, num_slots = z.shape[0], w.shape[0]
    if soft.background is not None and int(centroids.num_present) == 1:
        # The class must come out as 0 exactly, and stand alone for that.
        soft = SoftLabels(values=soft.table(num_slots, z.dtype))
    dense = soft.slots is None
    num_buffers = 7 if dense else 1 if soft.background is None else 5
    chunk = rows_a_chunk(z, num_slots, soft.views, matrices=num_buffers + 1)
    counted = None if present is None else present.to(z.dtype)
    keys = w / temperature
    shared = Shared(
        key_sum=keys.sum(0),
        to_logits=make_linear(keys, chunk),
        to_gradient=make_linear(keys.T, chunk) if need_grad else None,
        weighted_key_sum=None if weight is None else torch.mv(keys.T, weight),
        present=present,
        counted=counted,
        scale=weight if counted is None else counted if weight is None else counted * weight,
        num_others=count_others(centroids.num_present, z),
        weight=weight,
        shifted=not rows.have_small_logits(temperature),
        project=anchors.norms is not None,
        temperature=temperature,
        epsilon=epsilon,
        need_terms=need_terms,
    )
    evaluate = evaluate_table if dense else evaluate_entries
    keep_what_is_freed(z, (num_buffers + 2) * chunk * num_slots)
    # Each by itself, and hence aligned as a product wants it.
    room = [z.new_empty(chunk, num_slots) for _ in range(num_buffers)]
    gradient = z.new_empty(z.shape) if need_grad else None  # side by side, as the fake says
    losses, all_terms = [], []
    for start in range(0, num_rows, chunk):
        stop = min(start + chunk, num_rows)
        part = evaluate(
            shared,
            z[start:stop],
            soft,
            start,
            [buffer[: stop - start] for buffer in room],
            None if gradient is None else gradient[start:stop],
        )
        losses.append(part.loss)
        all_terms.append(part.terms)
        if gradient is not None and part.gradient is not None:
            _finish(shared, z[start:stop], part.gradient, gradient[start:stop])
    loss = torch.cat(losses) if losses else z.new_zeros(0)
    terms = None
    if need_terms:
        terms = torch.cat(all_terms, dim=1) if all_terms else z.new_zeros(4, 0)
    scale = gradient_scale(rows, need_grad)
    return Swept(loss=loss, terms=terms, gradient=gradient, scale=scale).masked_(anchors)


def _finish(shared: Shared, z: Tensor, dz: Tensor, gradient: Tensor) -> None:
    if shared.project:
        # dL/dx = (g - (g . z) z) / |x|; the division is left to `operators`.
        dz.addcmul_(z, (dz * z).sum(1, keepdim=True), value=-1)
    if dz is not gradient:
        gradient.copy_(dz)
