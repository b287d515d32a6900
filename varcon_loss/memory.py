"""Centroids that outlive the batch: an extension of the paper, for many classes a small batch."""

from typing import NamedTuple

import torch
from torch import Tensor

from varcon_loss.centroids import Centroids, unit_rows
from varcon_loss.norms import row_norms
from varcon_loss.readable import values_may_be_read

PREDICT_ROWS = 4096  # logits of this many rows are held at a time


class CentroidMemory(NamedTuple):
    """A loss module's running centroids, as its forward hands them on."""

    unit: Tensor  # [C, D] float32, unit length; zero rows where not seen
    seen: Tensor  # [C] float32, 1 or 0: averaged copies of a module can average it
    momentum: float
    update: bool  # does this call write?


def update_memory(memory: CentroidMemory, classes: Tensor, sums: Tensor, counts: Tensor) -> None:
    """Move the centroids of the classes present towards the batch's means, in place.

    ``w <- unit(momentum * w + (1 - momentum) * mean)``; a class seen first takes its mean. A class
    whose sum is not finite, or zero, keeps what it had: one bad batch must not spoil the memory.

    Args:
        memory: written to.
        classes: ``[S]`` the class of each slot; 0 for empty slots.
        sums: ``[S, D]`` sums of unit rows.
        counts: ``[S]`` rows in each slot, 0 where it is empty.
    """
    sums = sums.to(memory.unit.dtype)
    norms = row_norms(sums, sums.dtype)
    means = sums / norms.unsqueeze(1)
    old = memory.unit.index_select(0, classes)
    was_seen = memory.seen.index_select(0, classes)
    # Where nothing was remembered, `old` is zero and the blend points where the mean does.
    blended = memory.momentum * old + (1 - memory.momentum) * means
    blended_norms = row_norms(blended, blended.dtype)
    moved = norms.isfinite() & blended_norms.isfinite()  # the length of a zero row is infinite
    new = torch.where(moved.unsqueeze(1), blended / blended_norms.unsqueeze(1), old)
    now_seen = torch.where(moved, 1.0, was_seen)
    # Slots are filled from the first on, and an empty one repeats what the first writes. If that
    # is empty too, all are, and class 0 is written back unchanged.
    filled = counts > 0
    new = torch.where(filled.unsqueeze(1), new, new[:1])
    now_seen = torch.where(filled, now_seen, now_seen[:1])
    classes = torch.where(filled, classes, classes[:1])
    memory.unit.index_copy_(0, classes, new)
    memory.seen.index_copy_(0, classes, now_seen)


def remembered_centroids(memory: CentroidMemory, dtype: torch.dtype, *, copy: bool) -> Centroids:
    """Every class seen so far, in a slot of its own number.

    ``copy`` for implementations whose backward reads the centroids: the next call changes them.
    """
    present = memory.seen > 0
    num_classes = present.sum()
    everything = values_may_be_read(present) and bool(present.all())
    unit = memory.unit.to(dtype, copy=copy)
    return Centroids(unit, None if everything else present, num_classes, everything)


class Prediction(NamedTuple):
    """Nearest-centroid classification."""

    label: Tensor  # [N] int64
    confidence: Tensor  # [N] p(label | z), Eq. 8


def predict(
    features: Tensor, unit: Tensor, seen: Tensor, temperature: float, *, normalize: bool
) -> Prediction:
    """The most probable class of each row ``[N, D]`` over the seen rows of ``unit`` ``[C, D]``."""
    dtype = torch.promote_types(features.dtype, unit.dtype)
    z = unit_rows(features, row_norms(features, dtype) if normalize else None, dtype)
    keys = unit.to(dtype).T / temperature
    labels, confidences = [], []
    for part in z.split(PREDICT_ROWS):
        log_p = torch.log_softmax((part @ keys).masked_fill(~seen, -torch.inf), dim=1)
        best = log_p.max(dim=1)
        labels.append(best.indices)
        confidences.append(best.values.exp())
    return Prediction(torch.cat(labels), torch.cat(confidences))
