"""One entry a sample: features without views, labels read, lengths."""

from typing import NamedTuple

import torch
from torch import Tensor

from varcon_loss.norms import normalized
from varcon_loss.options import Options
from varcon_loss.readable import keepable, values_may_be_read
from varcon_loss.records import changed
from varcon_loss.soft_labels import SoftLabels, read_soft_labels


class Batch(NamedTuple):
    """What the caller gave, without views."""

    features: Tensor  # [N, D]
    # [N] int64, side by side; or class probabilities [R, C], a row for each `views` samples
    labels: Tensor
    name: str  # of the labels, in messages
    views: int = 1
    columns_of: str | None = None  # the other labels, if they say how many classes there are


class Samples(NamedTuple):
    """A batch made ready. Everything but ``features`` is free of gradient.

    Rows that take no part are zero vectors in ``unit``, and hold what they held in ``features``.
    The fused kernels read the features themselves: there ``unit`` is None.
    """

    features: Tensor  # [N, D] as the caller gave them, any float dtype; the gradient's way out
    # [N] int64, made safe to index with where `num_classes` is given; or shares of classes
    labels: Tensor | SoftLabels
    valid: Tensor | None = None  # [N] bool, False where ignored or unusable; None: all are valid
    broken: Tensor | None = None  # [N] bool, labels that cannot be: their loss is NaN; None: none
    num_valid: Tensor | None = None  # 0-d float32, at least 1; None: not counted
    unit: Tensor | None = None  # [N, D] z: the features divided by `norms`, in float32 or wider
    norms: Tensor | None = None  # [N] lengths; None: z is the features as they are

    def unit_rows(self, dtype: torch.dtype) -> Tensor:
        """``z`` ``[N, D]``, zero vectors where not valid."""
        if self.unit is not None:
            return self.unit
        unit = self.features.to(dtype)
        if self.norms is not None:
            unit = unit / self.norms.unsqueeze(1)
        return unit if self.valid is None else unit.masked_fill(~self.valid.unsqueeze(1), 0.0)

    def narrowed(self, kept: Tensor, broken: Tensor | None = None) -> "Samples":
        """The same, valid only where ``kept`` ``[N]``; ``broken`` ``[N]`` where more are."""
        if broken is None:
            if values_may_be_read(kept) and bool(kept.all()):
                return self
            broken = self.broken
        valid = kept if self.valid is None else self.valid & kept
        return changed(self, valid=valid, broken=broken, num_valid=None)

    def spoilt(self, where: Tensor | None) -> "Samples":
        """The same, all of them broken if ``where``, 0-d bool; None: as they are."""
        if where is None:
            return self
        num_rows = self.features.shape[0]
        broken = where.repeat(num_rows) if self.broken is None else self.broken | where
        return changed(self, broken=broken)


def are_soft(labels: Tensor) -> bool:
    """Are they class probabilities, and not integers?"""
    return labels.is_floating_point()


def shape_of_samples(features: Tensor) -> torch.Size:
    """``[N]``, or ``[B, V]`` with views."""
    return features.shape[:1] if features.ndim == 2 else features.shape[:2]


def flatten_views(features: Tensor) -> Tensor:
    """``[B, V, ...]`` -> ``[B * V, D]``; ``[N, D]`` as it is."""
    if features.ndim == 2:
        return features
    # `numel` of a symbolic number is a constant for torch.export.
    return features.reshape(features.shape[0] * features.shape[1], features.shape[2:].numel())


def flatten(features: Tensor, labels: Tensor, name: str, columns_of: str | None = None) -> Batch:
    """Each view is a sample with the same label."""
    rows, views = flatten_views(features), 1 if features.ndim == 2 else features.shape[1]
    if are_soft(labels):
        return Batch(features=rows, labels=labels, name=name, views=views)
    labels = labels if features.ndim == 2 else labels.repeat_interleave(views)
    labels = labels.to(torch.int64).contiguous()
    return Batch(features=rows, labels=labels, name=name, columns_of=columns_of)


def read_labels(batch: Batch, options: Options) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``labels``, ``valid`` and ``broken`` of `Samples`: the labels as int64, and which are usable.

    Not usable are ``ignore_index`` and those outside ``[0, num_classes)``.

    Raises:
        ValueError: a label out of range, on a CPU in eager mode. Elsewhere it is marked in
            ``broken``.
    """
    num_classes, ignore_index = options.num_classes, options.ignore_index
    values = keepable(batch.labels)
    readable = values_may_be_read(values)
    if not readable and num_classes is not None:
        return _mark_labels(values, ignore_index, num_classes)
    if readable and values.numel() > 0:
        lowest, highest = (int(extreme) for extreme in values.aminmax())
        none_ignored = ignore_index is None or not lowest <= ignore_index <= highest
        if none_ignored and (num_classes is None or 0 <= lowest <= highest < num_classes):
            return values, None, None
    valid = None if ignore_index is None else values != ignore_index
    if readable and valid is not None and bool(valid.all()):
        valid = None
    if num_classes is None:
        return values, valid, None
    broken = (values < 0) | (values >= num_classes)
    if valid is not None:
        broken &= valid
    if bool(broken.any()):
        example = int(values[broken][0])
        hint = "" if ignore_index is None else f" (or ignore_index={ignore_index})"
        way_out = "raise num_classes, or leave it out to allow any values"
        if batch.columns_of is not None:
            way_out = f"give {batch.columns_of} a column for each class"
        raise ValueError(
            f"{batch.name} must lie in [0, {num_classes}){hint}, got {example}: {way_out}"
        )
    if valid is not None:
        values = values.masked_fill(~valid, 0)
    return values, valid, None


def _mark_labels(
    values: Tensor, ignore_index: int | None, num_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`read_labels` where values cannot be read; on a GPU each of these calls is a launch."""
    safe = values.clamp(0, num_classes - 1)
    in_range = safe == values
    if ignore_index is None:
        return safe, in_range, ~in_range
    wanted = values != ignore_index
    if 0 <= ignore_index < num_classes:
        return safe, in_range & wanted, ~in_range
    return safe, in_range, wanted > in_range


def read(batch: Batch, options: Options, dtype: torch.dtype) -> Samples:
    """Labels read, lengths measured, and rows divided by them in ``dtype``."""
    if are_soft(batch.labels):
        labels, valid, broken = read_soft_labels(batch.labels, dtype, batch.views, name=batch.name)
    else:
        labels, valid, broken = read_labels(batch, options)
    # `no_grad` stops no derivative of the forward mode.
    taking_part = batch.features.detach()
    if valid is not None:
        # From here on a row that takes no part is a zero vector, whatever it held: it adds
        # nothing to any sum, and its gradient is exactly 0.
        taking_part = torch.where(valid.unsqueeze(1), taking_part, 0.0)
    unit, norms = to_unit(taking_part, dtype, normalize=options.normalize)
    return Samples(
        features=batch.features,
        labels=labels,
        valid=valid,
        broken=broken,
        unit=unit,
        norms=norms,
    )


def to_unit(rows: Tensor, dtype: torch.dtype, *, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """``z`` ``[N, D]`` in ``dtype`` and the lengths ``[N]``; None: the rows as they are."""
    return normalized(rows, dtype) if normalize else (rows.to(dtype), None)
