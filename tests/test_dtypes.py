"""Every dtype, with and without autocast: float32 inside, the input's dtype outside."""

import pytest
import torch
from torch import Tensor

from tests.conftest import IMPLEMENTATIONS, MakeBatch, gradient_of
from varcon_loss import varcon_loss, varcon_terms

HALVES = (torch.float16, torch.bfloat16)
by_dtype = pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])


@by_dtype
def test_wide_inside_and_the_callers_dtype_outside(dtype, impl, make_batch) -> None:
    """Halves lose the rounding of the inputs and of the gradient, and nothing to autocast."""
    features, labels = make_batch(dtype=dtype)
    terms = varcon_terms(features, labels, impl=impl)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(part.dtype == wide for part in (*terms[:5], terms.reduced))
    gradient = gradient_of(terms.reduced, features)
    assert gradient.dtype == dtype
    for half in HALVES:
        with torch.autocast("cpu", dtype=half):
            inside = varcon_loss(features, labels, impl=impl)
            assert gradient_of(inside, features).isfinite().all()
        assert torch.equal(inside, terms.reduced)
        assert torch.equal(gradient_of(inside, features), gradient)

    exact = features.detach().double().requires_grad_()
    want = varcon_terms(exact, labels, impl="reference")
    close = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(terms.loss.double(), want.loss, rtol=close, atol=close)
    want = gradient_of(want.reduced, exact)
    atol = float(want.abs().max()) * 1e-5 + torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(gradient.double(), want, rtol=torch.finfo(dtype).eps, atol=atol)


@by_dtype
@pytest.mark.parametrize("options", [{}, {"leave_one_out": True}, {"normalize": False}], ids=str)
def test_zero_vectors(dtype: torch.dtype, options: dict, impl: str, make_batch: MakeBatch) -> None:
    features, labels = make_batch(dtype=dtype)
    with torch.no_grad():
        features[3] = features[labels == 2] = 0
    loss = varcon_loss(features, labels, impl=impl, **options)
    gradient = gradient_of(loss, features)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert (gradient[0] != 0).any()
    assert (gradient[3] == 0).all() or "normalize" in options


@pytest.mark.parametrize("scales", [[1e-36], [1e-20], [1e20], [1e36], [1e-30, 1.0, 1e30]], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_any_length_of_features_gives_the_same_loss(dtype, scales, impl, make_batch) -> None:
    features, labels = make_batch(dtype=dtype)
    powers = torch.tensor(scales, dtype=dtype).log2().round().exp2()  # exact in every dtype
    scaled = features.detach() * powers.repeat(24 // len(scales)).unsqueeze(1)
    loss = varcon_loss(scaled.requires_grad_(), labels, impl=impl)
    torch.testing.assert_close(loss, varcon_loss(features, labels, impl=impl), rtol=1e-5, atol=1e-5)
    gradient = gradient_of(loss, scaled)
    assert gradient.isfinite().all() or min(scales) < 1


def test_rows_longer_than_their_dtype_can_say(impl: str) -> None:
    x = torch.tensor([[3e38, 3e38], [1.0, 2.0], [2.0, 1.0], [-1.0, 3.0]], requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1])
    loss = varcon_loss(x, labels, impl=impl)
    torch.testing.assert_close(loss, varcon_loss(x.double(), labels).float())
    gradient = gradient_of(loss, x)
    assert gradient[1:].all()
    assert gradient.isfinite().all()


def test_an_infinite_upstream_gradient_stays_where_it_belongs(impl: str) -> None:
    """A mean over the samples of a class that has none divides by zero."""
    x, labels = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 1, 0, 1, -100, 1])
    want = gradient_of(varcon_loss(x, labels, reduction="sum", impl=impl), x)
    terms = varcon_terms(x, labels, reduction="none", impl=impl)
    for loss in (terms.reduced, terms.loss):
        got = gradient_of(loss / torch.where(labels < 0, 0, 1), x)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_not_hidden(bad: float, impl: str, make_batch: MakeBatch) -> None:
    features, labels = make_batch()
    with torch.no_grad():
        features[5, 2] = bad
    for normalize in (True, False):
        assert varcon_loss(features, labels, impl=impl, normalize=normalize).isnan()


@pytest.mark.parametrize("spread", [0.05, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_eager_float32_is_as_exact_as_the_equations(spread: float, num_classes: int) -> None:
    """Both judged against float64, from nearly converged to random embeddings."""
    generator, labels = torch.Generator().manual_seed(0), torch.arange(512) % num_classes
    features = torch.randn(num_classes, 64, generator=generator)[labels]
    features += spread * torch.randn(512, 64, generator=generator)

    def run(x: Tensor, impl: str) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        loss = varcon_terms(x, labels, impl=impl).loss
        return loss.detach().double(), gradient_of(loss, x).double()

    exact = run(features.double(), "reference")
    reference, eager = (
        [float((a - b).norm() / b.norm()) for a, b in zip(run(features, impl), exact, strict=True)]
        for impl in IMPLEMENTATIONS
    )
    assert all(mine <= 2 * theirs + 1e-6 for mine, theirs in zip(eager, reference, strict=True))


@pytest.mark.parametrize("name", ["int8", "int16", "int32", "uint8", "uint16", "uint32"])
def test_integer_label_dtypes(name: str, impl: str, make_batch: MakeBatch) -> None:
    features, labels = make_batch()
    want, given = varcon_loss(features, labels, impl=impl), labels.to(getattr(torch, name))
    for known in (None, 5):
        got = varcon_loss(features, given, num_classes=known, impl=impl)
        torch.testing.assert_close(got, want)
    if name == "uint8":  # 156 is -100 as int8
        assert varcon_terms(features, given + 156 - 4, impl=impl).valid.all()


@pytest.mark.parametrize("kind", ["integers", "few shares", "full table"])
@pytest.mark.parametrize("widest", [torch.float64, torch.float32])
def test_sums_of_very_many_rows(kind: str, widest: torch.dtype, monkeypatch) -> None:
    """Added one by one in float32, nearly equal rows would be off by 3e-3.

    Apple's GPUs have no float64: sums of pieces go on in float32, and lose little.
    """
    monkeypatch.setattr("varcon_loss.centroids.widest", lambda device: widest)
    generator, labels = torch.Generator().manual_seed(0), torch.arange(300_000) % 2
    features = torch.randn(2, 4, generator=generator)[labels]
    features += 0.01 * torch.randn(features.shape, generator=generator)
    table = torch.eye(8)[labels] * 0.7 + torch.eye(8)[labels + 4] * 0.3
    rows = {"integers": labels, "few shares": table}.get(kind, table * 0.9 + 0.0125)
    got, want = (varcon_terms(x, rows, epsilon=0.05) for x in (features, features.double()))
    rtol = 2e-5 if widest == torch.float64 else 1e-4
    for one, other in ((got.reduced, want.reduced), (got.confidence, want.confidence)):
        torch.testing.assert_close(one, other.float(), rtol=rtol, atol=0.0)
