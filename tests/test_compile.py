"""torch.compile: the same values, without graph breaks once the number of classes is known."""

import pytest
import torch

from tests.conftest import MakeBatch
from varcon_loss import VarConLoss, varcon_terms


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"leave_one_out": True},
        {"normalize": False, "reduction": "sum"},
        {"reduction": "none", "weight": torch.tensor([1.0, 2.0, 0.5, 0.0, 1.0, 1.0, 1.0])},
    ],
    ids=lambda o: "-".join(o) or "defaults",
)
def test_full_graph_with_num_classes(options: dict, impl: str, make_batch: MakeBatch) -> None:
    criterion = VarConLoss(**{"num_classes": 7} | options, impl=impl)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    features, labels = make_batch(24, 5)
    labels[3] = -100
    for _ in range(2):
        expected = criterion(features, labels)
        (expected_grad,) = torch.autograd.grad(expected.sum(), features)
        got = compiled(features, labels)
        (got_grad,) = torch.autograd.grad(got.sum(), features)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(got_grad, expected_grad)
        features, labels = make_batch(31, 5, seed=1)  # another size


def test_full_graph_reference_set(impl: str, make_batch: MakeBatch) -> None:
    criterion = VarConLoss(num_classes=7, impl=impl)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    features, labels = make_batch(24, 5)
    ref_features, ref_labels = make_batch(40, 6, seed=1)
    options = {"ref_features": ref_features.detach(), "ref_labels": ref_labels}
    torch.testing.assert_close(
        compiled(features, labels, **options), criterion(features, labels, **options)
    )


def test_inductor(make_batch: MakeBatch) -> None:
    criterion = VarConLoss(num_classes=7)
    compiled = torch.compile(criterion, fullgraph=True)
    features, labels = make_batch(24, 5, dtype=torch.float32)
    expected, got = criterion(features, labels), compiled(features, labels)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, features), torch.autograd.grad(expected, features)
    )


def test_any_labels_compile_with_a_graph_break(make_batch: MakeBatch) -> None:
    criterion = VarConLoss()
    compiled = torch.compile(criterion, backend="aot_eager")
    features, labels = make_batch()
    torch.testing.assert_close(compiled(features, labels * 1000 - 7), criterion(features, labels))


def test_labels_out_of_range_give_nan_where_values_cannot_be_read(
    impl: str, make_batch: MakeBatch
) -> None:
    """As on an accelerator: nothing is raised, nothing outside is touched, nothing is hidden."""
    compiled = torch.compile(varcon_terms, fullgraph=True, backend="aot_eager")
    features, labels = make_batch(24, 5)
    for bad in (5, 10**12, -1, -(10**12)):
        odd = labels.clone()
        odd[3] = bad
        terms = compiled(features, odd, num_classes=5, impl=impl)
        assert terms.reduced.isnan()
        assert terms.loss.isnan().nonzero().flatten().tolist() == [3]
        assert not terms.valid[3]
        (gradient,) = torch.autograd.grad(terms.reduced, features)
        assert gradient.isfinite().all()
        assert (gradient[3] == 0).all()

        # Without an ignored label -100 is out of range as any other.
        odd[4] = -100
        terms = compiled(features, odd, num_classes=5, ignore_index=None, impl=impl)
        assert terms.loss.isnan().nonzero().flatten().tolist() == [3, 4]
        assert terms.valid.logical_not().nonzero().flatten().tolist() == [3, 4]

    terms = compiled(
        features, labels, num_classes=5, impl=impl,
        ref_features=features.detach()[labels < 4], ref_labels=labels[labels < 4],
    )  # fmt: skip
    assert torch.equal(terms.loss.isnan(), labels == 4)


def test_empty_and_ignored_batches_compile(impl: str, make_batch: MakeBatch) -> None:
    compiled = torch.compile(
        VarConLoss(num_classes=5, impl=impl), fullgraph=True, backend="aot_eager"
    )
    features, labels = make_batch(24, 5)
    for x, y in ((features, torch.full_like(labels, -100)), (features[:0], labels[:0])):
        anchors = x.detach().requires_grad_()
        loss = compiled(anchors, y)
        assert loss.item() == 0
        assert (torch.autograd.grad(loss, anchors)[0] == 0).all()


def test_the_operator_is_registered_soundly(make_batch: MakeBatch) -> None:
    features, labels = make_batch(12, 3, 8)
    z = torch.nn.functional.normalize(features.detach(), dim=1)
    w = torch.nn.functional.normalize(torch.randn(4, 8, dtype=z.dtype), dim=1)
    norms = features.detach().norm(dim=1)
    present = torch.tensor([True, True, True, False])
    w[3] = 0
    for own in (None, torch.nn.functional.normalize(torch.randn_like(z), dim=1)):
        centroids = (w, present, torch.tensor(3), True)
        rows = (features, z, norms, labels, *centroids, own, None, None)
        for need_terms in (True, False):
            arguments = (*rows, 0.1, 0.02, True, need_terms)
            torch.library.opcheck(torch.ops.varcon_loss.sweep.default, arguments)


def test_the_operator_refuses_to_be_differentiated_twice(make_batch: MakeBatch) -> None:
    """A saved gradient has no history: without a guard the answer would be silent zeros."""
    features, labels = make_batch(12, 3, 8)
    z = features.detach()
    w = torch.randn(3, 8, dtype=z.dtype)
    rows = (features, z, None, labels, w, None, torch.tensor(3), True, None, None, None)
    loss = torch.ops.varcon_loss.sweep(*rows, 1.0, 0.1, True, False)[0]
    (gradient,) = torch.autograd.grad(loss.sum(), features, create_graph=True)
    with pytest.raises(NotImplementedError, match="use impl='reference'"):
        (loss.sum() + gradient.square().sum()).backward()
