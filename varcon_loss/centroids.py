"""Classes as sums of unit embeddings, and the unit centroids ``w_k`` that the softmax runs over.

Sums add up: over samples, chunks and ranks, and, decayed, over time. No gradient flows here.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from varcon_loss import fused
from varcon_loss.labels import Labels
from varcon_loss.readable import values_may_be_read

# float32 adds so many rows one by one; longer sums go on in float64.
ROWS_A_SUM = 8192
# Squares of lengths between these keep their digits in float32.
SAFE_LENGTHS = (1e-15, 1e15)


class Classes(NamedTuple):
    """What a set of samples adds to its classes: one row a class, or all classes."""

    sums: Tensor  # [S, D] of unit embeddings
    counts: Tensor  # [S] samples (any dtype), or shares of them; 0: the row is empty
    names: Tensor | None  # [S] class of each row, ascending; None: row k is class k

    def of_all(self, num_classes: int) -> "Classes":
        """The same with a row for each class, in order."""
        if self.names is None:
            return self
        # An empty row may have a name beyond the last class.
        sums = self.sums.new_zeros(num_classes + 1, self.sums.shape[1])
        counts = self.counts.new_zeros(num_classes + 1).index_copy_(0, self.names, self.counts)
        return Classes(sums.index_copy_(0, self.names, self.sums)[:-1], counts[:-1], None)

    def total(self, kept: Tensor, weight: Tensor | None) -> Tensor:
        """What the samples of the classes ``kept`` ``[S]`` count in a mean, 0-d."""
        counts = self.counts.to(self.sums.dtype) * kept
        if weight is not None:
            weight = weight.to(counts.dtype)
            if self.names is not None:  # empty rows have names beyond the last class
                weight = weight[self.names.clamp_max(weight.shape[0] - 1)]
            counts = counts * weight
        return counts.sum()


class Table(NamedTuple):
    """What the softmax of Eq. 8 runs over."""

    w: Tensor  # [S, D] unit centroids; zero where a row is empty
    present: Tensor | None  # [S] bool, the rows that are not empty; None: all
    names: Tensor | None  # as in `Classes`

    def find(self, classes: Tensor) -> Tensor:
        """Rows of class numbers of any shape; some row in range for a class that it lacks."""
        if self.names is None:
            return classes
        return torch.searchsorted(self.names, classes).clamp_max_(self.names.shape[0] - 1)

    def found(self, labels: Labels) -> Tensor:
        """Which of the labels' classes have a row, ``[N, M]`` or ``[C]`` bool."""
        classes, shares = labels.classes, labels.shares
        if classes is None:
            classes = torch.arange(0 if shares is None else shares.shape[1], device=self.w.device)
        slots = self.find(classes)
        there = None if self.present is None else self.present[slots]
        if self.names is None:
            return torch.ones_like(slots, dtype=torch.bool) if there is None else there
        found = self.names[slots] == classes
        return found if there is None else found & there

    def knows(self, labels: Labels) -> Tensor:
        """Which samples have a share of a class that has a row, ``[N]`` bool."""
        found = self.found(labels)
        return found.squeeze(1) if labels.shares is None else (labels.shares * found).sum(1) > 0

    def lacks(self, labels: Labels) -> Tensor:
        """Which valid samples have a share of a class that has no row, ``[N]`` bool."""
        lost = ~self.found(labels)
        lost = lost.squeeze(1) if labels.shares is None else (labels.shares * lost).sum(1) > 0
        return lost if labels.valid is None else lost & labels.valid

    def missing(self, labels: Labels) -> list[int]:
        """The classes that valid samples have and the table lacks, ascending. It reads values."""
        lost = ~self.found(labels) & self.lacks(labels).unsqueeze(1)
        if labels.shares is not None:
            lost = lost & (labels.shares > 0)
        if labels.classes is None:
            return lost.any(0).nonzero().flatten().tolist()
        return labels.classes[lost].unique().tolist()

    def holds(self, classes: Classes) -> Tensor:
        """Which rows of ``classes`` are not empty, and have a row here, ``[S]`` bool."""
        filled, names = classes.counts > 0, classes.names
        names = torch.arange(len(filled), device=filled.device) if names is None else names
        if self.names is None:  # empty rows have names beyond the last class
            names = names.clamp_max(self.w.shape[0] - 1)
        return filled & self.found(Labels(names, None))

    def place(
        self, labels: Labels, slots: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """``w`` and ``present``, and in their rows the labels' ``slots`` and ``shares``.

        ``slots`` are those of integers, where they are known. The slots of a sample are different
        ones, but for classes that the table lacks: those go to an empty row.
        """
        w, present, shares = self.w, self.present, labels.shares
        if shares is None:
            slots = self.find(labels.class_of().unsqueeze(1)) if slots is None else slots
            return w, present, slots, None
        if labels.classes is None:
            if self.names is not None:
                shares = shares.index_select(1, self.names.clamp_max(shares.shape[1] - 1))
            return w, present, None, shares if present is None else shares * present
        slots, found = self.find(labels.classes), self.found(labels)
        if self.names is not None:
            slots = torch.where(found, slots, w.shape[0])
            there = torch.ones_like(self.names, dtype=torch.bool) if present is None else present
            w = torch.cat((w, w.new_zeros(1, w.shape[1])))
            present = torch.cat((there, there.new_zeros(1)))
        return w, present, slots, shares * found

    def num_present(self) -> Tensor:
        """``K``, 0-d int64."""
        if self.present is not None:
            return self.present.sum()
        return torch.full((), self.w.shape[0], dtype=torch.int64, device=self.w.device)


def unit(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows ``[N, D]`` divided by their lengths, and the lengths ``[N]``, both in ``dtype``.

    A row of zeros stays one, and has length *infinity*, so that a gradient divided by it is zero.
    A row with NaN or infinities becomes NaN, as its length.
    """
    if values_may_be_read(rows):
        lengths = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
        if lengths.numel() == 0:
            return rows.to(dtype, copy=True), lengths
        shortest, longest = lengths.aminmax()
        if SAFE_LENGTHS[0] < float(shortest) and float(longest) < SAFE_LENGTHS[1]:
            return rows.to(dtype) / lengths.unsqueeze(1), lengths
    # Divided by its largest entry first, a row anywhere from 1e-38 to 1e38 has a square.
    largest = torch.linalg.vector_norm(rows, ord=float("inf"), dim=1, keepdim=True).to(dtype)
    zero = largest == 0
    scale = largest.masked_fill(zero, 1.0)
    scaled = rows / scale
    lengths = torch.linalg.vector_norm(scaled, dim=1, keepdim=True).masked_fill_(zero, torch.inf)
    return scaled / lengths, (lengths * scale).squeeze(1)


def table_of(classes: Classes, dtype: torch.dtype) -> Table:
    """The directions of the class means. A class whose members cancel out has a zero centroid."""
    counts, present = classes.counts, None
    if not (values_may_be_read(counts) and float(counts.min()) > 0):
        present = counts > 0
    return Table(unit(classes.sums, dtype)[0], present, classes.names)


def own_without_self(z: Tensor, slots: Tensor, classes: Classes) -> Tensor:
    """Leave-one-out: the centroid of the *other* members of each sample's class, ``[N, D]``."""
    return unit(classes.sums.index_select(0, slots) - z, z.dtype)[0]


def sum_classes(
    z: Tensor, labels: Labels, num_classes: int | None, *, impl: str
) -> tuple[Classes, Tensor | None]:
    """Add up ``z`` ``[N, D]`` by class. Rows that take no part must be zero vectors.

    Args:
        z: unit embeddings.
        labels: of them.
        num_classes: ``C``, if it is known.
        impl: who adds.

    Returns:
        The classes, and the rows ``[N, M]`` that the labels are of; None: of all.
    """
    if labels.classes is None:
        table: Any = labels.shares
        if labels.broken is not None:  # an invalid share is in every sum
            table = table.masked_fill(labels.broken.any(), torch.nan)
        size, ones = table.shape[1], z.new_ones(z.shape[0], 1)
        counts = add_rows(ones, table, size).squeeze(1)
        return Classes(add_rows(z, table, size), counts, None), None
    valid = labels.valid if labels.shares is None else labels.shares > 0
    names, slots, counts = name_rows(labels.classes, valid, num_classes)
    slots = Table(z, None, names).find(labels.classes) if slots is None else slots
    size: Any = num_classes if names is None else names.shape[0]
    if counts is None:
        if labels.shares is not None:
            ones = labels.shares  # of rows that take no part: zeros
        elif labels.valid is not None:
            ones = labels.valid.to(z.dtype)
        else:
            ones = z.new_ones(slots.shape)
        if slots.shape[0] >= 2**24:  # adding 1 to a float32 of 2^24 changes nothing
            ones = ones.to(widest(z.device))
        counts = add_rows(ones.flatten(), slots.flatten(), size).to(z.dtype)
    add = fused.class_sums if impl == "triton" and not torch.compiler.is_compiling() else add_rows
    if labels.shares is None:
        return Classes(add(z, slots.squeeze(1), size), counts, names), slots
    sums = z.new_zeros(size, z.shape[1])
    for slot, share in zip(slots.unbind(1), labels.shares.split(1, dim=1), strict=True):
        sums += add(z * share, slot, size)
    return Classes(sums, counts, names), slots


def name_rows(
    classes: Tensor, valid: Tensor | None, num_classes: int | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The classes present ``[S]``, ascending; None: all ``num_classes`` have a row.

    Where values may not be read, ``S`` is the bound ``min(num_classes, N)``, and rows left over are
    empty. Without ``num_classes`` a GPU waits once. Where it costs nothing, the row of each of the
    ``classes`` and the number of classes in each row come too.
    """
    if num_classes is None or values_may_be_read(classes):
        if valid is None:
            if classes.numel() > 0:
                return torch.unique(classes, return_inverse=True, return_counts=True)
        elif values_may_be_read(classes):
            classes = classes[valid]
        names = torch.unique(classes)
        return names if names.shape[0] > 0 else names.new_zeros(1), None, None
    classes = classes.flatten()
    compiling = torch.compiler.is_compiling()  # a graph for any number of rows must not ask
    if not compiling and num_classes <= classes.shape[0]:
        return None, None, None
    marked = classes if valid is None else torch.where(valid.flatten(), classes, num_classes)
    ordered = marked.sort().values
    slots = torch.cat((ordered[:1] * 0, ordered.diff().ne(0).to(ordered.dtype))).cumsum(0)
    size = min(num_classes, classes.shape[0])
    names = ordered.new_full((size + 1,), num_classes)
    return names.scatter_(0, slots.clamp_max(size), ordered)[: max(1, size)], None, None


def widest(device: torch.device) -> torch.dtype:
    """float64, which Apple's GPUs lack."""
    return torch.float32 if device.type == "mps" else torch.float64


def add_rows(rows: Tensor, where: Tensor, size: int) -> Tensor:
    """Rows ``[N, ...]`` added by slot ``[N]``, or by shares ``[N, size]``: ``[size, ...]``.

    A float32 sum is off by at most what adding `ROWS_A_SUM` rows costs, whatever ``N``.
    """
    if torch.compiler.is_compiling():
        return _added_rows(rows, where, size)
    if rows.dtype != torch.float32 or rows.shape[0] <= ROWS_A_SUM:
        return _add(rows, where, size)
    total = rows.new_zeros(size, *rows.shape[1:], dtype=widest(rows.device))
    for part, theirs in zip(rows.split(ROWS_A_SUM), where.split(ROWS_A_SUM), strict=True):
        total += _add(part, theirs, size)
    return total.to(rows.dtype)


def _add(rows: Tensor, where: Tensor, size: int) -> Tensor:
    if where.is_floating_point():
        return where.T @ rows
    return rows.new_zeros(size, *rows.shape[1:]).index_add_(0, where, rows)


# Inductor compiles sums by index to wrong code: torch 2.6 on a CPU whatever the sizes, and later
# ones in some cases (pytorch issues 171493, 191571, 191837). It does not look into an operator.
@torch.library.custom_op("varcon_loss::added_rows", mutates_args=())
def _added_rows(rows: Tensor, where: Tensor, size: int) -> Tensor:
    return add_rows(rows, where, size)


@_added_rows.register_fake
def _(rows: Tensor, where: Tensor, size: int) -> Tensor:
    return rows.new_empty(size, *rows.shape[1:])
