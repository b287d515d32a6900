"""The loss expected under shares: values, gradients, forms and the ends of the range."""

import contextlib
from collections.abc import Iterator

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from tests import oracle_soft_labels
from tests.conftest import MakeBatch
from tests.counting import LargestWritten
from varcon_loss import varcon_terms
from varcon_loss.classes import Centroids, unit_centroids
from varcon_loss.rows import Rows, Swept
from varcon_loss.samples import Samples, to_unit
from varcon_loss.soft_labels import SoftLabels, class_masses, in_slots, soft_sums
from varcon_loss import sweep as chunks, products
from varcon_loss.sweeps.expectation import sweep_soft_labels
from varcon_loss.sweeps.expectation_reference import expected_loss_by_equations

F64 = torch.float64
FORMS = ("table", "entries", "background")


def soft_labels_of(table: Tensor, form: str, dtype: torch.dtype = F64) -> SoftLabels:
    """Either form of any table, with as many entries a row as it takes."""
    if form == "table":
        return SoftLabels(table)
    lowest = table.amin(1, keepdim=True)
    background = lowest if form == "background" else torch.zeros_like(lowest)
    size = max(1, int((table > background).sum(1).max()))
    entries, slots = table.topk(size, dim=1)
    return SoftLabels(
        entries.to(dtype), slots, None, lowest.to(dtype) if form == "background" else None
    )


def evaluate(
    z: Tensor,
    soft: SoftLabels,
    centroids: Centroids,
    temperature: float = 0.1,
    epsilon: float = 0.02,
    weight: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    norms: Tensor | None = None,
) -> Swept:
    anchors = Samples(features=z, labels=soft, valid=valid, unit=z, norms=norms)
    rows = Rows(anchors=anchors, slots=soft, centroids=centroids, weight=weight)
    return sweep_soft_labels(rows, soft, temperature, epsilon, True, True)


@contextlib.contextmanager
def plain_logits(small: bool) -> Iterator[None]:
    """Whether ``exp`` takes the logits as they are, whatever the rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rows, "have_small_logits", lambda rows, temperature: small)
        yield


def from_features(
    features: Tensor,
    table: Tensor,
    form: str = "table",
    temperature: float = 0.1,
    epsilon: float = 0.02,
    weight: Tensor | None = None,
    *,
    normalize: bool = True,
) -> tuple[Swept, Tensor]:
    """From features ``[N, D]`` and ``[N, C]``, and the gradient of the features."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    soft, valid = soft_labels_of(table, form, dtype), table.sum(1) > 0
    features = features.detach().masked_fill(~valid[:, None], 0.0)
    z, norms = to_unit(features, dtype, normalize=normalize)
    classes = (class_masses(soft, table.shape[1], dtype) > 0).nonzero().squeeze(1)
    if len(classes) == 0:  # as many slots as there must be
        centroids = Centroids(
            z.new_zeros(1, z.shape[1]), torch.tensor([False]), torch.tensor(0), False
        )
        classes = torch.zeros(1, dtype=torch.int64)
    soft = in_slots(soft, classes)
    if bool(valid.any()):
        centroids = unit_centroids(soft_sums(soft, z, len(classes)), None)
    result = evaluate(
        z, soft, centroids, temperature, epsilon,
        None if weight is None else weight[classes], valid, norms=norms,
    )  # fmt: skip
    return result, gradient_of(result)


def gradient_of(swept: Swept) -> Tensor:
    """Of the features."""
    assert swept.gradient is not None
    return swept.gradient if swept.scale is None else swept.gradient * swept.scale[:, None]


def random_table(num_rows: int, num_classes: int, share: float, generator: torch.Generator):
    table = torch.rand(num_rows, num_classes, generator=generator, dtype=F64)
    table *= torch.rand(table.shape, generator=generator, dtype=F64) < share
    table[torch.rand(num_rows, generator=generator) < 0.1] = 0.0
    return table


def row_errors(got: Tensor, exact: Tensor) -> Tensor:
    return (got.double() - exact).norm(dim=1) / exact.norm(dim=1)


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    num_rows=st.integers(1, 20),
    num_classes=st.integers(1, 9),
    dim=st.integers(1, 12),
    seed=st.integers(0, 2**31),
    temperature=st.floats(0.02, 5.0),
    share=st.floats(0.0, 0.99),
    density=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    floor=st.sampled_from([0.0, 0.05]),
    normalize=st.booleans(),
    weighted=st.booleans(),
)
def test_against_scalar_loops(
    form, num_rows, num_classes, dim, seed, temperature, share, density, floor, normalize, weighted
) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_rows, dim, generator=generator, dtype=F64)
    table = random_table(num_rows, num_classes, density, generator) + floor
    weight = torch.rand(num_classes, generator=generator, dtype=F64) if weighted else None
    epsilon = share * temperature
    (loss, terms, gradient, _), _ = from_features(
        features, table, form, temperature, epsilon, weight, normalize=normalize
    )
    expected = oracle_soft_labels.row_terms(
        features.tolist(),
        table.tolist(),
        temperature,
        epsilon,
        normalize=normalize,
        weight=None if weight is None else weight.tolist(),
    )
    assert terms is not None
    assert gradient is not None
    for name, got in zip(oracle_soft_labels.NAMES, (loss, *terms), strict=True):
        want = torch.tensor([row[name] for row in expected], dtype=F64)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: n + m)
    assert (gradient[table.sum(1) == 0] == 0).all()


@settings(max_examples=80, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    num_rows=st.integers(1, 30),
    num_classes=st.integers(1, 20),
    seed=st.integers(0, 2**31),
    temperature=st.floats(0.01, 2.0),
    share=st.floats(0.0, 0.95),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    floor=st.sampled_from([0.0, 0.05]),
    shifted=st.booleans(),
    weighted=st.booleans(),
    some_empty=st.booleans(),
)
def test_gradient_is_that_of_the_equations(
    form, num_rows, num_classes, seed, temperature, share, density, floor, shifted, weighted,
    some_empty,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(num_rows, 7, generator=generator, dtype=F64), dim=1)
    w = F.normalize(torch.randn(num_classes, 7, generator=generator, dtype=F64), dim=1)
    present = None
    if some_empty:
        present = torch.rand(num_classes, generator=generator) < 0.7
        w[~present] = 0.0
    count = torch.tensor(num_classes) if present is None else present.sum()
    empty = torch.zeros(num_classes, dtype=torch.bool) if present is None else ~present
    table = random_table(num_rows, num_classes, density, generator) + floor
    weight = torch.rand(num_classes, generator=generator, dtype=F64) if weighted else None
    soft, epsilon = soft_labels_of(table, form), share * temperature
    centroids = Centroids(unit=w, present=present, num_present=count, packed=False)
    with plain_logits(not shifted and 1 / temperature <= 40):
        swept = evaluate(z, soft, centroids, temperature, epsilon, weight)
    loss, terms, gradient, _ = swept
    x = z.clone().requires_grad_()
    want, want_terms = expected_loss_by_equations(
        x, SoftLabels(table), w, empty, weight, temperature, epsilon
    )
    want.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(loss, want.detach(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(terms, want_terms, rtol=1e-9, atol=1e-11)
    close = {"rtol": 1e-8, "atol": 1e-10 * float(x.grad.abs().max() + 1)}
    torch.testing.assert_close(gradient, x.grad, **close)


@pytest.mark.parametrize("form", ["table", "entries"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("confident", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_one_hot_rows_are_integer_labels(
    form: str, dtype: torch.dtype, confident: bool, normalize: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 9
    features = torch.randn(60, 16, generator=generator, dtype=dtype) / 4
    if confident:
        features = torch.eye(16, dtype=dtype)[labels] + features / 5
    results = {}
    for kind in (dtype, F64):
        x = features.detach().to(kind).clone().requires_grad_()
        terms = varcon_terms(x, labels, normalize=normalize, impl="eager")
        terms.loss.sum().backward()
        assert x.grad is not None
        results[kind] = (terms, x.grad)
    (integer, gradient), (exact, exact_gradient) = results[dtype], results[F64]
    got, got_gradient = from_features(features, F.one_hot(labels), form, normalize=normalize)
    close = {"rtol": 1e-12, "atol": 1e-14} if dtype == F64 else {"rtol": 2e-6, "atol": 3e-6}
    torch.testing.assert_close(got.loss, integer.loss.detach(), **close)
    for mine, name in zip(got.terms, ("kl", "nll", "confidence", "tau2"), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(mine, getattr(integer, name), **close)
    # As close to what is exact as the integer path is.
    error = float(row_errors(got_gradient, exact_gradient).max())
    assert error <= 1.5 * float(row_errors(gradient, exact_gradient).max()) + 1e-14
    loss_error = float((got.loss - exact.loss.detach()).abs().max())
    assert loss_error <= 1.5 * float((integer.loss - exact.loss).abs().max().detach()) + 1e-14


def confident_batch(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """float32 rows ``z`` with ``p`` near 1, centroids, and shares that agree with that."""
    generator = torch.Generator().manual_seed(1)
    num_rows, num_classes = 64, 50
    w = torch.linalg.qr(torch.randn(64, num_classes, generator=generator))[0].T.contiguous()
    first = torch.arange(num_rows) % num_classes
    second = (first + 1) % num_classes
    table = F.one_hot(first, num_classes).float()
    z = w[first]
    if kind == "smoothed":
        table = 0.999 * table + 0.001 / num_classes
    elif kind == "uneven":
        table = 0.999 * table + 0.001 * torch.rand(table.shape, generator=generator)
    elif kind in ("mixed", "mixed in the middle"):
        table = 0.6 * table + 0.4 * F.one_hot(second, num_classes)
        if kind == "mixed in the middle":
            z = 0.72 * z + 0.7 * w[second]
    elif kind == "barely mixed":
        table = 0.9999 * table + 0.0001 * F.one_hot(second, num_classes)
    noise = torch.randn(z.shape, generator=generator) * 0.02
    return F.normalize(z + noise, dim=1), w, table


def by_equations(
    z: Tensor, w: Tensor, table: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, other terms and gradient in float64."""
    x = z.requires_grad_()
    soft, empty = SoftLabels(table.double()), torch.zeros(len(w), dtype=torch.bool)
    loss, terms = expected_loss_by_equations(x, soft, w.double(), empty, None, temperature, 0.01)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), terms, gradient


@pytest.mark.parametrize(
    "kind", ["one-hot", "smoothed", "uneven", "mixed", "mixed in the middle", "barely mixed"]
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("small_logits", [True, False])
def test_confident_gradients_keep_their_digits(kind: str, form: str, small_logits: bool) -> None:
    """What float32 logits cost (they are 10 +- 1e-6) is all that is lost."""
    z, w, table = confident_batch(kind)
    temperature = 0.05
    centroids = Centroids(unit=w, present=None, num_present=torch.tensor(len(w)), packed=True)
    with plain_logits(small_logits):
        swept = evaluate(
            z, soft_labels_of(table, form, torch.float32), centroids, temperature, 0.01
        )
    loss, _, gradient, _ = swept
    want, terms, exact = by_equations(z.double(), w, table, temperature)
    assert gradient is not None
    if "mixed" not in kind:
        assert float(terms[2].min()) > 0.99
    errors = row_errors(gradient, exact)
    if kind != "mixed in the middle":
        assert float(errors.max()) < 1e-5
    else:
        # Some of these rows are near the least loss they can have, where the gradient vanishes:
        # what it is made of keeps its digits.
        made_of = 2 / temperature
        assert float((gradient - exact).norm(dim=1).max()) < 3e-6 * made_of
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=3e-6)


@settings(max_examples=30, deadline=None)
@given(form=st.sampled_from(["table", "entries"]), seed=st.integers(0, 2**31))
def test_linear_in_the_shares(form: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(12, 5, generator=generator, dtype=F64), dim=1)
    centroids = unit_centroids(torch.randn(6, 5, generator=generator, dtype=F64), None)
    one, two = (random_table(12, 6, 0.5, generator) for _ in range(2))
    results = [
        evaluate(z, soft_labels_of(table, form), centroids)
        for table in (one, two, 0.3 * one + 2 * two)
    ]
    for field in ("loss", "terms", "gradient"):
        a, b, both = (getattr(result, field) for result in results)
        torch.testing.assert_close(both, 0.3 * a + 2 * b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_order_of_classes_and_rows_does_not_matter(form: str) -> None:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(20, 6, generator=generator, dtype=F64)
    table = random_table(20, 7, 0.4, generator) + (0.01 if form == "background" else 0)
    classes, rows = torch.randperm(7, generator=generator), torch.randperm(20, generator=generator)
    (loss, _, _, _), gradient = from_features(features, table, form)
    (moved, _, _, _), moved_gradient = from_features(features[rows], table[rows][:, classes], form)
    torch.testing.assert_close(moved, loss[rows], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(moved_gradient, gradient[rows], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("normalize", [True, False])
def test_gradient_matches_finite_differences(form: str, normalize: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(5, 4, generator=generator, dtype=F64) * 0.4
    centroids = unit_centroids(torch.randn(6, 4, generator=generator, dtype=F64), None)
    soft = soft_labels_of(random_table(5, 6, 0.5, generator) + 0.02, form)
    weight = torch.rand(6, generator=generator, dtype=F64)

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            z, norms = to_unit(x, F64, normalize=normalize)
            result = evaluate(z, soft, centroids, 0.3, 0.2, weight, norms=norms)
            ctx.save_for_backward(gradient_of(result))
            return result.loss

        @staticmethod
        def backward(ctx, upstream):
            return ctx.saved_tensors[0] * upstream[:, None]

    assert torch.autograd.gradcheck(Loss.apply, features.requires_grad_())


def test_equations_can_be_differentiated_twice() -> None:
    generator = torch.Generator().manual_seed(6)
    z = F.normalize(torch.randn(3, 4, generator=generator, dtype=F64), dim=1).requires_grad_()
    w = F.normalize(torch.randn(5, 4, generator=generator, dtype=F64), dim=1)
    w[2] = 0.0
    table = torch.rand(3, 5, generator=generator, dtype=F64)
    empty = torch.arange(5) == 2

    def loss(z: Tensor) -> Tensor:
        return expected_loss_by_equations(z, SoftLabels(table), w, empty, None, 0.3, 0.2)[0]

    assert torch.autograd.gradgradcheck(loss, z)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", [1e-3, 0.005, 0.1])
def test_range(form: str, normalize: bool, temperature: float) -> None:
    """Logits of up to 1e6, ``exp(1 / tau2)`` of up to ``exp(2000)``."""
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(20, 6, generator=generator) * 30
    table = random_table(20, 7, 0.4, generator).float() + (0.01 if form == "background" else 0)
    options = {"temperature": temperature, "epsilon": temperature / 2, "normalize": normalize}
    (loss, _, _, _), gradient = from_features(features, table, form, **options)
    (want, _, _, _), want_gradient = from_features(
        features.double(), table.double(), form, **options
    )
    assert gradient.isfinite().all()
    assert float((loss - want).abs().max() / want.abs().max()) < 1e-5
    assert float((gradient - want_gradient).norm() / want_gradient.norm()) < 1e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_classes", [1000, 1023, 10_007, 40_003])
def test_many_classes_at_a_high_temperature(form: str, num_classes: int) -> None:
    """``1 + (K - 1) exp(-1 / tau2)`` is nearly K there, and products of it end somewhere."""
    generator = torch.Generator().manual_seed(8)
    features = torch.randn(12, 6, generator=generator)
    labels = torch.randint(num_classes, (12,), generator=generator)
    table = 0.9 * F.one_hot(labels, num_classes).float()
    if form != "entries":
        table += 0.1 / num_classes
    got, gradient = from_features(features, table, form, 5.0, 0.5)
    want, want_gradient = from_features(features.double(), table.double(), form, 5.0, 0.5)
    assert got.terms is not None
    assert want.terms is not None
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(got.terms.double(), want.terms, rtol=1e-4, atol=1e-4)
    assert float((gradient - want_gradient).norm() / want_gradient.norm()) < 1e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (6, 1), (5, 2), (0, 4)])
def test_odd_shapes(form: str, shape: tuple[int, int]) -> None:
    num_rows, num_classes = shape
    features = torch.randn(num_rows, 4)
    table = torch.rand(num_rows, num_classes)
    if num_rows == 0 and form != "table":
        return
    (loss, terms, _, _), gradient = from_features(features, table, form)
    assert terms is not None
    assert (loss.shape, terms.shape, gradient.shape) == ((num_rows,), (4, num_rows), (num_rows, 4))
    assert loss.isfinite().all()
    if num_classes == 1:
        assert (loss == 0).all()
        assert (gradient == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_zeros_take_no_part(form: str, make_batch: MakeBatch) -> None:
    features, labels = make_batch()
    table = 0.8 * F.one_hot(labels, 5).double() + 0.04
    features = features.detach()
    features[[3, 4]], table[[3, 4]] = torch.nan, 0.0
    kept = table.sum(1) > 0
    (loss, terms, _, _), gradient = from_features(features, table, form)
    (want, want_terms, _, _), want_gradient = from_features(features[kept], table[kept], form)
    assert terms is not None
    for got, expected in ((loss, want), (terms.T, want_terms.T), (gradient, want_gradient)):  # type: ignore[union-attr]
        torch.testing.assert_close(got[kept], expected, rtol=1e-12, atol=1e-14)
        assert (got[~kept] == 0).all()
    (loss, _, _, _), gradient = from_features(features, torch.zeros_like(table), "table")
    assert (loss == 0).all()
    assert (gradient == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_nan_shows(form: str) -> None:
    features = torch.randn(8, 4)
    features[0] = torch.nan
    table = F.one_hot(torch.arange(8) % 4).float() * 0.9 + 0.025
    table[7] = 0.0
    (loss, _, _, _), gradient = from_features(features, table, form)
    assert loss[:7].isnan().all()
    assert gradient[:7].isnan().any(1).all()
    assert loss[7] == 0
    assert (gradient[7] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_the_tables_dtype_is_the_callers(dtype: torch.dtype) -> None:
    features, table = torch.randn(10, 4), torch.rand(10, 6).to(dtype)
    (loss, _, _, _), gradient = from_features(features, table)
    (want, _, _, _), want_gradient = from_features(features, table.float())
    assert loss.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradient, want_gradient)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weighted", [False, True])
def test_views_share_a_row(form: str, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_CPU", 1)
    z = F.normalize(torch.randn(600, 5, dtype=F64), dim=1)
    centroids = unit_centroids(torch.randn(7, 5, dtype=F64), None)
    table = torch.rand(200, 7, dtype=F64)
    table[:, 2:4] = 0.0
    weight = torch.rand(7, dtype=F64) if weighted else None
    shared = evaluate(z, soft_labels_of(table, form)._replace(views=3), centroids, weight=weight)
    repeated = evaluate(
        z, soft_labels_of(table.repeat_interleave(3, 0), form), centroids, weight=weight
    )
    torch.testing.assert_close(tuple(shared), tuple(repeated), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_chunks_do_not_show(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    z = F.normalize(torch.randn(1000, 5, dtype=F64), dim=1)
    centroids = unit_centroids(torch.randn(17, 5, dtype=F64), None)
    table = F.one_hot(torch.arange(1000) % 17).double() + 0.01
    results = []
    for budget in (1, 2**30):
        monkeypatch.setattr(chunks, "CHUNK_CPU", budget)
        norms = torch.ones(1000, dtype=F64)
        results.append(tuple(evaluate(z, soft_labels_of(table, form), centroids, norms=norms)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_rows", [1400, 5000])
def test_no_matrix_of_samples_by_classes_is_made(form: str, num_rows: int) -> None:
    table = 0.9 * F.one_hot(torch.arange(num_rows) % 1000).float()
    if form != "entries":
        table += 1e-4
    soft = soft_labels_of(table, form, torch.float32)
    z = F.normalize(torch.randn(num_rows, 16), dim=1)
    centroids = unit_centroids(torch.randn(1000, 16), None)
    with LargestWritten() as largest:
        soft_sums(soft, z, 1000)
        evaluate(z, soft, centroids, norms=torch.ones(num_rows))
    assert largest.elements <= 2**20


def test_nothing_waits_for_a_device() -> None:
    """On the meta device tensors have no values, and reading one raises."""
    z, w = torch.empty(12, 4, device="meta"), torch.empty(5, 4, device="meta")
    soft = SoftLabels(torch.empty(12, 5, device="meta"))
    present, count = (
        torch.empty(5, dtype=torch.bool, device="meta"),
        torch.empty((), dtype=torch.int64, device="meta"),
    )
    centroids = Centroids(unit=w, present=present, num_present=count, packed=False)
    for temperature in (0.1, 0.02):
        result = evaluate(z, soft, centroids, temperature, 0.01, w[:, 0], norms=z[:, 0])
        shapes = [part.shape for part in result if part is not None]
        assert shapes == [(12,), (4, 12), (12, 4), (12,)]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("form", FORMS)
def test_by_onednn(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The faster library on some processors; it keeps its results in tensors of its own."""
    features = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    table = F.one_hot(torch.arange(40) % 7).float() + 0.01
    want, want_gradient = from_features(features.double(), table.double(), form)
    monkeypatch.setattr(products, "prefers_onednn", lambda: True)
    monkeypatch.setattr(products, "SMALLEST_FOR_ONEDNN", 0)
    got, gradient = from_features(features, table, form)
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-5, atol=1e-5)
    assert float(row_errors(gradient, want_gradient).max()) < 1e-5
