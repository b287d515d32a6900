"""The two matrix products of the eager sweep, by the faster of the libraries that torch carries.

On a CPU torch multiplies float32 matrices with MKL, which uses half the vector width of an AMD
processor that has AVX-512; oneDNN, which torch carries for its layers, uses all of it.
"""

import functools
import platform
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# Multiplications below which the copies into oneDNN's layout cost more than they gain.
SMALLEST_FOR_ONEDNN = 2**24


def make_linear(keys: Tensor, num_rows: int) -> Callable[[Tensor, Tensor | None], Tensor]:
    """A function ``(rows [n, D], out [n, K] or None)`` giving ``rows @ keys.T`` ``[n, K]``.

    The result is ``out`` or a tensor of its own, and may be written to.

    Args:
        keys: ``[K, D]``, contiguous or the transpose of what is.
        num_rows: rows of a call.
    """
    wanted = num_rows * keys.numel() >= SMALLEST_FOR_ONEDNN
    if wanted and keys.dtype == torch.float32 and keys.device.type == "cpu" and prefers_onednn():
        weight = keys.contiguous().to_mkldnn()
        return lambda rows, out: F.linear(rows.to_mkldnn(), weight).to_dense()
    return lambda rows, out: torch.mm(rows, keys.T, out=out)


@functools.cache
def prefers_onednn() -> bool:
    """Is this an AMD processor with AVX-512, under a torch with oneDNN?"""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in _processor()
    )


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
