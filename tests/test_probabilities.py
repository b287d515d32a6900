"""Class probabilities as labels: values, gradients, options, memory, ranks, compilers and errors.

Few shares a row are kept one by one, many are swept as a full table: at most 8 of C = 36 classes,
none but one-hot rows of C = 7. Nothing that a user sees may depend on it.
"""

import itertools
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from benchmarks.common.ranks import run_ranks
from tests import oracle_soft_labels as oracle
from tests.blind import look_at_nothing
from tests.conftest import IMPLEMENTATIONS
from tests.counting import LargestWritten
from varcon_loss import VarConLoss, VarConTerms, varcon_terms
from varcon_loss import varcon_loss as loss_of
from varcon_loss.equations import sweep_by_equations
from varcon_loss.sweep import sweep

F64 = torch.float64
KINDS = ("one-hot", "mixed", "eight", "nine", "smoothed", "dense")
CONFIDENT = ("integers", "one-hot", "smoothed", "uneven", "mixed", "between", "barely mixed")
by_kind = pytest.mark.parametrize("kind", KINDS)
by_width = pytest.mark.parametrize("num_classes", [7, 36])
by_weight = pytest.mark.parametrize("weighted", [False, True])


def rows_of(kind: str, num_rows: int, num_classes: int = 36, seed: int = 0) -> Tensor:
    """``[N, C]``: no label in the middle row, nobody in the last class; or all entries positive."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_rows, num_classes, generator=generator, dtype=F64)
    if kind == "dense":
        return (5 * scores).softmax(1)
    others = max(1, num_classes - 1)
    most = min(others, {"one-hot": 1, "eight": 8, "nine": 9}.get(kind, 2))
    classes = scores[:, :others].topk(most).indices
    shares = torch.rand(num_rows, most, generator=generator, dtype=F64) + 0.05
    rows = torch.zeros_like(scores).scatter_(1, classes, shares / shares.sum(1, keepdim=True))
    rows[num_rows // 2 : num_rows // 2 + 1] = 0.0
    return 0.9 * rows + 0.1 / num_classes if kind == "smoothed" else rows


def hot(labels: Tensor, num_classes: int = 36, dtype: torch.dtype = F64) -> Tensor:
    return F.one_hot(labels, num_classes).to(dtype)


def batch(num_rows: int, dim: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(num_rows, dim, generator=generator, dtype=F64).requires_grad_()


def weights_of(num_classes: int, seed: int = 0) -> Tensor:
    """One of them is zero."""
    weight = 3 * torch.rand(num_classes, generator=torch.Generator().manual_seed(seed), dtype=F64)
    weight[num_classes // 2] = 0.0
    return weight


def memory_of(num_classes: int, width: int = 6, **options: object) -> VarConLoss:
    memory = {"num_classes": num_classes, "feature_dim": width, "centroid_momentum": 0.9}
    return VarConLoss(**memory, **options)


def gradient_of(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), x)[0]


def everything(terms: VarConTerms, x: Tensor) -> list[Tensor]:
    return [*(part.flatten() for part in terms[:-1]), gradient_of(terms.reduced, x)]


def same(got: object, want: object, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(KINDS), num_rows=st.integers(1, 14),
    num_classes=st.sampled_from([1, 2, 3, 7, 8, 9, 36]), views=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31), temperature=st.floats(0.02, 5.0), share=st.floats(0.0, 0.99),
    normalize=st.booleans(), weighted=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)  # fmt: skip
def test_against_scalar_loops_and_integers(
    kind, num_rows, num_classes, views, seed, temperature, share, normalize, weighted, reduction
) -> None:
    """Rows of zeros take no part, whatever their features."""
    rows, features = rows_of(kind, num_rows, num_classes, seed), batch(num_rows * views, 5, seed)
    each, weight = rows.repeat_interleave(views, 0), weights_of(num_classes, seed)
    scale, given = weight.tolist() if weighted else None, (features.tolist(), each.tolist())
    options = {"temperature": temperature, "epsilon": share * temperature, "normalize": normalize}
    loops, summed = (oracle.row_terms(*given, **options, weight=by) for by in (None, scale))
    want = {name: torch.tensor([row[name] for row in loops], dtype=F64) for name in oracle.NAMES}
    reduced, valid = torch.tensor([row["loss"] for row in summed], dtype=F64), each.sum(1) > 0
    if reduction != "none":
        total = (each @ weight).sum() if weighted else valid.sum()
        reduced = reduced.sum() / (total if reduction == "mean" and total > 0 else 1)
    options |= {"weight": weight if weighted else None, "reduction": reduction}
    options["num_classes"] = num_classes
    x = features.detach().masked_fill(~valid[:, None], torch.nan)
    x = (x if views == 1 else x.view(num_rows, views, 5)).requires_grad_()
    gradients, labels = [], rows.argmax(1).where(rows.sum(1) > 0, -100)
    alike = (rows, labels) if kind == "one-hot" else (rows,)
    for impl, y in itertools.product(IMPLEMENTATIONS, alike):
        terms = varcon_terms(x, y, impl=impl, **options)
        assert terms.loss.shape == x.shape[:-1]
        same([getattr(terms, name).flatten() for name in want], list(want.values()))
        same(terms.reduced.flatten(), reduced.flatten())
        assert torch.equal(terms.valid.flatten(), valid)
        assert int(terms.num_classes) == int((rows.sum(0) > 0).sum())
        loss = loss_of(x, y, impl=impl, **options)
        same(loss, terms.reduced)
        gradients += [gradient_of(terms.reduced, x), gradient_of(loss, x)]
    for gradient in gradients:
        same(gradient, gradients[0], rtol=1e-8, atol=1e-10 * float(gradient.abs().max() + 1))
        assert (gradient.view(-1, 5)[~valid] == 0).all()


@settings(max_examples=100, deadline=None)
@given(
    most=st.sampled_from([1, 2, 3, 8, None]), num_rows=st.integers(1, 30),
    num_classes=st.integers(1, 20), seed=st.integers(0, 2**31), temperature=st.floats(0.01, 2.0),
    share=st.floats(0.0, 0.95), unit=st.booleans(), some_empty=st.booleans(),
)  # fmt: skip
def test_equations(most, num_rows, num_classes, seed, temperature, share, unit, some_empty) -> None:
    """Shares of classes that are absent are 0, and all lie in one empty row."""
    g = torch.Generator().manual_seed(seed)
    z, w = (F.normalize(torch.randn(n, 7, generator=g, dtype=F64)) for n in (num_rows, num_classes))
    shares, slots = torch.rand(num_rows, num_classes, generator=g, dtype=F64), None
    present = torch.ones(num_classes, dtype=torch.bool)
    if some_empty:
        present = torch.rand(num_classes, generator=g) < 0.6
        present[0] = True
        w, shares = w * present[:, None], shares * present
    if most is not None:
        slots = torch.rand(shares.shape, generator=g).topk(min(most, num_classes)).indices
        shares = shares.gather(1, slots)
        slots = slots.where(present[slots], int(present.int().argmin()))
    given = (present if some_empty else None, slots, shares, None, temperature, share * temperature)
    loss, terms, gradient = sweep(z, w, *given, unit, True, True)
    x = z.clone().requires_grad_()
    exact, exact_terms = sweep_by_equations(F.normalize(x) if unit else x, w, *given)
    want = gradient_of(exact, x)
    same((loss, terms), (exact.detach(), exact_terms), atol=1e-11)
    same(gradient, want, rtol=1e-8, atol=1e-10 * float(want.abs().max() + 1))
    alone, *nothing = sweep(z, w, *given, unit, False, False)
    same(alone, loss)
    assert [part.numel() for part in nothing] == [0, 0]


@pytest.mark.parametrize("unit", [True, False], ids=["plain exp", "shifted exp"])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("kind", CONFIDENT)
def test_confident_gradients_keep_their_digits(kind: str, full: bool, unit: bool) -> None:
    """Float32 logits are off by 1e-6 of 20: nothing else is lost."""
    g = torch.Generator().manual_seed(1)
    w = torch.linalg.qr(torch.randn(64, 50, generator=g))[0].T.contiguous()
    first = torch.arange(64) % 50
    one, other = hot(first, 50, torch.float32), hot((first + 1) % 50, 50, torch.float32)
    table = {
        "smoothed": 0.999 * one + 0.001 / 50,
        "uneven": 0.999 * one + 0.001 * torch.rand(one.shape, generator=g),
        "mixed": 0.6 * one + 0.4 * other, "between": 0.6 * one + 0.4 * other,
        "barely mixed": 0.9999 * one + 0.0001 * other,
    }.get(kind, one)  # fmt: skip
    z = (0.72 * one + 0.7 * other) @ w if kind == "between" else w[first]
    z = F.normalize(z + 0.02 * torch.randn(z.shape, generator=g))
    shares, slots = table, None
    if not full:
        shares, slots = table.topk(int((table > 0).sum(1).max()))
        shares = None if kind == "integers" else shares
    loss, _, gradient = sweep(z, w, None, slots, shares, None, 0.05, 0.01, unit, True, True)
    x = z.double().requires_grad_()
    given = (w.double(), None, None, table.double(), None, 0.05, 0.01)
    exact, terms = sweep_by_equations(F.normalize(x) if unit else x, *given)
    want = gradient_of(exact, x)
    # Some rows between two classes are near their least loss, where the gradient vanishes: what it
    # is made of, numbers of 2 / temperature, keeps its digits.
    bound = 3e-6 * 2 / 0.05 if kind == "between" else 1e-5 * want.norm(dim=1)
    assert ((gradient - want).norm(dim=1) < bound).all()
    assert float(terms[2].min()) > (0.0 if "mixed" in kind or kind == "between" else 0.99)
    same(loss.double(), exact.detach(), rtol=1e-5, atol=3e-6)


@by_kind
@by_weight
@pytest.mark.parametrize("normalize", [True, False])
def test_finite_differences(kind: str, weighted: bool, normalize: bool, impl: str) -> None:
    """Centroids are constants of the loss: those of a reference set, which stays as it is."""
    for num_classes in (7, 36):
        options = {"weight": weights_of(num_classes) if weighted else None, "normalize": normalize}
        reference, rows = batch(num_classes, 4, 1).detach(), rows_of(kind, 4, num_classes)
        options |= {
            "ref_features": reference, "ref_labels": torch.arange(num_classes), "impl": impl,
        }  # fmt: skip
        x = (batch(4, 4).detach() / 2).requires_grad_()
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(lambda x, y=rows, o=options: loss_of(x, y, 0.5, epsilon=0.2, **o), (x,))


@by_kind
def test_linear_in_the_shares_and_indifferent_to_order(kind: str) -> None:
    features, reference, classes = batch(20), batch(36, seed=1).detach(), torch.arange(36)

    def run(x: Tensor, rows: Tensor, ref_labels: Tensor = classes) -> list[Tensor]:
        terms = varcon_terms(x, rows, ref_features=reference, ref_labels=ref_labels)
        return [*(part.detach() for part in terms[:5]), gradient_of(terms.loss, x)]

    one, two = rows_of(kind, 20), rows_of("mixed", 20, seed=1)
    parts = zip(run(features, one), run(features, two), strict=True)
    same(run(features, 0.3 * one + 0.6 * two), [0.3 * a + 0.6 * b for a, b in parts])
    order, names = torch.randperm(20), torch.randperm(36)
    x, renamed = features.detach()[order].requires_grad_(), torch.empty_like(one)
    renamed[:, names] = one
    same(run(x, renamed[order], names), [part[order] for part in run(features, one)])


@by_kind
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("case", [(36, 1e-3), (36, 0.005), (7, 0.1), (1023, 5.0), (40_003, 5.0)])
def test_range(kind: str, normalize: bool, case: tuple[int, float]) -> None:
    """Logits of up to 1e6, ``exp(1 / tau2)`` of up to exp(2000), q that is nearly 1 / K."""
    results, (num_classes, temperature) = [], case
    options = {"temperature": temperature, "epsilon": temperature / 2, "normalize": normalize}
    for dtype in (torch.float32, F64):
        x = (30 * batch(12).detach()).to(dtype).requires_grad_()
        terms = varcon_terms(x, rows_of(kind, 12, num_classes).float(), **options)
        assert all(part.isfinite().all() for part in terms[:5])
        results.append((terms.loss.detach(), gradient_of(terms.loss, x)))
    for got, want, most in zip(*results, (1e-5, 1e-3), strict=True):
        assert float((got - want).norm() / want.norm()) < most


@by_kind
def test_nan_shows_and_nothing_is_zero(kind: str, impl: str) -> None:
    x, rows = batch(12), rows_of(kind, 12)
    rows[7] = 0.0
    with torch.no_grad():
        x[0] = torch.nan
    terms = varcon_terms(x, rows, impl=impl)
    assert torch.equal(terms.loss.isnan(), terms.valid)
    gradient = gradient_of(terms.loss, x)
    assert torch.equal(gradient.isnan().any(1), terms.valid)
    assert (gradient[7] == 0).all()
    for some in (x, x[:0]):  # nobody has a label, nobody is there
        nothing = loss_of(some, 0 * rows[: len(some)], impl=impl)
        assert float(nothing.detach()) == 0
        assert gradient_of(nothing, x).eq(0).all()


@by_kind
@by_weight
def test_neither_chunks_nor_views_show(kind: str, weighted: bool, monkeypatch) -> None:
    x, rows, weight = batch(900), rows_of(kind, 300), weights_of(36) if weighted else None
    want = everything(varcon_terms(x.view(300, 3, 6), rows, weight=weight), x)
    monkeypatch.setattr("varcon_loss.sweep.CHUNK_CPU", 1)
    got = everything(varcon_terms(x, rows.repeat_interleave(3, 0), weight=weight), x)
    same(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["mixed", "eight", "smoothed", "dense"])
def test_no_matrix_larger_than_a_chunk_is_made(kind: str) -> None:
    x = batch(4000, 16).detach().float().requires_grad_()
    rows = rows_of(kind, 4000, 1000).float()
    with LargestWritten() as largest:
        loss_of(x, rows).backward()
    assert largest.elements <= 2**20


@by_kind
@by_width
@pytest.mark.filterwarnings("ignore:ref_labels .* look like SupCon's mask")
def test_reference_sets_of_either_kind(kind: str, num_classes: int, impl: str) -> None:
    """Clean references for mixed anchors, and the other way round."""
    x, labels, every = batch(20), torch.arange(20) % num_classes, torch.arange(num_classes)
    rows, references = rows_of(kind, 20, num_classes), batch(num_classes, seed=1).detach()

    def loss(y: Tensor, ref: Tensor, ref_features: Tensor = references) -> Tensor:
        options = {"num_classes": num_classes, "impl": impl}
        return loss_of(x, y, ref_features=ref_features, ref_labels=ref, **options)

    for y in (rows, labels, hot(labels, num_classes)):
        same(loss(y, hot(every, num_classes)), loss(y, every))
    same(loss(hot(labels, num_classes), every), loss(labels, every))
    shares = rows_of(kind, num_classes, num_classes) / 2
    shares[-1] = 1 / num_classes  # every class has a share
    same(loss(rows, shares), loss(rows, every, shares.T @ F.normalize(references)))
    with pytest.raises(ValueError, match=r"ref_labels lack label 4, 5, .*row of zeros"):
        loss(hot(torch.arange(20) % 7, num_classes), every % 4)
    for anchors in (0 * labels, hot(0 * labels, num_classes)):
        with pytest.raises(ValueError, match="ref_labels lack label 0, which labels contain"):
            loss(anchors, torch.zeros(num_classes, num_classes))


@by_width
def test_memory_learns_by_shares(num_classes: int, impl: str) -> None:
    integers, shares = (memory_of(num_classes, impl=impl) for _ in range(2))
    for step in range(4):
        x = batch(10, seed=step)
        labels = torch.randint(1 + 2 * step, (10,), generator=torch.Generator().manual_seed(step))
        rows = hot(labels, num_classes)
        got, want = everything(shares.terms(x, rows), x), everything(integers.terms(x, labels), x)
        same(got, want, rtol=1e-5, atol=1e-5)
        same(shares.centroids, integers.centroids, rtol=1e-5, atol=1e-6)
    # A class that has a quarter of a sample moves by a quarter.
    before = shares.centroids
    shares(x[:1], 0.25 * rows[:1])
    before[labels[0]].lerp_(F.normalize(x.detach())[0].float(), 0.25 * (1 - 0.9))
    same(shares.centroids, F.normalize(before), rtol=1e-5, atol=1e-6)


def test_smoothing_does_not_move_classes_that_are_absent() -> None:
    directions, criterion = torch.eye(7, 16), memory_of(7, 16)
    for step in range(200):
        labels = torch.tensor([step % 7, (step + 1) % 7]).repeat(4)
        x = directions[labels] + 0.05 * batch(8, 16, step).detach().float()
        criterion(x, 0.9 * hot(labels, 7, torch.float32) + 0.1 / 7)
    assert (criterion.centroids * directions).sum(1).min() > 0.95


@by_kind
@by_width
@by_weight
@pytest.mark.filterwarnings("ignore:samples of classes that the centroid memory has not seen")
def test_memory_drops_shares_of_classes_it_has_not_seen(kind, num_classes, weighted, impl) -> None:
    """Of eight shares about six."""
    weight = weights_of(num_classes)
    criterion = memory_of(num_classes, impl=impl, weight=weight if weighted else None)
    seen = torch.arange(num_classes) % 4 == 1
    criterion(batch(num_classes)[seen], seen.nonzero().squeeze(1))
    criterion.eval()
    x, rows = batch(30), rows_of(kind, 30, num_classes)
    got, want = criterion.terms(x, rows), criterion.terms(x, rows * seen)
    same([*got[:-2], gradient_of(got.loss, x)], [*want[:-2], gradient_of(want.loss, x)])
    assert torch.equal(got.valid, (rows * seen).sum(1) > 0)
    # The mean divides by all shares of the rows that take part.
    total, kept = ((y @ weight)[got.valid].sum() for y in (rows, rows * seen))
    same(got.reduced, want.reduced * (kept / total if weighted else 1))


SETTINGS = ("plain", "as they are", "weight", "views", "memory", "reference")
by_setting = pytest.mark.parametrize("setting", SETTINGS)


def in_setting(setting: str, num_classes: int, **options: object) -> tuple[VarConLoss, dict]:
    reference = {"ref_features": batch(72, seed=9).detach(), "ref_labels": torch.arange(72) % 7}
    if setting == "memory":
        return memory_of(num_classes, **options), {}
    if setting == "weight":
        options |= {"weight": weights_of(num_classes), "reduction": "none"}
    criterion = VarConLoss(normalize=setting != "as they are", **options)
    return criterion, reference if setting == "reference" else {}


@pytest.mark.parametrize("how", ["blind", "one graph"])
@by_setting
def test_where_values_are_not_read(how: str, setting: str, impl: str, monkeypatch) -> None:
    """As on an accelerator, and in one graph."""
    results, views = [], 2 if setting == "views" else 1
    for looks in (True, False):
        criterion, reference = in_setting(setting, 7, impl=impl)
        call = criterion.terms
        if not looks and how == "blind":
            look_at_nothing(monkeypatch.setattr)
        elif not looks:
            torch._dynamo.reset()
            call = torch.compile(call, fullgraph=True, backend="aot_eager")
        for kind, num_rows in (("mixed", 15), ("one-hot", 12), ("dense", 15), ("dense", 0)):
            x, rows = batch(num_rows * views), rows_of(kind, num_rows, 7)
            terms = call(x.view(num_rows, 2, 6) if views == 2 else x, rows, **reference)
            results.append((everything(terms, x), getattr(criterion, "centroids", x)))
    # The memory is float32.
    same(results[4:], results[:4], *((1e-4, 1e-5) if setting == "memory" else (1e-8, 1e-10)))


@by_kind
@pytest.mark.parametrize("bad", [-0.5, float("nan"), float("inf")])
def test_bad_entries_where_none_is_read(kind: str, bad: float, impl: str, monkeypatch) -> None:
    look_at_nothing(monkeypatch.setattr)
    x, rows = batch(12), rows_of(kind, 12)
    twice = varcon_terms(x, 2 * rows, impl=impl)  # two samples a row, and no error
    same(twice.loss, 2 * varcon_terms(x, rows, impl=impl).loss)
    criterion, spoilt = memory_of(36, impl=impl), rows.clone()
    criterion(x, rows)
    before, spoilt[2, 5] = criterion.centroids, bad
    assert loss_of(x, spoilt, impl=impl).isnan()
    assert criterion(x, spoilt).isnan()
    assert torch.equal(criterion.centroids, before)
    reference = {"ref_features": batch(36).detach(), "ref_labels": torch.eye(36), "impl": impl}
    of_row = varcon_terms(x, spoilt, **reference).loss
    assert of_row.isnan().nonzero().flatten().tolist() == [2]
    reference["ref_labels"][:, 3] = 0  # some anchors lack their class
    assert torch.equal(varcon_terms(x, rows, **reference).loss.isnan(), rows[:, 3] > 0)
    reference["ref_labels"][3, 4] = bad
    assert loss_of(x, rows, **reference).isnan()


@by_setting
def test_nothing_waits_for_a_device(setting: str, impl: str) -> None:
    """On the meta device tensors have no values, and reading one raises."""
    criterion, reference = in_setting(setting, 7, impl=impl)
    x = torch.empty(12, 6, device="meta", requires_grad=True)
    given = x.view(6, 2, 6) if setting == "views" else x
    reference = {name: tensor.to("meta") for name, tensor in reference.items()}
    rows = torch.empty(len(given), 7, device="meta")
    terms = criterion.to("meta").terms(given, rows, **reference)
    assert gradient_of(terms.reduced, x).shape == (12, 6)


@by_setting
@torch.no_grad()
def test_exports_with_a_dynamic_batch(setting: str) -> None:
    """Of C rows too, and of more than a float32 sum takes."""
    (criterion, reference), size = in_setting(setting, 7), torch.export.Dim("B", min=2)
    criterion.eval()
    if setting == "memory":
        criterion.centroids = batch(7)
    shape = (2, 6) if setting == "views" else (6,)
    sizes = {"features": {0: size}, "labels": {0: size}, **dict.fromkeys(reference)}
    given = torch.randn(8, *shape), rows_of("dense", 8, 7).float()
    exported = torch.export.export(criterion, given, reference, dynamic_shapes=sizes).module()
    for num_rows in (5, 7, 9000):
        given = torch.randn(num_rows, *shape), rows_of("mixed", num_rows, 7).float()
        same(exported(*given, **reference), criterion(*given, **reference), 1e-5, 1e-5)


@by_kind
@pytest.mark.parametrize("memory", [False, True])
def test_what_changes_before_backward(kind: str, memory: bool, impl: str) -> None:
    """Labels are reused, weights are scheduled, and a teacher makes both in inference mode."""
    made = [memory_of(36, impl=impl) if memory else VarConLoss(impl=impl) for _ in range(3)]
    x, rows = batch(20), rows_of(kind, 20)
    rows[:, -1] = rows.amax(1) / 2  # every class may be there
    losses = []
    for criterion in made:
        with torch.inference_mode(criterion is made[2]):
            given, criterion.weight = rows.clone(), weights_of(36)
        losses.append(criterion(x, given))
        if criterion is made[1]:
            given.zero_()
            criterion.weight.mul_(torch.arange(36))
    want, *got = (gradient_of(loss, x) for loss in losses)
    assert all(torch.equal(gradient, want) for gradient in got)


@by_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("label_dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_dtypes(kind: str, dtype: torch.dtype, label_dtype: torch.dtype) -> None:
    x, rows = batch(20).detach().to(dtype).requires_grad_(), rows_of(kind, 20).to(label_dtype)
    exact = x.detach().double().requires_grad_()
    loss, want = loss_of(x, rows), loss_of(exact, rows.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(loss_of(x, rows), loss)
    same(loss, want.float(), rtol=1e-5, atol=1e-6)
    gradient, want = gradient_of(loss, x), gradient_of(want, exact)
    assert gradient.dtype == dtype
    assert float((gradient - want).norm() / want.norm()) < max(4 * torch.finfo(dtype).eps, 2e-6)


CASES = list(itertools.product(KINDS, (7, 36), (False, True)))


def part_of(rank: int, kind: str, num_classes: int, step: int = 0) -> tuple[Tensor, Tensor]:
    num_rows = 9 - 2 * rank
    x, rows = batch(num_rows, seed=10 * step + rank), rows_of(kind, num_rows, num_classes, step)
    if kind == "one-hot or smoothed":  # rank 0 smooths from the third step on, others but then
        smooths = step >= 2 if rank == 0 else step != 2
        rows = rows_of("smoothed", num_rows, num_classes, step)
        rows = rows if smooths else hot(rows.argmax(1), num_classes)
    return x, rows


def projected(x: Tensor, rows: Tensor, **options: object) -> list[Tensor]:
    """A step of a linear layer. Rows sum to a half: a mean divides by rows, or by weights."""
    p = batch(6, 4, seed=50)
    terms = VarConLoss(**options).terms(x.detach() @ p, rows / 2)
    return [*(part.detach() for part in terms[:-1]), gradient_of(terms.reduced, p)]


def on_rank(rank: int, world_size: int) -> dict:
    results, world = {}, {"process_group": "world"}
    for kind, num_classes, weighted in CASES:
        given, weight = part_of(rank, kind, num_classes), weights_of(num_classes)
        options = world | {"weight": weight if weighted else None}
        results[kind, num_classes, weighted] = projected(*given, **options)
    for num_classes in (7, 36):
        criterion = memory_of(num_classes, **world)
        for step in range(4):
            x, rows = part_of(rank, "one-hot or smoothed", num_classes, step)
            loss = criterion(x, rows.argmax(1) if rows.amax() == 1 else rows)
        results[num_classes] = [loss.detach(), criterion.centroids]
    late = VarConLoss(num_classes=36, **world)
    late(batch(4), torch.arange(4))
    with pytest.raises(ValueError, match="with class probabilities where some batches have them"):
        late(batch(4), rows_of("dense", 4))
    look_at_nothing()
    criterion, (x, rows) = memory_of(36, **world), part_of(rank, "eight", 36)
    criterion(x, rows)
    before, rows[0, 0] = criterion.centroids, -0.5 if rank == 1 else 0.5
    assert criterion(x, rows).isnan()
    assert torch.equal(criterion.centroids, before)
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_are_one_process_on_the_concatenated_batch(world_size: int, tmp_path: Path) -> None:
    """With more classes than samples and with fewer; and each rank chooses its kind of labels."""
    ranks = run_ranks(on_rank, world_size, tmp_path, seconds=40)

    def whole(*given: object) -> list[Tensor]:
        parts = [part_of(rank, *given) for rank in range(world_size)]
        return [torch.cat(side) for side in zip(*parts, strict=True)]

    for kind, num_classes, weighted in CASES:
        weight = weights_of(num_classes) if weighted else None
        want = projected(*whole(kind, num_classes), weight=weight)
        got = list(zip(*(rank[kind, num_classes, weighted] for rank in ranks), strict=True))
        same([torch.cat(part) for part in got[:6]], want[:6])
        same(list(got[6]), [want[6]] * world_size)
        same([sum(part) / world_size for part in got[7:]], want[7:])
    for num_classes in (7, 36):
        criterion = memory_of(num_classes)
        for step in range(4):
            want = criterion(*whole("one-hot or smoothed", num_classes, step))
        losses, centroids = zip(*(rank[num_classes] for rank in ranks), strict=True)
        same(sum(losses) / world_size, want.detach(), 1e-5, 1e-6)
        same(list(centroids), [criterion.centroids] * world_size, 1e-5, 1e-6)


ROWS = rows_of("dense", 6, 7)


@pytest.mark.parametrize(
    ("labels", "options", "error", "message"),
    [
        (-ROWS, {}, ValueError, "class probabilities, from 0 to 1, got -0.* sample 0 and class 0"),
        (ROWS * torch.nan, {}, ValueError, "got nan for sample 0 and class 0"),
        (1.03 * torch.eye(6, 7), {}, ValueError, r"got 1\.029.*sample 0 .*labels.long\(\)"),
        (torch.arange(12.0).view(6, 2), {}, ValueError, "got 2.0 for sample 1 and class 0"),
        (ROWS, {"num_classes": 9}, ValueError, "have 7 classes but num_classes=9"),
        (ROWS.bool().long(), {}, TypeError, r"are neither class numbers.*\.float\(\)"),
        (ROWS[:, :0], {}, ValueError, "have no classes"),
        (torch.arange(6.0).view(6, 1), {}, ValueError, r"have one class.*labels.squeeze\(1\).long"),
        (ROWS.to_sparse(), {}, TypeError, r"must be dense.*labels.to_dense\(\)"),
        (ROWS.view(6, 1, 7), {}, TypeError, r"labels \[6, 1, 7\] .* are neither class numbers"),
        (ROWS[:, 0], {}, TypeError, "must be integers .* or class probabilities"),
        (ROWS, {"leave_one_out": True}, ValueError, "no meaning with class probabilities"),
        (ROWS, {"impl": "triton"}, ValueError, "impl='triton' cannot run here"),
    ],
)
def test_bad_input(labels: Tensor, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        loss_of(batch(6), labels, **options)
    with pytest.raises(error, match=message):
        VarConLoss(**options)(batch(6), labels)


def test_two_sets_that_disagree() -> None:
    x, numbers, rows = batch(8), torch.arange(8), rows_of("dense", 8, 7)
    for labels, ref_labels, message in (
        (rows, torch.ones(8, 5), r"ref_labels \[8, 5\] have 5 classes but num_classes=7"),
        (
            numbers, 3 * torch.ones(8, 8),
            "ref_labels .*from 0 to 1, got 3.0 for sample 0 and class 0",
        ),
        (numbers, rows, r"labels must lie in \[0, 7\).* got 7: give ref_labels a column"),
        (rows, numbers, r"ref_labels must lie in \[0, 7\).* got 7: give labels a column"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{message}"):
            loss_of(x, labels, ref_features=x.detach(), ref_labels=ref_labels)


def test_rounded_and_single_probabilities_are_allowed() -> None:
    x = batch(6)
    # Two shares in bfloat16 may add up to more than 1.
    assert loss_of(x, 1.015 * hot(torch.arange(6) % 3)).isfinite()
    for options in ({"num_classes": 1}, {"weight": torch.ones(1)}):
        assert float(loss_of(x, torch.ones(6, 1), **options).detach()) == 0


def test_a_class_that_is_opposite_to_all_others_at_a_low_temperature() -> None:
    """The odds against it, a sum of exponentials over the smallest, pass float32's range."""
    rows, classes, temperature = 40, 40_000, 0.0251
    x = torch.zeros(rows, 4)
    x[:, 0] = 1.0
    x[0, 0] = -1.0
    shares = torch.full((rows, classes), 0.1 / classes)
    shares[torch.arange(rows), torch.arange(rows)] += 0.9
    options = {"temperature": temperature, "epsilon": temperature / 5}
    got = loss_of(x, shares, **options)
    want = loss_of(x.double(), shares.double(), **options)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
