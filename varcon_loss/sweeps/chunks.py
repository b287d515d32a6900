"""Chunks of rows: how large they are, and what those of a sweep under shares have in common."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

# Elements of one chunk's logits and rows. 4 MiB of float32 stay in a CPU's caches (2^18 and 2^22
# were both slower at N = 8192, K = 1000); an accelerator wants fewer, larger launches.
CHUNK_CPU = 2**20
CHUNK_ACCELERATOR = 2**25
# Far below any sum of exponentials here; only where there are none is the sum smaller.
TINY = 1e-30


class Shared(NamedTuple):
    """What does not change from chunk to chunk."""

    to_logits: Callable[[Tensor, Tensor | None], Tensor]  # [n, D] -> [n, S]
    to_gradient: Callable[[Tensor, Tensor | None], Tensor] | None  # and back; None: not needed
    key_sum: Tensor  # [D] sum of the keys
    weighted_key_sum: Tensor  # [D] the same by class weight
    present: Tensor | None  # [S] bool; None: no slot is empty
    counted: Tensor | None  # [S] the same as numbers
    scale: Tensor | None  # [S] the same by class weight; None: all 1
    num_others: Tensor | int  # K - 1
    weight: Tensor | None  # [S] what the loss multiplies the shares by
    shifted: bool  # must a maximum be subtracted before exp?
    project: bool  # does the gradient pass through the normalisation?
    temperature: float
    epsilon: float
    need_terms: bool


class Evaluated(NamedTuple):
    """What a chunk of rows yields."""

    loss: Tensor  # [n]
    others: Tensor | None  # [4, n] KL, NLL, confidence and tau2
    dl_dz: Tensor | None  # [n, D]
