"""What every test shares: the implementations under test, and data."""

import os

# One worker a core; the numbers do not depend on it. Before anything brings a BLAS along.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on CPU tensors
torch.set_num_threads(1)

IMPLEMENTATIONS = ("reference", "eager")

MakeBatch = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make_batch() -> MakeBatch:
    """Raw random features ``[N, D]`` with a gradient, and labels that all occur."""

    def make(
        num_rows: int = 24, num_classes: int = 5, dim: int = 16, dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(num_rows, dim, generator=generator, dtype=torch.float64) * 3
        labels = torch.arange(num_rows) % num_classes
        labels = labels[torch.randperm(num_rows, generator=generator)]
        return features.to(dtype).requires_grad_(), labels

    return make


def gradient_of(loss: Tensor, x: Tensor, retain_graph: bool = True) -> Tensor:
    return torch.autograd.grad(loss.sum(), x, retain_graph=retain_graph)[0]


def same_step(got: Tensor, want: Tensor, x: Tensor) -> None:
    """Two losses of ``x`` and their gradients."""
    torch.testing.assert_close(got, want)
    # A compiled graph may give its buffers away.
    torch.testing.assert_close(gradient_of(got, x, False), gradient_of(want, x, False))
