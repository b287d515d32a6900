"""One entry a class: which are present, their sums and their unit centroids ``w_k``.

The loss only ever works with *slots*, dense numbers ``0 ... S - 1``; a label's value matters
nowhere else. ``S`` is the number of rows that the centroids have. On a CPU it is ``K``, the number
of classes present; where reading ``K`` would synchronise a GPU or break a compiled graph it is the
bound ``min(num_classes, N)``, and the slots from ``K`` on stay empty (the kernels do so for any
labels: they read ``K`` on the GPU). No gradient flows here.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from varcon_loss.norms import directions
from varcon_loss.options import Options
from varcon_loss.readable import values_may_be_read
from varcon_loss.records import changed
from varcon_loss.samples import Batch, Samples, read
from varcon_loss.soft_labels import SoftLabels, class_masses, in_slots, soft_sums
from varcon_loss.sums import class_counts, sum_slots


class ClassIndex(NamedTuple):
    """The classes present, as a way from a label to its slot."""

    size: int  # S, at least 1
    gaps: str  # which slots may be empty: "none", the "last" ones, or "anywhere"
    # The way is one of these two; without either each class has the slot of its number.
    ascending: Tensor | None = None  # [S] labels in order; empty slots repeat the last
    table: Tensor | None = None  # [C] slot of every class, -1 where absent
    present: Tensor | None = None  # [S] bool, the slots that are not empty, if "anywhere"
    num_present: Tensor | None = None  # 0-d int64, K; None: unknown

    # No property: the compiler of torch 2.6 does not trace one of a named tuple.
    def in_order(self) -> bool:
        """Are the slots the classes?"""
        return self.ascending is None and self.table is None

    def among(self, counts: Tensor) -> "ClassIndex":
        """The same, where the rows of each slot ``[S]`` are what tells which are empty."""
        return changed(self, present=counts > 0) if self.gaps == "anywhere" else self


class Centroids(NamedTuple):
    """The softmax of Eq. 8 runs over these."""

    unit: Tensor  # [S, D] unit length; zero rows where the slot is empty
    present: Tensor | None  # [S] bool; None: no slot is empty, or `packed` tells the fused sweep
    num_present: Tensor  # 0-d int64, K
    packed: bool  # are the first K slots the ones that are not empty?

    def empty(self) -> Tensor:
        """Which slots are, ``[S]`` bool."""
        if self.present is not None:
            return ~self.present
        return torch.arange(self.unit.shape[0], device=self.unit.device) >= self.num_present


class Classes(NamedTuple):
    """What a set of samples says about its classes."""

    lookup: ClassIndex
    sums: Tensor  # [S, D] sums of the unit rows; [0, D] from kernels that were not asked to count
    # [S] how many valid rows that is, in shares where labels are; None: at least one in each slot
    counts: Tensor | None
    slots: Tensor | None = None  # [N] int64, of those rows; None: of all ranks, or labels in shares
    centroids: Centroids | None = None  # where they are there already
    # 0-d bool: did another rank fail, where nobody may look? Then the sums are NaN
    failed: Tensor | None = None

    def known_counts(self) -> Tensor:
        """`counts`, where somebody asked for them or some slot may be empty."""
        assert self.counts is not None
        return self.counts

    def slot_labels(self) -> Tensor:
        """The label of each slot ``[S]``; of an empty one some class, to which it adds zeros."""
        table = self.lookup.table
        if self.lookup.ascending is not None:
            return self.lookup.ascending
        if table is None:
            return torch.arange(self.lookup.size, device=self.sums.device)
        places = torch.where(table < 0, self.lookup.size, table)
        labels = places.new_zeros(self.lookup.size + 1)
        numbers = torch.arange(len(places), device=places.device)
        return labels.scatter_(0, places, numbers)[:-1]

    def find_centroids(self) -> Centroids:
        """Directions of the sums, unless they were found along with them."""
        if self.centroids is not None:
            return self.centroids
        present = self.lookup.present
        if present is None and self.lookup.gaps != "none":
            present = self.known_counts() > 0
        return unit_centroids(self.sums, present, packed=self.lookup.gaps != "anywhere")


def summarise(
    batch: Batch, options: Options, dtype: torch.dtype, *, count: bool
) -> tuple[Samples, Classes]:
    """Read a batch, index its classes and sum each of them.

    ``count`` where the number of samples matters, not only that there are some.
    """
    samples = read(batch, options, dtype)
    unit = samples.unit_rows(dtype)
    if isinstance(samples.labels, SoftLabels):
        return samples, _summarise_soft(samples, samples.labels, unit, options)
    index, slots = index_classes(samples.labels, samples.valid, options.num_classes)
    counts = None
    if count or index.gaps != "none":
        counts = class_counts(slots, samples.valid, index.size, dtype)
    if counts is not None:
        index = index.among(counts)
    sums = sum_slots(unit, slots, samples.valid, index.size)
    return samples, Classes(lookup=index, sums=sums, counts=counts, slots=slots)


def _summarise_soft(samples: Samples, soft: SoftLabels, unit: Tensor, options: Options) -> Classes:
    """Classes with any share; their counts are sums of shares."""
    assert options.num_classes is not None
    counts = class_masses(soft, options.num_classes, unit.dtype)
    if not values_may_be_read(counts):
        index = ClassIndex(size=options.num_classes, gaps="anywhere", present=counts > 0)
    elif bool((counts > 0).all()):
        index, _ = list_classes(torch.arange(options.num_classes, device=unit.device))
    else:
        index, labels = list_classes(counts.nonzero().squeeze(1))
        soft, counts = in_slots(soft, labels), counts.index_select(0, labels)
    sums = soft_sums(soft, unit, index.size)
    if samples.broken is not None:  # what cannot be is in every sum
        sums = sums.masked_fill(samples.broken.any(), torch.nan)
    return Classes(lookup=index, sums=sums, counts=counts)


def list_classes(present: Tensor) -> tuple[ClassIndex, Tensor]:
    """Of the labels present, whose number may be read, and the label of each slot.

    Where there is none class 0 has the one slot, which is empty.
    """
    if len(present) > 0:
        return ClassIndex(size=len(present), gaps="none", ascending=present), present
    none = present.new_zeros(1)
    return ClassIndex(size=1, gaps="last", ascending=none, num_present=none[0]), none


def index_classes(
    labels: Tensor, valid: Tensor | None, num_classes: int | None
) -> tuple[ClassIndex, Tensor]:
    """The classes present among the valid labels ``[N]``, ascending, and the slots ``[N]`` of all.

    Labels that are not valid get some slot in range.
    """
    if num_classes is None or values_may_be_read(labels):
        # On a GPU this is the one place that synchronises: give num_classes to avoid it. It does so
        # once, and what is left out keeps a slot, which is empty.
        if labels.numel() > 0 and (valid is None or not values_may_be_read(labels)):
            ascending, slots = torch.unique(labels, return_inverse=True)
            gaps = "none" if valid is None else "anywhere"
            return ClassIndex(size=ascending.numel(), gaps=gaps, ascending=ascending), slots
        index, _ = list_classes(torch.unique(labels if valid is None else labels[valid]))
        return index, find_slots(labels, index)[0]
    # As many rows as classes: nothing is gained by leaving out those that are absent. A compiled
    # graph for any number of rows must not ask.
    if not torch.compiler.is_compiling() and num_classes <= labels.shape[0]:
        return ClassIndex(size=num_classes, gaps="anywhere"), labels
    marks = labels if valid is None else torch.where(valid, labels, num_classes)
    present = torch.zeros(num_classes + 1, dtype=torch.bool, device=labels.device)
    present = present.index_fill(0, marks, True)[:num_classes]
    table = torch.where(present, present.cumsum(0) - 1, -1)
    size = max(1, min(num_classes, labels.shape[0]))
    index = ClassIndex(size=size, gaps="last", table=table)
    return index, table.index_select(0, labels).clamp_min(0)


def find_slots(labels: Tensor, index: ClassIndex) -> tuple[Tensor, Tensor]:
    """Slots ``[N]`` in ``[0, S)``, and where the label's class was found ``[N]`` (bool).

    Labels that are not valid, and those whose class is absent, get some slot in range.
    """
    if index.in_order():
        assert index.present is not None
        return labels, index.present.index_select(0, labels)
    if index.table is not None:
        slots = index.table.index_select(0, labels)
        return slots.clamp_min(0), slots >= 0
    assert index.ascending is not None
    slots = torch.searchsorted(index.ascending, labels).clamp_max(index.size - 1)
    found = index.ascending.index_select(0, slots) == labels
    if index.present is not None:
        found = found & index.present.index_select(0, slots)
    return slots, found if index.num_present is None else found & (slots < index.num_present)


def unit_centroids(sums: Tensor, present: Tensor | None, *, packed: bool = True) -> Centroids:
    """Directions of the class means. A class whose members cancel out gets a zero centroid.

    ``present`` ``[S]`` tells the empty slots; None: there are none.
    """
    unit = directions(sums)
    if present is None:
        num_present = torch.full((), sums.shape[0], dtype=torch.int64, device=sums.device)
        return Centroids(unit=unit, present=None, num_present=num_present, packed=True)
    return Centroids(unit=unit, present=present, num_present=present.sum(), packed=packed)


def centroids_without_self(unit: Tensor, sums: Tensor, slots: Tensor) -> Tensor:
    """Leave-one-out: each row's own centroid made of the *other* members of its class, [N, D]."""
    others = sums.index_select(0, slots) - unit
    return directions(others)
