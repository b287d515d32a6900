"""Chunks whose losses add up to the batch's: exact against one batch, under every option."""

import copy
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common.ranks import run_ranks
from tests.counting import Operators
from varcon_loss import LargeBatch, VarConLoss, backward_in_chunks

NUM_CLASSES, WIDTH, DIM = 6, 9, 5
EXACT = {"rtol": 1e-9, "atol": 1e-12}
WEIGHT = torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0, 1.0], dtype=torch.float64)
MEMORY = {"num_classes": NUM_CLASSES, "feature_dim": DIM, "centroid_momentum": 0.7}
OPTIONS = {
    "plain": {}, "known classes": {"num_classes": NUM_CLASSES}, "class weights": {"weight": WEIGHT},
    "sum": {"reduction": "sum"}, "leave-one-out": {"leave_one_out": True},
    "leave-one-out, weighted": {"leave_one_out": True, "weight": WEIGHT},
    "not normalised": {"normalize": False}, "memory": MEMORY,
    "memory, weighted": MEMORY | {"weight": WEIGHT}, "equations": {"impl": "reference"},
}  # fmt: skip


class Encoder(nn.Module):
    """Dropout, and running statistics that its outputs do not depend on."""

    def __init__(self, dropout: float = 0.0, views: int = 0, dtype=torch.float64) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(WIDTH, 8), nn.Linear(8, DIM * max(1, views))
        self.norm, self.dropout = nn.BatchNorm1d(8, affine=False), nn.Dropout(dropout)
        self.views = views
        self.to(dtype)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        hidden = self.dropout(torch.tanh(self.first(x)))
        if len(x) > 1:
            self.norm(hidden.detach())
        out = self.last(hidden if shift is None else hidden + shift)
        return out.unflatten(1, (self.views, DIM)) if self.views else out


def labels_of(kind: str, num_rows: int, generator: torch.Generator) -> Tensor:
    labels = torch.randint(NUM_CLASSES, (num_rows,), generator=generator)
    hot = torch.eye(NUM_CLASSES, dtype=torch.float64)
    if kind == "ignored":
        labels[torch.rand(num_rows, generator=generator) < 0.4] = -100
    if kind == "a class a chunk":
        labels = torch.arange(num_rows) * NUM_CLASSES // num_rows
    if kind == "mixed":
        labels = 0.7 * hot[labels] + 0.3 * hot[labels.flip(0)]
        labels[::5] = 0
    if kind == "smoothed":
        labels = 0.9 * hot[labels] + 0.1 / NUM_CLASSES
    return labels


def gradient_of(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(OPTIONS)),
    kind=st.sampled_from(["all", "ignored", "a class a chunk", "mixed", "smoothed"]),
    num_rows=st.integers(1, 40), chunk_size=st.integers(1, 50), views=st.sampled_from([0, 1, 3]),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_equals_one_batch(name, kind, num_rows, chunk_size, views, seed) -> None:
    options = OPTIONS[name]
    if kind in ("mixed", "smoothed") and "leave_one_out" in options:
        return
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_rows, WIDTH, generator=generator, dtype=torch.float64)
    labels = labels_of(kind, num_rows, generator)
    whole, chunked = Encoder(views=views), Encoder(views=views)
    criterion = VarConLoss(**options)
    # A memory is float32, and may round a sum of chunks to its other neighbour.
    close = {"rtol": 1e-6, "atol": 1e-7} if "feature_dim" in options else EXACT
    other = copy.deepcopy(criterion)
    for _ in range(2 if "feature_dim" in options else 1):
        whole.zero_grad()
        chunked.zero_grad()
        expected = criterion(whole(inputs), labels)
        expected.backward()
        loss = backward_in_chunks(chunked, other, inputs, labels, chunk_size)
        torch.testing.assert_close(loss, expected.detach(), **close)
        torch.testing.assert_close(gradient_of(chunked), gradient_of(whole), **close)
    if "feature_dim" in options:
        torch.testing.assert_close(other.centroid_memory, criterion.centroid_memory)


def test_the_terms_are_those_of_the_batch() -> None:
    features, labels = torch.randn(20, DIM).double(), torch.arange(20) % 4
    expected = VarConLoss().terms(features, labels)
    big = LargeBatch(VarConLoss())
    chunks = list(zip(features.split(7), labels.split(7), strict=True))
    for x, y in chunks:
        big.add(x, y)
    parts = [big.terms(x, y) for x, y in chunks]
    for name in ("loss", "kl", "nll", "confidence", "tau2", "valid"):
        got = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(got, getattr(expected, name), **EXACT)
    torch.testing.assert_close(sum(part.reduced for part in parts), expected.reduced, **EXACT)
    assert all(part.num_classes == 4 for part in parts)


def test_sums_of_many_chunks_lose_no_digits() -> None:
    """As one batch, whose long sums go on in float64."""
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(60_000, 4) + 3, dim=1)
    labels = torch.zeros(60_000, dtype=torch.int64)
    labels[::2] = 1
    exact = VarConLoss()(features.double(), labels)
    big = LargeBatch(VarConLoss())
    for x, y in zip(features.split(100), labels.split(100), strict=True):
        big.add(x, y)
    loss = sum(big(x, y) for x, y in zip(features.split(5000), labels.split(5000), strict=True))
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


def test_dropout_is_the_same_in_both_passes_and_statistics_move_once_a_chunk() -> None:
    inputs, labels = torch.randn(24, WIDTH).double(), torch.arange(24) % 4
    plain, chunked = Encoder(0.5), Encoder(0.5)
    torch.manual_seed(5)
    features = torch.cat([plain(x) for x in inputs.split(10)])
    drawn_next = torch.rand(3)
    VarConLoss()(features, labels).backward()
    torch.manual_seed(5)
    backward_in_chunks(chunked, VarConLoss(), inputs, labels, 10)
    torch.testing.assert_close(gradient_of(chunked), gradient_of(plain), **EXACT)
    assert torch.equal(torch.rand(3), drawn_next)
    for mine, others in zip(chunked.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, others)


@pytest.mark.parametrize("manual", [False, True])
def test_under_autocast_with_a_scaler(manual: bool) -> None:
    """Autocast keeps the weights that it has cast, those of the pass without a gradient too."""
    inputs, labels = torch.randn(24, WIDTH), torch.arange(24) % 4
    whole, chunked = Encoder(dtype=torch.float32), Encoder(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = VarConLoss()(whole(inputs), labels)
        if manual:
            big = LargeBatch(VarConLoss())
            parts = list(zip(inputs.split(7), labels.split(7), strict=True))
            with torch.no_grad():
                for x, y in parts:
                    big.add(chunked(x), y)
            for x, y in parts:
                scaler.scale(big(chunked(x), y)).backward()
        else:
            backward_in_chunks(
                chunked, VarConLoss(), inputs, labels, 7,
                backward=lambda part: scaler.scale(part).backward(),
            )  # fmt: skip
    (8 * loss).backward()
    assert gradient_of(whole).abs().max() > 0
    torch.testing.assert_close(gradient_of(chunked), gradient_of(whole), rtol=0.05, atol=0.01)


def test_inputs_of_several_tensors() -> None:
    x, shift = torch.randn(10, WIDTH).double(), torch.randn(10, 8).double()
    labels, gradients = torch.arange(10) % 3, []
    for inputs in ((x, shift), {"x": x, "shift": shift}, [x, shift]):
        model = Encoder()
        backward_in_chunks(model, VarConLoss(), inputs, labels, 4)
        gradients.append(gradient_of(model))
    whole = Encoder()
    VarConLoss()(whole(x, shift), labels).backward()
    for gradient in gradients:
        torch.testing.assert_close(gradient, gradient_of(whole), **EXACT)


X, Y = torch.randn(6, DIM), torch.tensor([0, 0, 1, 1, 2, 2])


def added(criterion: VarConLoss | None = None) -> LargeBatch:
    big = LargeBatch(criterion or VarConLoss())
    big.add(X, Y)
    return big


def in_turn(*calls) -> None:
    big = added()
    for call in calls:
        call(big)


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda: LargeBatch(VarConLoss())(X, Y), "no chunk was added"),
        (lambda: LargeBatch(VarConLoss()).terms(X, Y), "no chunk was added"),
        (lambda: LargeBatch(VarConLoss(reduction="none")), "use 'mean' or 'sum'"),
        (lambda: added(VarConLoss().eval()), "eval mode"),
        (lambda: in_turn(lambda b: b._criterion.eval(), lambda b: b(X, Y)), "eval mode"),
        (lambda: added()(X, Y + 1), "chunks that were added lack label 3"),
        (lambda: in_turn(lambda b: b(X, Y), lambda b: b.add(X, Y)), "is one batch"),
        (lambda: in_turn(lambda b: b(X, Y), lambda b: b(X[:1], Y[:1])), "7 rows"),
        (lambda: backward_in_chunks(nn.Identity(), VarConLoss(), X, Y, 0), "chunk_size must be"),
        (lambda: backward_in_chunks(nn.Identity(), VarConLoss(), X, Y[:4], 2), "one length"),
    ],
)
def test_misuse_is_an_error(misuse, message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        misuse()


CASES = {"plain": {}, "known": {"num_classes": NUM_CLASSES}, "memory": MEMORY}


def rows_of_rank(rank: int) -> tuple[Tensor, Tensor]:
    num_rows, generator = (13, 6, 0)[rank], torch.Generator().manual_seed(rank)
    inputs = torch.randn(num_rows, WIDTH, generator=generator, dtype=torch.float64)
    return inputs, labels_of("all", num_rows, generator)


def steps_on_rank(rank: int, world_size: int) -> dict[str, tuple]:
    found, (inputs, labels) = {}, rows_of_rank(rank)
    for case, options in CASES.items():
        model = DistributedDataParallel(Encoder(), broadcast_buffers=False)
        criterion = VarConLoss(process_group="world", **options)
        backward_in_chunks(model, criterion, inputs, labels, 4)  # ranks agree on their options
        model.zero_grad()
        criterion.reset_parameters()
        with Operators() as operators:
            loss = backward_in_chunks(model, criterion, inputs, labels, 4)
        # DDP tells all ranks of its buckets by broadcasts, after its first step.
        collectives = [name for name in operators.collectives() if name != "broadcast_"]
        found[case] = loss, gradient_of(model), collectives, criterion.centroid_memory
    return found


def test_ranks_exchange_once(tmp_path: Path) -> None:
    ranks = run_ranks(steps_on_rank, 3, tmp_path)
    inputs, labels = (torch.cat(c) for c in zip(*map(rows_of_rank, range(3)), strict=True))
    for case, options in CASES.items():
        whole, criterion = Encoder(), VarConLoss(**options)
        expected = criterion(whole(inputs), labels)
        expected.backward()
        losses = torch.stack([rank[case][0].double() for rank in ranks])
        torch.testing.assert_close(losses.mean(), expected.detach(), **EXACT)
        exchanges = ["allreduce_", "_allgather_base_"] if case == "plain" else ["allreduce_"]
        for _, gradient, collectives, memory in (rank[case] for rank in ranks):
            torch.testing.assert_close(gradient, gradient_of(whole), **EXACT)
            of_gradients = collectives[len(exchanges) :]  # DDP's, in a few buckets
            assert collectives[: len(exchanges)] == exchanges
            assert set(of_gradients) <= {"allreduce_"}
            assert len(of_gradients) <= 2
            if memory is not None:
                torch.testing.assert_close(memory, criterion.centroid_memory)
