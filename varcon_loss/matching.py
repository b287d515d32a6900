"""Which centroids does the softmax run over, and which of them is each anchor's own?

Three answers: the batch's own (the paper), a reference set's, or a memory's.
"""

import torch
from torch import Tensor

from varcon_loss.classes import Classes, centroids_without_self, find_slots
from varcon_loss.memory import CentroidMemory, remembered_centroids, update_memory
from varcon_loss.readable import values_may_be_read
from varcon_loss.rows import Rows
from varcon_loss.samples import Samples


def match_batch(anchors: Samples, classes: Classes, *, leave_one_out: bool) -> Rows:
    """The anchors are among the samples that ``classes`` were made of."""
    slots, centroids = _slots(anchors, classes), classes.find_centroids()
    if not leave_one_out:
        return Rows(anchors=anchors, slots=slots, centroids=centroids)
    assert classes.counts is not None
    kept = classes.counts > 1
    own = centroids_without_self(anchors.unit_rows(classes.sums.dtype), classes.sums, slots)
    anchors = anchors.narrowed(kept.index_select(0, slots))
    return Rows(anchors=anchors, slots=slots, centroids=centroids, own=own, kept=kept)


def match_reference(anchors: Samples, classes: Classes) -> Rows:
    """``classes`` are of the reference set; every anchor must find its class there.

    Raises:
        ValueError: one does not, on a CPU in eager mode. Elsewhere it is marked as broken.
    """
    slots, found = find_slots(anchors.labels, classes.lookup)
    missing = ~found if anchors.valid is None else ~found & anchors.valid
    if not values_may_be_read(missing):
        broken = missing if anchors.broken is None else missing | anchors.broken
        anchors = anchors.narrowed(found, broken)
    elif bool(missing.any()):
        absent = torch.unique(anchors.labels[missing]).tolist()
        listed = ", ".join(map(str, absent[:5])) + (", ..." if len(absent) > 5 else "")
        raise ValueError(
            f"ref_labels lack label {listed}, which labels contain: every anchor needs a "
            "reference of its class (mark anchors without one with ignore_index)"
        )
    return Rows(anchors=anchors, slots=slots, centroids=classes.find_centroids())


def match_memory(
    anchors: Samples,
    classes: Classes | None,
    memory: CentroidMemory,
    dtype: torch.dtype,
    *,
    copy: bool,  # for implementations whose backward reads centroids, which the next call changes
) -> Rows:
    """The memory, after it has learned from ``classes`` where there are any.

    Anchors of classes that it does not know take no part. After learning, such a class is one
    whose members cancel; if one of them is NaN, they do take part, so that it shows.
    """
    kept = None
    if classes is None:
        anchors = anchors.narrowed(memory.seen.index_select(0, anchors.labels) > 0)
    else:
        labels, slots = classes.slot_labels(), _slots(anchors, classes)
        assert classes.counts is not None
        update_memory(memory, labels, classes.sums, classes.counts)
        known = memory.seen.index_select(0, labels) > 0
        kept = known | ~classes.sums.isfinite().all(1)
        anchors = anchors.narrowed(kept.index_select(0, slots))
    centroids, slots = remembered_centroids(memory, anchors.labels, dtype, copy=copy)
    return Rows(anchors=anchors, slots=slots, centroids=centroids, kept=kept)


def _slots(anchors: Samples, classes: Classes) -> Tensor:
    """Where the anchors' classes are: known, unless the classes are those of all ranks."""
    if anchors.slots is not None and classes.members is not None:
        return anchors.slots
    return find_slots(anchors.labels, classes.lookup)[0]
