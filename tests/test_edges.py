"""Degenerate batches, ignored samples, views, weights, reductions, leave-one-out."""

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import MakeBatch, gradient_of, same_step
from varcon_loss import varcon_loss, varcon_terms

NOTHING = torch.empty(0, dtype=torch.int64)
UNKNOWN = torch.full((5, 8), torch.nan), torch.full((5,), -100)
DEGENERATE = {  # features, labels, options
    "empty": (torch.randn(0, 8), NOTHING, {}),
    "all ignored, even with NaN": (*UNKNOWN, {}),
    "the same, leave-one-out": (*UNKNOWN, {"leave_one_out": True}),
    "one class": (torch.randn(5, 8), torch.ones(5, dtype=torch.int64), {}),
    "one sample": (torch.randn(1, 8), torch.tensor([3]), {}),
    "classes of one, left out": (torch.randn(4, 8), torch.arange(4), {"leave_one_out": True}),
    "empty reference": (
        torch.randn(0, 8), NOTHING, {"ref_features": torch.randn(0, 8), "ref_labels": NOTHING}
    ),
    "weights of zero": (torch.randn(6, 8), torch.arange(6) % 3, {"weight": torch.zeros(4)}),
}  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("num_classes", [None, 4])
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_batches(case: str, num_classes: int | None, reduction: str, impl: str) -> None:
    features, labels, options = DEGENERATE[case]
    x = features.clone().requires_grad_()
    options = options | {"num_classes": num_classes, "reduction": reduction, "impl": impl}
    loss = varcon_loss(x, labels, **options)
    assert loss.item() == 0
    assert (gradient_of(loss, x) == 0).all()


def test_ignored_samples_take_part_in_nothing(impl: str, make_batch: MakeBatch) -> None:
    features, labels = make_batch()
    kept = labels != 3
    kept[1] = False
    marked = labels.masked_fill(~kept, -100)
    poisoned = features.detach().clone()
    poisoned[~kept] = float("nan")
    poisoned.requires_grad_()
    for options in ({}, {"num_classes": 5}, {"weight": torch.rand(5).double()}):
        expected = varcon_loss(features[kept], labels[kept], impl=impl, **options)
        terms = varcon_terms(poisoned, marked, impl=impl, **options)
        torch.testing.assert_close(terms.reduced, expected)
        gradient = gradient_of(terms.reduced, poisoned)
        torch.testing.assert_close(gradient, gradient_of(expected, features))
        assert (gradient[~kept] == 0).all()
        assert torch.equal(terms.valid, kept)
        for term in (terms.loss, terms.kl, terms.nll, terms.confidence, terms.tau2):
            assert (term[~kept] == 0).all()


def test_ignored_samples_have_no_gradient_beside_nan(impl: str, make_batch: MakeBatch) -> None:
    features, labels = make_batch()
    with torch.no_grad():
        features[0] = float("nan")
    labels[0], labels[1:4] = 0, -100
    loss = varcon_loss(features, labels, impl=impl)
    gradient = gradient_of(loss, features)
    assert loss.isnan()
    assert (gradient[1:4] == 0).all()


@pytest.mark.parametrize("shape", [(6, 8), (3, 2, 8)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_alone_is_that_of_the_terms(impl: str, reduction: str, shape: tuple) -> None:
    """What a call without terms leaves out must not change a bit, nor the gradient's way."""
    features = torch.randn(shape, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1, 2, -100])[: shape[0]]
    reference = {"ref_features": torch.randn(9, 8), "ref_labels": torch.arange(9) % 3}
    for options in ({}, {"leave_one_out": True}, {"weight": torch.rand(3)}, reference):
        shared = {"reduction": reduction, "impl": impl, **options}
        loss = varcon_loss(features, labels, **shared)
        reduced = varcon_terms(features, labels, **shared).reduced
        upstream = torch.randn_like(loss)
        gradients = [torch.autograd.grad(x, features, upstream)[0] for x in (loss, reduced)]
        assert torch.equal(loss, reduced)
        assert torch.equal(*gradients)


@pytest.mark.parametrize("num_classes", [1, 3])
def test_features_so_short_that_their_lengths_have_no_inverse(impl: str, num_classes: int) -> None:
    features = (torch.randn(6, 8) * 1e-40).requires_grad_()
    loss = varcon_loss(features, torch.arange(6) % num_classes, impl=impl)
    gradient = gradient_of(loss, features)
    assert loss.isfinite()
    assert not gradient.isnan().any()
    assert num_classes > 1 or (gradient == 0).all()


def test_short_rows_in_double_precision_have_long_gradients(impl: str) -> None:
    """Their lengths have no inverse in float32, but they have one here."""
    unit, labels = torch.randn(6, 8, dtype=torch.float64), torch.arange(6) % 3
    gradients = []
    for factor in (1.0, 1e-60):
        features = (unit * factor).requires_grad_()
        loss = varcon_loss(features, labels, impl=impl)
        gradients.append(gradient_of(loss, features) * factor)
    torch.testing.assert_close(*gradients)


def test_ignore_index_may_be_any_int_or_none(impl: str, make_batch: MakeBatch) -> None:
    features, labels = make_batch()
    assert varcon_terms(features, labels, ignore_index=2, impl=impl).num_classes == 4
    odd = labels.masked_fill(labels == 2, -100)
    assert varcon_terms(features, odd, impl=impl).num_classes == 4
    assert varcon_terms(features, odd, ignore_index=None, impl=impl).num_classes == 5
    with pytest.raises(ValueError, match="got -100"):
        varcon_terms(features, odd, ignore_index=None, num_classes=5, impl=impl)


def test_views_are_samples_with_the_same_label(impl: str) -> None:
    features = torch.randn(6, 3, 4, 2, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1, 2, -100])
    flat = features.reshape(18, 8)
    expected = varcon_terms(flat, labels.repeat_interleave(3), reduction="none", impl=impl)
    terms = varcon_terms(features, labels, reduction="none", impl=impl)
    for name in ("loss", "kl", "nll", "confidence", "tau2", "valid", "reduced"):
        got = getattr(terms, name)
        assert got.shape == (6, 3)
        assert torch.equal(got.flatten(), getattr(expected, name))
    assert gradient_of(terms.reduced, features).shape == features.shape
    expected = varcon_loss(flat, labels.repeat_interleave(3), impl=impl)
    assert torch.equal(varcon_loss(features, labels, impl=impl), expected)


def test_views_in_the_reference_set(impl: str) -> None:
    anchors, reference = torch.randn(4, 8), torch.randn(5, 2, 8)
    labels, ref_labels = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 1, 2, 2, 4])
    got = varcon_loss(anchors, labels, ref_features=reference, ref_labels=ref_labels, impl=impl)
    flat = {"ref_features": reference.flatten(0, 1), "ref_labels": ref_labels.repeat_interleave(2)}
    expected = varcon_loss(anchors, labels, impl=impl, **flat)
    torch.testing.assert_close(got, expected)


def test_a_copy_of_the_batch_as_reference_is_the_plain_loss(impl: str, make_batch) -> None:
    features, labels = make_batch()
    copy = features.detach().clone().requires_grad_()
    loss = varcon_loss(features, labels, ref_features=copy, ref_labels=labels, impl=impl)
    assert torch.autograd.grad(loss, copy, allow_unused=True, retain_graph=True) == (None,)
    same_step(loss, varcon_loss(features, labels, impl=impl), features)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_and_class_weights_follow_cross_entropy(
    reduction: str, impl: str, make_batch: MakeBatch
) -> None:
    features, labels = make_batch(num_classes=5)
    labels = labels.clone()
    labels[4] = -100
    for weight in (None, torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0]).double()):
        options = {"num_classes": 5, "weight": weight, "reduction": reduction}
        terms = varcon_terms(features, labels, impl=impl, **options)
        # Cross-entropy of these logits is exactly the per-sample loss.
        logits = torch.zeros(len(labels), 5).double()
        rows = torch.arange(len(labels))
        logits[rows, labels.clamp_min(0)] = -torch.log(torch.expm1(terms.loss.detach()) / 4)
        expected = F.cross_entropy(logits, labels, weight=weight, reduction=reduction)
        torch.testing.assert_close(terms.reduced, expected)


def test_weights_do_not_move_centroids_and_may_vanish(impl: str, make_batch: MakeBatch) -> None:
    features, labels = make_batch(num_classes=5)
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    plain = varcon_terms(features, labels, impl=impl)
    weighted = varcon_terms(features, labels, weight=weight, impl=impl)
    torch.testing.assert_close(weighted.loss, plain.loss)  # unweighted per sample
    torch.testing.assert_close(weighted.reduced, plain.loss[labels != 1].mean())


class TestLeaveOneOut:
    def test_a_class_of_one_is_left_out_but_still_counts_as_a_class(self, impl: str) -> None:
        features = torch.randn(5, 8, requires_grad=True)
        labels = torch.tensor([0, 0, 1, 1, 2])
        terms = varcon_terms(features, labels, leave_one_out=True, impl=impl)
        assert terms.valid.tolist() == [True, True, True, True, False]
        assert terms.num_classes == 3
        torch.testing.assert_close(terms.reduced, terms.loss[:4].mean())
        assert (gradient_of(terms.reduced, features)[4] == 0).all()

    def test_random_embeddings_are_not_recognised(self, impl: str) -> None:
        """With two samples a class, plain centroids make random embeddings look confident."""
        torch.manual_seed(0)
        features, labels = torch.randn(200, 64), torch.arange(200) // 2
        plain = varcon_terms(features, labels, impl=impl).confidence.mean()
        left_out = varcon_terms(features, labels, leave_one_out=True, impl=impl).confidence.mean()
        assert plain > 0.5
        assert left_out < 0.05


def test_collapse_reads_log_k(impl: str) -> None:
    terms = varcon_terms(torch.ones(20, 8), torch.arange(20) % 10, impl=impl)
    torch.testing.assert_close(terms.nll.mean(), terms.num_classes.float().log())


def test_num_classes_beyond_the_labels_changes_nothing(impl: str, make_batch: MakeBatch) -> None:
    features, labels = make_batch()
    expected = varcon_loss(features, labels, impl=impl)
    for num_classes in (5, 6, 100_000):
        got = varcon_loss(features, labels, num_classes=num_classes, impl=impl)
        torch.testing.assert_close(got, expected)


def test_features_of_any_layout(impl: str, make_batch: MakeBatch) -> None:
    features, labels = make_batch(24, 5, 16)
    expected = varcon_loss(features, labels, impl=impl)
    strided = features.detach().repeat_interleave(2, 0)[::2].T.contiguous().T
    assert not strided.is_contiguous()
    torch.testing.assert_close(varcon_loss(strided, labels, impl=impl), expected)
