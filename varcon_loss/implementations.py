"""Which implementation runs: the names of ``impl``, and what ``"auto"`` stands for."""

import torch
from torch import Tensor

from varcon_loss.rows import Implementation
from varcon_loss.sweeps.eager import EAGER
from varcon_loss.sweeps.fused import FUSED
from varcon_loss.sweeps.reference import REFERENCE

IMPLEMENTATIONS = {way.name: way for way in (REFERENCE, EAGER, FUSED)}


def choose(impl: str, features: Tensor, dtype: torch.dtype, *, shares: bool) -> Implementation:
    """What ``impl`` means for ``features`` ``[N, D]``, computed in ``dtype``.

    ``shares`` where labels are class probabilities.

    Raises:
        ValueError: the one that was named cannot run here.
    """
    if impl == "auto":
        fits = FUSED.takes_shares or not shares
        return FUSED if fits and FUSED.by_default(features, dtype) else EAGER
    way = IMPLEMENTATIONS[impl]
    obstacle = way.why_not(features, dtype)
    if shares and not way.takes_shares:
        obstacle = "it takes integer labels, and these are class probabilities"
    if obstacle is not None:
        raise ValueError(f"impl={impl!r} cannot run here: {obstacle}; use impl='auto'")
    return way
