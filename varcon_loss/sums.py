"""Sums of rows by their slots, whatever says which slots those are."""

from collections.abc import Callable

import torch
from torch import Tensor

# float32 adds so many rows one by one.
ROWS_A_SUM = 8192


def widest(device: torch.device) -> torch.dtype:
    """What long sums go on in: float64, which Apple's GPUs do not have."""
    return torch.float32 if device.type == "mps" else torch.float64


# Sums ``[S, D]`` of rows ``[N, D]`` by their slots ``[N]``; those not valid ``[N]`` are zeros.
SumSlots = Callable[[Tensor, Tensor, Tensor | None, int], Tensor]


def sum_slots(rows: Tensor, slots: Tensor, valid: Tensor | None, size: int) -> Tensor:
    """Sum the rows of each class: ``[N, D]``, slots ``[N]`` -> ``[S, D]``.

    Rows that are not valid must be zero vectors. float32 sums are off by at most what summing
    `ROWS_A_SUM` rows costs, whatever ``N``: sums of so many go on in float64.
    """
    add = added_rows if torch.compiler.is_compiling() else _add
    return add(rows, slots, size)


def class_counts(slots: Tensor, valid: Tensor | None, size: int, dtype: torch.dtype) -> Tensor:
    """How many valid rows each class has: slots ``[N]`` -> ``[S]``."""
    # So many in whole numbers: adding 1 to a float32 of 2^24 changes nothing.
    compiling = torch.compiler.is_compiling()
    number = dtype if not compiling and slots.shape[0] < 2**24 else torch.int64
    ones = torch.ones_like(slots, dtype=number) if valid is None else valid.to(number)
    if compiling:
        return added_rows(ones, slots, size).to(dtype)
    return ones.new_zeros(size).index_add_(0, slots, ones).to(dtype)


def _add(rows: Tensor, slots: Tensor, size: int) -> Tensor:
    sums = rows.new_zeros(size, *rows.shape[1:])
    if rows.dtype != torch.float32 or rows.shape[0] <= ROWS_A_SUM:
        return sums.index_add_(0, slots, rows)
    total = torch.zeros_like(sums, dtype=widest(rows.device))
    for part, their_slots in zip(rows.split(ROWS_A_SUM), slots.split(ROWS_A_SUM), strict=True):
        total += sums.zero_().index_add_(0, their_slots, part)
    return total.to(rows.dtype)


# Inductor compiles sums by index to wrong code: torch 2.6 on a CPU whatever the sizes, and later
# ones in some cases (pytorch issues 171493, 191571, 191837). It does not look into an operator.
@torch.library.custom_op("varcon_loss::added_rows", mutates_args=())
def added_rows(rows: Tensor, slots: Tensor, size: int) -> Tensor:
    """Rows ``[N, ...]`` added by slot ``[N]``, as `sum_slots`: ``[S, ...]``."""
    return _add(rows, slots, size)


@added_rows.register_fake
def _(rows: Tensor, slots: Tensor, size: int) -> Tensor:
    return rows.new_empty(size, *rows.shape[1:])
