"""Unit rows and their lengths, safe at both ends of the floating-point range."""

import torch
from torch import Tensor

from varcon_loss.readable import values_may_be_read

# Squares of lengths between these keep their digits in float32.
SAFE = (1e-15, 1e15)


def normalized(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows ``[N, D]`` of any float dtype divided by their lengths, and the lengths ``[N]``.

    Both in ``dtype``. A row of zeros stays one and has length *infinity*, so that a gradient
    divided by it is zero and not NaN. A row with NaN or infinities becomes NaN, as its length: it
    must not pass for a zero vector.
    """
    if values_may_be_read(rows):
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
        if norms.numel() == 0:
            return rows.to(dtype), norms
        shortest, longest = norms.aminmax()
        if SAFE[0] < float(shortest) and float(longest) < SAFE[1]:
            return rows.to(dtype) / norms.unsqueeze(1), norms
    scaled, scale, lengths = _scaled(rows, dtype)
    return scaled / lengths, (lengths * scale).squeeze(1)


def directions(rows: Tensor) -> Tensor:
    """The first of `normalized`, in the dtype of the rows ``[N, D]``."""
    if values_may_be_read(rows):
        return normalized(rows, rows.dtype)[0]
    scaled, _, lengths = _scaled(rows, rows.dtype)  # on a GPU each call is a launch
    return scaled / lengths


def _scaled(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``[N, D]`` divided by their largest entries ``[N, 1]``, these, and the lengths left.

    That keeps squares from overflowing or vanishing: bfloat16 and float32 features may lie anywhere
    from 1e-38 to 1e38.
    """
    largest = torch.linalg.vector_norm(rows, ord=float("inf"), dim=1, keepdim=True).to(dtype)
    zero = largest == 0
    scale = largest.masked_fill(zero, 1.0)
    scaled = rows / scale  # in `dtype`, with no copy of the rows in it
    lengths = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return scaled, scale, lengths.masked_fill_(zero, torch.inf)
