"""What the chunks of one sweep under shares have in common: see `expectation`."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


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
