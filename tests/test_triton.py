"""The Triton kernels, under the interpreter on a CPU and compiled on a GPU, against the others.

The interpreter multiplies bfloat16 operands upcast to float32: true bfloat16 products are proven
only on a GPU.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tests import blind
from varcon_loss import VarConLoss, VarConTerms, varcon_loss, varcon_terms
from varcon_loss.classes import Centroids, index_classes
from varcon_loss.options import Options
from varcon_loss.rows import Rows
from varcon_loss.samples import Batch, Samples
from varcon_loss import fused
from varcon_loss.sweeps.eager import EAGER

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT32 = {"rtol": 2e-5, "atol": 2e-6}


def batch(
    num_rows: int, num_classes: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_rows, dim, generator=generator) * 3
    labels = torch.randint(num_classes, (num_rows,), generator=generator)
    return features.to(DEVICE, dtype), labels.to(DEVICE)


def compare(features: Tensor, labels: Tensor, **options: object) -> None:
    """Values and gradients under a random upstream gradient, float32."""
    results = []
    for impl in ("reference", "triton"):
        anchors = features.clone().requires_grad_()
        terms = varcon_terms(anchors, labels, impl=impl, **options)
        assert terms.impl == impl
        generator = torch.Generator().manual_seed(1)
        upstream = torch.randn(terms.reduced.shape, generator=generator).to(DEVICE)
        (gradient,) = torch.autograd.grad(terms.reduced, anchors, upstream)
        results.append((terms, gradient))
    (expected, expected_grad), (got, got_grad) = results
    assert_terms(got, expected, FLOAT32)
    assert got_grad.dtype == features.dtype
    scale = float(expected_grad.abs().max()) if expected_grad.numel() else 1.0
    torch.testing.assert_close(got_grad, expected_grad, rtol=2e-5, atol=2e-6 * max(scale, 1.0))


def assert_terms(got: VarConTerms, expected: VarConTerms, tolerances: dict) -> None:
    for name in ("loss", "kl", "nll", "confidence", "tau2", "reduced"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), **tolerances)
    assert torch.equal(got.valid, expected.valid)
    assert torch.equal(got.num_classes, expected.num_classes)


@pytest.mark.parametrize("num_rows", [1, 2, 17, 63, 130])
@pytest.mark.parametrize(("num_classes", "dim"), [(1, 1), (2, 3), (33, 16), (7, 65), (70, 129)])
def test_odd_shapes(num_rows: int, num_classes: int, dim: int) -> None:
    compare(*batch(num_rows, num_classes, dim))


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 40},
        {"ignore_index": 3},
        {"ignore_index": None},
        {"weight": torch.linspace(0, 2, 12)},
        {"leave_one_out": True},
        {"leave_one_out": True, "num_classes": 12},
        {"normalize": False, "reduction": "sum"},
        {"reduction": "none"},
        {"temperature": 0.02, "epsilon": 0.01},
        {"temperature": 1.5, "epsilon": 0.0},
    ],
    ids=str,
)
def test_options(options: dict) -> None:
    options = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in options.items()}
    compare(*batch(50, 12, 20), **options)


def test_reference_set_views_and_strides() -> None:
    features, labels = batch(20, 4, 24)
    ref_features, ref_labels = batch(30, 4, 24, seed=1)
    compare(features, labels, ref_features=ref_features, ref_labels=ref_labels)
    compare(features.view(20, 2, 12), labels)
    compare(features.T.contiguous().T, labels)
    compare(features[:, ::2], labels)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e20, 1e37])
def test_features_of_any_size(scale: float) -> None:
    features, labels = batch(20, 4, 8)
    expected = varcon_loss(features, labels, impl="reference")
    got = varcon_loss(features * scale, labels, impl="triton")
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_rows_that_say_nothing() -> None:
    features, labels = batch(12, 3, 8)
    features[2] = 0
    features[5] = torch.nan
    labels[5] = -100
    features.requires_grad_()
    loss = varcon_loss(features, labels, impl="triton")
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss.isfinite()
    assert gradient[2].eq(0).all()
    assert gradient[5].eq(0).all()
    assert gradient[0].ne(0).any()

    ignored = torch.full_like(labels, -100)
    for rows in (features, features[:0]):
        loss = varcon_loss(rows, ignored[: len(rows)], impl="triton", num_classes=3)
        assert float(loss.detach()) == 0
        assert torch.autograd.grad(loss, rows)[0].eq(0).all()


def test_nan_shows() -> None:
    features, labels = batch(12, 3, 8)
    features[4, 1] = torch.nan
    assert varcon_loss(features, labels, impl="triton").isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(37, 5, 24), (64, 33, 130), (3, 3, 1)])
@pytest.mark.parametrize("normalize", [True, False])
def test_half_operands(dtype: torch.dtype, shape: tuple[int, int, int], normalize: bool) -> None:
    """The loss and gradient of eager float32 whose centroids are rounded as the operands are."""
    features, labels = batch(*shape, dtype)
    features = features / (1 if normalize else 10)
    labels = torch.unique(labels, return_inverse=True)[1]
    z = features.float()
    norms = torch.linalg.vector_norm(z, dim=1) if normalize else None
    unit = z / norms[:, None] if norms is not None else z
    w = torch.zeros(int(labels.max()) + 1, shape[2], device=DEVICE)
    w = torch.nn.functional.normalize(w.index_add(0, labels, unit), dim=1)

    def sweep(run, w: Tensor, anchors: Samples) -> tuple[Tensor, Tensor]:
        count = torch.tensor(len(w), device=DEVICE)
        centroids = Centroids(unit=w, present=None, num_present=count, packed=True)
        terms = run(Rows(anchors, labels, centroids), 0.1, 0.02, True)
        return terms.loss, torch.autograd.grad(terms.loss.sum(), anchors.features)[0]

    ours = features.detach().requires_grad_()
    loss, gradient = sweep(fused.FUSED.sweep, w, Samples(ours, labels, norms=norms))
    theirs = z.detach().requires_grad_()
    # The own class is float32 in the kernel: only the other centroids are rounded.
    count = torch.tensor(len(w), device=DEVICE)
    rounded = Rows(
        Samples(theirs, labels, unit=unit, norms=norms),
        labels,
        Centroids(unit=w.to(dtype).float(), present=None, num_present=count, packed=True),
        own=w.index_select(0, labels),
    )
    terms = EAGER.sweep(rounded, 0.1, 0.02, True)
    (expected,) = torch.autograd.grad(terms.loss.sum(), theirs)

    unit_roundoff = torch.finfo(dtype).eps / 2
    # The sum of other logits uses exact centroids here and rounded ones there, and the weights of
    # the second product are rounded here only; each error is at most a roundoff of its term.
    size = 1.0 if norms is None else float((1 / norms).max())
    torch.testing.assert_close(loss, terms.loss, rtol=0, atol=4 * unit_roundoff / 0.1)
    error = (gradient.float() - expected).norm(dim=1).max()
    assert gradient.dtype == dtype
    assert float(error) <= 6 * unit_roundoff / 0.1 * size


def test_small_gradients_survive_float16() -> None:
    """Confident rows: every entry of the gradient is below float16's range, until it is scaled."""
    features = torch.eye(8, dtype=torch.float16, device=DEVICE).repeat(2, 1) * 100
    features = (features + torch.linspace(-1, 1, 128, device=DEVICE).view(16, 8)).half()
    labels = torch.arange(8, device=DEVICE).repeat(2)
    gradients = []
    for impl in ("eager", "triton"):
        anchors = features.clone().requires_grad_()
        loss = varcon_loss(anchors, labels, temperature=0.05, epsilon=0.0, impl=impl)
        gradients.append(torch.autograd.grad(loss * 2.0**20, anchors)[0].float())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.02, atol=2e-4)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("ignore_index", [None, -100, 3, 2**63 - 1])
@pytest.mark.parametrize("num_classes", [None, 6, 10_000])
@pytest.mark.parametrize("num_rows", [0, 1, 17, 1024, 2049])
def test_sorted_labels(num_rows: int, num_classes: int | None, ignore_index: int | None) -> None:
    """Slots, members and classes as the torch path finds them; nothing outside is touched."""
    generator = torch.Generator().manual_seed(num_rows)
    bound = num_classes or 2000
    values = torch.randint(bound, (num_rows,), generator=generator)
    if num_classes is None:
        values = values * 2**51 - 2**62 + (values % 3)  # hashes, negative ones too
        values[:1] = 2**63 - 1
    elif ignore_index is not None:
        values[::5] = ignore_index
    options = Options(num_classes=num_classes, ignore_index=ignore_index)
    rows = Batch(torch.zeros(num_rows, 1, device=DEVICE), values.to(DEVICE), "labels")
    got, lookup, found_slots, groups = fused.sort_labels(rows, options)
    assert got.valid is not None
    assert got.num_valid is not None
    assert lookup.ascending is not None
    # All that follows on the CPU: a GPU would be asked for each slot.
    labels, ascending, found_slots = values, lookup.ascending.cpu(), found_slots.cpu()
    order, runs, starts, ends = (x.cpu() for x in groups)
    expected = EAGER.read(Batch(torch.zeros(num_rows, 1), labels, "labels"), options, torch.float32)
    assert isinstance(expected.labels, Tensor)
    _, slots = index_classes(expected.labels, expected.valid, num_classes)
    valid = torch.ones_like(labels, dtype=torch.bool) if expected.valid is None else expected.valid
    present = torch.unique(labels[valid])
    assert torch.equal(got.valid.cpu(), valid)
    assert isinstance(got.labels, Tensor)
    assert torch.equal(got.labels.cpu()[valid], labels[valid])
    assert torch.equal(found_slots[valid], slots[valid])
    assert int(lookup.num_present) == len(present)
    assert float(got.num_valid) == max(1, int(valid.sum()))
    assert torch.equal(ascending[: len(present)], present)
    assert torch.equal(ascending, ascending.sort().values)
    assert len(ascending) == max(1, min(num_rows, num_classes or num_rows))
    for slot, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        members = (valid & (found_slots == slot)).nonzero().flatten()
        assert torch.equal(order[start:end], members)
    assert torch.equal(runs, torch.where(valid, found_slots, -1)[order].int())


def test_narrow_keys_sort_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels far out of range do not come back into it, whatever the width of the keys."""
    labels = torch.randint(300, (1500,), generator=torch.Generator().manual_seed(0))
    labels[::7] = 2**40 + 5
    labels[1::7] = -(2**16) + 3
    labels[2::7] = -100
    for device_may_not_be_read in (True, False):
        if not device_may_not_be_read:
            labels[::7] = labels[1::7] = -100
        monkeypatch.setattr(
            fused, "values_may_be_read", lambda tensor, blind=device_may_not_be_read: not blind
        )
        results = []
        for at_once in (4096, 0):
            monkeypatch.setattr(fused, "SORTED_AT_ONCE", at_once)
            rows = Batch(torch.zeros(len(labels), 1), labels.to(DEVICE), "labels")
            found, lookup, slots, groups = fused.sort_labels(rows, Options(num_classes=300))
            order, runs, starts, ends = groups
            kept = runs >= 0  # the others may come in any order
            read = (found.labels, found.valid, found.broken, found.num_valid, slots)
            results.append((*read, lookup.ascending, order[kept]))
            assert torch.equal((ends - starts).sum(), kept.sum())
        for narrow, wide in zip(*results, strict=True):
            assert torch.equal(narrow, wide)


@pytest.mark.parametrize("sizes", [(1024, 1024), (511, 512, 1), (700, 1300, 2, 40)])
@pytest.mark.parametrize("normalize", [True, False])
def test_sums_of_large_classes(
    sizes: tuple[int, ...], normalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of classes that start and end anywhere in a stretch of the sorted rows."""
    monkeypatch.setattr(fused, "LONG_CLASS", 64)
    sizes = tuple(-(-size // 8) for size in sizes)
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    if len(sizes) > 2:  # else large classes start where stretches do
        labels[3] = -100
    features, _ = batch(len(labels), 2, 5)
    rows = Batch(features, labels.to(DEVICE), "labels")
    _, _, slots, groups = fused.sort_labels(rows, Options(num_classes=len(sizes)))
    sums, counts, unit, norms = fused.class_sums(features, *groups, normalize, True)
    none_kept, *others = fused.class_sums(features, *groups, normalize, False)
    assert none_kept.shape == (0, 5)
    assert all(torch.equal(a, b) for a, b in zip(others[:2], (counts, unit), strict=True))
    lengths = torch.linalg.vector_norm(features, dim=1)
    rows = features / lengths[:, None] if normalize else features
    valid = labels.to(DEVICE) >= 0
    expected = torch.zeros(len(sums), 5, device=DEVICE)
    expected.index_add_(0, slots[valid], rows[valid])
    torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(counts, torch.bincount(slots[valid], minlength=len(sums)).float())
    torch.testing.assert_close(
        unit, torch.nn.functional.normalize(expected, dim=1), rtol=1e-4, atol=1e-4
    )
    if normalize:
        torch.testing.assert_close(norms[valid], lengths[valid])


@pytest.mark.parametrize(("num_rows", "num_classes"), [(49, 40), (40, 1)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.02, "epsilon": 0.01},
        {"leave_one_out": True, "num_classes": 41},
        {"ignore_index": 0},
    ],
    ids=str,
)
def test_rows_in_order_of_class(
    num_rows: int, num_classes: int, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large batches are swept in order of class, where only a few tiles of keys have a mask."""
    monkeypatch.setattr(fused, "SORTED_FROM", 0)
    monkeypatch.setitem(fused.TILES[4], 64, fused.Tiles(32, 16, 8, 2))
    compare(*batch(num_rows, num_classes, 24), **options)


def test_memory_and_reference_set_in_order_of_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots with gaps, and slots of rows that take no part."""
    monkeypatch.setattr(fused, "SORTED_FROM", 0)
    test_memory()
    test_reference_set_views_and_strides()
    test_as_on_a_gpu(3, monkeypatch)


def test_a_reference_set_with_nothing_valid_has_no_class_0() -> None:
    features, _ = batch(6, 3, 8)
    zeros = torch.zeros(6, dtype=torch.int64, device=DEVICE)
    options = {"ref_features": features, "ref_labels": zeros - 100, "impl": "triton"}
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="ref_labels lack label 0"):
            varcon_loss(features, zeros, **options)
    else:
        assert varcon_loss(features, zeros, **options).isnan()


@pytest.mark.parametrize("num_classes", [3, None])
def test_as_on_a_gpu(num_classes: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that may not look at values: bad labels are NaN, and the rest as ever."""
    blind.look_at_nothing(monkeypatch.setattr)
    features, labels = batch(20, 3, 8)
    labels[3] = -100
    compare(features, labels, num_classes=num_classes)
    compare(features, labels, num_classes=num_classes, leave_one_out=True)
    if num_classes is not None:
        features.requires_grad_()
        for bad in (-1, 3, 2**40):
            labels[5] = bad
            terms = varcon_terms(features, labels, num_classes=3, impl="triton")
            (gradient,) = torch.autograd.grad(terms.reduced, features)
            assert terms.reduced.isnan()
            assert terms.loss.isnan().nonzero().flatten().tolist() == [5]
            assert not terms.valid[5]
            assert gradient[5].eq(0).all()
            assert gradient.isfinite().all()


def test_two_runs_give_identical_bits() -> None:
    features, labels = batch(200, 3, 24)
    runs = []
    for _ in range(2):
        anchors = features.clone().requires_grad_()
        loss = varcon_loss(anchors, labels, impl="triton")
        runs.append((loss, torch.autograd.grad(loss, anchors)[0]))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_memory() -> None:
    losses = {}
    for impl in ("reference", "triton"):
        criterion = VarConLoss(num_classes=9, feature_dim=12, centroid_momentum=0.9, impl=impl).to(
            DEVICE
        )
        for seed in range(3):
            anchors, labels = batch(16, 9, 12, seed=seed)
            anchors.requires_grad_()
            loss = criterion(anchors, labels)
        losses[impl] = (loss, torch.autograd.grad(loss, anchors)[0], criterion.centroids)
    for got, expected in zip(losses["triton"], losses["reference"], strict=True):
        torch.testing.assert_close(got, expected, **FLOAT32)


def test_forward_alone_keeps_no_gradient() -> None:
    features, labels = batch(10, 3, 8)
    with torch.no_grad():
        got = varcon_loss(features, labels, impl="triton")
    torch.testing.assert_close(got, varcon_loss(features, labels, impl="reference"), **FLOAT32)


@pytest.mark.parametrize("in_order", [False, True])
def test_second_derivatives_are_those_of_the_equations(
    in_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the reference's equations, from what the kernels keep: rows in the order of the batch.

    Lengths of rows that take no part are whatever was in memory.
    """
    monkeypatch.setattr(fused, "SORTED_FROM", 0 if in_order else 2**62)
    make_sums = fused.class_sums

    def with_unset_norms(*arguments: Any, **named: Any) -> tuple[Tensor, ...]:
        *others, norms = make_sums(*arguments, **named)
        norms[::4] = 0.0
        return *others, norms

    monkeypatch.setattr(fused, "class_sums", with_unset_norms)
    features, labels = batch(13, 4, 8)
    labels[::4] = -100
    found = []
    for impl in ("reference", "triton"):
        anchors = features.clone().requires_grad_()
        loss = varcon_loss(anchors, labels, 0.5, 0.2, ignore_index=-100, impl=impl)
        (gradient,) = torch.autograd.grad(loss, anchors, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), anchors, retain_graph=True)
        found.append((second, torch.autograd.grad(loss + gradient.square().sum(), anchors)[0]))
    assert found[0][0].abs().max() > 1e-4
    torch.testing.assert_close(found[1], found[0], rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("num_classes", [5, None])
def test_compiles_as_one_graph(num_classes: int | None) -> None:
    torch._dynamo.reset()
    criterion = VarConLoss(num_classes=num_classes, impl="triton")
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    features, labels = batch(24, 5, 16)
    features.requires_grad_()
    expected, got = criterion(features, labels), compiled(features, labels)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, features), torch.autograd.grad(expected, features)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_follow_the_rules(dtype: torch.dtype) -> None:
    features, labels = batch(9, 4, 6, dtype)
    valid = labels != 2
    norms = fused.row_norms(features, valid)
    rows = Batch(features, labels, "labels")
    _, lookup, slots, groups = fused.sort_labels(rows, Options(num_classes=4, ignore_index=2))
    operators = torch.ops.varcon_loss
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for operator, arguments in (
        (operators.row_norms, (features, valid)),
        (operators.sort_labels, (labels, 2, 4)),
        (operators.class_sums, (features, *groups, True, True)),
        (operators.class_sums, (features, *groups, True, False)),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=checks)
    _, counts, w, _ = fused.class_sums(features, *groups, True, False)
    present, count = counts > 0, lookup.num_present
    features.requires_grad_()
    given = {
        "features": features, "norms": norms, "w": w, "need_grad": True, "need_terms": True,
        "unit": None, "slots": slots, "soft": None, "entries": None, "columns": None,
        "background": None, "class_weight": None, "present": present, "num_present": count,
        "packed": False, "own": None, "valid": valid, "broken": None,
        "temperature": 0.1, "epsilon": 0.02, "temperatures": None,
    }  # fmt: skip
    torch.library.opcheck(operators.fused_sweep.default, (), given)


def test_float64_is_an_error_and_wide_rows_too() -> None:
    labels = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="float64"):
        varcon_loss(torch.ones(4, 3, device=DEVICE).double(), labels, impl="triton")
    wide = torch.ones(4, fused.LARGEST_DIM + 1, device=DEVICE)
    with pytest.raises(ValueError, match="width 1025"):
        varcon_loss(wide, labels, impl="triton")
    assert varcon_terms(wide, labels).impl == "eager"


@pytest.mark.parametrize("layout", ["a column", "every other", "expanded"])
def test_labels_of_any_layout(layout: str) -> None:
    """The kernels read labels and slots by number: they must lie side by side."""
    features, labels = batch(16, 4, 8)
    wanted = labels if layout != "expanded" else labels[:1].repeat(16)
    strided = {
        "a column": torch.stack((labels, labels.flip(0)), dim=1)[:, 0],
        "every other": labels.repeat_interleave(2)[::2],
        "expanded": labels[:1].expand(16),
    }[layout]
    assert torch.equal(strided, wanted)
    weight = torch.tensor([1.0, 5.0, 0.2, 3.0], device=DEVICE)
    memory = {"num_classes": 4, "feature_dim": 8, "centroid_momentum": 0.9}
    ref_labels = torch.arange(40, device=DEVICE)[::2] // 2 % 4
    reference = {"ref_features": torch.randn(20, 8, device=DEVICE), "ref_labels": ref_labels}
    for options, call in (
        ({}, {}), ({"weight": weight}, {}), ({"ignore_index": 0}, {}), (memory, {}),
        ({}, reference), ({"num_classes": 4, "leave_one_out": True}, {}),
    ):  # fmt: skip
        found = []
        for given in (strided, wanted):
            torch.manual_seed(0)
            criterion = VarConLoss(impl="triton", **options).to(DEVICE)
            leaf = features.clone().requires_grad_()
            for _ in range(2):
                terms = criterion.terms(leaf, given, **call)
            (gradient,) = torch.autograd.grad(terms.reduced, leaf)
            criterion.eval()
            after = criterion.terms(features, given, **call)
            found.append((terms.loss, terms.valid, gradient, after.loss))
        for got, want in zip(*found, strict=True):
            assert torch.equal(got, want), (layout, options)
