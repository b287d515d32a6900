"""Labels of either kind as class numbers and shares: an integer is one share of 1."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from varcon_loss.readable import values_may_be_read

MOST_SHARES = 8  # a row: with more, a table of all classes is faster
LARGEST_SHARE = 1.02  # two shares in bfloat16 may add up to as much


class Labels(NamedTuple):
    """The classes that each sample belongs to."""

    classes: Tensor | None  # [N, M] int64, different in a row; None: all classes, in order
    shares: Tensor | None  # [N, M]; None: 1 of one class
    valid: Tensor | None = None  # [N] bool, the samples that take part; None: all do
    broken: Tensor | None = None  # [N] bool, invalid, where values may not be read: NaN

    def class_of(self) -> Tensor:
        """``[N]``, of integer labels."""
        return self.classes.squeeze(1)  # pyright: ignore[reportOptionalMemberAccess]

    def weights(self, weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What each valid sample counts in a mean, ``[N]``, 0 for the others; None: 1."""
        if weight is None:
            return None
        if self.shares is None:
            rows = weight.to(dtype).index_select(0, self.class_of())
        else:
            rows = self.weighted(weight).shares.sum(1)  # pyright: ignore[reportOptionalMemberAccess]
        return rows if self.valid is None else rows.masked_fill(~self.valid, 0.0)

    def weighted(self, weight: Tensor) -> "Labels":
        """The same, with each share multiplied by the weight ``[C]`` of its class."""
        shares: Any = self.shares
        weight = weight.to(shares.dtype)
        weight = weight if self.classes is None else weight[self.classes]
        return Labels(self.classes, shares * weight, self.valid, self.broken)

    def broken_where(self, where: Tensor) -> "Labels":
        """The same, broken also ``where`` ``[N]`` or 0-d bool."""
        entries: Any = self.shares if self.classes is None else self.classes
        broken = where.expand(entries.shape[0]) if self.broken is None else self.broken | where
        return Labels(self.classes, self.shares, self.valid, broken)

    def valid_where(self, kept: Tensor) -> "Labels":
        """The same, valid only where ``kept`` ``[N]``."""
        if values_may_be_read(kept) and bool(kept.all()):
            return self
        valid = kept if self.valid is None else self.valid & kept
        return Labels(self.classes, self.shares, valid, self.broken)


def read_labels(
    labels: Tensor, views: int, num_classes: int | None, ignore_index: int | None,
    dtype: torch.dtype, name: str, columns_of: str | None,
) -> Labels:  # fmt: skip
    """Integers ``[B]`` or class probabilities ``[B, C]``, one row for each ``views`` samples.

    Args:
        labels: as the caller gave them, of an allowed dtype and shape.
        views: samples of each label, one after the other.
        num_classes: ``C``; None: integers of any value.
        ignore_index: the integer that takes part in nothing.
        dtype: of the shares.
        name: of the argument, for messages.
        columns_of: the argument whose columns say what ``num_classes`` is, for messages.

    Raises:
        ValueError: an invalid label, where values may be read. Elsewhere it is ``broken``.
    """
    labels = labels.detach()
    if labels.is_floating_point():
        read = _read_shares(labels, dtype, name)
    else:
        labels = labels.to(torch.int64).flatten()  # a column is as good
        read = _read_integers(labels, num_classes, ignore_index, name, columns_of)
    if views == 1:
        return read
    return Labels(*(None if x is None else x.repeat_interleave(views, 0) for x in read))


def _read_integers(
    labels: Tensor, num_classes: int | None, ignore_index: int | None, name: str,
    columns_of: str | None,
) -> Labels:  # fmt: skip
    valid = broken = None
    if not values_may_be_read(labels):
        valid = None if ignore_index is None else labels != ignore_index
        if num_classes is not None:
            safe = labels.clamp(0, num_classes - 1)
            in_range = safe == labels
            broken = ~in_range if valid is None else valid > in_range
            valid, labels = in_range if valid is None else valid & in_range, safe
        return Labels(labels.unsqueeze(1), None, valid, broken)
    if not torch.is_inference_mode_enabled() and labels.is_inference():
        labels = labels.clone()  # autograd keeps no tensor that inference mode made
    if labels.numel() == 0:
        return Labels(labels.unsqueeze(1), None)
    lowest, highest = (int(extreme) for extreme in labels.aminmax())
    if ignore_index is not None and lowest <= ignore_index <= highest:
        valid = labels != ignore_index
        valid = None if bool(valid.all()) else valid
    if num_classes is not None and not 0 <= lowest <= highest < num_classes:
        outside = (labels < 0) | (labels >= num_classes)
        outside = outside if valid is None else outside & valid
        if bool(outside.any()):
            got = int(labels[outside][0])
            way_out = "raise num_classes, or leave it out to allow any values"
            if columns_of is not None:
                way_out = f"give {columns_of} a column for each class"
            elif got < 0:
                way_out = f"give ignore_index={got} if it marks samples without a label"
            hint = "" if ignore_index is None else f" (or ignore_index={ignore_index})"
            raise ValueError(f"{name} must lie in [0, {num_classes}){hint}, got {got}: {way_out}")
    if valid is not None and num_classes is not None:
        labels = labels.masked_fill(~valid, 0)
    return Labels(labels.unsqueeze(1), None, valid)


def _read_shares(table: Tensor, dtype: torch.dtype, name: str) -> Labels:
    if table.shape[0] == 0:
        return Labels(None, table.to(dtype))
    lowest, highest = table.amin(1), table.amax(1)  # on a CPU a tenth of aminmax's time
    valid = highest != 0
    allowed = (lowest >= 0) & (highest < LARGEST_SHARE)  # also False for NaN
    if not values_may_be_read(table):
        # An entry of 2 has a meaning, as two samples; what is no number of samples is NaN.
        return Labels(None, table.to(dtype), valid, ~((lowest >= 0) & (highest < torch.inf)))
    if not bool(allowed.all()):
        row = int((~allowed).nonzero()[0])
        column = int((~((table[row] >= 0) & (table[row] < LARGEST_SHARE))).nonzero()[0])
        raise ValueError(
            f"{name} [N, C] in floating point are class probabilities, from 0 to 1, got "
            f"{float(table[row, column])} for sample {row} and class {column}: class numbers are "
            f"integers ({name}.long(), one a sample); a sample without a label has a row of zeros"
        )
    all_valid = None if bool(valid.all()) else valid
    most, limit = 1, min(MOST_SHARES, table.shape[1] // 4)
    for rows in (table[:1], *table.split(1024)):  # the first row tells most tables of all classes
        most = max(most, int(rows.count_nonzero(1).amax()))
        if most > limit:
            return Labels(None, table.to(dtype), all_valid)
    shares, classes = table.to(dtype).topk(most)
    return Labels(classes, shares, all_valid)
