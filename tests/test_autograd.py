"""How the loss behaves as a differentiable function."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import MakeBatch
from varcon_loss import varcon_loss, varcon_terms


class CountProducts(TorchDispatchMode):
    """Counts matrix products that run."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


def test_without_a_gradient_its_product_is_not_computed(make_batch: MakeBatch) -> None:
    features, labels = make_batch()
    with CountProducts() as with_grad:
        varcon_loss(features, labels, impl="eager")
    assert with_grad.count == 2
    with CountProducts() as detached:
        a = varcon_loss(features.detach(), labels, impl="eager")
    assert detached.count == 1
    with CountProducts() as no_grad, torch.no_grad():
        b = varcon_loss(features, labels, impl="eager")
    assert no_grad.count == 1
    assert not a.requires_grad
    assert not b.requires_grad
    with CountProducts() as inference, torch.inference_mode():
        varcon_loss(features, labels, impl="eager")
    assert inference.count == 1


def test_two_backwards_agree(impl: str, make_batch: MakeBatch) -> None:
    features, labels = make_batch()
    loss = varcon_loss(features, labels, impl=impl)
    (first,) = torch.autograd.grad(loss, features, retain_graph=True)
    kept = first.clone()
    first.mul_(7)  # what a caller does to a gradient must not reach the saved one
    (second,) = torch.autograd.grad(loss, features, retain_graph=True)
    assert torch.equal(kept, second)
    (scaled,) = torch.autograd.grad(3 * loss, features)
    torch.testing.assert_close(scaled, 3 * kept)


def test_differentiating_twice_is_right_or_refused(make_batch: MakeBatch) -> None:
    features, labels = make_batch(8, 3, 4)
    ref_features, ref_labels = make_batch(9, 3, 4, seed=1)

    def gradient(impl: str) -> torch.Tensor:
        loss = varcon_loss(
            features, labels, impl=impl,
            ref_features=ref_features.detach(), ref_labels=ref_labels,
        )  # fmt: skip
        return torch.autograd.grad(loss, features, create_graph=True)[0]

    # A gradient penalty: without the refusal it would vanish without a word.
    penalised = varcon_loss(features, labels) + gradient("eager").square().sum()
    with pytest.raises(NotImplementedError, match="use impl='reference'"):
        penalised.backward()
    assert torch.autograd.gradgradcheck(
        lambda x: varcon_loss(
            x, labels, 0.5, 0.2, impl="reference",
            ref_features=ref_features.detach(), ref_labels=ref_labels,
        ),
        features.detach().requires_grad_(),
    )  # fmt: skip


def test_saved_features_are_not_needed_by_backward(make_batch: MakeBatch) -> None:
    """Backward may run after the features were changed in place, as an optimiser might."""
    features, labels = make_batch()
    hidden = features * 1
    loss = varcon_loss(hidden, labels, impl="eager")
    expected = torch.autograd.grad(varcon_loss(features, labels, impl="eager"), features)[0]
    with torch.no_grad():
        hidden.zero_()
    (got,) = torch.autograd.grad(loss, features)
    torch.testing.assert_close(got, expected)


def test_descends(impl: str) -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(60, 16, requires_grad=True), torch.arange(60) % 6
    optimizer = torch.optim.SGD([features], lr=2.0)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        terms = varcon_terms(features, labels, impl=impl)
        terms.reduced.backward()
        optimizer.step()
        losses.append(terms.reduced.item())
    assert losses[-1] < 0.2 * losses[0]
    terms = varcon_terms(features, labels, impl=impl)
    assert terms.tau2.mean() > 0.11  # confident samples get the loose temperature


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_upstream_gradients(reduction: str, impl: str, make_batch: MakeBatch) -> None:
    features, labels = make_batch()
    loss = varcon_loss(features, labels, reduction=reduction, impl=impl)
    upstream = torch.randn_like(loss)
    (got,) = torch.autograd.grad(loss, features, upstream)
    terms = varcon_terms(features, labels, impl=impl)
    each = upstream if reduction == "none" else upstream.expand(len(labels))
    each = each / len(labels) if reduction == "mean" else each
    (expected,) = torch.autograd.grad(terms.loss, features, each)
    torch.testing.assert_close(got, expected)
