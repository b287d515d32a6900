"""Class slots to unit centroids ``w_k``: sums, counts, directions. No gradient flows here."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from varcon_loss.norms import row_norms

# float32 adds so many rows one by one.
ROWS_A_SUM = 8192


class Centroids(NamedTuple):
    """The softmax of Eq. 8 runs over these."""

    unit: Tensor  # [S, D] unit length; zero rows where the slot is empty
    present: Tensor | None  # [S] bool; None: no slot is empty, or `packed` tells the fused sweep
    num_classes: Tensor  # 0-d int64, K
    packed: bool  # are the first K slots the ones that are not empty?


def unit_rows(rows: Tensor, norms: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``z`` ``[N, D]`` in ``dtype``: rows divided by their lengths, or as they are."""
    return rows.to(dtype) if norms is None else rows.to(dtype) / norms.unsqueeze(1)


def class_sums(unit: Tensor, slots: Tensor, size: int) -> Tensor:
    """Sum the rows of each class: ``[N, D]``, slots ``[N]`` -> ``[S, D]``.

    Rows that take no part must be zero vectors. float32 sums are off by at most what summing
    `ROWS_A_SUM` rows costs, whatever ``N``: sums of so many go on in float64.
    """
    sums = unit.new_zeros(size, unit.shape[1])
    if unit.dtype == torch.float64 or unit.shape[0] <= ROWS_A_SUM:
        return sums.index_add_(0, slots, unit)
    total = sums.to(torch.float64)
    for rows, their_slots in zip(unit.split(ROWS_A_SUM), slots.split(ROWS_A_SUM), strict=True):
        total += sums.zero_().index_add_(0, their_slots, rows)
    return total.to(unit.dtype)


# Sums ``[S, D]`` of rows ``[N, D]`` by their slots ``[N]``; those not valid ``[N]`` are zeros.
SumSlots = Callable[[Tensor, Tensor, Tensor | None, int], Tensor]


def sum_by_slot(rows: Tensor, slots: Tensor, valid: Tensor | None, size: int) -> Tensor:
    """`class_sums` as `SumSlots`."""
    return class_sums(rows, slots, size)


def class_counts(slots: Tensor, valid: Tensor | None, size: int, dtype: torch.dtype) -> Tensor:
    """How many valid rows each class has: slots ``[N]`` -> ``[S]``."""
    # Counted in whole numbers: adding 1 to a float32 of 2^24 changes nothing.
    ones = torch.ones_like(slots) if valid is None else valid.to(torch.int64)
    return ones.new_zeros(size).index_add_(0, slots, ones).to(dtype)


def unit_centroids(sums: Tensor, counts: Tensor | None, *, packed: bool = True) -> Centroids:
    """Directions of the class means. A class whose members cancel out gets a zero centroid.

    ``counts`` ``[S]`` tells the empty slots; None: there are none.
    """
    unit = sums / row_norms(sums, sums.dtype).unsqueeze(1)
    if counts is None:
        num_classes = torch.full((), sums.shape[0], dtype=torch.int64, device=sums.device)
        return Centroids(unit, None, num_classes, True)
    present = counts > 0
    return Centroids(unit, present, present.sum(), packed)


def centroids_without_self(unit: Tensor, sums: Tensor, slots: Tensor) -> Tensor:
    """Leave-one-out: each row's own centroid made of the *other* members of its class, [N, D]."""
    others = sums.index_select(0, slots) - unit
    return others / row_norms(others, others.dtype).unsqueeze(1)
