"""Values and gradients against an oracle that shares no code with the package."""

import math

import hypothesis.strategies as st
import mpmath
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from tests import oracle
from tests.conftest import IMPLEMENTATIONS, MakeBatch, gradient_of
from tests.counting import LargestWritten
from varcon_loss import varcon_loss, varcon_terms

TERMS = ("loss", "kl", "nll", "confidence", "tau2")


def assert_terms_match(terms, expected: list, rtol: float = 1e-11) -> None:
    assert terms.valid.flatten().tolist() == [row is not None for row in expected]
    got = {name: getattr(terms, name).flatten().double() for name in TERMS}
    want = {name: [0.0 if row is None else row[name] for row in expected] for name in TERMS}
    want = {name: torch.tensor(column, dtype=torch.float64) for name, column in want.items()}
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-13)


@settings(max_examples=60, deadline=None)
@given(
    impl=st.sampled_from(IMPLEMENTATIONS), num_rows=st.integers(1, 40),
    num_classes=st.integers(1, 12), dim=st.integers(1, 20), seed=st.integers(0, 2**31),
    temperature=st.floats(0.02, 5.0), share=st.floats(0.0, 0.99), normalize=st.booleans(),
    leave_one_out=st.booleans(), known=st.booleans(), ignored=st.floats(0.0, 1.0),
)  # fmt: skip
def test_every_option_against_scalar_loops(
    impl, num_rows, num_classes, dim, seed, temperature, share, normalize, leave_one_out, known,
    ignored,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_rows, dim, generator=generator, dtype=torch.float64)
    labels = torch.randint(num_classes, (num_rows,), generator=generator)
    labels[torch.rand(num_rows, generator=generator) < ignored * 0.5] = -100
    options = {"normalize": normalize, "leave_one_out": leave_one_out}
    temperatures = {"temperature": temperature, "epsilon": share * temperature}
    given = options | temperatures | {"num_classes": num_classes + 3 if known else None}
    terms = varcon_terms(features, labels, impl=impl, **given)
    expected = oracle.row_terms(features.tolist(), labels.tolist(), **temperatures, **options)
    assert_terms_match(terms, expected, rtol=1e-9)
    losses = [row["loss"] for row in expected if row is not None]
    mean = math.fsum(losses) / max(1, len(losses))
    assert float(terms.reduced) == pytest.approx(mean, rel=1e-9, abs=1e-12)
    assert terms.num_classes == len(labels[labels != -100].unique())


def test_against_high_precision() -> None:
    """Confident rows: 1 - p near 1e-40, where a subtraction would leave nothing."""
    mpmath.mp.dps = 80
    features = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 2]] * 2
    labels = torch.tensor([0, 0, 1, 2])
    temperature, epsilon = 0.02, 0.005
    one, t1, eps = mpmath.mpf(1), mpmath.mpf(temperature), mpmath.mpf(epsilon)
    nll = mpmath.log(1 + 2 * mpmath.exp(-one / t1))
    p = mpmath.exp(-nll)
    tau2 = (t1 - eps) + 2 * eps * p
    scale = mpmath.exp(-1 / tau2)
    normaliser = 1 + 2 * scale
    log_p_other = -one / t1 - nll
    kl = (1 / normaliser) * (-mpmath.log(normaliser) + nll)
    kl += 2 * (scale / normaliser) * (mpmath.log(scale / normaliser) - log_p_other)
    for impl in IMPLEMENTATIONS:
        terms = varcon_terms(features, labels, temperature, epsilon=epsilon, impl=impl)
        # log_softmax, which the reference reads from the paper, rounds nll to a multiple of 1e-16.
        close = {"rel": 1e-12, "abs": 1e-15 if impl == "reference" else 0}
        assert float(terms.nll[0]) == pytest.approx(float(nll), **close)
        assert float(terms.kl[0]) == pytest.approx(float(kl), rel=1e-9, abs=1e-16)


def test_reference_set_against_scalar_loops(impl: str, make_batch: MakeBatch) -> None:
    features, labels = make_batch(10, 4)
    ref_features, ref_labels = make_batch(30, 6, seed=1)
    ref_labels = ref_labels.clone()
    ref_labels[3] = -100
    for options in ({}, {"num_classes": 9}, {"normalize": False}):
        reference = {"ref_features": ref_features, "ref_labels": ref_labels}
        terms = varcon_terms(features, labels, impl=impl, **options, **reference)
        reference = {name: part.tolist() for name, part in reference.items()}
        reference["normalize"] = options.get("normalize", True)
        expected = oracle.row_terms(features.tolist(), labels.tolist(), **reference)
        assert_terms_match(terms, expected)
        assert terms.num_classes == 6


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 50), num_classes=st.integers(1, 20), dim=st.integers(1, 33),
    seed=st.integers(0, 2**31), temperature=st.floats(0.01, 2.0), share=st.floats(0.0, 0.95),
    normalize=st.booleans(), leave_one_out=st.booleans(), reference=st.booleans(),
)  # fmt: skip
def test_closed_form_gradient_equals_autograd_of_the_equations(
    num_rows, num_classes, dim, seed, temperature, share, normalize, leave_one_out, reference
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, dim, generator=generator, dtype=torch.float64) / dim**0.5

    features, upstream = draw(num_rows), torch.randn(num_rows, generator=generator).double()
    labels = torch.randint(num_classes, (num_rows,), generator=generator)
    options: dict = {"normalize": normalize, "leave_one_out": leave_one_out}
    if reference:
        options["leave_one_out"] = False
        options["ref_features"] = draw(num_classes + 5)
        options["ref_labels"] = torch.arange(num_classes + 5) % num_classes
    options |= {"temperature": temperature, "epsilon": share * temperature, "reduction": "none"}
    x = features.requires_grad_()
    want, got = (
        gradient_of(upstream * varcon_loss(x, labels, impl=impl, **options), x)
        for impl in IMPLEMENTATIONS
    )
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10 * float(want.abs().max() + 1))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), impl=st.sampled_from(IMPLEMENTATIONS))
def test_invariances(seed: int, impl: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(18, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(6, (18,), generator=generator)
    base = varcon_terms(features, labels, impl=impl)

    def same(features: Tensor, labels: Tensor, want: Tensor = base.loss) -> None:
        got = varcon_terms(features, labels, impl=impl).loss
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)

    order = torch.randperm(18, generator=generator)
    same(features[order], labels[order], base.loss[order])
    same(features, torch.randint(-(2**62), 2**62, (6,), generator=generator)[labels])
    same(features.repeat(2, 1), labels.repeat(2), base.loss.repeat(2))
    same(features * (torch.rand(18, 1, generator=generator).double() * 100 + 0.01), labels)
    same(features @ torch.linalg.qr(torch.randn(7, 7, generator=generator).double())[0], labels)
    same(torch.cat([features, torch.zeros(18, 3, dtype=torch.float64)], dim=1), labels)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch, make_batch: MakeBatch) -> None:
    features, labels = make_batch(1000, 17)
    results = []
    for budget in (1, 2**30):
        monkeypatch.setattr("varcon_loss.sweep.CHUNK_CPU", budget)
        terms = varcon_terms(features, labels, impl="eager")
        gradient = gradient_of(terms.reduced, features)
        results.append((terms.loss.detach(), terms.tau2, gradient))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("num_rows", [1400, 5000])
def test_no_matrix_of_samples_by_classes_is_made(num_rows: int) -> None:
    """What is written at a time stays in a CPU's caches: 4 MiB of float32."""
    features = torch.randn(num_rows, 16, requires_grad=True)
    with LargestWritten() as largest:
        varcon_loss(features, torch.arange(num_rows) % 1000, impl="eager").backward()
    assert largest.elements <= 2**20


def test_large_logits_without_normalisation(impl: str) -> None:
    """Logits of 1e4: nothing may overflow, whatever ``normalize`` promises."""
    features = torch.eye(3).repeat(2, 1) * 1e3
    features[0] = -features[0]
    features.requires_grad_()
    terms = varcon_terms(features, torch.arange(6) % 3, normalize=False, impl=impl)
    assert terms.loss.isfinite().all()
    assert gradient_of(terms.reduced, features).isfinite().all()


def test_tiny_temperature(impl: str, make_batch: MakeBatch) -> None:
    """exp(1 / tau2) would overflow float32 by far."""
    features, labels = make_batch(30, 5, dtype=torch.float32)
    terms = varcon_terms(features, labels, 1e-3, epsilon=5e-4, impl=impl)
    assert terms.loss.isfinite().all()
    assert gradient_of(terms.reduced, features).isfinite().all()
    expected = oracle.row_terms(features.tolist(), labels.tolist(), 1e-3, 5e-4)
    want = torch.tensor([row["loss"] for row in expected if row is not None])
    torch.testing.assert_close(terms.loss.detach(), want, rtol=1e-4, atol=1e-3)
