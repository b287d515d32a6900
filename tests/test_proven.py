"""Where the kernels run by default, and what is said where they cannot run: no device needed."""

import json
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from benchmarks.common.results import RESULTS
from varcon_loss import fused, proven, varcon_loss

pytest.importorskip("triton")


class Device(NamedTuple):
    """What torch says of a CUDA device."""

    major: int
    minor: int
    shared_memory_per_block_optin: int


A100, L4, H100 = Device(8, 0, 163 * 1024), Device(8, 9, 99 * 1024), Device(9, 0, 227 * 1024)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """Features ``[64, dim]`` as on a device that need not be there."""

    def make(device: Device, dim: int, dtype: torch.dtype) -> Tensor:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
        with FakeTensorMode():
            return torch.empty(64, dim, dtype=dtype, device="cuda")

    return make


def test_auto_is_eager_but_where_the_kernels_are_proven(
    on_device: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    features = on_device(H100, 128, torch.bfloat16)
    assert not fused.runs_by_default(features, torch.float32)
    proof = proven.Proof((9, 0), torch.bfloat16, (64, 256), "gpu-proof-h100")
    monkeypatch.setattr(proven, "PROVEN", (proof,))
    assert fused.runs_by_default(features, torch.float32)
    assert not fused.runs_by_default(features, torch.float64)
    for other in (
        on_device(H100, 128, torch.float32),
        on_device(H100, 512, torch.bfloat16),
        on_device(L4, 128, torch.bfloat16),
    ):
        assert not fused.runs_by_default(other, torch.float32)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not fused.runs_by_default(on_device(H100, 128, torch.bfloat16), torch.float32)


def test_each_default_rests_on_results_that_passed() -> None:
    for proof in proven.PROVEN:
        content = json.loads((RESULTS / f"{proof.results}.json").read_text())
        assert content["rows"], proof
        assert all(row["status"] == "passed" for row in content["rows"]), proof


@pytest.mark.parametrize("dtype", fused.DTYPES)
@pytest.mark.parametrize("dim", [1, 128, 512, 513, 768, 1024])
@pytest.mark.parametrize("device", [A100, L4, H100])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_wide_float32_where_a_device_has_room(
    precision: str,
    device: Device,
    dim: int,
    dtype: torch.dtype,
    on_device: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fused, "float32_precision", lambda: precision)
    obstacle = fused.why_not(on_device(device, dim, dtype), torch.float32)
    wide = dtype == torch.float32 and dim > 512
    fits = not wide or (precision == "ieee" and device != L4)
    assert fits == (obstacle is None)
    if obstacle is not None:
        assert f"width {dim}" in obstacle
        assert "KiB of shared memory" in obstacle


def test_every_obstacle_is_told(
    on_device: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fused.why_not(on_device(H100, 8, torch.bfloat16), torch.float32) is None
    turing = on_device(Device(7, 5, 64 * 1024), 8, torch.float16)
    assert "7.5" in str(fused.why_not(turing, torch.float32))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm 7.0" in str(fused.why_not(on_device(H100, 8, torch.bfloat16), torch.float32))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    features, labels = torch.randn(4, 8), torch.arange(4)
    with pytest.raises(ValueError, match=r"cannot run here: .*CUDA devices; use impl='auto'"):
        varcon_loss(features, labels, impl="triton")
    monkeypatch.setattr(fused, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="Triton is not installed"):
        varcon_loss(features, labels, impl="triton")
