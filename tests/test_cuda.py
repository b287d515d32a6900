"""What only a GPU can show. `tests/test_triton.py` runs there too, with compiled kernels."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from varcon_loss import VarConLoss, fused, proven, varcon_loss, varcon_terms

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def batch(
    num_rows: int, num_classes: int, dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    features = torch.randn(num_rows, dim, generator=generator, device="cuda").to(dtype)
    labels = torch.randint(num_classes, (num_rows,), generator=generator, device="cuda")
    return features.requires_grad_(), labels


def step(features: Tensor, labels: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    loss = varcon_loss(features, labels, **options)
    return loss.detach(), torch.autograd.grad(loss, features)[0]


@pytest.fixture
def waiting_is_an_error() -> Iterator[Callable[[], None]]:
    """Called, it makes it one until the test ends."""

    def switch() -> None:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    yield switch
    torch.cuda.set_sync_debug_mode("default")


OPTIONS = {
    "plain": {}, "many classes": {"num_classes": 100}, "leave-one-out": {"leave_one_out": True},
    "weights": {"weight": torch.linspace(0.5, 2, 10)},
    "as they are": {"normalize": False, "reduction": "sum"},
    "memory": {"feature_dim": 32, "centroid_momentum": 0.9},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_nothing_waits_for_the_gpu(
    name: str, impl: str, waiting_is_an_error: Callable[[], None]
) -> None:
    criterion = VarConLoss(**{"num_classes": 10} | OPTIONS[name], impl=impl).cuda()
    features, labels = batch(64, 10, 32)
    reference = {"ref_features": features.detach().clone(), "ref_labels": labels.clone()}
    for _ in range(2):
        criterion(features, labels).backward()
        if name == "plain":
            criterion(features, labels, **reference).backward()
        waiting_is_an_error()  # the first round compiles


def test_a_captured_graph_replays_on_new_data() -> None:
    """By the code of the documentation."""
    page = (Path(__file__).parents[1] / "docs" / "kernels.md").read_text()
    documented: dict[str, Any] = {}
    exec(page.partition("```python\n")[2].partition("```")[0], documented)
    features, labels = batch(96, 10, 32)
    criterion = VarConLoss(num_classes=10, impl="triton")
    graph, loss, gradient = documented["capture"](criterion, features, labels)
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            features.copy_(torch.randn(96, 32))
            # fewer classes each time: K is read by the kernels, not baked in
            labels.copy_(torch.randint(10 - 3 * seed, (96,)))
        graph.replay()
        expected = step(features, labels, num_classes=10, impl="reference")
        torch.testing.assert_close((loss, gradient), expected, rtol=1e-4, atol=2e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_runs_on_the_device_of_its_inputs() -> None:
    features, labels = batch(64, 10, 32)
    expected = step(features, labels, impl="triton")
    moved = features.detach().to("cuda:1").requires_grad_()
    got = step(moved, labels.to("cuda:1"), impl="triton")
    assert got[1].device == moved.device
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu())


def test_auto_picks_the_kernels_where_they_are_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = batch(8, 3, 16)
    monkeypatch.setattr(proven, "PROVEN", ())
    assert varcon_terms(features, labels).impl == "eager"
    here = torch.cuda.get_device_capability()
    proof = proven.Proof(here, torch.float32, (1, 64), proven.TRITON, "")
    monkeypatch.setattr(proven, "PROVEN", (proof,))
    assert varcon_terms(features, labels).impl == "triton"
    assert varcon_terms(features.double(), labels).impl == "eager"


@pytest.mark.parametrize("dim", [64, 128, 256, 512, 768, 1024])
@pytest.mark.parametrize("dtype", fused.DTYPES)
def test_every_width_runs_or_says_why_not(dim: int, dtype: torch.dtype) -> None:
    """True half products, not upcast ones; float64 says what is right."""
    features, labels = batch(20_000, 300, dim, dtype)
    options = {"num_classes": 300, "impl": "triton"}
    if fused.why_not(features, torch.float32) is not None:
        with pytest.raises(ValueError, match="shared memory"):
            varcon_loss(features, labels, **options)
        return
    loss, gradient = step(features, labels, **options)
    exact = features.detach().double().requires_grad_()
    expected, expected_gradient = step(exact, labels, num_classes=300, impl="eager")
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    error = (gradient.double() - expected_gradient).norm() / expected_gradient.norm()
    assert error < tolerance


def test_many_classes() -> None:
    """K = 100,000, and more logits than a 32-bit offset could count."""
    features, labels = batch(65_536, 100_000, 64)
    for got, expected in zip(
        step(features, labels, num_classes=100_000, impl="triton"),
        step(features, labels, num_classes=100_000, impl="eager"), strict=True,
    ):  # fmt: skip
        size = float(expected.abs().max())
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * size)


def test_offsets_beyond_32_bits() -> None:
    """Features of more than 2^31 elements: the last rows are read and written where they are."""
    rows, dim = 2**21 + 64, 1024
    if torch.cuda.get_device_properties(0).total_memory < 70 * 2**30:
        pytest.skip("needs 70 GiB")
    features = torch.zeros(rows, dim, dtype=torch.bfloat16, device="cuda")
    features[-128:] = torch.randn(128, dim, device="cuda").bfloat16()
    labels = torch.full((rows,), -100, device="cuda")
    labels[-128:] = torch.arange(128, device="cuda") % 4
    loss, gradient = step(features.requires_grad_(), labels, num_classes=4, impl="triton")
    tail = features.detach()[-128:].clone().requires_grad_()
    expected, expected_gradient = step(tail, labels[-128:], num_classes=4, impl="triton")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient[-128:], expected_gradient)
    assert gradient[:-128].eq(0).all()


def test_two_runs_give_identical_bits_at_size() -> None:
    runs = [step(*batch(8192, 100, 128, torch.bfloat16), impl="triton") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_extra_memory_stays_small() -> None:
    """Rows and their gradient in float32, and no matrix of samples by classes."""
    features, labels = batch(65_536, 10_000, 128, torch.bfloat16)
    options = {"num_classes": 10_000, "impl": "triton"}
    step(features, labels, **options)  # compile
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(features, labels, **options)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 4 * features.numel() * 4
