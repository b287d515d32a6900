"""VarConLoss as a module: state, copies, what it prints, what importing it costs."""

import copy
import pickle
import subprocess
import sys
import warnings
from fractions import Fraction

import pytest
import torch

import varcon_loss
from tests.conftest import MakeBatch, gradient_of
from varcon_loss import ProjectionHead, VarConLoss, VarConTerms, varcon_terms


def test_module_and_function_are_the_same(make_batch: MakeBatch) -> None:
    features, labels = make_batch()
    options = {"leave_one_out": True, "weight": torch.rand(5), "reduction": "sum"}
    criterion = VarConLoss(0.2, epsilon=0.05, **options)
    of_function = varcon_terms(features, labels, 0.2, epsilon=0.05, **options).reduced
    assert torch.equal(criterion(features, labels), of_function)
    terms = criterion.terms(features, labels)
    assert isinstance(terms, VarConTerms)
    assert torch.equal(terms.reduced, criterion(features, labels))
    assert terms.impl == "eager"
    assert criterion.num_classes == 5


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 3.0, 1.0, 1.0])])
def test_pickles_copies_and_state(weight: torch.Tensor | None, make_batch: MakeBatch) -> None:
    features, labels = make_batch()
    criterion = VarConLoss(0.3, epsilon=0.1, weight=weight, impl="eager", ignore_index=None)
    expected = criterion(features, labels)
    for twin in (pickle.loads(pickle.dumps(criterion)), copy.deepcopy(criterion)):
        assert torch.equal(twin(features, labels), expected)
    assert list(criterion.state_dict()) == ([] if weight is None else ["weight"])
    if weight is not None:
        assert criterion.double().weight.dtype == torch.float64
        assert criterion.to("meta").weight.device.type == "meta"
        assert weight.device.type == "cpu"


def test_repr_shows_what_was_chosen() -> None:
    assert repr(VarConLoss()) == "VarConLoss(temperature=0.1, epsilon=0.02)"
    options = {"weight": torch.ones(3), "leave_one_out": True, "reduction": "sum"}
    text = repr(VarConLoss(0.2, epsilon=0.0, **options))
    for part in ("temperature=0.2", "num_classes=3", "reduction='sum'", "out=True", "weight=[3]"):
        assert part in text


def test_public_names() -> None:
    assert sorted(varcon_loss.__all__) == [
        "LargeBatch", "ProjectionHead", "VarConLoss", "VarConTerms", "__version__",
        "backward_in_chunks", "varcon_loss", "varcon_terms",
    ]  # fmt: skip


def test_importing_brings_torch_alone() -> None:
    """Compared with a bare `import torch`, in a fresh interpreter."""
    script = """
import sys, torch
before = set(sys.modules)
import varcon_loss
top = {name.partition(".")[0] for name in set(sys.modules) - before}
hosts = {"triton", "timm", "pytorch_metric_learning", "torchvision", "numpy", "benchmarks"}
print(sorted(top & hosts))
"""
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"


@pytest.mark.parametrize("kind", ["mlp-bn", "mlp", "linear"])
def test_projection_head(kind: str) -> None:
    head = ProjectionHead(24, 10, kind, hidden_dim=7)
    views = torch.randn(3, 2, 24)
    out = head(views)
    assert out.shape == (3, 2, 10)
    out.sum().backward()
    assert all(p.grad is not None for p in head.parameters())
    flat = head.eval()(views.flatten(0, 1))
    torch.testing.assert_close(head(views), flat.unflatten(0, (3, 2)))


def test_the_default_head_starts_spread_out() -> None:
    """A plain MLP starts with nearly parallel embeddings, which invites collapse."""
    torch.manual_seed(0)
    features = torch.rand(256, 64)  # as after a ReLU: all positive

    def mean_cosine(kind: str) -> float:
        z = torch.nn.functional.normalize(ProjectionHead(64, 128, kind)(features), dim=1)
        return float((z @ z.T).detach().mean())

    assert mean_cosine("mlp-bn") < 0.3
    assert mean_cosine("mlp") > 0.7


def test_numbers_of_numpy(make_batch: MakeBatch) -> None:
    np = pytest.importorskip("numpy")
    features, labels = make_batch(dtype=torch.float32)
    plain = {"temperature": 0.25, "epsilon": 0.0625, "num_classes": 8, "ignore_index": -1}
    memory = {"feature_dim": 16, "centroid_momentum": 0.75}
    kinds = [np.float64, np.float32, np.int64, np.int32, np.int16, np.float16]
    pairs = zip((plain | memory).items(), kinds, strict=True)
    others = {name: kind(value) for (name, value), kind in pairs}
    expected, got = VarConLoss(**plain, **memory), VarConLoss(**others)
    for name in others:
        assert type(getattr(got, name)) is type((plain | memory)[name])
    compiled = torch.compile(got, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(features, labels), expected(features, labels))
    of_numpy = {"temperature": np.float32(0.25), "epsilon": np.float64(0.0625)}
    found = varcon_terms(features, labels, num_classes=np.uint8(8), **of_numpy).reduced
    assert torch.equal(found, varcon_terms(features, labels, 0.25, epsilon=0.0625).reduced)
    got.temperature = np.float64(0.5)  # a schedule
    expected.temperature = Fraction(1, 2)
    torch.testing.assert_close(compiled(features, labels), expected(features, labels))
    with pytest.raises(TypeError, match="temperature must be a number, got str"):
        got.temperature = "0.1"
    with pytest.raises(TypeError, match="num_classes must be an int or None, got float64"):
        VarConLoss(num_classes=np.float64(8))


def test_a_reference_set_gets_no_gradient_and_says_so(make_batch: MakeBatch) -> None:
    (images, labels), (texts, _), criterion = make_batch(), make_batch(seed=1), VarConLoss()
    with pytest.warns(UserWarning, match=r"ref_features.requires_grad is True, but no grad"):
        loss = criterion(images, labels, ref_features=texts, ref_labels=labels)
    loss.backward()
    assert texts.grad is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(images, labels, ref_features=texts.detach(), ref_labels=labels)
        with torch.no_grad():
            criterion(images, labels, ref_features=texts, ref_labels=labels)


def test_what_gets_no_gradient_says_so() -> None:
    features, labels = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 0, 1])
    probabilities, weight = torch.rand(2, 4, 2, requires_grad=True).unbind()
    for name, call in (
        ("labels", lambda: varcon_loss.varcon_loss(features, probabilities)),
        ("weight", lambda: varcon_loss.varcon_loss(features, labels, weight=weight[0])),
        ("weight", lambda: VarConLoss(weight=weight[0])),
    ):
        with pytest.warns(UserWarning, match=rf"{name}.requires_grad is True, but no gradient"):
            call()


def test_class_weights_lose_no_digits() -> None:
    weight = torch.tensor([0.3, 1e-8, 2e5])
    for narrow in (VarConLoss(weight=weight).half(), VarConLoss(weight=weight).bfloat16()):
        assert torch.equal(narrow.weight, weight)
        features = torch.randn(6, 4, dtype=torch.float16)
        assert narrow(features, torch.arange(6) % 3).isfinite()


def test_a_copy_of_a_compiled_loss_is_its_own(make_batch: MakeBatch) -> None:
    """`criterion.compile()` keeps what runs in an attribute, which copies must not share."""
    features, labels = make_batch(dtype=torch.float32)
    criterion = VarConLoss(num_classes=7, feature_dim=16, centroid_momentum=0.9)
    criterion(features, labels)
    criterion.compile(backend="aot_eager")
    expected = criterion(features, labels)
    before = criterion.centroids.clone()
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        twin(torch.randn_like(features).requires_grad_(), labels)
        assert torch.equal(criterion.centroids, before)
        twin.temperature = 1.0
        assert twin(features, labels) != expected


def test_a_copy_of_what_torch_compile_gives_is_of_its_kind() -> None:
    compiled = torch.compile(VarConLoss(weight=torch.ones(3)), backend="aot_eager")
    twin = copy.deepcopy(compiled)
    assert type(twin) is type(compiled)
    twin.load_state_dict(compiled.state_dict())


def test_losses_and_terms_may_be_changed_in_place_and_apart(make_batch: MakeBatch) -> None:
    features, labels = make_batch()
    expected = 2 * gradient_of(varcon_terms(features, labels, reduction="sum").reduced, features)
    terms = VarConLoss(reduction="none").terms(features, labels)
    kept = terms.loss.clone()
    terms.reduced.mul_(2)
    assert torch.equal(terms.loss, kept)
    for losses in (varcon_loss.varcon_loss(features, labels, reduction="none"), terms.loss):
        losses *= 2
        torch.testing.assert_close(gradient_of(losses, features), expected)


@pytest.mark.parametrize("kind", ["integers", "mixed", "any probabilities", "reference set"])
@pytest.mark.parametrize("remembers", [False, True])
def test_a_default_device_is_not_the_features(kind: str, remembers: bool) -> None:
    """As a validation loss on the CPU under `torch.set_default_device("cuda")`."""
    features, labels = torch.randn(8, 4), torch.arange(8) % 3
    reference = {}
    if kind == "mixed":
        labels = 0.7 * torch.eye(12)[labels] + 0.3 * torch.eye(12)[labels.flip(0)]
    elif kind == "any probabilities":
        labels = torch.rand(8, 12)
    elif kind == "reference set":
        if remembers:
            pytest.skip("has a memory instead")
        reference = {"ref_features": features + 1, "ref_labels": labels}
    memory = {"feature_dim": 4, "centroid_momentum": 0.9} if remembers else {}
    criterion = VarConLoss(num_classes=12, **memory)
    with torch.device("meta"):
        for training in (True, False):
            loss = criterion.train(training)(features, labels, **reference)
            assert loss.device.type == "cpu"
        if remembers:
            assert criterion.predict(features).label.device.type == "cpu"
