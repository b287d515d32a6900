"""Labels to class slots: which of the ``K`` classes present does each sample belong to?

The loss only ever works with *slots*, dense numbers ``0 ... S - 1``; a label's value matters
nowhere else. ``S`` is the number of rows that the centroids have. On a CPU it is ``K``, the number
of classes present; where reading ``K`` would synchronise a GPU or break a compiled graph it is the
bound ``min(num_classes, N)``, and the slots from ``K`` on stay empty (`fused.sort_labels` does so
for any labels: its kernels read ``K`` on the GPU).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from varcon_loss.readable import values_may_be_read


class Labels(NamedTuple):
    """Labels ``[N]`` as int64, and what is known of them."""

    values: Tensor  # [N] int64, made safe to index with where `num_classes` is given
    valid: Tensor | None  # [N] bool, False where ignored or out of range; None: all are valid
    out_of_range: Tensor | None  # [N] bool; None: all are known to be in range
    divisor: Tensor | None = None  # 0-d float32, how many are valid, at least 1; None: unknown


class ClassIndex(NamedTuple):
    """The classes present, as a way from a label to its slot."""

    size: int  # S, at least 1
    may_be_sparse: bool  # can a slot be empty?
    table: Tensor | None  # [C] slot of every class, -1 where absent
    classes: Tensor | None  # [S] sorted labels, without a table; empty slots repeat the last
    packed: bool = True  # do the empty slots come last?
    num_present: Tensor | None = None  # 0-d int64, K; None: unknown


def read_labels(
    labels: Tensor, num_classes: int | None, ignore_index: int | None, *, name: str = "labels"
) -> Labels:
    """Cast to int64, then find the ignored labels and those outside ``[0, num_classes)``.

    Raises:
        ValueError: a label out of range, on a CPU in eager mode. Elsewhere it is marked in
            ``out_of_range`` and its row's loss becomes NaN.
    """
    values = labels.to(torch.int64)
    if not torch.compiler.is_compiling() and values.is_inference():
        values = values.clone()  # autograd keeps none that were made in inference mode
    readable = values_may_be_read(values)
    if readable and values.numel() > 0:
        lowest, highest = (int(extreme) for extreme in values.aminmax())
        none_ignored = ignore_index is None or not lowest <= ignore_index <= highest
        if none_ignored and (num_classes is None or 0 <= lowest <= highest < num_classes):
            return Labels(values, None, None)
    valid = None if ignore_index is None else values != ignore_index
    if readable and valid is not None and bool(valid.all()):
        valid = None
    if num_classes is None:
        return Labels(values, valid, None)
    out_of_range = (values < 0) | (values >= num_classes)
    if valid is not None:
        out_of_range &= valid
    if readable:
        if bool(out_of_range.any()):
            example = int(values[out_of_range][0])
            hint = "" if ignore_index is None else f" (or ignore_index={ignore_index})"
            raise ValueError(
                f"{name} must lie in [0, {num_classes}){hint}, got {example}: "
                "raise num_classes, or leave it out to allow any values"
            )
        out_of_range = None
    else:
        valid = ~out_of_range if valid is None else valid & ~out_of_range
    if valid is not None:
        values = values.masked_fill(~valid, 0)
    return Labels(values, valid, out_of_range)


def index_classes(labels: Labels, num_classes: int | None) -> tuple[ClassIndex, Tensor]:
    """The classes present among the valid labels, ascending, and the slots ``[N]`` of the labels.

    Invalid labels get some slot in range.
    """
    values, valid = labels.values, labels.valid
    if num_classes is None or values_may_be_read(values):
        # On a GPU this is the one place that synchronises: give num_classes to avoid it.
        if valid is None and values.numel() > 0:
            classes, slots = torch.unique(values, return_inverse=True)
            return ClassIndex(classes.numel(), False, None, classes), slots
        classes = torch.unique(values if valid is None else values[valid])
        index = ClassIndex(max(1, classes.numel()), classes.numel() == 0, None, classes)
        return index, find_slots(labels, index)[0]
    marks = values if valid is None else values.masked_fill(~valid, num_classes)
    present = torch.zeros(num_classes + 1, dtype=torch.bool, device=values.device)
    present = present.index_fill(0, marks, True)[:num_classes]
    table = (present.cumsum(0) - 1).masked_fill(~present, -1)
    index = ClassIndex(max(1, min(num_classes, values.shape[0])), True, table, None)
    return index, find_slots(labels, index)[0]


def classes_of_slots(labels: Labels, slots: Tensor, size: int) -> Tensor:
    """The label in each slot, ``[S]``; 0 in empty slots."""
    marks = slots if labels.valid is None else slots.masked_fill(~labels.valid, size)
    return marks.new_zeros(size + 1).scatter_(0, marks, labels.values)[:size]


def find_slots(labels: Labels, index: ClassIndex) -> tuple[Tensor, Tensor]:
    """Slots ``[N]`` in ``[0, S)``, and where the label's class was found ``[N]`` (bool).

    Invalid labels, and those whose class is absent, get some slot in range.
    """
    values = labels.values
    if index.table is not None:
        slots = index.table.index_select(0, values)
        return slots.clamp_min(0), slots >= 0
    assert index.classes is not None
    if len(index.classes) == 0:
        return torch.zeros_like(values), torch.zeros_like(values, dtype=torch.bool)
    slots = torch.searchsorted(index.classes, values).clamp_max(index.size - 1)
    found = index.classes.index_select(0, slots) == values
    return slots, found if index.num_present is None else found & (slots < index.num_present)


def narrow(labels: Labels, kept: Tensor) -> Labels:
    """The same labels, valid only where ``kept`` ``[N]``."""
    if values_may_be_read(kept) and bool(kept.all()):
        return labels
    valid = kept if labels.valid is None else labels.valid & kept
    return Labels(labels.values, valid, labels.out_of_range)


def require_reference(labels: Labels, found: Tensor) -> Labels:
    """Anchors whose class the reference set lacks: an error, or ``out_of_range`` off the CPU."""
    missing = ~found if labels.valid is None else ~found & labels.valid
    if values_may_be_read(missing):
        if bool(missing.any()):
            absent = torch.unique(labels.values[missing]).tolist()
            listed = ", ".join(map(str, absent[:5])) + (", ..." if len(absent) > 5 else "")
            raise ValueError(
                f"ref_labels lack label {listed}, which labels contain: every anchor needs a "
                "reference of its class (mark anchors without one with ignore_index)"
            )
        return labels
    if labels.out_of_range is not None:
        missing = missing | labels.out_of_range
    values, valid, *_ = narrow(labels, found)
    return Labels(values, valid, missing)
