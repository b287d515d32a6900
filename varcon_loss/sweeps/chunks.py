"""Chunks of rows: how large they are, and what those of a sweep have in common."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from varcon_loss.readable import values_may_be_read

# Elements of one chunk's logits and rows. 4 MiB of float32 stay in a CPU's caches (2^18 and 2^22
# were both slower at N = 8192, K = 1000); an accelerator wants fewer, larger launches.
CHUNK_CPU = 2**20
CHUNK_ACCELERATOR = 2**25
LARGEST_KEPT = 2**25 - 2**16  # bytes; glibc learns nothing from larger blocks
# Far below any sum of exponentials here; only where there are none is the sum smaller.
TINY = 1e-30


class Shared(NamedTuple):
    """What does not change from chunk to chunk."""

    to_logits: Callable[[Tensor, Tensor | None], Tensor]  # [n, D] -> [n, S]
    to_gradient: Callable[[Tensor, Tensor | None], Tensor] | None  # and back; None: not needed
    key_sum: Tensor  # [D] sum of the keys
    present: Tensor | None  # [S] bool; None: no slot is empty
    num_others: Tensor | int  # K - 1
    shifted: bool  # must a maximum be subtracted before exp?
    project: bool  # does the gradient pass through the normalisation?
    temperature: float
    epsilon: float
    need_terms: bool
    # Under shares of classes:
    weight: Tensor | None = None  # [S] what the loss multiplies the shares by
    weighted_key_sum: Tensor | None = None  # [D] sum of the keys by that
    counted: Tensor | None = None  # [S] `present` as numbers
    scale: Tensor | None = None  # [S] the same by class weight; None: all 1


def numbers_a_piece(like: Tensor) -> int:
    """How many are worked on at a time on the device of ``like``."""
    return CHUNK_CPU if like.device.type == "cpu" else CHUNK_ACCELERATOR


def rows_a_chunk(z: Tensor, num_slots: int, views: int = 1, matrices: int = 1) -> int:
    """How many of the rows ``[N, D]`` are swept at a time: a multiple of ``views``, at least 1.

    With so many ``matrices`` ``[n, S]`` at once an accelerator, whose memory they take, does fewer.
    """
    num_rows, dim = z.shape
    budget = numbers_a_piece(z)
    if z.device.type != "cpu":
        budget //= matrices
    num_chunks = max(1, -(-num_rows // max(128, budget // (num_slots + dim))))
    chunk = -(-num_rows // num_chunks)
    return max(1, -(-chunk // views) * views)


def keep_what_is_freed(z: Tensor, numbers: int) -> None:
    """Have glibc keep so many freed ``numbers`` like ``z`` for the next chunk and the next step.

    A block freed at once, never written, raises what it hands back to the system. Otherwise a step
    has up to 150,000 page faults (half of the time at N = 65,536, K = 1000).
    """
    if z.device.type == "cpu":
        z.new_empty(min(numbers, LARGEST_KEPT // z.itemsize))


def count_others(num_present: Tensor, z: Tensor) -> Tensor | int:
    """``K - 1``, at least 0: a number where it may be read, else as the rows ``z`` are."""
    if values_may_be_read(num_present):
        return max(0, int(num_present) - 1)
    # K = 0: no row is valid, but log(-1) would turn the zeros into NaN.
    return num_present.to(z.dtype).sub_(1).clamp_min_(0)
