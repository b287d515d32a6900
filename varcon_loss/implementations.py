"""Which implementation runs: the names of ``impl``, and what ``"auto"`` stands for."""

import torch
from torch import Tensor

from varcon_loss.rows import Implementation
from varcon_loss.sweeps.eager import EAGER
from varcon_loss.sweeps.fused import FUSED
from varcon_loss.sweeps.reference import REFERENCE

IMPLEMENTATIONS = {x.name: x for x in (REFERENCE, EAGER, FUSED)}


def choose(impl: str, features: Tensor, dtype: torch.dtype, *, soft: bool) -> Implementation:
    """What ``impl`` means for ``features`` ``[N, D]``, computed in ``dtype``.

    ``soft`` where labels are class probabilities.

    Raises:
        ValueError: the one that was named cannot run here.
    """
    if impl == "auto":
        fits = FUSED.takes_soft_labels or not soft
        return FUSED if fits and FUSED.by_default(features, dtype) else EAGER
    named = IMPLEMENTATIONS[impl]
    obstacle = named.why_not(features, dtype)
    if soft and not named.takes_soft_labels:
        obstacle = "it takes integer labels, and these are class probabilities"
    if obstacle is not None:
        raise ValueError(f"impl={impl!r} cannot run here: {obstacle}; use impl='auto'")
    return named
