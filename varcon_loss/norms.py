"""Row lengths, safe at both ends of the floating-point range."""

import torch
from torch import Tensor

from varcon_loss.readable import values_may_be_read

# Squares of lengths between these keep their digits in float32.
SAFE = (1e-15, 1e15)


def row_norms(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Euclidean length of each row: ``[N, D]`` of any float dtype -> ``[N]`` of ``dtype``.

    A row of zeros gets length *infinity*, so that dividing by the length gives a zero vector and
    a zero gradient instead of NaN. A row with NaN, with infinities, or longer than ``dtype`` can
    express gets NaN: it must not pass for a zero vector.
    """
    if values_may_be_read(rows):
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
        if norms.numel() == 0:
            return norms
        shortest, longest = norms.aminmax()
        if SAFE[0] < float(shortest) and float(longest) < SAFE[1]:
            return norms
    # Dividing by the largest entry first keeps the squares from overflowing or vanishing:
    # bfloat16 and float32 features may lie anywhere from 1e-38 to 1e38.
    largest = torch.linalg.vector_norm(rows, ord=float("inf"), dim=1).to(dtype)
    scale = largest.masked_fill(largest == 0, 1.0)
    norms = torch.linalg.vector_norm(rows.to(dtype) / scale.unsqueeze(1), dim=1) * largest
    norms = norms.masked_fill(norms.isinf(), float("nan"))
    return norms.masked_fill(largest == 0, float("inf"))
