"""Eager on an accelerator against the equations in float64: what `impl="auto"` gives there today.

On Apple's GPU (mps) too. Without a GPU it runs on CPU tensors whose values may not be read.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import blind
from tests.conftest import same_step
from varcon_loss import VarConLoss
from varcon_loss import sweep as chunks

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "mps" if torch.backends.mps.is_available() else "cpu"
N, C, D = 700, 23, 20

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {}, "weight": {"weight": torch.linspace(0.0, 2.0, C)},
    "cold": {"temperature": 0.02, "epsilon": 0.01}, "as they are": {"normalize": False},
    "none": {"reduction": "none"}, "leave-one-out": {"leave_one_out": True},
    "memory": {"feature_dim": D, "centroid_momentum": 0.9}, "any labels": {"num_classes": None},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    if CUDA:  # cuBLAS, where deterministic algorithms are asked for
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def labels_of(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(C - 3, (N,), generator=generator)  # three classes are absent
    if kind == "integers":
        labels[::9] = -100
        return labels
    soft = torch.eye(C)[labels]
    if kind == "mixup":
        soft = 0.7 * soft + 0.3 * soft[torch.randperm(N, generator=generator)]
    if kind == "smoothed":
        soft = 0.9 * soft + 0.1 / C
    soft[::9] = 0
    return soft


def everything(
    device: str, features: Tensor, kind: str, options: dict, impl: str, *, reference: bool
) -> list[Tensor]:
    """Loss, terms and gradient of the last of one or, with a memory, two steps."""
    criterion = VarConLoss(impl=impl, **{"num_classes": C} | options).to(device)
    features, labels = features.to(device).requires_grad_(), labels_of(kind).to(device)
    given = {}
    if reference:
        given["ref_features"] = 2 * features.detach().flip(0)
        given["ref_labels"] = labels.flip(0).contiguous()
    for _ in range(2 if "feature_dim" in options else 1):
        terms = criterion.terms(features, labels, **given)
    upstream = torch.linspace(0.5, 1.5, terms.reduced.numel(), dtype=terms.reduced.dtype)
    upstream = upstream.view_as(terms.reduced).to(device)
    (gradient,) = torch.autograd.grad(terms.reduced, features, upstream)
    *numbers, _ = terms
    return [x.detach().cpu() for x in (*numbers, gradient)]


@pytest.mark.parametrize(("chunk", "columns"), [(2**25, False), (1, True)], ids=["whole", "chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reference", [False, True], ids=["batch", "reference set"])
@pytest.mark.parametrize("kind", ["integers", "one-hot", "mixup", "smoothed"])
@pytest.mark.parametrize("name", OPTIONS)
def test_values(
    name: str, kind: str, reference: bool, dtype: torch.dtype, chunk: int, columns: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    options = OPTIONS[name]
    if reference and name in ("leave-one-out", "memory"):
        pytest.skip("is not offered")
    if kind != "integers" and name in ("leave-one-out", "any labels"):
        pytest.skip("is for integer labels")
    features = torch.randn(N, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    if name == "as they are":
        features = features / 5
    if columns:
        features = features.T.contiguous().T
    want = everything("cpu", features.double(), kind, options, "reference", reference=reference)
    monkeypatch.setattr(chunks, "CHUNK_ACCELERATOR", chunk)
    monkeypatch.setattr(chunks, "CHUNK_CPU", chunk)
    if DEVICE == "cpu":
        blind.look_at_nothing(monkeypatch.setattr)
    got = everything(DEVICE, features, kind, options, "eager", reference=reference)
    *terms, gradient = got
    *wanted, wanted_gradient = want
    for a, b in zip(terms, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5, check_dtype=False)
    error = (gradient.double() - wanted_gradient).norm() / wanted_gradient.norm()
    assert error < (1e-4 if dtype == torch.float32 else 5e-3)
    if not CUDA:
        return
    torch.use_deterministic_algorithms(True)  # raises where an operator has no such form
    try:
        given = (DEVICE, features, kind, options, "eager")
        once, again = (everything(*given, reference=reference) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("kind", ["integers", "mixup"])
@pytest.mark.parametrize("columns", [False, True])
def test_compiled(kind: str, columns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor asserts that an operator's results lie as its fake said."""
    monkeypatch.setattr(chunks, "CHUNK_ACCELERATOR", 1)
    monkeypatch.setattr(chunks, "CHUNK_CPU", 1)
    torch._dynamo.reset()
    features = torch.randn(N, D)
    if columns:
        features = features.T.contiguous().T
    features, labels = features.to(DEVICE).requires_grad_(), labels_of(kind).to(DEVICE)
    criterion = VarConLoss(num_classes=C, impl="eager")
    same_step(torch.compile(criterion)(features, labels), criterion(features, labels), features)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["integers", "mixup"])
def test_captured(kind: str) -> None:
    features, labels = torch.randn(N, D, device="cuda", requires_grad=True), labels_of(kind).cuda()
    criterion = VarConLoss(num_classes=C, impl="eager")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(criterion(features, labels), features)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = criterion(features, labels)
        (gradient,) = torch.autograd.grad(loss, features)
    with torch.no_grad():
        features.copy_(torch.randn(N, D))
        labels.copy_(labels.roll(1, 0))
    graph.replay()
    want = criterion(features, labels)
    torch.testing.assert_close(loss, want.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(want, features)[0])


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["integers", "mixup"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["plain", "memory"])
def test_nothing_waits(kind: str, autocast: bool, name: str) -> None:
    features, labels = torch.randn(N, D, device="cuda", requires_grad=True), labels_of(kind).cuda()
    criterion = VarConLoss(num_classes=C, impl="eager", **OPTIONS[name]).cuda()
    try:
        for mode in ("default", "error"):
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode(mode)
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                criterion(features, labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
