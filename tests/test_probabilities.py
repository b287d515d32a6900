"""Class probabilities as labels, as users give them: every option, device rule and error."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common.ranks import run_ranks
from tests import oracle_soft_labels
from tests.conftest import MakeBatch
from tests.test_distributed import DIM, WIDTH, encoder
from varcon_loss import VarConLoss, varcon_loss, varcon_terms

C = 7
WEIGHT = torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0, 1.0, 0.1], dtype=torch.float64)
OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "as they are": {"normalize": False},
    "weight": {"weight": WEIGHT},
    "weight, sum": {"weight": WEIGHT, "reduction": "sum"},
    "weight, none": {"weight": WEIGHT, "reduction": "none"},
    "cold": {"temperature": 0.01, "epsilon": 0.005},
}
by_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def hot(labels: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Integer labels as rows of class probabilities; -100 as a row of zeros."""
    rows = one_hot(labels.clamp_min(0), C).to(dtype)
    return rows * (labels >= 0).unsqueeze(1)


def mixed(num_rows: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Two classes a row, one row of zeros, nobody in the last class."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randint(C - 1, (2, num_rows), generator=generator)
    share = torch.rand(num_rows, 1, generator=generator, dtype=torch.float64)
    rows = share * hot(first) + (1 - share) * hot(second)
    rows[num_rows // 2] = 0
    return rows.to(dtype)


def smoothed(num_rows: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (0.9 * mixed(num_rows, seed) + 0.1 / C).to(dtype)


def dense(num_rows: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, C, generator=generator, dtype=torch.float64).softmax(1).to(dtype)


KINDS = {"mixed": mixed, "smoothed": smoothed, "dense": dense}
by_kind = pytest.mark.parametrize("kind", KINDS)


@by_options
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_hot_rows_are_integer_labels(
    options: dict, dtype: torch.dtype, impl: str, make_batch: MakeBatch
) -> None:
    features, labels = make_batch(24, C - 1, dtype=dtype)
    labels[[3, 8]] = -100
    if options.get("normalize", True) is False:
        features = (features.detach() / 10).requires_grad_()
    # Two sums in another order differ by as many roundings as there are rows.
    close = {"rtol": 0.0, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 0.0, "atol": 1e-11}
    expected = varcon_terms(features, labels, num_classes=C, impl=impl, **options)
    got = varcon_terms(features, hot(labels), impl=impl, **options)
    for name in ("loss", "kl", "nll", "confidence", "tau2", "reduced"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), **close)
    assert torch.equal(got.valid, expected.valid)
    assert int(got.num_classes) == int(expected.num_classes)
    alone = varcon_loss(features, hot(labels), impl=impl, **options)
    torch.testing.assert_close(alone, expected.reduced, **close)
    gradients = [
        torch.autograd.grad(loss.sum(), features, retain_graph=True)[0]
        for loss in (expected.reduced, got.reduced, alone)
    ]
    torch.testing.assert_close(gradients[1], gradients[0], **close)
    torch.testing.assert_close(gradients[2], gradients[0], **close)


@by_kind
@pytest.mark.parametrize("weighted", [False, True])
def test_against_scalar_loops(kind: str, weighted: bool, impl: str, make_batch: MakeBatch) -> None:
    features, _ = make_batch(12, 3, 4)
    rows = KINDS[kind](12)
    options = {"weight": WEIGHT} if weighted else {}
    terms = varcon_terms(features, rows, impl=impl, **options)
    given = features.tolist(), rows.tolist()
    expected = oracle_soft_labels.row_terms(*given)
    for name in oracle_soft_labels.NAMES:
        values = torch.tensor([row[name] for row in expected], dtype=torch.float64)
        torch.testing.assert_close(getattr(terms, name).detach(), values, rtol=1e-9, atol=1e-11)
    weights = WEIGHT.tolist() if weighted else [1.0] * C
    summed = sum(row["loss"] for row in oracle_soft_labels.row_terms(*given, weight=weights))
    valid = int((rows.sum(1) > 0).sum())
    whole = float((rows * WEIGHT).sum()) if weighted else valid
    assert float(terms.reduced) == pytest.approx(summed / whole, rel=1e-9)
    assert int(terms.valid.sum()) == valid
    assert int(terms.num_classes) == int((rows.sum(0) > 0).sum())


@by_kind
@pytest.mark.parametrize("options", [{}, {"weight": WEIGHT}, {"normalize": False}], ids=str)
def test_gradient_matches_finite_differences(
    kind: str, options: dict, impl: str, make_batch: MakeBatch
) -> None:
    """Centroids are constants of the loss: those of a reference set, which stays as it is."""
    features, _ = make_batch(6, 3, 4)
    reference, rows = torch.randn(14, 4, dtype=torch.float64), KINDS[kind](6)

    def loss(x: Tensor) -> Tensor:
        return varcon_loss(
            x, rows, 0.5, 0.2, ref_features=reference, ref_labels=torch.arange(14) % C, impl=impl,
            **options,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (features,))
    assert torch.autograd.gradgradcheck(loss, (features,))


@by_kind
def test_views_share_a_row(kind: str, impl: str) -> None:
    features = torch.randn(6, 3, 5, dtype=torch.float64)
    rows = KINDS[kind](6)
    terms = varcon_terms(features, rows, impl=impl)
    flat = varcon_terms(features.flatten(0, 1), rows.repeat_interleave(3, 0), impl=impl)
    assert terms.loss.shape == terms.valid.shape == (6, 3)
    torch.testing.assert_close(terms.loss.flatten(), flat.loss)
    torch.testing.assert_close(terms.reduced, flat.reduced)


@pytest.mark.parametrize("kind", ["mixed", "dense"])
def test_reference_sets_of_either_kind(kind: str, impl: str, make_batch: MakeBatch) -> None:
    """Clean references for mixed anchors, and the other way round."""
    features, labels = make_batch(20, C)
    ref_features, ref_labels = torch.randn(35, 16, dtype=torch.float64), torch.arange(35) % C
    rows = KINDS[kind](20)

    def loss(y: Tensor, ref: Tensor, **options: object) -> Tensor:
        return varcon_loss(
            features, y, ref_features=ref_features, ref_labels=ref, impl=impl, **options
        )

    torch.testing.assert_close(loss(rows, ref_labels), loss(rows, hot(ref_labels)))
    expected = loss(labels, ref_labels, num_classes=C)
    torch.testing.assert_close(loss(labels, hot(ref_labels)), expected)
    torch.testing.assert_close(loss(hot(labels), ref_labels, num_classes=C), expected)

    with pytest.raises(ValueError, match=r"ref_labels lack label 4, 5, .*row of zeros"):
        loss(hot(torch.arange(20) % (C - 1)), ref_labels % 4)
    for anchors in (torch.zeros_like(labels), hot(torch.zeros_like(labels))):
        with pytest.raises(ValueError, match="ref_labels lack label 0, which labels contain"):
            loss(anchors, torch.zeros(35, C))


def test_memory_learns_by_shares(impl: str) -> None:
    generator = torch.Generator().manual_seed(0)
    options = {"num_classes": C, "feature_dim": 5, "centroid_momentum": 0.9, "impl": impl}
    integers, rows = VarConLoss(**options), VarConLoss(**options)
    for step in range(4):
        features = torch.randn(10, 5, generator=generator).requires_grad_()
        labels = torch.randint(1 + 2 * step, (10,), generator=generator)
        expected, got = integers(features, labels), rows(features, hot(labels))
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            torch.autograd.grad(got, features), torch.autograd.grad(expected, features)
        )
        torch.testing.assert_close(rows.centroids, integers.centroids)
        with torch.no_grad():
            every = torch.arange(10) % C
            torch.testing.assert_close(rows(features, hot(every)), integers(features, every))


def test_smoothing_does_not_move_classes_that_are_absent() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(C, 16)
    criterion = VarConLoss(num_classes=C, feature_dim=16, centroid_momentum=0.9)
    for step in range(200):
        labels = torch.tensor([step % C, (step + 1) % C]).repeat(4)
        features = directions[labels] + 0.05 * torch.randn(8, 16, generator=generator)
        criterion(features, 0.9 * hot(labels, torch.float32) + 0.1 / C)
    assert (criterion.centroids * directions).sum(1).min() > 0.95


def test_memory_drops_shares_of_classes_it_has_not_seen() -> None:
    criterion = VarConLoss(num_classes=C, feature_dim=5, centroid_momentum=0.5)
    criterion(torch.randn(8, 5), torch.arange(8) % 3)
    criterion.eval()
    features = torch.randn(2, 5)
    half = 0.5 * hot(torch.tensor([0, 1])) + 0.5 * hot(torch.tensor([6, 2]))
    terms = criterion.terms(features, half)
    alone = criterion.terms(features, torch.tensor([0, 1]))
    torch.testing.assert_close(terms.nll[0], alone.nll[0] / 2)
    assert criterion.terms(features, hot(torch.tensor([6, 5]))).valid.tolist() == [False, False]


def on_rank(rank: int, world_size: int) -> dict:
    results = {}
    for kind, exchange in itertools.product(KINDS, ("all-reduce", "all-gather")):
        for title, options in {"plain": {}, "weight": {"weight": WEIGHT}}.items():
            net = DistributedDataParallel(encoder()) if world_size > 1 else encoder()
            criterion = VarConLoss(
                num_classes=C, process_group="world", exchange=exchange, **options
            )
            inputs, rows = share_of(rank, kind)
            terms = criterion.terms(net(inputs), rows)
            terms.reduced.backward()
            gradient = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
            results[kind, exchange, title] = (terms.loss.detach(), terms.num_classes, gradient)
    return results


def share_of(rank: int, kind: str) -> tuple[Tensor, Tensor]:
    num_rows = 9 - 2 * rank
    generator = torch.Generator().manual_seed(rank)
    inputs = torch.randn(num_rows, WIDTH, generator=generator, dtype=torch.float64)
    return inputs, KINDS[kind](num_rows, seed=rank)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_equal_one_process_on_the_concatenated_batch(world_size: int, tmp_path: Path) -> None:
    ranks = run_ranks(on_rank, world_size, tmp_path)
    for kind, exchange, title in ranks[0]:
        parts = [share_of(rank, kind) for rank in range(world_size)]
        net = encoder()
        assert net(parts[0][0]).shape[1] == DIM
        expected = varcon_terms(
            net(torch.cat([x for x, _ in parts])),
            torch.cat([y for _, y in parts]),
            weight=WEIGHT if title == "weight" else None,
        )
        expected.reduced.backward()
        gradient = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        got = [rank[kind, exchange, title] for rank in ranks]
        torch.testing.assert_close(torch.cat([loss for loss, _, _ in got]), expected.loss.detach())
        for _, num_classes, rank_gradient in got:
            assert int(num_classes) == int(expected.num_classes)
            torch.testing.assert_close(rank_gradient, gradient, rtol=1e-10, atol=1e-12)


def many_classes(rank: int, kind: str) -> tuple[Tensor, Tensor]:
    """Three rows a rank, and more classes than there are rows."""
    inputs, rows = share_of(rank, kind)
    return inputs[:3], torch.cat([rows[:3], rows[3:6]], dim=1)


def many_classes_on_rank(rank: int, world_size: int) -> dict:
    results = {}
    for kind, exchange in itertools.product(KINDS, ("auto", "all-gather")):
        criterion = VarConLoss(process_group="world", exchange=exchange)
        for _ in range(2):
            results[kind, exchange] = criterion(*many_classes(rank, kind))
    late = VarConLoss(num_classes=2 * C, process_group="world")
    late(many_classes(rank, "dense")[0], torch.arange(3))
    with pytest.raises(ValueError, match=r"class probabilities follow .* choose exchange='all-red"):
        late(*many_classes(rank, "dense"))
    return results


def test_ranks_that_hold_more_classes_than_rows(tmp_path: Path) -> None:
    ranks = run_ranks(many_classes_on_rank, 2, tmp_path)
    for kind, exchange in ranks[0]:
        parts = [many_classes(rank, kind) for rank in range(2)]
        expected = varcon_loss(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))
        torch.testing.assert_close(sum(rank[kind, exchange] for rank in ranks) / 2, expected)


def memory_on_rank(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    inputs, rows = share_of(rank, "mixed")
    criterion = VarConLoss(
        num_classes=C, feature_dim=WIDTH, centroid_momentum=0.9, process_group="world"
    )
    loss = criterion(inputs, 2 * rows)  # two labels a row: shares that do not sum to 1
    return loss, criterion.centroids


def some_smoothed(rank: int, step: int) -> tuple[Tensor, Tensor]:
    """Rank 0 gives class 0 alone, rank 1 a little of every class."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    labels = torch.arange(4) * rank
    rows = hot(labels) if rank == 0 else 0.9 * hot(labels) + 0.1 / C
    return torch.randn(4, WIDTH, generator=generator, dtype=torch.float64), rows


def either_kind_on_rank(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    criterion = VarConLoss(
        num_classes=C, feature_dim=WIDTH, centroid_momentum=0.9, process_group="world"
    )
    loss = torch.zeros(())
    for step in range(3):
        inputs, rows = some_smoothed(rank, step)
        loss = criterion(inputs, rows.argmax(1) if rank == 0 else rows)
    return loss, criterion.centroids


def test_ranks_with_labels_of_either_kind_remember_the_same(tmp_path: Path) -> None:
    """Each rank may decide by itself whether it mixes."""
    criterion = VarConLoss(num_classes=C, feature_dim=WIDTH, centroid_momentum=0.9)
    expected = torch.zeros(())
    for step in range(3):
        parts = [some_smoothed(rank, step) for rank in range(2)]
        expected = criterion(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))
    got = run_ranks(either_kind_on_rank, 2, tmp_path)
    torch.testing.assert_close(sum(loss for loss, _ in got) / 2, expected)
    for _, centroids in got:
        torch.testing.assert_close(centroids, criterion.centroids)


def test_ranks_with_a_memory_divide_by_rows(tmp_path: Path) -> None:
    parts = [share_of(rank, "mixed") for rank in range(2)]
    criterion = VarConLoss(num_classes=C, feature_dim=WIDTH, centroid_momentum=0.9)
    expected = criterion(torch.cat([x for x, _ in parts]), 2 * torch.cat([y for _, y in parts]))
    got = run_ranks(memory_on_rank, 2, tmp_path)
    torch.testing.assert_close(sum(loss for loss, _ in got) / 2, expected)
    for _, centroids in got:
        torch.testing.assert_close(centroids, criterion.centroids)


BAD_LABELS = {
    "negative": (-dense(4), "got -0."),
    "integers": (hot(torch.arange(4)).long(), "cast class probabilities to float"),
    "none": (None, "labels is None"),
    "too many columns": (torch.ones(4, C + 1), f"{C + 1} classes but num_classes={C}"),
}


def failing_rank(rank: int, world_size: int) -> dict:
    errors = {}
    for num_classes, title in itertools.product((None, C), BAD_LABELS):
        if title == "too many columns" and num_classes is None:
            continue
        criterion = VarConLoss(num_classes=num_classes, process_group="world")
        criterion(torch.randn(4, 5), dense(4))
        labels = BAD_LABELS[title][0] if rank == 1 else dense(4)
        try:
            criterion(torch.randn(4, 5), labels)
        except (RuntimeError, TypeError, ValueError) as error:
            errors[num_classes, title] = str(error)
        # Nobody is out of step.
        criterion(torch.randn(4, 5), dense(4))
    return errors


def test_bad_labels_on_one_rank_are_an_error_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(failing_rank, 2, tmp_path, seconds=40)
    assert len(first) == len(second) == 7
    for (num_classes, title), error in second.items():
        assert "failed on rank 1" in first[num_classes, title]
        assert BAD_LABELS[title][1] in error


@by_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("label_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(kind: str, dtype: torch.dtype, label_dtype: torch.dtype) -> None:
    features = torch.randn(20, 8).to(dtype).requires_grad_()
    rows = KINDS[kind](20, dtype=label_dtype)
    loss = varcon_loss(features, rows)
    (gradient,) = torch.autograd.grad(loss, features)
    exact = features.detach().double().requires_grad_()
    expected = varcon_loss(exact, rows.double())
    (exact_gradient,) = torch.autograd.grad(expected, exact)
    assert (loss.dtype, gradient.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)
    error = (gradient.double() - exact_gradient).norm() / exact_gradient.norm()
    assert float(error) < max(4 * torch.finfo(dtype).eps, 2e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(varcon_loss(features, rows), loss)


@pytest.mark.parametrize("title", ["plain", "as they are", "weight, none"])
def test_full_graph(title: str, impl: str) -> None:
    torch._dynamo.reset()
    criterion = VarConLoss(**OPTIONS[title], impl=impl)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    for kind in KINDS.values():
        features = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
        expected, got = criterion(features, kind(20)), compiled(features, kind(20))
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            torch.autograd.grad(got.sum(), features), torch.autograd.grad(expected.sum(), features)
        )
    torch._dynamo.reset()


def test_a_compiled_batch_may_be_empty(impl: str) -> None:
    torch._dynamo.reset()
    features = torch.randn(0, 6, requires_grad=True)
    compiled = torch.compile(VarConLoss(impl=impl), fullgraph=True, backend="aot_eager")
    loss = compiled(features, torch.zeros(0, C))
    assert float(loss.detach()) == 0
    assert torch.autograd.grad(loss, features)[0].shape == (0, 6)
    torch._dynamo.reset()


def test_memory_and_reference_sets_compile() -> None:
    torch._dynamo.reset()
    features, rows = torch.randn(20, 6, dtype=torch.float64, requires_grad=True), mixed(20)
    options = {"num_classes": C, "feature_dim": 6, "centroid_momentum": 0.9}
    criterion, twin = VarConLoss(**options), VarConLoss(**options)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(features, rows), criterion(features, rows))
    torch.testing.assert_close(twin.centroids, criterion.centroids)
    reference = {"ref_features": torch.randn(30, 6), "ref_labels": torch.arange(30) % C}
    plain = VarConLoss(num_classes=C)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(features, rows, **reference), plain(features, rows, **reference)
    )
    torch._dynamo.reset()


def test_exports_with_a_dynamic_batch() -> None:
    criterion, batch = VarConLoss(), torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(
        criterion, (torch.randn(8, 6), dense(8).float()), dynamic_shapes=({0: batch}, {0: batch})
    ).module()
    for num_rows in (5, 20):
        given = (torch.randn(num_rows, 6), dense(num_rows).float())
        torch.testing.assert_close(exported(*given), criterion(*given))


@by_kind
def test_labels_may_be_reused_before_backward(kind: str) -> None:
    features, rows = torch.randn(20, 6, requires_grad=True), KINDS[kind](20)
    (expected,) = torch.autograd.grad(varcon_loss(features, rows), features)
    loss = varcon_loss(features, rows)
    rows.zero_()
    assert torch.equal(torch.autograd.grad(loss, features)[0], expected)


@by_kind
def test_what_was_made_in_inference_mode(kind: str, impl: str) -> None:
    """As a teacher makes labels."""
    features = torch.randn(20, 6, requires_grad=True)
    with torch.inference_mode():
        rows, weight = KINDS[kind](20), WEIGHT.float()
        assert rows.is_inference()
    for options in ({}, {"weight": weight}):
        got = varcon_loss(features, rows, impl=impl, **options)
        want = varcon_loss(
            features, rows.clone(), impl=impl, **{name: x.clone() for name, x in options.items()}
        )
        assert torch.equal(
            torch.autograd.grad(got, features)[0], torch.autograd.grad(want, features)[0]
        )


@by_kind
@pytest.mark.parametrize("remembers", [False, True])
def test_class_weights_may_change_before_backward(kind: str, remembers: bool) -> None:
    features, rows = torch.randn(20, 6, requires_grad=True), KINDS[kind](20)
    rows[:, -1] = rows.amax(1)  # every class is there
    memory = {"feature_dim": 6, "centroid_momentum": 0.0} if remembers else {}
    criterion = VarConLoss(weight=WEIGHT.float(), **memory)
    (expected,) = torch.autograd.grad(criterion(features, rows), features)
    loss = criterion(features, rows)
    assert criterion.weight is not None
    criterion.weight.mul_(torch.arange(C))
    assert torch.equal(torch.autograd.grad(loss, features)[0], expected)


@pytest.mark.parametrize(
    ("labels", "options", "error", "message"),
    [
        (-dense(6), {}, ValueError, "labels as class probabilities must be finite and at least 0"),
        (dense(6) * torch.nan, {}, ValueError, "got nan for sample 0 and class 0"),
        (dense(6), {"num_classes": 9}, ValueError, "have 7 classes but num_classes=9"),
        (dense(6), {"weight": torch.ones(5)}, ValueError, "have 7 classes but num_classes=5"),
        (hot(torch.arange(6)).long(), {}, TypeError, r"cast class probabilities to float"),
        (dense(6)[:, :0], {}, ValueError, "have no classes"),
        (
            torch.arange(6.0).view(6, 1),
            {},
            ValueError,
            r"labels \[6, 1\] have one class.*labels.squeeze\(1\).long\(\)",
        ),
        (mixed(6).to_sparse(), {}, TypeError, r"must be dense.*labels.to_dense\(\)"),
        (dense(5), {}, ValueError, r"labels must have shape \[6\]"),
        (dense(6).view(6, 1, C), {}, TypeError, r"class probabilities \[6, C\]"),
        (dense(6)[:, 0], {}, TypeError, "must be integers .* or class probabilities"),
        (dense(6), {"leave_one_out": True}, ValueError, "no meaning with class probabilities"),
        (dense(6), {"impl": "triton"}, ValueError, "impl='triton' cannot run here"),
    ],
)
def test_what_cannot_be(
    labels: Tensor, options: dict, error: type[Exception], message: str
) -> None:
    features = torch.randn(6, 4)
    with pytest.raises(error, match=message):
        varcon_loss(features, labels, **options)
    with pytest.raises(error, match=message):
        VarConLoss(**options)(features, labels)


def test_one_class_where_it_is_meant() -> None:
    features, rows = torch.randn(6, 4), torch.ones(6, 1)
    for options in ({"num_classes": 1}, {"weight": torch.ones(1)}):
        assert float(varcon_loss(features, rows, **options)) == 0


def test_two_sets_that_disagree() -> None:
    with pytest.raises(ValueError, match=r"ref_labels \[6, 5\] have 5 classes but num_classes=7"):
        varcon_loss(
            torch.randn(6, 4), dense(6), ref_features=torch.randn(6, 4), ref_labels=torch.ones(6, 5)
        )
    features, labels = torch.randn(C + 1, 4), torch.arange(C + 1)
    for given, taken in (("labels", "ref_labels"), ("ref_labels", "labels")):
        both = {given: labels, taken: dense(C + 1)}
        message = rf"^{given} must lie in \[0, 7\).* got 7: give {taken} a column for each class"
        with pytest.raises(ValueError, match=message):
            varcon_loss(features, ref_features=features, **both)


def test_rows_of_zeros_and_classes_that_nobody_has() -> None:
    features = torch.randn(6, 4, requires_grad=True)
    with torch.no_grad():
        features[1] = torch.nan
    rows = hot(torch.tensor([0, -100, 2, 0, 2, 5]))
    terms = varcon_terms(features, rows)
    (gradient,) = torch.autograd.grad(terms.reduced, features)
    assert terms.valid.tolist() == [True, False, True, True, True, True]
    assert int(terms.num_classes) == 3
    assert gradient[1].eq(0).all()
    assert gradient.isfinite().all()
    nothing = varcon_loss(features, torch.zeros(6, C))
    assert float(nothing.detach()) == 0
    assert torch.autograd.grad(nothing, features)[0].eq(0).all()
    empty = features[:0]
    assert float(varcon_loss(empty, rows[:0])) == 0
