"""Nothing waits for a device: on the meta device tensors have no values, and reading one raises."""

import pytest
import torch

from tests.counting import Operators
from varcon_loss import VarConLoss, fused

N, V, D, C = 16, 2, 8, 5

OPTIONS = {
    "plain": {}, "ignore_index": {"ignore_index": 3}, "all labels count": {"ignore_index": None},
    "weight": {"weight": torch.rand(C)}, "leave_one_out": {"leave_one_out": True},
    "not normalised": {"normalize": False}, "sum": {"reduction": "sum"},
    "none": {"reduction": "none"}, "memory": {"feature_dim": D, "centroid_momentum": 0.9},
}  # fmt: skip


@pytest.fixture(params=["reference", "eager", "triton"])
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "triton":
        # The kernels' operators have shapes but nothing to run on; torch.compile asks them so.
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        monkeypatch.setattr(fused, "why_not", lambda features, dtype: None)
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


def test_labels_of_any_value_synchronise_once(impl: str) -> None:
    features, labels = batch(N, D)
    with pytest.raises(NotImplementedError):  # as documented: give num_classes
        VarConLoss(impl=impl)(features, labels)


# Views and allocations: a GPU is sent nothing. Our own operators do as they look.
NOT_SENT = (
    "view", "_unsafe_view", "expand", "unsqueeze", "squeeze", "slice", "select", "detach", "alias",
    "t.", "transpose", "permute", "reshape", "empty", "new_empty", "scalar_tensor", "as_strided",
    "split",
)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"num_classes": C}, 97),  # the authors' operations: 92, the lean equations: 104
        ({"num_classes": 10 * N}, 110),
        ({"num_classes": C, "weight": torch.rand(C)}, 104),
        ({"num_classes": C, "leave_one_out": True}, 115),
        ({"num_classes": C, "feature_dim": D, "centroid_momentum": 0.9}, 138),
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
