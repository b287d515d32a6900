"""Per-row losses to what the caller asked for."""

from typing import NamedTuple

import torch
from torch import Tensor

from varcon_loss.classes import Classes
from varcon_loss.samples import Samples
from varcon_loss.soft_labels import SoftLabels, row_totals


class VarConTerms(NamedTuple):
    """The loss with everything one logs, from one sweep.

    Per-sample tensors have shape ``[N]``, or ``[B, V]`` for features with views, and are float32
    or wider. Samples that take no part (see ``valid``) are 0 in all of them.

    Attributes:
        loss: per-sample loss ``L_i`` (Eq. 7), without class weights; differentiable.
        kl: ``KL(q || p)``, detached.
        nll: ``-log p(y | z)``, detached.
        confidence: ``p(y | z)`` (Eq. 8), detached.
        tau2: adaptive temperature (Eq. 13), detached.
        valid: bool; False for samples that are ignored, or that ``leave_one_out`` leaves without
            another member of their class.
        num_classes: 0-d int64, the number ``K`` of classes that the softmax ran over. A mean
            ``nll`` that stays near ``log K`` means that the embeddings have collapsed.
        reduced: what `VarConLoss.forward` returns: class weights and ``reduction`` applied.
        impl: the implementation that ran.
    """

    loss: Tensor
    kl: Tensor
    nll: Tensor
    confidence: Tensor
    tau2: Tensor
    valid: Tensor
    num_classes: Tensor
    reduced: Tensor
    impl: str


def reduce_loss(
    loss: Tensor,
    anchors: Samples,
    row_weights: Tensor | None,
    reduction: str,
    total: Tensor | None,
    world_size: int,
) -> Tensor:
    """``[N]`` -> ``[]``, or ``[N]`` for ``"none"``.

    The mean is ``sum(weight * loss) / sum(weight)``, and 0 where nothing has weight. Over several
    ranks the denominator is what they have together, and mean and sum are multiplied by their
    number, so that what DDP and FSDP average is the loss, and the gradient, of the whole batch.

    Args:
        loss: ``[N]``, weighed, 0 where not valid.
        anchors: which rows are valid.
        row_weights: ``[N]``, 0 where not valid; None: all are 1.
        reduction: of the public arguments.
        total: 0-d, the denominator over all ranks; None: there is one.
        world_size: how many ranks there are.
    """
    if reduction == "none":
        return alone(loss, anchors)
    if total is not None:
        loss = loss * world_size
    if reduction == "sum":
        return loss.sum()
    if total is None:
        if row_weights is None and anchors.valid is None:
            return loss.mean() if loss.numel() > 0 else loss.sum()
        if row_weights is None and anchors.num_valid is not None:
            return loss.sum() / anchors.num_valid
        if row_weights is None:
            assert anchors.valid is not None
            return loss.sum() / anchors.valid.sum().clamp_min(1)
        total = row_weights.sum()
    return loss.sum() / torch.where(total == 0, 1, total)


def alone(loss: Tensor, anchors: Samples) -> Tensor:
    """Losses ``[N]`` for the caller to reduce.

    An upstream gradient of infinity, as of a mean over no samples, must not reach those that take
    no part: there it would be multiplied by zero.
    """
    return loss if anchors.valid is None else torch.where(anchors.valid, loss, loss.detach())


def weigh_rows(anchors: Samples, weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The class weight of each row ``[N]``, 0 where not valid; None where classes have none.

    Of shares of classes: the weights of its classes by its shares.
    """
    if weight is None:
        return None
    weight = weight.to(dtype)
    if isinstance(anchors.labels, SoftLabels):
        row_weights = row_totals(anchors.labels, weight)
    else:
        row_weights = weight.index_select(0, anchors.labels)
    if anchors.valid is not None:
        row_weights = row_weights.masked_fill(~anchors.valid, 0.0)
    return row_weights


def denominator(anchors: Samples, row_weights: Tensor | None) -> Tensor:
    """What a rank adds to the denominator of the mean, 0-d."""
    if row_weights is not None:
        return row_weights.sum()
    if anchors.valid is not None:
        return anchors.valid.sum()
    return torch.full((), len(anchors.features), device=anchors.features.device)


def denominator_of_kept(classes: Classes, kept: Tensor, weight: Tensor | None) -> Tensor:
    """The denominator over all ranks where classes drop out as a whole.

    A class of one does so under ``leave_one_out``. It follows from what every rank knows of all
    classes by now; ``kept`` ``[S]``.
    """
    counts = classes.known_counts() * kept
    if weight is not None:
        counts = counts * weight.to(counts.dtype).index_select(0, classes.slot_labels())
    return counts.sum()
