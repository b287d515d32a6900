"""Which implementation runs: the names of ``impl``, and what ``"auto"`` stands for."""

import torch
from torch import Tensor

from varcon_loss.eager import EAGER
from varcon_loss.fused import FUSED
from varcon_loss.reference import REFERENCE
from varcon_loss.rows import Implementation

IMPLEMENTATIONS = {way.name: way for way in (REFERENCE, EAGER, FUSED)}


def choose(impl: str, features: Tensor, dtype: torch.dtype) -> Implementation:
    """What ``impl`` means for ``features`` ``[N, D]``, computed in ``dtype``.

    Raises:
        ValueError: the one that was named cannot run here.
    """
    if impl == "auto":
        return FUSED if FUSED.by_default(features, dtype) else EAGER
    way = IMPLEMENTATIONS[impl]
    obstacle = way.why_not(features, dtype)
    if obstacle is not None:
        raise ValueError(f"impl={impl!r} cannot run here: {obstacle}; use impl='auto'")
    return way
