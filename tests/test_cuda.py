"""What only a GPU can show. `tests/test_triton.py` runs there too, with compiled kernels."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from varcon_loss import VarConLoss, varcon_loss, varcon_terms
from varcon_loss import fused, proven

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def batch(
    num_rows: int, num_classes: int, dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    features = torch.randn(num_rows, dim, generator=generator, device="cuda").to(dtype)
    labels = torch.randint(num_classes, (num_rows,), generator=generator, device="cuda")
    return features.requires_grad_(), labels


@pytest.fixture
def sync_debug_mode() -> Iterator[Callable[[str], None]]:
    """Set what happens when something waits for the GPU; reset after the test."""

    def switch(mode: str) -> None:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)

    yield switch
    torch.cuda.set_sync_debug_mode("default")


OPTIONS = {
    "plain": {"num_classes": 10},
    "any labels": {},
    "leave-one-out": {"num_classes": 10, "leave_one_out": True},
    "weights": {"weight": torch.linspace(0.5, 2, 10)},
    "no normalisation": {"num_classes": 10, "normalize": False},
    "sum": {"num_classes": 10, "reduction": "sum"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_nothing_waits_for_the_gpu(
    name: str, impl: str, sync_debug_mode: Callable[[str], None]
) -> None:
    if impl == "eager" and name == "any labels":
        pytest.skip("eager needs num_classes for this, as documented")
    options = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in OPTIONS[name].items()}
    features, labels = batch(64, 10, 32)
    for mode in ("default", "error"):  # the first time compiles
        sync_debug_mode(mode)
        varcon_loss(features, labels, impl=impl, **options).backward()


def test_memory_and_reference_set_do_not_wait(sync_debug_mode: Callable[[str], None]) -> None:
    features, labels = batch(64, 10, 32)
    criterion = VarConLoss(
        num_classes=10, feature_dim=32, centroid_momentum=0.9, impl="triton"
    ).cuda()
    reference = {"ref_features": features.detach().clone(), "ref_labels": labels.clone()}
    for mode in ("default", "error"):
        sync_debug_mode(mode)
        criterion(features, labels).backward()
        varcon_loss(features, labels, num_classes=10, impl="triton", **reference).backward()


def test_a_captured_graph_replays_on_new_data() -> None:
    """By the code of the documentation."""
    page = (Path(__file__).parents[1] / "docs" / "kernels.md").read_text()
    documented: dict[str, Any] = {}
    exec(page.partition("```python\n")[2].partition("```")[0], documented)
    features, labels = batch(96, 10, 32)
    criterion = VarConLoss(num_classes=10, impl="triton")
    graph, loss, gradient = documented["capture"](criterion, features, labels)
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(seed)
        with torch.no_grad():
            features.copy_(torch.randn(96, 32, generator=generator, device="cuda"))
            # fewer classes each time: K is read by the kernels, not baked in
            labels.copy_(torch.randint(10 - 3 * seed, (96,), generator=generator, device="cuda"))
        graph.replay()
        anchors = features.detach().clone().requires_grad_()
        expected = varcon_loss(anchors, labels, num_classes=10, impl="reference")
        (expected_gradient,) = torch.autograd.grad(expected, anchors)
        torch.testing.assert_close(loss, expected.detach(), rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_runs_on_the_device_of_its_inputs() -> None:
    features, labels = batch(64, 10, 32)
    expected = varcon_loss(features, labels, impl="triton")
    moved = features.detach().to("cuda:1").requires_grad_()
    got = varcon_loss(moved, labels.to("cuda:1"), impl="triton")
    got.backward()
    assert got.device == moved.device
    assert moved.grad is not None
    torch.testing.assert_close(got.cpu(), expected.cpu())


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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_rows", [100, 20_000])
def test_every_width_runs_or_says_why_not(num_rows: int, dim: int, dtype: torch.dtype) -> None:
    """Tiles of every width, in small and large batches; true half products, not upcast ones."""
    features, labels = batch(num_rows, 300, dim, dtype)
    obstacle = fused.why_not(features, torch.float32)
    if obstacle is not None:
        assert "shared memory" in obstacle
        with pytest.raises(ValueError, match="shared memory"):
            varcon_loss(features, labels, impl="triton")
        return
    loss = varcon_loss(features, labels, impl="triton", num_classes=300)
    (gradient,) = torch.autograd.grad(loss, features)
    exact = features.detach().double().requires_grad_()
    expected = varcon_loss(exact, labels, impl="eager", num_classes=300)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    error = (gradient.double() - expected_gradient).norm() / expected_gradient.norm()
    assert error < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_classes(dtype: torch.dtype) -> None:
    """K = 100,000, and more logits than a 32-bit offset could count."""
    features, labels = batch(65_536, 100_000, 64, dtype)
    terms = varcon_terms(features, labels, num_classes=100_000, impl="triton")
    terms.reduced.backward()
    assert terms.impl == "triton"
    eager = varcon_terms(features.detach(), labels, num_classes=100_000, impl="eager")
    assert torch.equal(terms.num_classes, eager.num_classes)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(terms.loss.detach(), eager.loss, rtol=tolerance, atol=tolerance)
    assert features.grad is not None
    assert features.grad.isfinite().all()


def test_offsets_beyond_32_bits() -> None:
    """Features of more than 2^31 elements: the last rows are read and written where they are."""
    rows, dim = 2**21 + 64, 1024
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    features = torch.zeros(rows, dim, dtype=torch.bfloat16, device="cuda")
    features[-128:] = torch.randn(128, dim, device="cuda").bfloat16()
    labels = torch.full((rows,), -100, device="cuda")
    labels[-128:] = torch.arange(128, device="cuda") % 4
    features.requires_grad_()
    loss = varcon_loss(features, labels, num_classes=4, impl="triton")
    loss.backward()
    tail = features.detach()[-128:].clone().requires_grad_()
    expected = varcon_loss(tail, labels[-128:], num_classes=4, impl="triton")
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert features.grad is not None
    torch.testing.assert_close(features.grad[-128:], tail.grad)
    assert features.grad[:-128].eq(0).all()


def test_two_runs_give_identical_bits_at_size() -> None:
    features, labels = batch(8192, 100, 128, torch.bfloat16)
    runs = []
    for _ in range(2):
        features.grad = None
        loss = varcon_loss(features, labels, impl="triton")
        loss.backward()
        runs.append((loss.detach(), features.grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_extra_memory_stays_small() -> None:
    """At most three times the features: no matrix of samples by classes is kept."""
    features, labels = batch(65_536, 10_000, 128, torch.bfloat16)
    criterion = VarConLoss(num_classes=10_000, impl="triton")
    criterion(features, labels).backward()  # compile
    features.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    criterion(features, labels).backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 3 * features.numel() * features.element_size()
