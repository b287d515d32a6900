"""Every dtype, with and without autocast: float32 inside, the input's dtype outside."""

import pytest
import torch

from tests.conftest import IMPLEMENTATIONS, MakeBatch
from varcon_loss import soft_labels, sums, varcon_loss, varcon_terms

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_is_float32_or_wider_and_gradients_keep_the_dtype(
    dtype: torch.dtype, impl: str, make_batch: MakeBatch
) -> None:
    features, labels = make_batch(dtype=dtype)
    terms = varcon_terms(features, labels, impl=impl)
    terms.reduced.backward()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for tensor in (terms.reduced, terms.loss, terms.kl, terms.nll, terms.confidence, terms.tau2):
        assert tensor.dtype == wide
    assert features.grad is not None
    assert features.grad.dtype == dtype

    # Half precision loses nothing but the rounding of the inputs and of the returned gradient.
    exact = features.detach().double().requires_grad_()
    expected = varcon_terms(exact, labels, impl="reference")
    expected.reduced.backward()
    assert exact.grad is not None
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(terms.loss.double(), expected.loss, rtol=tolerance, atol=tolerance)
    rounding = torch.finfo(dtype).eps
    scale = float(exact.grad.abs().max())
    atol = scale * 1e-5 + torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(features.grad.double(), exact.grad, rtol=rounding, atol=atol)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("autocast", HALVES)
def test_autocast_changes_nothing(
    dtype: torch.dtype, autocast: torch.dtype, impl: str, make_batch: MakeBatch
) -> None:
    features, labels = make_batch(dtype=dtype)
    plain = varcon_loss(features, labels, impl=impl)
    with torch.autocast("cpu", dtype=autocast):
        inside = varcon_loss(features, labels, impl=impl)
        inside.backward()
    assert torch.equal(plain, inside)
    assert features.grad is not None
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_vectors(dtype: torch.dtype, impl: str, make_batch: MakeBatch) -> None:
    features, labels = make_batch(dtype=dtype)
    with torch.no_grad():
        features[3] = 0
        features[labels == 2] = 0
    for options in ({}, {"leave_one_out": True}, {"normalize": False}):
        features.grad = None
        loss = varcon_loss(features, labels, impl=impl, **options)
        loss.backward()
        assert loss.isfinite()
        assert features.grad is not None
        assert features.grad.isfinite().all()
        if options.get("normalize", True):
            assert (features.grad[3] == 0).all()
            assert (features.grad[0] != 0).any()


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e20, 1e36])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_any_length_of_features_gives_the_same_loss(
    dtype: torch.dtype, scale: float, impl: str, make_batch: MakeBatch
) -> None:
    features, labels = make_batch(dtype=torch.float32)
    powers = 2.0 ** round(torch.tensor(scale).log2().item())  # exact in every dtype
    base = features.detach().to(dtype)
    expected = varcon_loss(base, labels, impl=impl)
    scaled = (base * powers).requires_grad_()
    loss = varcon_loss(scaled, labels, impl=impl)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    assert scaled.grad is not None
    if scale > 1:
        assert scaled.grad.isfinite().all()


@pytest.mark.parametrize("name", ["reference", "eager"])
def test_rows_longer_than_their_dtype_can_say(name: str) -> None:
    x = torch.tensor([[3e38, 3e38], [1.0, 2.0], [2.0, 1.0], [-1.0, 3.0]], requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1])
    loss = varcon_loss(x, labels, impl=name)
    torch.testing.assert_close(loss, varcon_loss(x.double(), labels).float())
    loss.backward()
    assert x.grad is not None
    assert x.grad[1:].all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", ["reference", "eager"])
def test_an_infinite_upstream_gradient_stays_where_it_belongs(name: str) -> None:
    """A mean over the samples of a class that has none divides by zero."""
    x, labels = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 1, 0, 1, -100, 1])
    losses = varcon_loss(x, labels, reduction="none", impl=name)
    terms = varcon_terms(x, labels, impl=name)
    for loss in (losses, terms.loss):
        (gradient,) = torch.autograd.grad((loss / torch.where(labels < 0, 0, 1)).sum(), x)
        (expected,) = torch.autograd.grad(varcon_loss(x, labels, reduction="sum", impl=name), x)
        torch.testing.assert_close(gradient, expected)


def test_mixed_rows_of_extreme_length(impl: str, make_batch: MakeBatch) -> None:
    features, labels = make_batch(dtype=torch.float32)
    lengths = torch.tensor([1e-30, 1.0, 1e30]).repeat(8).unsqueeze(1)
    torch.testing.assert_close(
        varcon_loss(features * lengths, labels, impl=impl),
        varcon_loss(features, labels, impl=impl),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_not_hidden(bad: float, impl: str, make_batch: MakeBatch) -> None:
    features, labels = make_batch()
    with torch.no_grad():
        features[5, 2] = bad
    assert varcon_loss(features, labels, impl=impl).isnan()
    assert varcon_loss(features, labels, impl=impl, normalize=False).isnan()


@pytest.mark.parametrize("spread", [0.05, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_eager_float32_is_as_exact_as_the_equations_in_float32(
    spread: float, num_classes: int
) -> None:
    """Both judged against float64, from nearly converged to random embeddings."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(num_classes, 64, generator=generator)
    labels = torch.arange(512) % num_classes
    noise = torch.randn(512, 64, generator=generator)
    features = centers[labels] + spread * noise

    def run(x: torch.Tensor, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.clone().requires_grad_()
        terms = varcon_terms(x, labels, impl=impl)
        terms.loss.sum().backward()
        assert x.grad is not None
        return terms.loss.detach().double(), x.grad.double()

    exact = run(features.double(), "reference")
    errors = {}
    for impl in IMPLEMENTATIONS:
        got = run(features, impl)
        errors[impl] = [float((a - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True)]
    for eager, reference in zip(errors["eager"], errors["reference"], strict=True):
        assert eager <= 2 * reference + 1e-6


def test_integer_label_dtypes(impl: str, make_batch: MakeBatch) -> None:
    features, labels = make_batch()
    expected = varcon_loss(features, labels, impl=impl)
    for dtype in (
        torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16, torch.uint32
    ):  # fmt: skip
        for known in (None, 5):
            got = varcon_loss(features, labels.to(dtype), num_classes=known, impl=impl)
            torch.testing.assert_close(got, expected)


def test_a_uint8_label_is_not_the_negative_number_it_looks_like(impl: str) -> None:
    features = torch.randn(4, 3)
    labels = torch.tensor([156, 156, 1, 1], dtype=torch.uint8)  # -100 as int8
    assert varcon_terms(features, labels, impl=impl).valid.all()


def test_float32_sums_of_very_many_rows() -> None:
    """Nearly equal rows of two classes: adding them one by one would be off by 3e-3."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2, 4, generator=generator)
    labels = torch.arange(300_000) % 2
    features = directions[labels] + 0.01 * torch.randn(len(labels), 4, generator=generator)
    terms = varcon_terms(features, labels, epsilon=0.05)
    exact = varcon_terms(features.double(), labels, epsilon=0.05)
    torch.testing.assert_close(terms.reduced, exact.reduced.float(), rtol=2e-5, atol=0)
    torch.testing.assert_close(terms.confidence, exact.confidence.float(), rtol=2e-5, atol=0)


@pytest.mark.parametrize("kind", ["integers", "soft"])
def test_very_many_rows_where_there_is_no_float64(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Apple's GPUs: sums of pieces go on in float32, and lose little."""
    assert sums.widest(torch.device("mps")) == torch.float32
    for module in (sums, soft_labels):
        monkeypatch.setattr(module, "widest", lambda _: torch.float32)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 4, generator=generator)[torch.arange(100_000) % 2]
    labels = torch.arange(100_000) % 2
    given = labels if kind == "integers" else torch.eye(2)[labels] * 0.9 + 0.05
    terms = varcon_terms(rows, given, epsilon=0.05)
    exact = varcon_terms(rows.double(), given, epsilon=0.05)
    torch.testing.assert_close(terms.reduced, exact.reduced.float(), rtol=1e-4, atol=0)


def test_counts_beyond_what_float32_counts() -> None:
    from varcon_loss.sums import class_counts

    slots = torch.zeros(2**24 + 2, dtype=torch.int64)
    assert class_counts(slots, None, 1, torch.float32) == 2**24 + 2
