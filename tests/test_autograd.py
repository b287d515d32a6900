"""How the loss behaves as a differentiable function."""

import warnings
import weakref

import pytest
import torch
from torch.autograd import forward_ad

from tests.conftest import MakeBatch, gradient_of
from tests.counting import Operators
from varcon_loss import VarConLoss, varcon_loss, varcon_terms


def test_without_a_gradient_its_product_is_not_computed(make_batch: MakeBatch) -> None:
    features, labels = make_batch()
    for mode, x, products in (
        (torch.enable_grad, features, 2), (torch.enable_grad, features.detach(), 1),
        (torch.no_grad, features, 1), (torch.inference_mode, features, 1),
    ):  # fmt: skip
        with Operators() as operators, mode():
            loss = varcon_loss(x, labels, impl="eager")
        assert operators.count("mm.", "addmm.") == products
        assert loss.requires_grad == (products == 2)


def test_two_backwards_agree(impl: str, make_batch: MakeBatch) -> None:
    features, labels = make_batch()
    loss = varcon_loss(features, labels, impl=impl)
    first = gradient_of(loss, features)
    kept = first.clone()
    first.mul_(7)  # what a caller does to a gradient must not reach the saved one
    assert torch.equal(kept, gradient_of(loss, features))
    torch.testing.assert_close(gradient_of(3 * loss, features), 3 * kept)


TWICE = {
    "defaults": {},
    "reference set": {"ref": True},
    "as they are": {"normalize": False, "ref": True},
    "leave-one-out, weighted": {
        "leave_one_out": True, "weight": torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64),
    },
    "sum": {"reduction": "sum"},
}  # fmt: skip


@pytest.fixture(params=TWICE, name="loss_twice")
def _loss_twice(request: pytest.FixtureRequest, make_batch: MakeBatch):
    """``loss(features, impl)`` under various options, and features with an ignored row."""
    features, labels = make_batch(9, 3, 4)
    labels[2] = -100
    options = {"temperature": 0.5, "epsilon": 0.2} | TWICE[request.param]
    ref, ref_labels = make_batch(9, 3, 4, seed=1)
    with_reference = options.pop("ref", False)

    def loss(x: torch.Tensor, impl: str) -> torch.Tensor:
        more = {"ref_features": ref.detach().to(x.dtype), "ref_labels": ref_labels}
        return varcon_loss(x, labels, impl=impl, **options, **(more if with_reference else {}))

    return loss, features


@pytest.mark.parametrize("fast", ["eager", "triton"])
def test_second_derivatives_are_right(loss_twice, fast: str) -> None:
    """However they are asked for, the ways beside ``.backward()`` too."""
    loss, features = loss_twice
    close = {}
    if fast == "triton":
        pytest.importorskip("triton")
        features, close = features.detach().float().requires_grad_(), {"rtol": 1e-4, "atol": 1e-5}

    def ways(impl: str) -> list[torch.Tensor]:
        x, v = features.detach(), torch.linspace(-1, 1, features.numel()).view_as(features)
        v = v.to(x.dtype)
        net = torch.nn.Linear(4, 4).to(x.dtype)
        with torch.no_grad():
            for i, parameter in enumerate(net.parameters()):
                parameter.copy_(torch.linspace(-i, 1, parameter.numel()).view_as(parameter))
        value = loss(net(x), impl)
        first = torch.autograd.grad(value, list(net.parameters()), create_graph=True)
        penalty = sum(g.square().sum() for g in first) + value
        through_network = torch.autograd.grad(penalty, list(net.parameters()))
        penalised = loss(features, impl)
        (first,) = torch.autograd.grad(penalised, features, create_graph=True)
        features.grad = None
        (penalised + first.square().sum()).backward()

        def of(z: torch.Tensor) -> torch.Tensor:
            return loss(z, impl)

        functional, func = torch.autograd.functional, torch.func
        found = [functional.hvp(of, x, v)[1], functional.hessian(of, x), features.grad.clone()]
        if fast != "triton":
            found.append(func.jacrev(func.jacrev(of))(x))
            found.append(func.grad(lambda z: (func.grad(of)(z) * v).sum())(x))
        return [*found, *through_network]

    for got, expected in zip(ways(fast), ways("reference"), strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(got, expected, **close)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperatures", [(0.1, 0.02), (0.7, 0.6), (0.5, 0.0)])
def test_finite_differences(temperatures: tuple, normalize: bool, impl: str, make_batch) -> None:
    """The centroids are detached, so they are held still: those of a reference set."""
    features, labels = make_batch(6, 3, 4)
    ref_features, ref_labels = make_batch(9, 3, 4, seed=1)
    options = {"temperature": temperatures[0], "epsilon": temperatures[1], "normalize": normalize}
    options |= {"ref_features": ref_features.detach(), "ref_labels": ref_labels}
    x = (features.detach() * 0.4).requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return varcon_loss(x, labels, impl=impl, reduction="none", **options)

    assert torch.autograd.gradcheck(loss, x, eps=1e-6, atol=1e-6, rtol=1e-5)
    if temperatures[0] == 0.1:
        return
    assert torch.autograd.gradgradcheck(loss, x)

    def third(x: torch.Tensor) -> torch.Tensor:
        (first,) = torch.autograd.grad(loss(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
        return second.square().sum()

    assert torch.autograd.gradcheck(third, x)


def test_backward_after_features_changed(make_batch: MakeBatch) -> None:
    """In place, as by an optimiser: a gradient was saved, but a second one needs the features."""
    features, labels = make_batch()
    hidden = features * 1
    loss = varcon_loss(hidden, labels, impl="eager")
    expected = gradient_of(varcon_loss(features, labels, impl="eager"), features)
    with torch.no_grad():
        hidden.zero_()
    torch.testing.assert_close(gradient_of(loss, features), expected)
    with pytest.raises(RuntimeError, match="changed in place since"):
        torch.autograd.grad(loss, features, create_graph=True)


def test_gradients_after_the_memory_moved(impl: str, make_batch: MakeBatch) -> None:
    """The next step moves the memory; an earlier loss keeps the centroids that it saw."""
    features, labels = make_batch(dtype=torch.float32)
    criterion = VarConLoss(num_classes=5, feature_dim=16, centroid_momentum=0.9, impl=impl)
    criterion(features, labels)
    loss = criterion(features, labels)

    def derivatives() -> list[torch.Tensor]:
        (first,) = torch.autograd.grad(loss, features, retain_graph=True)
        (again,) = torch.autograd.grad(loss, features, create_graph=True)
        return [first, *torch.autograd.grad(again.square().sum(), features, retain_graph=True)]

    expected = derivatives()
    assert expected[1].abs().max() > 0
    criterion(features, labels.flip(0))
    assert all(torch.equal(a, b) for a, b in zip(derivatives(), expected, strict=True))


def test_nothing_outlives_the_features(make_batch: MakeBatch) -> None:
    """A script that keeps its losses must not keep its embeddings with them."""
    features, labels = make_batch()
    hidden = features * 1
    gone = weakref.ref(hidden)
    storage = weakref.ref(hidden.untyped_storage())
    loss = varcon_loss(hidden, labels)
    loss.backward()
    del hidden
    assert gone() is None
    assert storage() is None
    assert loss.grad_fn is not None


def test_under_saved_tensor_hooks_and_checkpointing(impl: str, make_batch: MakeBatch) -> None:
    features, labels = make_batch()
    expected = gradient_of(varcon_loss(features, labels, impl=impl), features)
    with torch.autograd.graph.save_on_cpu():
        loss = varcon_loss(features, labels, impl=impl)
    torch.testing.assert_close(gradient_of(loss, features), expected)
    loss = torch.utils.checkpoint.checkpoint(
        lambda x: varcon_loss(x * 1, labels, impl=impl), features, use_reentrant=False
    )
    torch.testing.assert_close(gradient_of(loss, features), expected)


def test_func_transforms(impl: str, make_batch: MakeBatch) -> None:
    features, labels = make_batch()
    x = features.detach()

    def each(z: torch.Tensor) -> torch.Tensor:
        return varcon_loss(z, labels, impl=impl, reduction="none")

    expected = torch.autograd.functional.jacobian(each, x)
    torch.testing.assert_close(torch.func.jacrev(each)(x), expected)
    value, pull, *_ = torch.func.vjp(each, x)
    torch.testing.assert_close(value, each(x))
    torch.testing.assert_close(pull(torch.ones_like(value))[0], expected.sum(0))
    gradient = torch.func.grad(lambda z: varcon_terms(z, labels, impl=impl).reduced)(x)
    torch.testing.assert_close(gradient, expected.mean(0))


def test_other_transforms_are_refused_by_torch(make_batch: MakeBatch) -> None:
    features, labels = make_batch()
    x = features.detach()

    def loss(z: torch.Tensor) -> torch.Tensor:
        return varcon_loss(z, labels)

    for transform in (
        lambda: torch.func.jvp(loss, (x,), (x,)), lambda: torch.func.jacfwd(loss)(x),
        lambda: torch.func.vmap(loss)(torch.stack([x, x])),
        lambda: torch.func.vmap(torch.func.grad(loss))(torch.stack([x, x])),
    ):  # fmt: skip
        with pytest.raises((NotImplementedError, RuntimeError)):
            transform()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError):
        loss(forward_ad.make_dual(x, x))
    with pytest.raises(ValueError, match=r"cannot run here: .*torch.func"):
        torch.func.grad(lambda z: varcon_loss(z, labels, impl="triton"))(x.float())


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
    terms = varcon_terms(features, labels, reduction=reduction, impl=impl)
    assert not any(part.requires_grad for part in terms[1:6])
    each = upstream if reduction == "none" else upstream.expand(len(labels))
    each = each / len(labels) if reduction == "mean" else each
    expected = gradient_of(terms.loss * each, features)
    for value in (loss, terms.reduced):
        torch.testing.assert_close(gradient_of(value * upstream, features), expected)


@pytest.mark.parametrize("options", [{}, {"feature_dim": 16, "centroid_momentum": 0.9}])
def test_labels_and_references_made_in_inference_mode(options: dict, impl: str, make_batch) -> None:
    """As a teacher makes them."""
    features, labels = make_batch(dtype=torch.float32)
    with torch.inference_mode():
        taught, reference = labels + 0, make_batch(dtype=torch.float32, seed=1)[0] + 0
    VarConLoss(num_classes=5, impl=impl, **options)(features, taught).backward()
    if not options:
        criterion = VarConLoss(normalize=False, impl=impl)
        criterion(features, taught, ref_features=reference, ref_labels=taught).backward()
    assert features.grad is not None


def test_second_derivatives_are_exact_under_autocast() -> None:
    features = torch.randn(24, 16, requires_grad=True)
    labels, direction = torch.arange(24) % 4, torch.randn(24, 16)

    def second() -> torch.Tensor:
        loss = varcon_loss(features, labels)
        (gradient,) = torch.autograd.grad(loss, features, create_graph=True)
        return torch.autograd.grad(gradient, features, direction)[0]

    expected = second()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(second(), expected)


@pytest.mark.parametrize(
    "options", [{}, {"leave_one_out": True}, {"weight": torch.tensor([1.0, 2.0, 0.5]).double()}],
    ids=lambda o: "-".join(o) or "defaults",
)  # fmt: skip
@pytest.mark.parametrize("kind", ["integers", "probabilities", "reference set"])
def test_forward_mode_by_the_equations(kind: str, options: dict) -> None:
    """Centroids are constants of it too, though `torch.no_grad` stops no tangent."""
    generator = torch.Generator().manual_seed(0)
    features, direction = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64).unbind()
    labels = torch.arange(6) % 3
    if "leave_one_out" in options and kind != "integers":
        pytest.skip("is for integer labels, without a reference set")
    if kind == "probabilities":
        labels = 0.8 * torch.eye(3, dtype=torch.float64)[labels] + 0.1

    def loss(x: torch.Tensor) -> torch.Tensor:
        reference = {"ref_features": 2 * x + 1, "ref_labels": labels}
        given = reference if kind == "reference set" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no gradient goes to the reference set
            return varcon_loss(x, labels, 0.3, epsilon=0.1, impl="reference", **options, **given)

    (gradient,) = torch.autograd.grad(loss(leaf := features.clone().requires_grad_()), leaf)
    slope = torch.func.jvp(loss, (features,), (direction,))[1]
    torch.testing.assert_close(slope, (gradient * direction).sum())
    hessian = torch.autograd.functional.hessian(loss, features)
    torch.testing.assert_close(torch.func.hessian(loss)(features), hessian)


@pytest.mark.parametrize("labels", [torch.arange(8) % 3, torch.rand(8, 3)], ids=["int", "soft"])
@pytest.mark.parametrize("where", ["checkpoint", "copying hooks"])
def test_second_derivatives_where_what_was_saved_is_made_anew(where: str, labels) -> None:
    features = torch.randn(8, 4, requires_grad=True)
    if labels.is_floating_point():
        labels = labels.clone().div_(labels.sum(1, keepdim=True))  # written to, before

    def loss(x: torch.Tensor) -> torch.Tensor:
        return varcon_loss((x * 1.0).mul_(2), labels)

    def penalty(value: torch.Tensor) -> torch.Tensor:
        (first,) = torch.autograd.grad(value, features, create_graph=True)
        return torch.autograd.grad(first.square().sum(), features)[0]

    expected = penalty(loss(features))
    if where == "checkpoint":
        value = torch.utils.checkpoint.checkpoint(loss, features, use_reentrant=False)
    else:
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x)
        with hooks:
            value = loss(features)
    assert isinstance(value, torch.Tensor)
    torch.testing.assert_close(penalty(value), expected)
