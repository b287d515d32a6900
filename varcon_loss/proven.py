"""Where the fused kernels have been shown to be right on a device: there ``impl="auto"`` runs them.

An entry is added by hand, from results of ``python -m benchmarks gpu-proof`` that are in the
repository. Elsewhere on CUDA ``"auto"`` is ``"eager"``, and ``impl="triton"`` is the way to try
the kernels.
"""

import importlib.metadata
from typing import NamedTuple

import torch


class Proof(NamedTuple):
    """What one results file shows."""

    capability: tuple[int, int]  # CUDA compute capability of the device
    dtype: torch.dtype  # of the features
    widths: tuple[int, int]  # smallest and largest D
    triton: str  # that compiled them, as "3.6"
    results: str  # name of the file in benchmarks/results/, without .json

    def covers(self, capability: tuple[int, int], dtype: torch.dtype, dim: int) -> bool:
        smallest, largest = self.widths
        shown = (self.capability, self.dtype, self.triton)
        return shown == (capability, dtype, TRITON) and smallest <= dim <= largest


def _installed() -> str:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"
    return ".".join(version.split(".")[:2])


TRITON = _installed()  # another one may compile other code
PROVEN: tuple[Proof, ...] = ()


def is_proven(capability: tuple[int, int], dtype: torch.dtype, dim: int) -> bool:
    """Whether an entry of `PROVEN` covers features ``[N, dim]`` on such a device."""
    return any(proof.covers(capability, dtype, dim) for proof in PROVEN)
