"""Both libraries that may multiply the eager sweep's matrices, whichever this processor prefers."""

import pytest
import torch

from varcon_loss import varcon_terms
from varcon_loss.sweeps import products
from varcon_loss.sweeps.products import make_linear

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@pytest.fixture(params=[pytest.param(True, marks=needs_onednn), False], ids=["oneDNN", "mm"])
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(products, "prefers_onednn", lambda: request.param)
    monkeypatch.setattr(products, "SMALLEST_FOR_ONEDNN", 0)
    return request.param


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (130, 17, 33)])
@pytest.mark.parametrize("transposed", [False, True])
def test_product(onednn: bool, shape: tuple[int, int, int], transposed: bool) -> None:
    num_rows, num_keys, dim = shape
    rows, out = torch.randn(num_rows, dim), torch.full((num_rows, num_keys), torch.nan)
    keys = torch.randn(dim, num_keys).T if transposed else torch.randn(num_keys, dim)
    got = make_linear(keys, num_rows)(rows, out)
    assert (got is out) != onednn
    assert got.is_contiguous()
    torch.testing.assert_close(got, rows @ keys.T)
    got.fill_(0.0)  # it belongs to the caller


@pytest.mark.parametrize("normalize", [True, False])
def test_loss_and_gradient(onednn: bool, normalize: bool) -> None:
    features = torch.randn(300, 24, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(300) % 37
    results = []
    for impl in ("eager", "reference"):
        anchors = features.double() if impl == "reference" else features.clone()
        anchors.requires_grad_()
        terms = varcon_terms(anchors, labels, normalize=normalize, impl=impl)
        terms.loss.sum().backward()
        assert anchors.grad is not None
        results.append((terms.loss.detach().double(), anchors.grad.double()))
    for got, exact in zip(*results, strict=True):
        assert float((got - exact).norm() / exact.norm()) < 1e-6


def test_only_float32_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "prefers_onednn", lambda: True)
    monkeypatch.setattr(products, "SMALLEST_FOR_ONEDNN", 0)
    rows, out = torch.randn(4, 3, dtype=torch.float64), torch.empty(4, 5, dtype=torch.float64)
    assert make_linear(torch.randn(5, 3, dtype=torch.float64), 4)(rows, out) is out
