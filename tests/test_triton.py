"""The Triton kernels against the equations: interpreted on a CPU, compiled on a GPU.

The interpreter multiplies bfloat16 operands upcast to float32: true bfloat16 products are proven
only on a GPU.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from tests import blind
from tests.conftest import same_step
from varcon_loss import VarConLoss, fused, varcon_loss, varcon_terms
from varcon_loss.equations import sweep_by_equations

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 2.0**-23


@pytest.fixture(autouse=True)
def only_what_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as NaN, and interpreted kernels may touch nothing but their tensors."""
    make = Tensor.new_empty

    def new_nan(self: Tensor, *size: Any, **options: Any) -> Tensor:
        made = make(self, *size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", new_nan)
    if DEVICE == "cuda":
        return
    from triton.runtime.interpreter import InterpreterBuilder

    ours: list[tuple[int, int]] = []
    launch = fused._launch

    def watched(*given: Any, **arguments: Any) -> None:
        tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
        assert all(tensor.is_contiguous() for tensor in tensors)
        ours[:] = [(x.data_ptr(), x.data_ptr() + x.numel() * x.itemsize) for x in tensors]
        launch(*given, **arguments)

    def checked(name: str, at: int) -> None:
        original = getattr(InterpreterBuilder, name)

        def access(self: Any, pointers: Any, *others: Any) -> Any:
            addresses = torch.from_numpy(pointers.data[others[at].data].astype("int64"))
            inside = [(addresses >= first) & (addresses < last) for first, last in ours]
            assert torch.stack(inside).any(0).all(), "out of bounds"
            return original(self, pointers, *others)

        monkeypatch.setattr(InterpreterBuilder, name, access)

    checked("create_masked_load", 0)
    checked("create_masked_store", 1)
    monkeypatch.setattr(fused, "_launch", watched)


def rows(num_rows: int, dim: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Float32 unit rows that ``dtype`` can express, but for the last digits of their lengths."""
    made = torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed))
    return F.normalize(made, dim=1).to(dtype).float().to(DEVICE)


def slots_of(num_rows: int, size: int) -> Tensor:
    return torch.randint(size, (num_rows, 1), generator=torch.Generator().manual_seed(2)).to(DEVICE)


def check_sweep(
    num_rows: int, size: int, dim: int, operands: torch.dtype = torch.float32,
    temperature: float = 0.1, epsilon: float = 0.02, *, length: float | None = None,
    gaps: bool = False, with_own: bool = False,
) -> None:  # fmt: skip
    """Loss, terms and gradient against the equations in float64.

    The operands hold ``z`` and ``w`` exactly. Half ones round the weights of the second product,
    which add up to at most the slope: 2, and what comes by tau2.

    Args:
        num_rows: N.
        size: S.
        dim: D.
        operands: dtype of the products' operands.
        temperature: tau1.
        epsilon: of Eq. 13.
        length: a power of two, of the rows; None: unit rows, whose gradient is projected.
        gaps: only the classes of samples are present, all in the upper half.
        with_own: a centroid for each sample.
    """
    z, w = rows(num_rows, dim, 0, operands), rows(size, dim, 1, operands)
    first, present = size // 2 if gaps else 0, None
    slots = first + slots_of(num_rows, size - first)
    if num_rows > 1 and size > 1:  # as wrong as can be: the largest of all logits
        z[0], slots[0] = w[-1], first
    unit, z = length is None, z * (length or 1.0)
    if gaps:
        present = torch.zeros(size, dtype=torch.bool, device=DEVICE)
        present[slots] = True
        w = w * present.unsqueeze(1)
    own = rows(num_rows, dim, 3) if with_own else None
    table = (slots, None, own, temperature, epsilon)
    loss, terms, gradient = fused.sweep(z, w, present, *table, unit, True, True, operands)

    exact = z.double().requires_grad_()
    table = (slots, None, None if own is None else own.double(), temperature, epsilon)
    expected, expected_terms = sweep_by_equations(exact, w.double(), present, *table)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    if unit:
        along = (expected_gradient * exact).sum(1, keepdim=True)
        expected_gradient = expected_gradient - along * exact.detach()
    assert (loss.dtype, gradient.dtype) == (torch.float32, torch.float32)
    tolerance = {"rtol": 1e-5, "atol": 4 * EPS * (1 + (length or 1.0) / temperature)}
    tolerance["check_dtype"] = False
    torch.testing.assert_close(loss, expected.detach(), **tolerance)
    torch.testing.assert_close(terms, expected_terms, **tolerance)
    # The slopes add up to 2 and what comes by tau2; float32 rounds the logits.
    roundoff = 0.0 if operands == torch.float32 else torch.finfo(operands).eps / 2
    most = 3 * (roundoff + 4 * EPS * (length or 1.0) / temperature) / temperature
    assert ((gradient - expected_gradient).norm(dim=1) <= most).all()


@pytest.mark.parametrize("num_rows", [0, 1, 17, 130])
@pytest.mark.parametrize(("size", "dim"), [(1, 1), (2, 3), (33, 16), (7, 65), (140, 129)])
def test_odd_shapes(num_rows: int, size: int, dim: int) -> None:
    check_sweep(num_rows, size, dim)


@pytest.mark.parametrize("operands", fused.DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        {}, {"gaps": True}, {"with_own": True}, {"gaps": True, "with_own": True, "length": 0.25},
        {"length": 8.0}, {"temperature": 0.05}, {"temperature": 0.01, "epsilon": 0.005},
        {"temperature": 1.5, "epsilon": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_every_dtype_and_option(operands: torch.dtype, case: dict) -> None:
    check_sweep(37, 140, 24, operands, **case)


@pytest.mark.parametrize("operands", [torch.bfloat16, torch.float16])
def test_the_own_class_is_not_rounded(operands: torch.dtype) -> None:
    """Rows that the operands cannot express: others' logits move by two roundings, at most."""
    z, w, slots = rows(40, 24, 0), rows(30, 24, 1), slots_of(40, 30)
    z = F.normalize(z + 3 * w[slots.flatten()], dim=1)
    given = (z, w, None, slots, None, None, 0.1, 0.02)
    loss, terms, _ = fused.sweep(*given, True, False, True, operands)
    expected, expected_terms = sweep_by_equations(*given)
    roundoff = torch.finfo(operands).eps / 2
    # -log p = log(1 + sum of the others): relative to their share of the probability.
    moved = 2 * roundoff / 0.1 * (1 - expected_terms[2]) + 40 * EPS
    assert ((terms[1] - expected_terms[1]).abs() <= moved).all()
    torch.testing.assert_close(loss, expected, rtol=0, atol=4 * roundoff / 0.1)


@pytest.mark.parametrize("operands", fused.DTYPES)
@pytest.mark.parametrize("temperature", [0.05, 0.1])
def test_confident_rows_keep_their_digits(temperature: float, operands: torch.dtype) -> None:
    """What is left of the NLL and of the gradient is right, relative to itself."""
    z = torch.eye(8, device=DEVICE)
    w = F.normalize(z - 0.25, dim=1).to(operands).float()
    table = (torch.arange(8, device=DEVICE).unsqueeze(1), None, None, temperature, 0.0)
    _, terms, gradient = fused.sweep(z, w, None, *table, True, True, True, operands)
    exact = z.double().requires_grad_()
    expected, expected_terms = sweep_by_equations(exact, w.double(), None, *table)
    (wanted,) = torch.autograd.grad(expected.sum(), exact)
    wanted = wanted - (wanted * exact.detach()).sum(1, keepdim=True) * exact.detach()
    assert terms[2].gt(0.999).all()
    logits = 8 * EPS / temperature
    torch.testing.assert_close(terms[1], expected_terms[1].float(), rtol=logits, atol=0)
    roundoff, size = max(torch.finfo(operands).eps, logits), float(wanted.abs().max())
    assert 1e-12 < size < 1e-2
    torch.testing.assert_close(gradient, wanted.float(), rtol=roundoff, atol=roundoff * size)


def test_forward_alone_and_tensors_of_any_layout() -> None:
    z, w, slots, own = rows(20, 8, 0), rows(6, 8, 1), slots_of(20, 6), rows(20, 8, 3)
    rest = (None, 0.1, 0.02, True)
    present = torch.ones(6, dtype=torch.bool, device=DEVICE)

    def strided(x: Tensor) -> Tensor:
        return torch.stack((x, x), dim=-1)[..., 0]

    expected = fused.sweep(z, w, present, slots, None, own, *rest[1:], True, True, torch.float32)
    tensors = (strided(z), strided(w), strided(present), strided(slots), None, strided(own))
    got = fused.sweep(*tensors, *rest[1:], True, True, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    loss, terms, gradient = fused.sweep(*tensors, *rest[1:], False, False, torch.float32)
    assert torch.equal(loss, expected[0])
    assert (terms.shape, gradient.shape) == ((4, 0), (0,))
    sums = fused.class_sums(z, slots[:, 0], 6)
    assert torch.equal(fused.class_sums(tensors[0], tensors[3][:, 0], 6), sums)


@pytest.mark.parametrize("long_run", [8, 512])
@pytest.mark.parametrize("sizes", [(0,), (1,), (0, 3, 0, 0), (64, 64), (63, 1, 0, 129), (1,) * 70])
def test_class_sums(sizes: tuple[int, ...], long_run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that start and end anywhere; two runs give the same bits."""
    monkeypatch.setattr(fused, "LONG_RUN", long_run)
    slots = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    slots = slots[torch.randperm(len(slots), generator=torch.Generator().manual_seed(0))].to(DEVICE)
    z = torch.randn(len(slots), 5, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    sums = fused.class_sums(z, slots, len(sizes))
    expected = torch.zeros(len(sizes), 5, dtype=torch.float64, device=DEVICE)
    expected.index_add_(0, slots, z.double())
    torch.testing.assert_close(sums, expected.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(fused.class_sums(z, slots, len(sizes)), sums)


def batch(
    num_rows: int, num_classes: int, dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(num_rows, dim, generator=generator) * 3
    labels = torch.randint(num_classes, (num_rows,), generator=generator)
    return features.to(DEVICE, dtype), labels.to(DEVICE)


def compare(features: Tensor, labels: Tensor, **options: Any) -> None:
    """What a user gets from the kernels and from the equations, under a random upstream."""
    results, inputs = [], {k: options.pop(k) for k in list(options) if k.startswith("ref_")}
    for impl in ("reference", "triton"):
        anchors = features.clone().requires_grad_()
        criterion = VarConLoss(**options, impl=impl).to(DEVICE)
        for _ in range(2 if "feature_dim" in options else 1):
            terms = criterion.terms(anchors, labels, **inputs)
        assert terms.impl == impl
        generator = torch.Generator().manual_seed(1)
        upstream = torch.randn(terms.reduced.shape, generator=generator).to(DEVICE)
        (gradient,) = torch.autograd.grad(terms.reduced, anchors, upstream)
        assert gradient.dtype == features.dtype
        results.append([*terms[:-1], gradient])
    for expected, got in zip(*results, strict=True):
        size = float(expected.detach().float().abs().max().clamp_min(1))
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6 * size)


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 40}, {"ignore_index": 3, "weight": torch.linspace(0, 2, 12)},
        {"leave_one_out": True}, {"leave_one_out": True, "num_classes": 15},
        {"normalize": False, "reduction": "sum"},
        {"reduction": "none", "temperature": 0.02, "epsilon": 0.01},
        {"num_classes": 14, "feature_dim": 20, "centroid_momentum": 0.9},
    ],
    ids=str,
)  # fmt: skip
def test_options(options: dict) -> None:
    features, labels = batch(50, 12, 20)
    if not options.get("normalize", True):
        features = features / 10
    compare(features, labels, **options)


def test_reference_sets_views_and_strides() -> None:
    features, labels = batch(20, 4, 24)
    compare(features, labels, ref_features=2 * features.flip(0), ref_labels=labels.flip(0))
    compare(features.view(20, 2, 12), labels)
    compare(features.T.contiguous().T, labels.repeat_interleave(2)[::2])


@pytest.mark.parametrize("num_classes", [3, None])
def test_as_on_a_gpu(num_classes: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where values may not be looked at: bad labels are NaN, and the rest as ever."""
    blind.look_at_nothing(monkeypatch.setattr)
    features, labels = batch(20, 3, 8)
    labels[3] = -100
    compare(features, labels, num_classes=num_classes)
    compare(features, labels, num_classes=num_classes, leave_one_out=True)
    if num_classes is None:
        return
    labels[5] = 2**40
    terms = varcon_terms(features.requires_grad_(), labels, num_classes=3, impl="triton")
    (gradient,) = torch.autograd.grad(terms.reduced, features)
    assert terms.reduced.isnan()
    assert terms.loss.isnan().nonzero().flatten().tolist() == [5]
    assert gradient[5].eq(0).all()
    assert gradient.isfinite().all()


def test_second_derivatives_are_those_of_the_equations() -> None:
    features, labels = batch(13, 4, 8)
    labels[::4] = -100
    found = []
    for impl in ("reference", "triton"):
        anchors = features.clone().requires_grad_()
        loss = varcon_loss(anchors, labels, 0.5, epsilon=0.2, impl=impl)
        (gradient,) = torch.autograd.grad(loss, anchors, create_graph=True)
        found.append(torch.autograd.grad(loss + gradient.square().sum(), anchors)[0])
    torch.testing.assert_close(found[1], found[0], rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("num_classes", [5, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_as_one_graph(num_classes: int | None, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    criterion = VarConLoss(num_classes=num_classes, impl="triton")
    compiled = torch.compile(criterion, fullgraph=num_classes is not None, backend="aot_eager")
    features, labels = batch(24, 5, 16, dtype)
    features.requires_grad_()
    same_step(compiled(features, labels), criterion(features, labels), features)


def test_float64_is_an_error_and_wide_rows_too() -> None:
    labels = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="float64"):
        varcon_loss(torch.ones(4, 3, device=DEVICE).double(), labels, impl="triton")
    wide = torch.ones(4, fused.LARGEST_DIM + 1, device=DEVICE)
    with pytest.raises(ValueError, match="width 1025"):
        varcon_loss(wide, labels, impl="triton")
    assert varcon_terms(wide, labels).impl == "eager"
