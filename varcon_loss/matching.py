"""Which centroids does the softmax run over, and which of them is each anchor's own?

Three answers: the batch's own (the paper), a reference set's, or a memory's.
"""

from typing import Any

import torch
from torch import Tensor

from varcon_loss.classes import Classes, centroids_without_self, find_slots
from varcon_loss.distributed import tell_of_failure
from varcon_loss.memory import CentroidMemory, remembered_centroids, update_memory
from varcon_loss.options import Options
from varcon_loss.readable import values_may_be_read
from varcon_loss.rows import Rows
from varcon_loss.samples import Samples
from varcon_loss.soft_labels import SoftLabels, class_masses, in_slots, row_totals


def match_batch(anchors: Samples, classes: Classes, options: Options) -> Rows:
    """The anchors are among the samples that ``classes`` were made of."""
    centroids = classes.find_centroids()
    if isinstance(anchors.labels, SoftLabels):
        soft, weight = _by_slot(anchors.labels, classes, options)
        return Rows(anchors=anchors, slots=soft, centroids=centroids, weight=weight)
    slots = _slots(anchors, classes)
    if not options.leave_one_out:
        return Rows(anchors=anchors, slots=slots, centroids=centroids)
    kept = classes.known_counts() > 1
    own = centroids_without_self(anchors.unit_rows(classes.sums.dtype), classes.sums, slots)
    anchors = anchors.narrowed(kept.index_select(0, slots))
    return Rows(anchors=anchors, slots=slots, centroids=centroids, own=own, kept=kept)


def match_reference(
    anchors: Samples, members: Samples, classes: Classes, options: Options, group: Any
) -> Rows:
    """The ``members`` of ``classes`` are a reference set, where every anchor must find its class.

    Raises:
        ValueError: one does not, on a CPU in eager mode. Elsewhere it is marked as broken.
        RuntimeError: one does not on another rank of the ``group``.
    """
    labels, weight = anchors.labels, None
    if isinstance(labels, SoftLabels):
        unknown = ~_known_classes(classes, options)
        slots, weight = _by_slot(labels, classes, options)
        missing = row_totals(labels, unknown.to(classes.sums.dtype)) > 0
    else:
        unknown = None
        slots, found = find_slots(labels, classes.lookup)
        missing = ~found if anchors.valid is None else ~found & anchors.valid
    anywhere = None if group is None else tell_of_failure(group, missing.any())
    if not values_may_be_read(missing):
        broken = missing if anchors.broken is None else missing | anchors.broken
        anchors = anchors.narrowed(~missing, broken)
        # A reference that cannot be is in every loss; where there are ranks `failed` tells.
        spoils = members.broken.any() if members.broken is not None and group is None else None
        anchors = anchors.spoilt(spoils).spoilt(classes.failed).spoilt(anywhere)
    elif bool(missing.any()):
        if isinstance(labels, SoftLabels) and unknown is not None:
            mass = class_masses(labels, len(unknown), classes.sums.dtype)
            absent = ((mass > 0) & unknown).nonzero().squeeze(1).tolist()
            way_out = "give anchors without one a row of zeros"
        else:
            assert isinstance(labels, Tensor)
            absent = torch.unique(labels[missing]).tolist()
            way_out = "mark anchors without one with ignore_index"
        listed = ", ".join(map(str, absent[:5])) + (", ..." if len(absent) > 5 else "")
        raise ValueError(
            f"ref_labels lack label {listed}, which labels contain: every anchor needs a "
            f"reference of its class ({way_out})"
        )
    centroids = classes.find_centroids()
    return Rows(anchors=anchors, slots=slots, centroids=centroids, weight=weight)


def match_memory(
    anchors: Samples,
    classes: Classes | None,
    memory: CentroidMemory,
    options: Options,
    dtype: torch.dtype,
    *,
    copy: bool,  # for implementations whose backward reads centroids, which the next call changes
) -> Rows:
    """The memory, after it has learned from ``classes`` where there are any.

    Anchors of classes that it does not know take no part. After learning, such a class is one
    whose members cancel; if one of them is NaN, they do take part, so that it shows.
    """
    own_labels, kept = anchors.labels, None
    if classes is not None:
        anchors = anchors.spoilt(classes.failed)
        # Not in compiled graphs: Inductor's C++ for CPUs fails on the plain copy into the memory.
        in_order = classes.lookup.in_order() and not torch.compiler.is_compiling()
        labels = None if in_order else classes.slot_labels()
        broken = update_memory(memory, labels, classes.sums, classes.known_counts())
        seen = memory.seen if labels is None else memory.seen.index_select(0, labels)
        kept = (seen > 0) | broken
    centroids, remembered = remembered_centroids(memory, dtype, copy=copy)
    if isinstance(own_labels, SoftLabels):
        known = memory.seen > 0
        if classes is not None and kept is not None:
            known = known.index_put((classes.slot_labels(),), kept)
        anchors = anchors.narrowed(row_totals(own_labels, known.to(dtype)) > 0)
        soft, weight = _select(own_labels, options.weight, remembered, dtype)
        # No `kept`: the mean divides by rows, which the shares of classes do not count.
        return Rows(anchors=anchors, slots=soft, centroids=centroids, weight=weight)
    if kept is None or classes is None:
        anchors = anchors.narrowed(memory.seen.index_select(0, own_labels) > 0)
    else:
        anchors = anchors.narrowed(kept.index_select(0, _slots(anchors, classes)))
    if remembered is not None:
        slots = torch.searchsorted(remembered, own_labels).clamp_max(len(remembered) - 1)
    else:  # a copy of the caller's labels: autograd keeps slots
        slots = own_labels.clone() if values_may_be_read(own_labels) else own_labels
    return Rows(anchors=anchors, slots=slots, centroids=centroids, kept=kept)


def _slots(anchors: Samples, classes: Classes) -> Tensor:
    """Where the classes are that the anchors are members of; if of all ranks, to be looked up."""
    if classes.slots is not None:
        return classes.slots
    assert isinstance(anchors.labels, Tensor)
    return find_slots(anchors.labels, classes.lookup)[0]


def _by_slot(
    soft: SoftLabels, classes: Classes, options: Options
) -> tuple[SoftLabels, Tensor | None]:
    """The same shares, and class weights ``[S]`` where there are any, in the order of slots."""
    labels, size = classes.slot_labels(), classes.lookup.size
    # Slots are classes where nobody has left any out.
    every = size == options.num_classes and values_may_be_read(labels)
    in_order = every or classes.lookup.in_order()
    return _select(soft, options.weight, None if in_order else labels, classes.sums.dtype)


def _select(
    soft: SoftLabels, weight: Tensor | None, classes: Tensor | None, dtype: torch.dtype
) -> tuple[SoftLabels, Tensor | None]:
    """Soft labels and weights of ``classes`` ``[S]``; None: of all."""
    if classes is None:  # a copy of the weights: autograd keeps them, and the caller's may change
        return soft, None if weight is None else weight.to(dtype, copy=True)
    weight = None if weight is None else weight.to(dtype).index_select(0, classes)
    return in_slots(soft, classes), weight


def _known_classes(classes: Classes, options: Options) -> Tensor:
    """Which classes have a slot, ``[C]`` bool."""
    lookup = classes.lookup
    if lookup.in_order():
        assert lookup.present is not None
        return lookup.present
    if lookup.table is not None:
        return lookup.table >= 0
    assert lookup.ascending is not None
    assert options.num_classes is not None
    known = torch.zeros(options.num_classes, dtype=torch.bool, device=lookup.ascending.device)
    return known if lookup.gaps != "none" else known.index_fill_(0, lookup.ascending, True)
