"""The centroid memory: what it holds, when it moves, and what it survives."""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import MakeBatch
from tests.counting import LargestWritten
from varcon_loss import VarConLoss, varcon_terms


def make(impl: str = "eager", momentum: float = 0.9, **options) -> VarConLoss:
    options = {"num_classes": 8, "feature_dim": 16} | options
    return VarConLoss(centroid_momentum=momentum, impl=impl, **options)


def moved(memory: dict[int, Tensor], features: Tensor, labels: Tensor, m: float) -> dict:
    """The update in plain words, a class at a time."""
    memory = dict(memory)
    for label in labels.unique().tolist():
        if label == -100:
            continue
        mean = F.normalize(F.normalize(features[labels == label], dim=1).sum(0), dim=0)
        mean = m * memory[label] + (1 - m) * mean if label in memory else mean
        memory[label] = F.normalize(mean, dim=0)
    return memory


def test_updates_and_loss_follow_the_definition(impl: str, make_batch: MakeBatch) -> None:
    criterion = make(impl, 0.7)
    memory: dict[int, Tensor] = {}
    for seed in range(4):
        features, labels = make_batch(12, 3 + seed, seed=seed)
        labels = labels.masked_fill(torch.arange(12) == seed, -100)
        memory = moved(memory, features.detach(), labels, 0.7)
        terms = criterion.terms(features, labels)
        # The softmax runs over every class seen so far: a reference set of one vector each.
        expected = VarConLoss(impl=impl).terms(
            features, labels,
            ref_features=torch.stack(list(memory.values())), ref_labels=torch.tensor(list(memory)),
        )  # fmt: skip
        assert terms.num_classes == len(memory)
        torch.testing.assert_close(terms.loss, expected.loss, rtol=1e-5, atol=1e-5)
        (got,) = torch.autograd.grad(terms.reduced, features)
        (want,) = torch.autograd.grad(expected.reduced, features)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    for label in range(8):
        want = memory.get(label, torch.zeros(16, dtype=torch.float64)).float()
        torch.testing.assert_close(criterion.centroids[label], want, rtol=1e-5, atol=1e-6)


def test_without_momentum_nothing_changes(impl: str, make_batch: MakeBatch) -> None:
    features, labels = make_batch()
    plain = VarConLoss(num_classes=8, impl=impl)
    same = VarConLoss(num_classes=8, feature_dim=16, centroid_momentum=None, impl=impl)
    assert torch.equal(plain(features, labels), same(features, labels))
    assert list(same.state_dict()) == []
    for use, error in (
        (same.reset_memory, RuntimeError), (lambda: same.predict(features), RuntimeError),
        (lambda: same.centroids, AttributeError),
        (lambda: setattr(same, "centroids", torch.ones(8, 16)), AttributeError),
        (lambda: setattr(same, "centroid_momentum", 0.5), AttributeError),
    ):  # fmt: skip
        with pytest.raises(error, match="remembers no centroids"):
            use()
    assert not hasattr(same, "centroids")
    assert dict(inspect.getmembers(same))["temperature"] == 0.1
    with pytest.raises(AttributeError, match="no attribute 'centroid'"):
        _ = same.centroid


def test_read_but_not_written_in_eval_or_without_gradients(impl: str, make_batch) -> None:
    criterion = make(impl)
    features, labels = make_batch(24, 5)
    criterion(features, labels)
    before = criterion.centroids.clone()
    others, other_labels = make_batch(24, 8, seed=1)
    criterion.eval()
    terms = criterion.terms(others, other_labels)
    with torch.no_grad():
        criterion.train()
        again = criterion.terms(others, other_labels)
    assert torch.equal(criterion.centroids, before)
    assert torch.equal(terms.loss, again.loss)
    # Classes 5, 6 and 7 have not been seen: their samples take no part.
    assert torch.equal(terms.valid, other_labels < 5)
    torch.testing.assert_close(terms.reduced, terms.loss[other_labels < 5].mean())
    assert terms.num_classes == 5


def test_eval_before_any_training(impl: str, make_batch: MakeBatch) -> None:
    """As trainers do for a sanity check."""
    features, labels = make_batch()
    criterion = make(impl).eval()
    with pytest.warns(UserWarning, match="the centroid memory is empty"):
        loss = criterion(features, labels)
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, features)[0] == 0).all()
    with pytest.warns(UserWarning, match="the centroid memory is empty"):
        label, confidence = criterion.predict(features)
    assert (label == -1).all()
    assert confidence.isnan().all()


def test_a_filled_memory_is_quiet(impl: str, make_batch: MakeBatch) -> None:
    features, labels = make_batch()
    criterion = make(impl)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(features, labels)
        criterion.eval()(features, labels)
        criterion.predict(features)
        for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
            twin(features, labels)
        loaded = make(impl).eval()
        loaded.load_state_dict(criterion.state_dict())
        loaded(features, labels)
    criterion.reset_parameters()
    with pytest.warns(UserWarning, match="memory is empty"):
        criterion(features, labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_memory_is_float32_whatever_happens(dtype: torch.dtype, make_batch) -> None:
    features, labels = make_batch(dtype=torch.float32)

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        by_default = make(momentum=0.999)
    finally:
        torch.set_default_dtype(before)
    filled, assigned, copied, cast, put = (make(momentum=0.999) for _ in range(5))
    filled(features, labels)
    state = {name: value.to(dtype) for name, value in filled.state_dict().items()}
    assigned.load_state_dict(state, assign=True)
    copied.load_state_dict(state)
    cast.to(dtype)
    put.centroid_memory = put.centroid_memory.to(dtype)
    kept = filled.centroids.clone()
    assert torch.equal(filled.to(dtype).centroids, kept)
    for criterion in (by_default, assigned, copied, cast, put, filled):
        for _ in range(3):
            criterion(features, labels)
        held = criterion.centroid_memory.clone()
        assert held.dtype == torch.float32
        criterion(features.detach().flip(0), labels)
        step = (criterion.get_buffer("centroid_memory") - held).abs().max()
        assert 1e-6 < step < 1e-2  # bfloat16 would stand still at this momentum


def test_the_cost_follows_the_classes_seen(impl: str, make_batch: MakeBatch) -> None:
    """1,000,000 classes, of which 5 were seen: as with 5."""
    features, labels = make_batch(dtype=torch.float32)
    far = labels * 199_999 + 17
    big, small = make(impl, num_classes=1_000_000), make(impl, num_classes=5)
    for _ in range(2):
        with LargestWritten(new_matrices=True) as largest:
            loss = big(features, far)
            (gradient,) = torch.autograd.grad(loss, features)
            label, confidence = big.predict(features.detach())
        assert largest.elements < 2_000_000
        expected = small(features, labels)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, features)[0])
        want = small.predict(features.detach())
        assert torch.equal(label, want.label * 199_999 + 17)
        torch.testing.assert_close(confidence, want.confidence)
    unknown = far.clone()
    unknown[::2] += 1
    terms = big.eval().terms(features, unknown)
    assert terms.valid.tolist() == [False, True] * 12
    assert terms.num_classes == 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_batch_shows_in_the_loss_and_not_in_the_memory(
    bad: float, impl: str, make_batch: MakeBatch
) -> None:
    criterion = make(impl)
    features, labels = make_batch(24, 5)
    criterion(features, labels)
    before = criterion.centroids.clone()
    poisoned = features.detach().clone()
    poisoned[3] = bad
    assert criterion(poisoned.requires_grad_(), labels).isnan()
    after = criterion.centroids
    assert after.isfinite().all()
    assert torch.equal(after[labels[3]], before[labels[3]])
    assert criterion(features, labels).isfinite()
    assert make(impl)(poisoned, labels).isnan()  # also where the class has never been seen


def test_members_that_cancel_leave_the_memory_alone(impl: str) -> None:
    criterion = make(impl, num_classes=2, feature_dim=2)
    opposite = torch.tensor([[1.0, 0], [-1, 0], [0, 1]], requires_grad=True)
    labels = torch.tensor([0, 0, 1])
    terms = criterion.terms(opposite, labels)
    assert terms.reduced.isfinite()
    assert terms.valid.tolist() == [False, False, True]  # class 0 is still unknown
    assert criterion.centroids.tolist() == [[0, 0], [0, 1]]
    half = make(impl, 0.5, num_classes=2, feature_dim=2)
    for sign in (1.0, -1.0):  # the blend of a centroid with its opposite has no direction
        half(sign * opposite[:1].detach().requires_grad_(), labels[:1])
    assert half.centroids.tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize("num_rows", [0, 6])
def test_a_batch_without_samples_leaves_the_memory_alone(num_rows: int, impl: str) -> None:
    """Of an empty and an ignored batch, before and after there is something to remember."""
    criterion = make(impl, num_classes=3, feature_dim=4)
    nothing = torch.randn(num_rows, 4, requires_grad=True), torch.full((num_rows,), -100)
    for known, labels in enumerate(([], [1], [0, 2])):
        if labels:
            criterion(torch.randn(len(labels), 4, requires_grad=True), torch.tensor(labels))
        before = criterion.centroids.clone()
        terms = criterion.terms(*nothing)
        assert terms.reduced == 0
        assert terms.num_classes == (0, 1, 3)[known]
        assert torch.equal(criterion.centroids, before)


def test_state(impl: str, make_batch: MakeBatch) -> None:
    criterion = make(impl)
    features, labels = make_batch(24, 5)
    criterion(features, labels)
    assert set(criterion.state_dict()) == {"centroid_memory"}

    loaded = make(impl)
    buffer = io.BytesIO()
    torch.save(criterion.state_dict(), buffer)
    buffer.seek(0)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    twins = [loaded, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))]
    for twin in twins:
        assert torch.equal(twin.centroids, criterion.centroids)
    next_features, next_labels = make_batch(24, 7, seed=1)
    expected = criterion(next_features, next_labels)
    for twin in twins:
        assert torch.equal(twin(next_features, next_labels), expected)

    assert copy.deepcopy(criterion).to("meta").centroid_memory.device.type == "meta"
    criterion.reset_memory()
    assert (criterion.centroids == 0).all()
    assert criterion.terms(features, labels).num_classes == 5


def test_averaged_copies(make_batch: MakeBatch) -> None:
    criterion = make()
    averaged = torch.optim.swa_utils.AveragedModel(criterion, use_buffers=True)
    for seed in range(3):
        criterion(*make_batch(24, 5, seed=seed))
        averaged.update_parameters(criterion)
    twin = averaged.module
    assert isinstance(twin, VarConLoss)
    torch.testing.assert_close(twin.centroids.norm(dim=1), torch.tensor([1.0] * 5 + [0.0] * 3))
    features, labels = make_batch(24, 5)
    assert twin.centroid_memory.norm(dim=1)[:5].max() < 0.999
    reference = {"ref_features": twin.centroids[:5], "ref_labels": torch.arange(5)}
    expected = varcon_terms(features, labels, **reference)
    terms = twin.eval().terms(features, labels)
    torch.testing.assert_close(terms.confidence, expected.confidence)
    torch.testing.assert_close(terms.reduced, expected.reduced)


def test_labels_may_be_reused_before_backward(impl: str, make_batch: MakeBatch) -> None:
    features, labels = make_batch()
    criterion = make(impl, num_classes=5)
    criterion(features, labels)  # every class is seen from here on
    loss = copy.deepcopy(criterion)(features, labels)
    (expected,) = torch.autograd.grad(loss, features)
    loss = criterion(features, labels)
    labels.zero_()
    (gradient,) = torch.autograd.grad(loss, features)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype: torch.dtype, impl: str, make_batch: MakeBatch) -> None:
    criterion = make(impl)
    features, labels = make_batch(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(features, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert criterion.centroid_memory.dtype == torch.float32
    assert features.grad is not None
    assert features.grad.isfinite().all()


def test_compiles_into_one_graph(impl: str, make_batch: MakeBatch) -> None:
    torch._dynamo.reset()
    eager, traced = make(impl), make(impl)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        features, labels = make_batch(24, 3 + 2 * seed, seed=seed)
        labels = labels.masked_fill(labels == 1, -100)
        torch.testing.assert_close(compiled(features, labels), eager(features, labels))
        torch.testing.assert_close(traced.centroids, eager.centroids)
    compiled(features, torch.full_like(labels, -100))
    torch.testing.assert_close(traced.centroids, eager.centroids)


def test_predict(make_batch: MakeBatch) -> None:
    criterion = make(num_classes=8)
    features, labels = make_batch(60, 5)
    criterion(features, labels)
    criterion.eval()
    label, confidence = criterion.predict(features)
    z = F.normalize(features.detach(), dim=1)
    p = (z @ criterion.centroids[:5].double().T / 0.1).softmax(1)
    torch.testing.assert_close(confidence, p.max(1).values)
    assert torch.equal(label, p.argmax(1))
    own = criterion.terms(features, labels).confidence
    torch.testing.assert_close(own[label == labels], confidence[label == labels])
    exact = criterion.predict(features.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = criterion.predict(features.float())
    assert torch.equal(found.confidence, exact.confidence)
    views = criterion.predict(features.view(20, 3, 16))
    assert torch.equal(views.label, label.view(20, 3))
    assert torch.equal(views.confidence, confidence.view(20, 3))
    odd = features.detach().clone()
    odd[7] = torch.nan
    assert criterion.predict(odd).label[7] == -1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"centroid_momentum": 1.0}, ValueError, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"centroid_momentum": -0.1}, ValueError, r"must lie in \[0, 1\), got -0.1"),
        ({"centroid_momentum": float("nan")}, ValueError, r"must lie in \[0, 1\), got nan"),
        ({"centroid_momentum": "0.9"}, TypeError, "centroid_momentum must be a number or None"),
        ({"feature_dim": None}, ValueError, "needs num_classes and feature_dim"),
        ({"num_classes": None}, ValueError, "needs num_classes and feature_dim"),
        ({"feature_dim": 0}, ValueError, "feature_dim must be at least 1, got 0"),
        ({"leave_one_out": True}, ValueError, "leave_one_out cannot be used"),
    ],
)
def test_bad_options(options: dict, error: type[Exception], message: str) -> None:
    memory = {"num_classes": 8, "feature_dim": 16, "centroid_momentum": 0.9}
    with pytest.raises(error, match=message):
        VarConLoss(**memory | options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, x, y: c(x[:, :15], y), r"features have width 15 but .* feature_dim=16"),
        (lambda c, x, y: c(x, y, ref_features=x, ref_labels=y), "ref_features cannot be used with"),
        (lambda c, x, y: c(x, y + 8), r"labels must lie in \[0, 8\)"),
        (lambda c, x, y: c.to("meta")(x, y), "memory is on meta but features are on cpu"),
        (lambda c, x, y: c.predict(x[0]), r"features must have shape \[N, D\]"),
        (lambda c, x, y: setattr(c, "centroid_momentum", 1.5), r"lie in \[0, 1\), got 1.5"),
        (
            lambda c, x, y: setattr(c, "leave_one_out", True),
            "cannot be used with centroid_momentum",
        ),
        (lambda c, x, y: setattr(c, "num_classes", 2), "the centroid memory has 8 classes"),
        (lambda c, x, y: setattr(c, "num_classes", None), "the centroid memory has 8 classes"),
    ],
)
def test_bad_calls(change, message: str, make_batch: MakeBatch) -> None:
    criterion = make()
    criterion.num_classes, criterion.centroid_momentum = 8, 0.5  # which are no changes, or legal
    with pytest.raises(ValueError, match=message):
        change(criterion, *make_batch())


def test_a_memory_of_one_class_has_nothing_to_tell_apart(impl: str) -> None:
    """The other slots are empty: no sum over other classes may divide anything."""
    criterion = make(impl, num_classes=4, feature_dim=8)
    features = torch.randn(5, 8, requires_grad=True)
    loss = criterion(features, torch.full((5,), 2))
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("copies", [2, 3, 6, 7, 10, 20])
def test_averages_of_checkpoints_load(copies: int, make_batch: MakeBatch) -> None:
    """`sum(x / n)` of ones is not 1 to the last bit."""
    features, labels = make_batch(dtype=torch.float32)
    source, criterion = make(), make()
    source(features, labels)
    total = sum(source.get_buffer("centroid_memory") / copies for _ in range(copies))
    criterion.load_state_dict({"centroid_memory": total})
    torch.testing.assert_close(criterion.eval()(features, labels), source.eval()(features, labels))


def in_a_copy(criterion: VarConLoss, rows: Tensor) -> VarConLoss:
    criterion = copy.deepcopy(criterion)
    criterion.get_buffer("centroid_memory").mul_(0).add_(rows)
    return criterion


WAYS = {  # by whoever may write rows there
    "data assigned": lambda c, rows: setattr(c.centroid_memory, "data", rows.clone()),
    "data copied": lambda c, rows: c.centroid_memory.data.copy_(rows),
    "buffer assigned": lambda c, rows: setattr(c, "centroid_memory", rows.clone()),
    "in place": torch.no_grad()(lambda c, rows: c.centroid_memory.copy_(rows)),
    "loaded": lambda c, rows: c.load_state_dict({"centroid_memory": rows}),
    "assigned": lambda c, rows: c.load_state_dict({"centroid_memory": rows.clone()}, assign=True),
    "centroids": lambda c, rows: setattr(c, "centroids", rows),
    "centroids, a parameter": lambda c, rows: setattr(c, "centroids", torch.nn.Parameter(rows)),
    "in a copy": in_a_copy,
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_rows_of_any_length_are_directions(way: str, compiled: bool, make_batch: MakeBatch) -> None:
    """Whoever wrote them, averages of copies too; a row of zeros is a class not seen."""
    features, labels = make_batch(24, 5, dtype=torch.float32)
    source = make()
    for seed in range(3):
        source(*make_batch(24, 8, dtype=torch.float32, seed=seed))
    scale = torch.linspace(0.3, 3, 8).unsqueeze(1)
    scale[2] = 0
    rows = source.get_buffer("centroid_memory")
    rows[2] = 0
    criterion = make()
    written = WAYS[way](criterion, rows * scale)
    criterion = written if way == "in a copy" else criterion
    call = torch.compile(criterion, backend="aot_eager") if compiled else criterion
    for training in (True, False, True):
        expected = source.train(training)(features, labels)
        torch.testing.assert_close(call.train(training)(features, labels), expected)
    torch.testing.assert_close(criterion.centroids, source.centroids)
    assert torch.equal(criterion.predict(features).label, source.predict(features).label)


def test_a_class_forgotten_by_hand_is_learned_anew(make_batch: MakeBatch) -> None:
    features, labels = make_batch(24, 5, dtype=torch.float32)
    criterion = make()
    criterion(features, labels)
    criterion.get_buffer("centroid_memory")[1] = 0
    loaded = make()
    loaded.load_state_dict(criterion.state_dict())
    for twin in (criterion.to("cpu"), copy.deepcopy(criterion), loaded):
        with torch.no_grad():
            terms = twin.terms(features, labels)
        assert torch.equal(terms.valid, labels != 1)
        assert terms.num_classes == 4
        assert not (twin.predict(features).label == 1).any()
        twin(features, labels)
        assert twin.centroids.norm(dim=1).count_nonzero() == 5


def test_centroids_are_set_by_assignment() -> None:
    criterion = make(num_classes=3, feature_dim=2)
    criterion.centroids = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -2.0]]).double()
    torch.testing.assert_close(criterion.centroids, torch.tensor([[0.6, 0.8], [0, 0], [0, -1.0]]))
    assert [name for name, _ in criterion.named_parameters()] == []
    criterion.centroids[:] = 5.0  # of a copy
    assert criterion.centroids[1].tolist() == [0, 0]
    for wrong in (torch.ones(2, 2), torch.ones(3), [[1.0, 0.0]] * 3):
        with pytest.raises(ValueError, match=r"centroids must be a tensor \[3, 2\]"):
            criterion.centroids = wrong


@pytest.mark.parametrize("holder", [False, True])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_what_an_allocator_leaves_is_no_class(holder: bool, device: str, make_batch) -> None:
    with torch.device(device), pytest.MonkeyPatch.context() as patch:
        criterion = make()
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), criterion) if holder else criterion
        patch.setattr(torch, "empty_like", torch.ones_like)
        model.to_empty(device="cpu")
    assert not criterion.centroid_memory.any()
    criterion(*make_batch())
    assert criterion.centroid_memory.any()


def test_what_a_loader_allocates_is_no_class(make_batch: MakeBatch) -> None:
    trained = make()
    trained(*make_batch())
    for rows in (torch.full((8, 16), 7.0), torch.full((8, 16), float("nan")), torch.ones(8, 16)):
        with torch.device("meta"):
            criterion = make()
        with pytest.warns(UserWarning, match=r"emptied: .* call reset_parameters\(\)"):
            criterion.load_state_dict({"centroid_memory": rows}, assign=True)
        assert not criterion.centroid_memory.any()
        criterion.load_state_dict(trained.state_dict(), assign=True)
        assert torch.equal(criterion.centroids, trained.centroids)


def test_a_checkpoint_of_another_width_leaves_the_memory_empty(make_batch: MakeBatch) -> None:
    """Some loaders catch the error of `load_state_dict`."""
    trained = make()
    trained(*make_batch())
    criterion = make(feature_dim=12)
    with pytest.raises(RuntimeError, match="size mismatch"):
        criterion.load_state_dict(trained.state_dict())
    with pytest.warns(UserWarning, match="memory is empty"):
        assert (criterion.predict(torch.randn(4, 12)).label == -1).all()


def test_training_in_eval_mode_says_so(make_batch: MakeBatch) -> None:
    features, labels = make_batch(24, 8)
    criterion = make().eval()
    with pytest.warns(UserWarning, match=r"empty.* In eval mode it is only read"):
        criterion(features, labels)
    criterion.train()(features[labels < 4], labels[labels < 4])
    criterion.eval()
    with pytest.warns(UserWarning, match=r"in eval mode it does not learn .*call train\(\)"):
        criterion(features, labels).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(features[labels < 4], labels[labels < 4]).backward()  # as SAM's second forward
        with torch.no_grad():
            criterion(features, labels)


def test_data_parallel_says_what_to_use() -> None:
    with pytest.warns(UserWarning, match="DistributedDataParallel"):
        make()._replicate_for_data_parallel()
