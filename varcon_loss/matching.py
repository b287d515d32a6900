"""Which centroids does the softmax run over, and which of them is each anchor's own?

Three answers: the batch's own (the paper), a reference set's, or a memory's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from varcon_loss.centroids import (
    Centroids,
    centroids_without_self,
    class_counts,
    class_sums,
    unit_centroids,
)
from varcon_loss.labels import (
    ClassIndex,
    Labels,
    classes_of_slots,
    find_slots,
    index_classes,
    narrow,
    require_reference,
)
from varcon_loss.memory import CentroidMemory, remembered_centroids, update_memory


class ClassSummary(NamedTuple):
    """What a set of samples says about its classes."""

    index: ClassIndex
    slots: Tensor  # [N] slot of each sample
    sums: Tensor  # [S, D] sum of the rows of each class
    counts: Tensor  # [S] how many valid rows that is


class Match(NamedTuple):
    """Anchors and centroids brought together."""

    centroids: Centroids
    slots: Tensor  # [N] each anchor's own class
    own: Tensor | None  # [N, D] each anchor's own centroid where it is not centroids.unit[slots]
    labels: Labels  # the anchors' labels, fewer of them valid than before perhaps


def summarise(unit: Tensor, labels: Labels, num_classes: int | None) -> ClassSummary:
    """Index the classes of samples ``[N, D]`` (zero rows where not valid) and sum each of them."""
    index, slots = index_classes(labels, num_classes)
    sums = class_sums(unit, slots, index.size)
    counts = class_counts(slots, labels.valid, index.size, unit.dtype)
    return ClassSummary(index, slots, sums, counts)


def match_batch(
    summary: ClassSummary, unit: Tensor, labels: Labels, *, leave_one_out: bool
) -> Match:
    """The anchors are the samples that ``summary`` was made of."""
    centroids = unit_centroids(summary.sums, summary.counts, summary.index.may_be_sparse)
    if not leave_one_out:
        return Match(centroids, summary.slots, None, labels)
    own = centroids_without_self(unit, summary.sums, summary.slots)
    has_others = summary.counts.index_select(0, summary.slots) > 1
    return Match(centroids, summary.slots, own, narrow(labels, has_others))


def match_reference(summary: ClassSummary, labels: Labels) -> Match:
    """``summary`` is of the reference set; every anchor must find its class there."""
    centroids = unit_centroids(summary.sums, summary.counts, summary.index.may_be_sparse)
    slots, found = find_slots(labels, summary.index)
    return Match(centroids, slots, None, require_reference(labels, found))


def match_memory(
    memory: CentroidMemory,
    summary: ClassSummary | None,
    labels: Labels,
    dtype: torch.dtype,
    *,
    copy: bool,
) -> Match:
    """With a ``summary`` of the batch the memory learns from it first; without, it is only read.

    Anchors of classes that the memory does not know take no part.
    """
    shows: Tensor | None = None
    if summary is not None:
        classes = classes_of_slots(labels, summary.slots, summary.index.size)
        update_memory(memory, classes, summary.sums, summary.counts)
        # A class may still be unknown: its members cancel, or one is NaN, which must show.
        shows = ~summary.sums.isfinite().all(1).index_select(0, summary.slots)
    known = memory.seen.index_select(0, labels.values) > 0
    if shows is not None:
        known = known | shows
    centroids = remembered_centroids(memory, dtype, copy=copy)
    return Match(centroids, labels.values, None, narrow(labels, known))
