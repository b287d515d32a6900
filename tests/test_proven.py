"""Where the kernels run by default, and what is said where they cannot run: no device needed."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from benchmarks import gpu_proof
from varcon_loss import fused, proven, varcon_loss

pytest.importorskip("triton")


class Device(NamedTuple):
    """What torch says of a CUDA device."""

    major: int
    minor: int
    shared_memory_per_block_optin: int


A100, L4, H100 = Device(8, 0, 163 * 1024), Device(8, 9, 99 * 1024), Device(9, 0, 227 * 1024)
B200, RTX5090 = H100._replace(major=10), L4._replace(major=12, minor=0)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """Features ``[64, dim]`` as on a device that need not be there."""

    def make(device: Device, dim: int, dtype: torch.dtype) -> Tensor:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
        with FakeTensorMode():
            return torch.empty(64, dim, dtype=dtype, device="cuda")

    return make


def test_auto_is_eager_but_where_the_kernels_are_proven(on_device, monkeypatch) -> None:
    features = on_device(H100, 128, torch.bfloat16)
    assert not fused.runs_by_default(features, torch.float32)
    proof = proven.Proof((9, 0), torch.bfloat16, (64, 256), proven.TRITON, "gpu-proof-h100")
    monkeypatch.setattr(proven, "PROVEN", (proof._replace(triton="0.1"),))
    assert not fused.runs_by_default(features, torch.float32)
    monkeypatch.setattr(proven, "PROVEN", (proof,))
    assert fused.runs_by_default(features, torch.float32)
    assert not fused.runs_by_default(features, torch.float64)
    for device, dim, dtype in (
        (H100, 128, torch.float32), (H100, 512, torch.bfloat16), (L4, 128, torch.bfloat16)
    ):  # fmt: skip
        assert not fused.runs_by_default(on_device(device, dim, dtype), torch.float32)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not fused.runs_by_default(on_device(H100, 128, torch.bfloat16), torch.float32)


def test_each_default_rests_on_results_that_passed() -> None:
    for proof in proven.PROVEN:
        assert gpu_proof.supports(proof, Path(gpu_proof.__file__).parent / "results"), proof


@pytest.mark.parametrize("dtype", fused.DTYPES)
@pytest.mark.parametrize("dim", [1, 64, 384, 512, 513, 1024])
@pytest.mark.parametrize("device", [A100, L4, H100, B200, RTX5090], ids=lambda d: f"{d[0]}.{d[1]}")
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_wide_float32_where_a_device_has_room(
    precision: str, device: Device, dim: int, dtype: torch.dtype,
    on_device: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(fused, "float32_precision", lambda: precision)
    obstacle = fused.why_not(on_device(device, dim, dtype), torch.float32)
    needed, room = 0, device.shared_memory_per_block_optin // 1024
    if dtype == torch.float32 and dim > 512:
        needed = {"ieee": 130, "tf32": 193}[precision]
    assert (obstacle is None) == (needed <= room)
    if obstacle is not None:
        assert f"float32 features of width {dim} need {needed} KiB" in obstacle
        assert f"has {room} KiB" in obstacle


def test_every_obstacle_is_told(on_device, monkeypatch) -> None:
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


def test_what_a_device_lacks_is_no_break_in_a_compiled_graph(monkeypatch) -> None:
    """The precision of products, and the limits of a device, are asked for while tracing."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: H100)
    torch._dynamo.reset()

    def scaled(x: Tensor) -> Tensor:
        device = torch.device("cuda", 0)
        capability, limit = fused._capability(device), fused._shared_bytes(device)
        tiles = fused.choose_tiles(768, 4)
        needed = tiles.shared_bytes(768, 4, capability, fused.float32_precision())
        return x * capability[0] if needed <= limit else x

    compiled = torch.compile(scaled, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 9.0))
