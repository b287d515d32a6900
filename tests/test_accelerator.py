"""What an accelerator does, on CPU tensors that may not be looked at; on ranks too."""

import copy
import math
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from benchmarks.common.ranks import run_ranks
from tests import blind
from varcon_loss import VarConLoss, varcon_terms

DIM, NUM_CLASSES = 6, 5


@pytest.fixture
def blinded(monkeypatch: pytest.MonkeyPatch) -> None:
    blind.look_at_nothing(monkeypatch.setattr)


def everything(features: Tensor, labels: Tensor, options: dict, remembers: bool) -> list[Tensor]:
    """Loss, terms, gradient, and what a memory then holds."""
    features = features.clone().requires_grad_()
    memory = {"feature_dim": DIM, "centroid_momentum": 0.9} if remembers else {}
    criterion = VarConLoss(**options, **memory)
    terms = criterion.terms(features, labels)
    (gradient,) = torch.autograd.grad(terms.reduced.sum(), features)
    held = list(criterion.buffers()) if remembers else []
    named = (terms.loss, terms.kl, terms.nll, terms.confidence, terms.tau2, terms.valid)
    return [terms.reduced, *named, terms.num_classes, gradient, *held]


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_the_answers_are_those_of_a_cpu(data: st.DataObject) -> None:
    draw = data.draw
    num_rows, num_classes = draw(st.integers(0, 12)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    features = torch.randn(num_rows, DIM, generator=generator, dtype=torch.float64)
    kind = draw(st.sampled_from(["integers", "mixed", "smoothed"]))
    ignored = draw(st.sampled_from([-100, 0, None]))
    remembers = draw(st.booleans())
    labels = torch.randint(num_classes, (num_rows,), generator=generator)
    options = {"num_classes": num_classes, "reduction": draw(st.sampled_from(["mean", "none"]))}
    if draw(st.booleans()):
        weight = torch.rand(num_classes, generator=generator, dtype=torch.float64)
        options["weight"] = weight * (weight > 0.2)
    if kind == "integers":
        options["ignore_index"] = ignored
        if ignored == -100:
            labels[torch.rand(num_rows, generator=generator) < 0.2] = -100
        if not remembers:
            options["leave_one_out"] = draw(st.booleans())
    else:
        other = labels[torch.randperm(num_rows, generator=generator)]
        hot = torch.eye(num_classes, dtype=torch.float64)
        labels = 0.7 * hot[labels] + 0.3 * hot[other] + 0.01 * (kind == "smoothed")
        labels[torch.rand(num_rows, generator=generator) < 0.2] = 0.0
    expected = everything(features, labels, options, remembers)
    with pytest.MonkeyPatch.context() as patch:
        blind.look_at_nothing(patch.setattr)
        found = everything(features, labels, options, remembers)
    # A memory is float32.
    close = {"rtol": 2e-5, "atol": 2e-5} if remembers else {"rtol": 1e-9, "atol": 1e-11}
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, **close)


@pytest.mark.usefixtures("blinded")
@pytest.mark.parametrize("bad", [-1, 3, 2**40])
def test_a_reference_that_cannot_be_shows(bad: int) -> None:
    features, labels = torch.randn(8, DIM, requires_grad=True), torch.arange(8) % 3
    reference = {"ref_features": torch.randn(4, DIM), "ref_labels": torch.tensor([0, 1, 2, bad])}
    terms = varcon_terms(features, labels, num_classes=3, **reference)
    assert terms.loss.isnan().all()
    assert terms.reduced.isnan()


def test_a_reference_that_cannot_be_shows_in_a_compiled_graph() -> None:
    criterion = torch.compile(VarConLoss(num_classes=3), fullgraph=True, backend="aot_eager")
    features, labels = torch.randn(8, DIM, requires_grad=True), torch.arange(8) % 3
    for bad, is_nan in ((7, True), (2, False)):
        ref_labels = torch.tensor([0, 1, 2, bad])
        loss = criterion(features, labels, ref_features=torch.randn(4, DIM), ref_labels=ref_labels)
        assert loss.isnan() == is_nan


@pytest.mark.usefixtures("blinded")
@pytest.mark.parametrize("bad", [-0.9, -5.0, math.nan, math.inf])
def test_class_probabilities_that_cannot_be_show(bad: float) -> None:
    """They are in every sum, so every loss is NaN, and a memory keeps what it had."""
    features = torch.randn(8, DIM, requires_grad=True)
    good = torch.eye(4)[torch.arange(8) % 4]
    broken = good.clone()
    broken[0, 1] = bad
    assert varcon_terms(features, broken).loss.isnan().all()
    reference = features.detach()
    terms = varcon_terms(features, good, ref_features=reference, ref_labels=broken)
    assert terms.loss.isnan().all()
    criterion = VarConLoss(num_classes=4, feature_dim=DIM, centroid_momentum=0.9)
    criterion(features, good)
    before = criterion.centroid_memory.clone()
    assert criterion(torch.randn(8, DIM, requires_grad=True), broken).isnan()
    torch.testing.assert_close(criterion.centroid_memory, before)
    assert not criterion(features, good).isnan()


def invalid_labels_on_rank(rank: int, world_size: int) -> dict[str, list[float]]:
    """Losses of three steps; in the second one rank has an invalid label."""
    blind.look_at_nothing()
    found = {}
    for title, options in {
        "batch": {}, "gathered": {"num_classes": 500},
        "memory, gathered": {"num_classes": 500, "feature_dim": DIM, "centroid_momentum": 0.9},
        "memory": {"feature_dim": DIM, "centroid_momentum": 0.9}, "reference": {},
        "probabilities": {},
    }.items():  # fmt: skip
        criterion = VarConLoss(**{"num_classes": NUM_CLASSES, "process_group": "world"} | options)
        losses = found[title] = []
        for step in range(3):
            torch.manual_seed(10 * step + rank)
            features = torch.randn(8, DIM, requires_grad=True)
            labels = torch.arange(8) % NUM_CLASSES
            reference = {}
            if title == "reference":
                reference = {"ref_features": torch.randn(8, DIM), "ref_labels": labels}
            if title == "probabilities":
                labels = torch.eye(NUM_CLASSES)[labels]
            if step == rank == 1:
                labels = labels.clone()
                labels[0] = -9
            held = copy.deepcopy(criterion.centroid_memory)
            losses.append(float(criterion(features, labels, **reference)))
            if held is not None and step == 1:
                torch.testing.assert_close(criterion.centroid_memory, held)
    criterion = VarConLoss(num_classes=12, process_group="world")
    for size in (0, 8):  # a first step without samples makes room for class probabilities
        soft = torch.full((size, 12), 1 / 12)
        loss = criterion(torch.randn(size, DIM, requires_grad=True), soft)
        assert loss.isfinite()
        assert size or loss == 0
    return found


def test_an_invalid_label_on_one_rank_shows_on_all(tmp_path: Path) -> None:
    for found in run_ranks(invalid_labels_on_rank, 2, tmp_path):
        for title, losses in found.items():
            assert [math.isnan(loss) for loss in losses] == [False, True, False], title
