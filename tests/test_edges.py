"""Degenerate batches, ignored samples, views, weights, reductions, leave-one-out."""

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import MakeBatch
from varcon_loss import VarConLoss, varcon_loss, varcon_terms


def zero_with_graph(loss: torch.Tensor, features: torch.Tensor) -> None:
    assert loss.item() == 0
    loss.backward()
    assert features.grad is not None
    assert (features.grad == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("num_classes", [None, 4])
class TestDegenerate:
    def test_empty_batch(self, reduction, num_classes, impl) -> None:
        features = torch.randn(0, 8, requires_grad=True)
        labels = torch.empty(0, dtype=torch.int64)
        zero_with_graph(
            varcon_loss(features, labels, num_classes=num_classes, reduction=reduction, impl=impl),
            features,
        )

    def test_all_ignored_even_with_nan_features(self, reduction, num_classes, impl) -> None:
        features = torch.full((5, 8), float("nan"), requires_grad=True)
        labels = torch.full((5,), -100)
        for options in ({}, {"leave_one_out": True}):
            features.grad = None
            zero_with_graph(
                varcon_loss(
                    features,
                    labels,
                    num_classes=num_classes,
                    reduction=reduction,
                    impl=impl,
                    **options,
                ),
                features,
            )

    def test_one_class(self, reduction, num_classes, impl) -> None:
        features = torch.randn(5, 8, requires_grad=True)
        labels = torch.ones(5, dtype=torch.int64)
        zero_with_graph(
            varcon_loss(features, labels, num_classes=num_classes, reduction=reduction, impl=impl),
            features,
        )

    def test_one_sample(self, reduction, num_classes, impl) -> None:
        features = torch.randn(1, 8, requires_grad=True)
        labels = torch.tensor([3])
        zero_with_graph(
            varcon_loss(features, labels, num_classes=num_classes, reduction=reduction, impl=impl),
            features,
        )

    def test_empty_reference_for_an_empty_batch(self, reduction, num_classes, impl) -> None:
        features = torch.randn(0, 8, requires_grad=True)
        labels = torch.empty(0, dtype=torch.int64)
        loss = varcon_loss(
            features, labels, num_classes=num_classes, reduction=reduction, impl=impl,
            ref_features=torch.randn(0, 8), ref_labels=labels,
        )  # fmt: skip
        zero_with_graph(loss, features)


def test_ignored_samples_take_part_in_nothing(impl: str, make_batch: MakeBatch) -> None:
    features, labels = make_batch()
    kept = labels != 3
    kept[1] = False
    marked = labels.masked_fill(~kept, -100)
    poisoned = features.detach().clone()
    poisoned[~kept] = float("nan")
    poisoned.requires_grad_()
    for options in ({}, {"num_classes": 5}, {"weight": torch.rand(5).double()}):
        features.grad = poisoned.grad = None
        expected = varcon_loss(features[kept], labels[kept], impl=impl, **options)
        terms = varcon_terms(poisoned, marked, impl=impl, **options)
        torch.testing.assert_close(terms.reduced, expected)
        terms.reduced.backward()
        expected.backward()
        assert poisoned.grad is not None
        assert features.grad is not None
        torch.testing.assert_close(poisoned.grad, features.grad)
        assert (poisoned.grad[~kept] == 0).all()
        assert torch.equal(terms.valid, kept)
        for term in (terms.loss, terms.kl, terms.nll, terms.confidence, terms.tau2):
            assert (term[~kept] == 0).all()


def test_ignored_samples_have_no_gradient_beside_nan(impl: str, make_batch: MakeBatch) -> None:
    features, labels = make_batch()
    with torch.no_grad():
        features[0] = float("nan")
    labels[0], labels[1:4] = 0, -100
    loss = varcon_loss(features, labels, impl=impl)
    (gradient,) = torch.autograd.grad(loss, features)
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
    (gradient,) = torch.autograd.grad(loss, features)
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
        gradients.append(torch.autograd.grad(loss, features)[0] * factor)
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
    terms.reduced.sum().backward()
    assert features.grad is not None
    assert features.grad.shape == features.shape
    assert torch.equal(
        varcon_loss(features, labels, impl=impl),
        varcon_loss(flat, labels.repeat_interleave(3), impl=impl),
    )


def test_views_in_the_reference_set(impl: str) -> None:
    anchors, reference = torch.randn(4, 8), torch.randn(5, 2, 8)
    labels, ref_labels = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 1, 2, 2, 4])
    got = varcon_loss(anchors, labels, ref_features=reference, ref_labels=ref_labels, impl=impl)
    expected = varcon_loss(
        anchors, labels, impl=impl,
        ref_features=reference.flatten(0, 1), ref_labels=ref_labels.repeat_interleave(2),
    )  # fmt: skip
    torch.testing.assert_close(got, expected)


def test_a_copy_of_the_batch_as_reference_is_the_plain_loss(
    impl: str, make_batch: MakeBatch
) -> None:
    features, labels = make_batch()
    plain = varcon_loss(features, labels, impl=impl)
    (expected,) = torch.autograd.grad(plain, features)
    copy = features.detach().clone().requires_grad_()
    loss = varcon_loss(features, labels, ref_features=copy, ref_labels=labels, impl=impl)
    loss.backward()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(features.grad, expected)
    assert copy.grad is None  # the reference is detached


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_and_class_weights_follow_cross_entropy(
    reduction: str, impl: str, make_batch: MakeBatch
) -> None:
    features, labels = make_batch(num_classes=5)
    labels = labels.clone()
    labels[4] = -100
    for weight in (None, torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0]).double()):
        terms = varcon_terms(
            features, labels, num_classes=5, weight=weight, impl=impl, reduction=reduction
        )
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
    zero_with_graph(varcon_loss(features, labels, weight=torch.zeros(5), impl=impl), features)


def test_terms_carry_the_gradient_of_any_upstream(impl: str, make_batch: MakeBatch) -> None:
    features, labels = make_batch()
    upstream = torch.randn(len(labels)).double()
    terms = varcon_terms(features, labels, impl=impl)
    assert not any(
        t.requires_grad for t in (terms.kl, terms.nll, terms.confidence, terms.tau2, terms.valid)
    )
    (a,) = torch.autograd.grad((terms.loss * upstream).sum(), features, retain_graph=True)
    losses = varcon_loss(features, labels, reduction="none", impl=impl)
    (b,) = torch.autograd.grad(losses, features, upstream)
    torch.testing.assert_close(a, b)
    (c,) = torch.autograd.grad(terms.reduced, features)
    (d,) = torch.autograd.grad(varcon_loss(features, labels, impl=impl), features)
    torch.testing.assert_close(c, d)


class TestLeaveOneOut:
    def test_a_class_of_one_is_left_out_but_still_counts_as_a_class(self, impl: str) -> None:
        features = torch.randn(5, 8, requires_grad=True)
        labels = torch.tensor([0, 0, 1, 1, 2])
        terms = varcon_terms(features, labels, leave_one_out=True, impl=impl)
        assert terms.valid.tolist() == [True, True, True, True, False]
        assert terms.num_classes == 3
        torch.testing.assert_close(terms.reduced, terms.loss[:4].mean())
        terms.reduced.backward()
        assert features.grad is not None
        assert (features.grad[4] == 0).all()

    def test_only_classes_of_one(self, impl: str) -> None:
        features = torch.randn(5, 8, requires_grad=True)
        zero_with_graph(
            varcon_loss(features, torch.arange(5), leave_one_out=True, impl=impl), features
        )

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
    for num_classes in (5, 6, 100_000):
        torch.testing.assert_close(
            varcon_loss(features, labels, num_classes=num_classes, impl=impl),
            varcon_loss(features, labels, impl=impl),
        )


def test_features_of_any_layout(impl: str, make_batch: MakeBatch) -> None:
    features, labels = make_batch(24, 5, 16)
    expected = varcon_loss(features, labels, impl=impl)
    strided = features.detach().repeat_interleave(2, 0)[::2].T.contiguous().T
    assert not strided.is_contiguous()
    torch.testing.assert_close(varcon_loss(strided, labels, impl=impl), expected)
    criterion = VarConLoss(impl=impl)
    torch.testing.assert_close(criterion(strided, labels), expected)
