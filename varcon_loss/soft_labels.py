"""Soft labels: how much of each sample belongs to each class, its shares.

``[N, C]`` numbers, at least 0, from mixup, CutMix, smoothing or several labels a sample. A row of
zeros takes no part. Most such tables are nearly empty (mixup: two entries a row), and then only
their entries are kept; otherwise the caller's table stays where it is and is read piece by piece.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from varcon_loss.checks import warn_of_mask
from varcon_loss.readable import keepable, values_may_be_read
from varcon_loss.records import changed
from varcon_loss.sums import ROWS_A_SUM, widest
from varcon_loss.sweeps.chunks import numbers_a_piece
from varcon_loss.sweeps.products import make_linear

# Entries a row up to which they are kept one by one: each costs as much as a small fraction of a
# row of classes does, hence also no more than every fourth class.
MOST_ENTRIES = 8
# Where a table is nearly empty, most blocks of so many numbers are, and a block is quickly seen.
BLOCK = 32


class SoftLabels(NamedTuple):
    """Either form of the shares; each row may stand for several samples."""

    values: Tensor  # [R, C] as the caller gave it, any float dtype; or [R, M], the entries
    slots: Tensor | None = None  # [R, M] int64 where the entries are, different in a row
    columns: Tensor | None = None  # [S] the column of each slot; None: the columns are the slots
    # [R, 1] beside entries: the share of all other classes, as smoothing gives; None: 0
    background: Tensor | None = None
    views: int = 1  # consecutive samples that share a row: N = R * views

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """The shares ``[n, S]`` (or ``[n, M]``) of some samples, not to be written to.

        ``start`` and ``stop`` are multiples of ``views``.
        """
        return self._of_samples(self._in_columns(self._part(self.values, start, stop), dtype))

    def whole(self, dtype: torch.dtype) -> Tensor:
        """`rows` of all samples, ``[N, S]`` (or ``[N, M]``)."""
        return self._of_samples(self._in_columns(self.values, dtype))

    def slots_of(self, start: int, stop: int) -> Tensor:
        """The slots ``[n, M]`` beside `rows`."""
        assert self.slots is not None
        return self._of_samples(self._part(self.slots, start, stop))

    def background_of(self, start: int, stop: int) -> Tensor | None:
        """The background ``[n, 1]`` beside `rows`."""
        if self.background is None:
            return None
        return self._of_samples(self._part(self.background, start, stop))

    def table(self, size: int, dtype: torch.dtype) -> Tensor:
        """All of it, ``[N, S]``."""
        if self.slots is None:
            return self.whole(dtype)
        table = self.values.new_zeros(self.values.shape[0], size, dtype=dtype)
        if self.background is not None:
            table += self.background
        return self._of_samples(table.scatter_(1, self.slots, self.values.to(dtype)))

    def _part(self, rows: Tensor, start: int, stop: int) -> Tensor:
        return rows[start // self.views : stop // self.views]

    def _in_columns(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return (values if self.columns is None else values.index_select(1, self.columns)).to(dtype)

    def _of_samples(self, rows: Tensor) -> Tensor:
        return rows if self.views == 1 else rows.repeat_interleave(self.views, 0)


def read_soft_labels(
    values: Tensor, dtype: torch.dtype, views: int = 1, *, name: str
) -> tuple[SoftLabels, Tensor | None, Tensor | None]:
    """Look at ``[R, C]`` once: are all entries usable, which rows take part, are they few?

    Returns:
        Soft labels whose slots are classes, and ``valid`` and ``broken`` of `Samples`: rows of
        zeros are not valid.

    Raises:
        ValueError: an entry that is negative, infinite or NaN, on a CPU in eager mode. Elsewhere
            its rows are marked in ``broken``, and their loss becomes NaN.
    """
    values = keepable(values.detach())
    readable = values_may_be_read(values)
    if values.numel() == 0:
        none = torch.zeros(values.shape[0] * views, dtype=torch.bool, device=values.device)
        return SoftLabels(values=values, views=views), none, None
    lowest, highest = values.amin(1), None
    blocks = None
    if readable and _may_have_few(values, lowest):
        # The largest of each block first: it tells where entries are, too.
        blocks = _block_maxima(values)
        highest = blocks.amax(1)
    else:
        highest = values.amax(1)
    valid: Tensor | None = highest != 0  # NaN is valid, so that it shows
    broken = None
    if readable:
        if not (float(lowest.min()) >= 0 and float(highest.max()) < torch.inf):
            _refuse(values, lowest, highest, name)
        if bool(valid.all()):
            valid = None
        if views == 1 and name == "labels":
            warn_of_mask(name, values)
    else:
        broken = ~((lowest >= 0) & (highest < torch.inf))
    if views > 1:
        valid = None if valid is None else valid.repeat_interleave(views)
        broken = None if broken is None else broken.repeat_interleave(views)
    soft = None if blocks is None else find_entries(values, lowest, blocks, dtype, views)
    return soft or SoftLabels(values=values, views=views), valid, broken


def _refuse(values: Tensor, lowest: Tensor, highest: Tensor, name: str) -> None:
    row = int((~((lowest >= 0) & (highest < torch.inf))).nonzero()[0])
    entries = values[row]
    column = int((~((entries >= 0) & (entries < torch.inf))).nonzero()[0])
    raise ValueError(
        f"{name} as class probabilities must be finite and at least 0, got "
        f"{float(entries[column])} for sample {row} and class {column}: a sample that is to take "
        "no part has a row of zeros"
    )


def _may_have_few(values: Tensor, lowest: Tensor) -> bool:
    """Have the first rows few entries above their ``lowest``?"""
    most = min(MOST_ENTRIES, values.shape[1] // 4)
    return most > 0 and int((values[:16] > lowest[:16, None]).sum(1).max()) <= most


def _block_maxima(values: Tensor) -> Tensor:
    """``[R, C]`` -> ``[R, C / BLOCK]``, rounded up."""
    num_columns = values.shape[1]
    whole = num_columns // BLOCK * BLOCK
    maxima = []
    if whole > 0:
        maxima.append(values[:, :whole].unflatten(1, (-1, BLOCK)).amax(2))
    if whole < num_columns:
        maxima.append(values[:, whole:].amax(1, keepdim=True))
    return torch.cat(maxima, dim=1)


def find_entries(
    values: Tensor, lowest: Tensor, blocks: Tensor, dtype: torch.dtype, views: int = 1
) -> SoftLabels | None:
    """The entries of ``[R, C]`` above each row's ``lowest`` ``[R]``, at least 0.

    ``blocks`` are their `_block_maxima`. None where a row has many. It reads values: on a CPU.
    """
    num_rows, num_columns = values.shape
    most = min(MOST_ENTRIES, num_columns // 4)
    rows, block = (blocks > lowest.unsqueeze(1)).nonzero(as_tuple=True)
    if len(rows) > most * num_rows:
        return None
    width = min(BLOCK, num_columns)
    starts = (block * BLOCK).clamp_max(num_columns - width)
    windows = _windows(values, rows, starts, width)
    above = windows > lowest.index_select(0, rows).unsqueeze(1)
    if width == BLOCK and num_columns % BLOCK != 0:
        # The last block begins before its place, with columns of the one before.
        last = (block == blocks.shape[1] - 1).nonzero().squeeze(1)
        above[:, : BLOCK - num_columns % BLOCK].index_fill_(0, last, False)
    found, within = above.nonzero(as_tuple=True)
    above_lowest = windows[found, within].to(dtype)
    rows, columns = rows.index_select(0, found), starts.index_select(0, found) + within
    counts = torch.bincount(rows, minlength=num_rows)
    size = max(1, int(counts.max()))
    if size > most:
        return None
    first_of_row = (counts.cumsum(0) - counts).index_select(0, rows)
    place = torch.arange(len(rows), device=rows.device) - first_of_row
    place += rows * size
    slots = rows.new_zeros(num_rows * size)
    entries = above_lowest.new_zeros(num_rows * size)
    missing = torch.ones_like(slots, dtype=torch.bool)
    slots[place], entries[place], missing[place] = columns, above_lowest, False
    background = lowest.unsqueeze(1).to(dtype) if float(lowest.max()) > 0 else None
    soft = SoftLabels(
        values=entries.view(-1, size),
        slots=slots.view(-1, size),
        background=background,
        views=views,
    )
    return _fill(soft, missing.view(-1, size))


def _fill(soft: SoftLabels, missing: Tensor) -> SoftLabels:
    """Give entries that are ``missing`` ``[R, M]`` to classes without one, which lose nothing."""
    rows = missing.any(1).nonzero().squeeze(1)
    if len(rows) == 0:
        return soft
    assert soft.slots is not None
    values, slots, missing = soft.values.clone(), soft.slots.clone(), missing[rows]
    # Of the first M slots the row's entries leave at least as many free as it misses.
    given = slots[rows].masked_fill(missing, -1)
    taken = (given.unsqueeze(2) == torch.arange(slots.shape[1], device=slots.device)).any(1)
    free = taken.to(torch.uint8).argsort(dim=1, stable=True)
    slots[rows] = torch.where(missing, free.gather(1, (missing.cumsum(1) - 1).clamp_min(0)), given)
    nothing = 0.0 if soft.background is None else soft.background[rows]
    values[rows] = torch.where(missing, nothing, values[rows])
    return changed(soft, values=values, slots=slots)


def _windows(values: Tensor, rows: Tensor, starts: Tensor, width: int) -> Tensor:
    """``[E, width]`` pieces of rows of ``[R, C]``."""
    if not values.is_contiguous():
        return values.unfold(1, width, 1)[rows, starts]
    flat = values.as_strided((values.numel() - width + 1, width), (1, 1))
    return flat.index_select(0, rows * values.shape[1] + starts)


def in_slots(soft: SoftLabels, classes: Tensor) -> SoftLabels:
    """The same shares by slot, where only ``classes`` ``[S]`` have one; others are dropped."""
    if soft.slots is None:
        assert soft.columns is None
        return changed(soft, columns=classes)
    size = classes.shape[0]
    num_classes = int(torch.maximum(soft.slots.max(), classes.max())) + 1
    table = classes.new_full((num_classes,), -1)
    table[classes] = torch.arange(size, device=classes.device)
    slots = table[soft.slots]
    # What is left of each row comes first, and no row has more entries than there are slots.
    order = (slots < 0).to(torch.uint8).argsort(dim=1, stable=True)
    most = max(1, int((slots >= 0).sum(1).max()))
    slots = slots.gather(1, order)[:, :most]
    values = soft.values.gather(1, order)[:, :most]
    return _fill(changed(soft, values=values, slots=slots), slots < 0)


def class_masses(soft: SoftLabels, size: int, dtype: torch.dtype) -> Tensor:
    """How many samples each of ``size`` classes has, in shares: ``[S]``."""
    if soft.slots is not None:
        # Added one by one, and float32 adds so many badly.
        masses = soft.values.new_zeros(size, dtype=torch.float64)
        above, background = soft.values.double(), soft.background
        if background is not None:
            above = above - background
            masses += background.sum(dtype=torch.float64)
        masses.index_add_(0, soft.slots.reshape(-1), above.reshape(-1))
        return masses.mul_(soft.views).to(dtype)
    if not values_may_be_read(soft.values):
        wide = widest(soft.values.device)
        masses = soft.values.sum(0, dtype=wide).mul_(soft.views).to(dtype)
        return masses if soft.columns is None else masses.index_select(0, soft.columns)
    masses = soft.values.new_zeros(size, dtype=torch.promote_types(dtype, torch.float32))
    total = masses.to(torch.float64) if len(soft.values) > ROWS_A_SUM else masses
    for start in range(0, soft.values.shape[0], ROWS_A_SUM):
        part = soft.values[start : start + ROWS_A_SUM]
        sums = part.sum(0, dtype=masses.dtype)
        total += sums if soft.columns is None else sums.index_select(0, soft.columns)
    return total.mul_(soft.views).to(dtype)


def soft_sums(soft: SoftLabels, unit: Tensor, size: int) -> Tensor:
    """``w`` before it is made unit: shares of rows ``[N, D]`` summed by slot, ``[S, D]``.

    Off by at most what summing `ROWS_A_SUM` rows costs, as `sum_slots`.
    """
    if soft.views > 1:
        unit = unit.unflatten(0, (-1, soft.views)).sum(1)
        soft = changed(soft, views=1)
    if torch.compiler.is_compiling():  # no pieces: their number would be compiled in
        return torch.mm(soft.whole(unit.dtype).T, unit)
    total = unit.new_zeros(size, unit.shape[1])
    if unit.shape[0] > ROWS_A_SUM:
        total = total.to(widest(unit.device))
    step = ROWS_A_SUM
    if soft.slots is None and (soft.columns is not None or soft.values.dtype != unit.dtype):
        step = min(
            step, max(128, numbers_a_piece(unit) // max(1, size))
        )  # pieces of the table are copied
    for start in range(0, unit.shape[0], step):
        rows, stop = unit[start : start + step], start + step
        part = soft.rows(start, stop, unit.dtype)
        if soft.slots is None:
            total += make_linear(rows.T, size)(part.T, None)
            continue
        background = soft.background_of(start, stop)
        if background is not None:
            part = part - background
            total += torch.mv(rows.T, background.squeeze(1))
        total += _sum_entries(rows, part, soft.slots_of(start, stop), size)
    return total.to(unit.dtype)


def _sum_entries(rows: Tensor, values: Tensor, slots: Tensor, size: int) -> Tensor:
    """Rows ``[n, D]`` times their entries ``[n, M]``, summed by slot: ``[size, D]``."""
    slots, order = slots.reshape(-1).sort(stable=True)
    return F.embedding_bag(
        torch.div(order, values.shape[1], rounding_mode="floor"),
        rows,
        torch.searchsorted(slots, torch.arange(size, device=slots.device)),
        mode="sum",
        per_sample_weights=values.reshape(-1).index_select(0, order),
    )


def row_totals(soft: SoftLabels, weight: Tensor) -> Tensor:
    """What each row has of ``weight`` ``[S]`` in all: ``[N]``, in its dtype."""
    if soft.slots is not None:
        own = weight[soft.slots]
        totals = (soft.values.to(weight.dtype) * own).sum(1)
        if soft.background is not None:
            background = soft.background.squeeze(1).to(weight.dtype)
            totals += background * (weight.sum() - own.sum(1))
    elif soft.columns is None and soft.values.dtype == weight.dtype:
        totals = torch.mv(soft.values, weight)
    elif torch.compiler.is_compiling():
        return torch.mv(soft.whole(weight.dtype), weight)
    else:
        once = changed(soft, views=1)
        step = max(1, numbers_a_piece(weight) // max(1, len(weight)))
        parts = [
            torch.mv(once.rows(start, start + step, weight.dtype), weight)
            for start in range(0, len(soft.values), step)
        ]
        totals = torch.cat(parts) if parts else weight.new_zeros(0)
    return totals if soft.views == 1 else totals.repeat_interleave(soft.views)
