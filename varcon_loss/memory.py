"""Centroids that outlive the batch: an extension of the paper, for many classes a small batch."""

from typing import NamedTuple

import torch
from torch import Tensor

from varcon_loss.classes import Centroids
from varcon_loss.norms import directions, normalized
from varcon_loss.readable import values_may_be_read
from varcon_loss.samples import to_unit

PREDICT_ROWS = 4096  # logits of this many rows are held at a time
ROUNDING = 1e-5  # a centroid's length is off by less, and an average of ones


class CentroidMemory(NamedTuple):
    """A loss module's running centroids, as its forward hands them on."""

    unit: Tensor  # [C, D] float32, unit length; zero rows where not seen
    seen: Tensor  # [C] float32, 1 or 0: averaged copies of a module can average it
    momentum: float
    update: bool  # does this call write?


def update_memory(
    memory: CentroidMemory, classes: Tensor | None, sums: Tensor, counts: Tensor
) -> Tensor:
    """Move the centroids of the classes present towards the batch's means, in place.

    ``w <- unit(momentum * w + (1 - momentum) * mean)``; a class seen first takes its mean. A class
    whose sum is not finite, or zero, keeps what it had: one bad batch must not spoil the memory.
    A class that has less than one sample in all moves by so much less: smoothing gives each class a
    little of every sample, which says little about it.

    Args:
        memory: written to.
        classes: ``[S]`` the class of each slot; 0 for empty slots. None: the slots are the classes.
        sums: ``[S, D]`` sums of unit rows.
        counts: ``[S]`` rows in each slot, of all ranks, 0 where it is empty; less than one where
            they are shares.

    Returns:
        Which sums are not finite, ``[S]`` bool.
    """
    means, lengths = normalized(sums.to(memory.unit.dtype), memory.unit.dtype)
    old, was_seen = memory.unit, memory.seen
    if classes is not None:
        old, was_seen = old.index_select(0, classes), was_seen.index_select(0, classes)
    if torch.compiler.is_compiling():  # elsewhere `VarConLoss` sees that somebody has written
        old = lengthened(old)
    # Where nothing was remembered, `old` is zero and the blend points where the mean does.
    step = counts.clamp(max=1).to(means.dtype).mul_(1 - memory.momentum)
    blended, blended_lengths = normalized(old.lerp(means, step.unsqueeze(1)), means.dtype)
    # The length of a zero row is infinite, that of a broken one NaN.
    moved = (lengths < torch.inf) & (blended_lengths < torch.inf)
    new = torch.where(moved.unsqueeze(1), blended, old)
    now_seen = torch.where(moved, 1.0, was_seen)
    if classes is None:
        memory.unit.copy_(new)
        memory.seen.copy_(now_seen)
    else:
        # Slots are filled from the first on, and an empty one repeats what the first writes. If
        # that is empty too, all are, and class 0 is written back unchanged.
        filled = counts > 0
        classes = torch.where(filled, classes, classes[:1])
        new = torch.where(filled.unsqueeze(1), new, new[:1])
        memory.unit.index_copy_(0, classes, new)
        memory.seen.index_copy_(0, classes, torch.where(filled, now_seen, now_seen[:1]))
    return lengths.isnan()


def remembered_centroids(
    memory: CentroidMemory, dtype: torch.dtype, *, copy: bool
) -> tuple[Centroids, Tensor | None]:
    """Every class seen so far, and which class is in each slot ``[S]``; None: every class is.

    Where values can be read the cost follows the classes seen; elsewhere each class keeps a slot.

    ``copy`` for implementations whose backward reads the centroids: the next call changes them.
    """
    present = memory.seen > 0
    if values_may_be_read(present):
        seen = present.nonzero().squeeze(1)
        if 0 < len(seen) < len(present):
            unit = _as_read(memory, memory.unit.index_select(0, seen)).to(dtype)
            num_present = torch.tensor(len(seen), device=seen.device)
            return Centroids(unit=unit, present=None, num_present=num_present, packed=True), seen
    everything = values_may_be_read(present) and bool(present.all())
    unit = _as_read(memory, memory.unit).to(dtype, copy=copy)
    centroids = Centroids(
        unit=unit,
        present=None if everything else present,
        num_present=present.sum(),
        packed=everything,
    )
    return centroids, None


def _as_read(memory: CentroidMemory, unit: Tensor) -> Tensor:
    """What training wrote has unit length; what only is read may be an average of copies.

    A compiled training step cannot tell whether somebody else wrote since the last.
    """
    written_here = memory.update and not torch.compiler.is_compiling()
    return unit if written_here else directions(unit)


def can_be_remembered(unit: Tensor, seen: Tensor) -> bool:
    """Can training, or an average of trained copies, have left this? It reads values."""
    lengths = torch.linalg.vector_norm(unit, dim=1)
    known = (seen > 0) & (seen < 1 + ROUNDING) & lengths.isfinite()
    return bool((known | ((seen == 0) & (lengths == 0))).all())


def lengthened(unit: Tensor) -> Tensor:
    """Centroids ``[C, D]`` of unit length again, where averaging or rounding has changed it."""
    lengths = torch.linalg.vector_norm(unit, dim=1, keepdim=True)
    return torch.where((lengths - 1).abs() > ROUNDING, directions(unit), unit)


class Prediction(NamedTuple):
    """Nearest-centroid classification."""

    label: Tensor  # int64; -1 where nothing can be said
    confidence: Tensor  # p(label | z), Eq. 8; NaN where nothing can be said


def predict(
    features: Tensor, memory: CentroidMemory, temperature: float, *, normalize: bool
) -> Prediction:
    """The most probable class of each row ``[N, D]`` over the classes seen."""
    dtype = torch.promote_types(features.dtype, memory.unit.dtype)
    z, _ = to_unit(features, dtype, normalize=normalize)
    centroids, classes = remembered_centroids(memory, memory.unit.dtype, copy=False)
    unit, present = centroids.unit, centroids.present
    keys = unit.to(dtype).T / temperature
    labels, confidences = [], []
    for part in z.split(PREDICT_ROWS):
        logits = part @ keys
        if present is not None:
            logits.masked_fill_(~present, -torch.inf)
        best = torch.log_softmax(logits, dim=1).max(dim=1)
        labels.append(best.indices)
        confidences.append(best.values.exp())
    label, confidence = torch.cat(labels), torch.cat(confidences)
    if classes is not None:
        label = classes.index_select(0, label)
    return Prediction(label=label.masked_fill(confidence.isnan(), -1), confidence=confidence)
