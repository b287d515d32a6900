"""VarConLoss as a module: state, copies, what it prints, what importing it costs."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch

import varcon_loss
from tests.conftest import MakeBatch
from varcon_loss import ProjectionHead, VarConLoss, VarConTerms, varcon_terms


def test_module_and_function_are_the_same(make_batch: MakeBatch) -> None:
    features, labels = make_batch()
    options = {"leave_one_out": True, "weight": torch.rand(5), "reduction": "sum"}
    criterion = VarConLoss(0.2, 0.05, **options)
    assert torch.equal(
        criterion(features, labels), varcon_terms(features, labels, 0.2, 0.05, **options).reduced
    )
    terms = criterion.terms(features, labels)
    assert isinstance(terms, VarConTerms)
    assert torch.equal(terms.reduced, criterion(features, labels))
    assert terms.impl == "eager"
    assert criterion.num_classes == 5


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 2.0, 3.0, 1.0, 1.0])])
def test_pickles_copies_and_state(weight: torch.Tensor | None, make_batch: MakeBatch) -> None:
    features, labels = make_batch()
    criterion = VarConLoss(0.3, 0.1, weight=weight, impl="eager", ignore_index=None)
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
    text = repr(VarConLoss(0.2, 0.0, weight=torch.ones(3), leave_one_out=True, reduction="sum"))
    for part in (
        "temperature=0.2",
        "num_classes=3",
        "reduction='sum'",
        "leave_one_out=True",
        "weight=[3]",
    ):
        assert part in text


def test_public_names() -> None:
    assert sorted(varcon_loss.__all__) == [
        "ProjectionHead", "VarConLoss", "VarConTerms", "__version__", "varcon_loss", "varcon_terms",
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
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", ["mlp-bn", "mlp", "linear"])
def test_projection_head(kind: str) -> None:
    head = ProjectionHead(24, 10, kind, hidden_dim=7)
    out = head(torch.randn(5, 24))
    assert out.shape == (5, 10)
    out.sum().backward()
    assert all(p.grad is not None for p in head.parameters())


def test_the_default_head_starts_spread_out() -> None:
    """A plain MLP starts with nearly parallel embeddings, which invites collapse."""
    torch.manual_seed(0)
    features = torch.rand(256, 64)  # as after a ReLU: all positive

    def mean_cosine(kind: str) -> float:
        z = torch.nn.functional.normalize(ProjectionHead(64, 128, kind)(features), dim=1)
        return float((z @ z.T).detach().mean())

    assert mean_cosine("mlp-bn") < 0.3
    assert mean_cosine("mlp") > 0.7
