"""Which centroids does the softmax run over, and which of them is each anchor's own?

Three answers: the batch's own (the paper), a reference set's, or a memory's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from varcon_loss import fused
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
from varcon_loss.rows import Samples


class ClassSummary(NamedTuple):
    """What a set of samples says about its classes."""

    classes: ClassIndex
    slots: Tensor  # [N] slot of each sample
    sums: Tensor  # [S, D] sum of the rows of each class
    counts: Tensor | None  # [S] how many valid rows that is; None: at least one in every slot
    centroids: Centroids | None = None  # where they are there already


class Match(NamedTuple):
    """Anchors and centroids brought together."""

    centroids: Centroids
    slots: Tensor  # [N] each anchor's own class
    own: Tensor | None  # [N, D] each anchor's own centroid where it is not centroids.unit[slots]
    labels: Labels  # the anchors' labels, fewer of them valid than before perhaps
    kept: Tensor | None  # [S] bool, the classes whose members take part; None: all


def summarise(
    samples: Samples, labels: Labels, num_classes: int | None, *, count: bool
) -> ClassSummary:
    """Index the classes of samples ``[N, D]`` and sum each of them.

    ``count`` where the number of samples matters, not only that there are some.
    """
    index, slots = index_classes(labels, num_classes)
    assert samples.unit is not None
    counts = None
    if count or index.may_be_sparse:
        counts = class_counts(slots, labels.valid, index.size, samples.dtype)
    return ClassSummary(index, slots, class_sums(samples.unit, slots, index.size), counts)


def summarise_fused(
    features: Tensor, sorted_labels: fused.SortedLabels, *, normalize: bool
) -> tuple[Samples, ClassSummary]:
    """`summarise` by the kernels, on features as they come: lengths and centroids fall out too."""
    _, index, slots, groups = sorted_labels
    sums, counts, unit, norms = fused.class_sums(features, *groups, normalize)
    assert index.num_present is not None
    centroids = Centroids(unit, None, index.num_present, True)
    samples = Samples(features, None, norms if normalize else None)
    return samples, ClassSummary(index, slots, sums, counts, centroids)


def _centroids(summary: ClassSummary) -> Centroids:
    if summary.centroids is not None:
        return summary.centroids
    index = summary.classes
    counts = summary.counts if index.may_be_sparse else None
    return unit_centroids(summary.sums, counts, packed=index.packed)


def match_batch(
    summary: ClassSummary, samples: Samples, labels: Labels, *, leave_one_out: bool
) -> Match:
    """The anchors are among the samples that ``summary`` was made of, in ``summary.slots``."""
    slots, counts = summary.slots, summary.counts
    centroids = _centroids(summary)
    if not leave_one_out:
        return Match(centroids, slots, None, labels, None)
    assert counts is not None
    kept = counts > 1
    own = centroids_without_self(samples.unit_rows(labels.valid), summary.sums, slots)
    return Match(centroids, slots, own, narrow(labels, kept.index_select(0, slots)), kept)


def match_reference(summary: ClassSummary, labels: Labels) -> Match:
    """``summary`` is of the reference set; every anchor must find its class there."""
    slots, found = find_slots(labels, summary.classes)
    labels = require_reference(labels, found)
    centroids = _centroids(summary)
    return Match(centroids, slots, None, labels, None)


def match_memory(
    memory: CentroidMemory, labels: Labels, dtype: torch.dtype, *, copy: bool
) -> Match:
    """The memory as it is; anchors of classes that it does not know take no part."""
    labels = narrow(labels, memory.seen.index_select(0, labels.values) > 0)
    centroids, slots = remembered_centroids(memory, labels.values, dtype, copy=copy)
    return Match(centroids, slots, None, labels, None)


def match_learning_memory(
    memory: CentroidMemory,
    summary: ClassSummary,
    labels: Labels,
    dtype: torch.dtype,
    *,
    classes: Tensor | None,
    copy: bool,
) -> Match:
    """The memory after it has learned from the batch, whose slots hold ``classes`` ``[S]``.

    A class may still be unknown then: if its members cancel, they take no part; if one of them is
    NaN, they do, so that it shows.
    """
    if classes is None:
        classes = classes_of_slots(labels, summary.slots, summary.classes.size)
    assert summary.counts is not None
    update_memory(memory, classes, summary.sums, summary.counts)
    known = memory.seen.index_select(0, classes) > 0
    kept = known | ~summary.sums.isfinite().all(1)
    labels = narrow(labels, kept.index_select(0, summary.slots))
    centroids, slots = remembered_centroids(memory, labels.values, dtype, copy=copy)
    return Match(centroids, slots, None, labels, kept)
