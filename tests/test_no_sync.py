"""Nothing waits for a device: on the meta device tensors have no values, and reading one raises."""

import dataclasses

import pytest
import torch

from tests.counting import Operators
from varcon_loss import VarConLoss, classes
from varcon_loss.implementations import IMPLEMENTATIONS
from varcon_loss.rows import nothing_prevents
from varcon_loss.sums import class_counts

N, V, D, C = 16, 2, 8, 5

OPTIONS = {
    "plain": {},
    "ignore_index": {"ignore_index": 3},
    "all labels count": {"ignore_index": None},
    "weight": {"weight": torch.rand(C)},
    "leave_one_out": {"leave_one_out": True},
    "not normalised": {"normalize": False},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "memory": {"feature_dim": D, "centroid_momentum": 0.9},
}


@pytest.fixture(params=["reference", "eager", "triton"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "triton":
        # The kernels' operators have shapes but nothing to run on; torch.compile asks them so.
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        everywhere = dataclasses.replace(IMPLEMENTATIONS["triton"], why_not=nothing_prevents)
        monkeypatch.setitem(IMPLEMENTATIONS, "triton", everywhere)
    return request.param


def batch(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    features = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
    return features, torch.empty(shape[0], dtype=torch.int64, device="meta")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_value_is_read(impl: str, dtype: torch.dtype, options: dict) -> None:
    criterion = VarConLoss(num_classes=C, impl=impl, **options).to("meta")
    for shape in ((N, D), (N // V, V, D)):
        features, labels = batch(*shape, dtype=dtype)
        terms = criterion.terms(features, labels)
        for loss in (criterion(features, labels), terms.reduced):
            assert loss.dtype == torch.float32
            assert loss.shape == (shape[:-1] if options.get("reduction") == "none" else ())
            (gradient,) = torch.autograd.grad(loss.sum(), features)
            assert (gradient.shape, gradient.dtype) == (features.shape, dtype)
        assert terms.tau2.shape == terms.valid.shape == shape[:-1]


def test_no_value_of_a_reference_set_is_read(impl: str) -> None:
    features, labels = batch(N, D)
    ref_features, ref_labels = batch(3 * N, D)
    criterion = VarConLoss(num_classes=C, impl=impl)
    criterion(features, labels, ref_features=ref_features, ref_labels=ref_labels).backward()
    assert features.grad is not None
    assert ref_features.grad is None


def test_labels_of_any_value_synchronise_once_but_under_triton(impl: str) -> None:
    features, labels = batch(N, D)
    criterion = VarConLoss(impl=impl)
    if impl == "triton":
        criterion(features, labels).backward()
    else:
        with pytest.raises(NotImplementedError):  # as documented: give num_classes
            criterion(features, labels)


# Views and allocations: a GPU is sent nothing. Our own operators do as they look.
NOT_SENT = (
    "view", "_unsafe_view", "expand", "unsqueeze", "squeeze", "slice", "select", "detach", "alias",
    "t.", "transpose", "permute", "reshape", "empty", "new_empty", "scalar_tensor", "as_strided",
    "split",
)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"num_classes": C}, 94),  # the authors' operations: 92, the lean equations: 104
        ({"num_classes": 10 * N}, 102),
        ({"num_classes": C, "weight": torch.rand(C)}, 100),
        ({"num_classes": C, "leave_one_out": True}, 109),
        ({"num_classes": C, "feature_dim": D, "centroid_momentum": 0.9}, 119),
    ],
    ids=["plain", "many classes", "weight", "leave_one_out", "memory"],
)
def test_launches_of_a_step(options: dict, most: int) -> None:
    """Small batches wait for the host on a GPU: what counts there is how often it is asked."""
    criterion = VarConLoss(impl="eager", **options).to("meta")
    features, labels = batch(N, D)
    with Operators() as operators:
        torch.autograd.grad(criterion(features, labels), features)
    sent = [name for name in operators.names if not name.startswith(NOT_SENT)]
    assert len(sent) <= most, sent


def test_an_empty_slot_is_no_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where values cannot be read and any labels may come, what is left out keeps a slot."""
    monkeypatch.setattr(classes, "values_may_be_read", lambda tensor: False)
    labels, valid = torch.tensor([7, 0, 3, 7]), torch.tensor([True, False, True, True])
    index, slots = classes.index_classes(labels, valid, None)
    index = index.among(class_counts(slots, valid, index.size, torch.float32))
    found, known = classes.find_slots(torch.tensor([0, 3, 7, 5]), index)
    assert known.tolist() == [False, True, True, False]
    assert found[1:3].tolist() == [slots[2], slots[0]]
