"""Per-row losses to what the caller asked for."""

from typing import NamedTuple

import torch
from torch import Tensor


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


class RanksTotal(NamedTuple):
    """What a mean over the ranks of a process group divides by."""

    weight: Tensor  # 0-d, summed over ranks
    world_size: int


def reduce_loss(
    loss: Tensor,
    row_weights: Tensor | None,
    valid: Tensor | None,
    divisor: Tensor | None,
    reduction: str,
    total: RanksTotal | None,
) -> Tensor:
    """Weigh and reduce: ``[N]`` -> ``[]``, or ``[N]`` for ``"none"``.

    ``loss`` is 0 where not ``valid``, and so are ``row_weights``. The mean is
    ``sum(weight * loss) / sum(weight)``, and 0 where nothing has weight. ``divisor`` may give the
    number of valid rows, at least 1. Over several ranks the
    denominator is ``total``, and mean and sum are multiplied by the number of ranks, so that what
    DDP and FSDP average is the loss, and the gradient, of the whole batch.
    """
    if row_weights is not None:
        loss = loss * row_weights
    if reduction == "none":
        return loss
    if total is not None:
        loss = loss * total.world_size
    if reduction == "sum":
        return loss.sum()
    if total is None:
        if row_weights is None and valid is None:
            return loss.mean() if loss.numel() > 0 else loss.sum()
        if row_weights is None and divisor is not None:
            return loss.sum() / divisor
        shares = valid if row_weights is None else row_weights
        assert shares is not None
        weight = shares.sum()
    else:
        weight = total.weight
    return loss.sum() / torch.where(weight == 0, 1, weight)
