"""Centroids over ranks, in real gloo processes, against one process on the concatenated batch."""

import copy
import gc
import itertools
import math
import pickle
import time
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common.ranks import leave_group, run_ranks
from tests.counting import Operators
from varcon_loss import VarConLoss, varcon_loss, varcon_terms

NUM_CLASSES, DIM, WIDTH = 7, 6, 9
MANY = 500  # more classes than all ranks have samples: rows are gathered, not a table summed

# How a rank's share of the batch may look; each entry gives (labels) for rank r.
PARTS = {
    "equal": lambda rank, g: torch.randint(NUM_CLASSES, (8,), generator=g),
    "unequal": lambda rank, g: torch.randint(NUM_CLASSES, (5 - rank,), generator=g),
    "disjoint classes": lambda rank, g: torch.full((6,), rank),
    "one rank ignores all": lambda rank, g: (
        torch.full((4,), -100) if rank == 0 else torch.randint(NUM_CLASSES, (6,), generator=g)
    ),
    "one rank is empty": lambda rank, g: (
        torch.empty(0, dtype=torch.int64)
        if rank == 0
        else torch.randint(NUM_CLASSES, (6,), generator=g)
    ),
    "all ignored": lambda rank, g: torch.full((3,), -100),
}
OPTIONS = {
    "known": {"num_classes": NUM_CLASSES},
    "known, gathered": {"num_classes": MANY},
    "unknown": {},
    "leave-one-out": {"num_classes": NUM_CLASSES, "leave_one_out": True},
    "leave-one-out, unknown": {"leave_one_out": True},
    "sum": {"num_classes": NUM_CLASSES, "reduction": "sum"},
    "weight": {"weight": torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0, 1.0, 0.1], dtype=torch.float64)},
    "weight, leave-one-out": {
        "weight": torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0, 1.0, 0.1], dtype=torch.float64),
        "leave_one_out": True,
    },
    "reference": {"num_classes": NUM_CLASSES, "impl": "reference"},
}


def encoder() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, DIM)).double()


def parts_of(case: str, world_size: int) -> list[tuple[Tensor, Tensor]]:
    result = []
    for rank in range(world_size):
        g = torch.Generator().manual_seed(100 + rank)
        labels = PARTS[case](rank, g)
        result.append((torch.randn(len(labels), WIDTH, generator=g, dtype=torch.float64), labels))
    return result


def names(labels: Tensor, options: dict) -> Tensor:
    """Without num_classes labels may be any integers: use hashes, beyond what float64 holds."""
    if "num_classes" in options or "weight" in options:
        return labels
    return torch.where(labels == -100, labels, labels * (2**60 + 1) - 2**62)


def sweep_on_rank(rank: int, world_size: int, fused: bool) -> dict:
    results = {}
    for case, (title, options) in itertools.product(PARTS, OPTIONS.items()):
        inputs, labels = parts_of(case, world_size)[rank]
        net = DistributedDataParallel(encoder()) if world_size > 1 else encoder()
        criterion = VarConLoss(process_group="world", **options)
        features = net(inputs)
        if fused and "impl" not in options:
            features, criterion.impl = features.float(), "triton"
        terms = criterion.terms(features, names(labels, options))
        terms.reduced.backward()
        gradient = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        results[case, title] = (
            terms.reduced.detach(), terms.loss.detach(), terms.tau2, terms.num_classes, gradient,
        )  # fmt: skip
    return results


@pytest.mark.parametrize(
    ("world_size", "fused"), [(1, False), (2, False), (3, False), (4, False), (3, True)]
)
def test_equals_one_process_on_the_concatenated_batch(
    world_size: int, fused: bool, tmp_path: Path
) -> None:
    """``fused``: float32 through the Triton kernels, where there is a Triton."""
    if fused:
        pytest.importorskip("triton")
    ranks = run_ranks(sweep_on_rank, world_size, tmp_path, fused)
    close = {"rtol": 2e-5, "atol": 2e-6} if fused else {"rtol": 1e-10, "atol": 1e-12}
    for case, (title, options) in itertools.product(PARTS, OPTIONS.items()):
        parts = parts_of(case, world_size)
        inputs = torch.cat([x for x, _ in parts])
        labels = names(torch.cat([y for _, y in parts]), options)
        net = encoder()
        expected = varcon_terms(net(inputs), labels, **options)
        expected.reduced.backward()
        gradient = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        got = [rank[case, title] for rank in ranks]

        def message(m: str, case: str = case, title: str = title) -> str:
            return f"{case}, {title}: {m}"

        got = [
            tuple(value.double() if value.is_floating_point() else value for value in g)
            for g in got
        ]
        losses = torch.stack([g[0] for g in got])
        torch.testing.assert_close(losses.mean(), expected.reduced.detach(), msg=message, **close)
        for index, name in ((1, "loss"), (2, "tau2")):
            torch.testing.assert_close(
                torch.cat([g[index] for g in got]),
                getattr(expected, name).detach(), msg=message, **close,
            )  # fmt: skip
        for g in got:
            assert g[3] == expected.num_classes
            # A sum over samples has the rounding errors of them all.
            scale = len(labels) if fused and title == "sum" else 1
            torch.testing.assert_close(
                g[4], gradient, msg=message, rtol=close["rtol"], atol=scale * close["atol"]
            )


def nothing_on_rank(rank: int, world_size: int) -> list[float]:
    losses = []
    memory = {"num_classes": NUM_CLASSES, "feature_dim": DIM, "centroid_momentum": 0.9}
    for options in (*OPTIONS.values(), memory):
        criterion = VarConLoss(process_group="world", **options)
        for _ in range(2):  # the handshake, then what it was remembered for
            features = torch.randn(0, DIM, dtype=torch.float64, requires_grad=True)
            loss = criterion(features, torch.empty(0, dtype=torch.int64))
            loss.backward()
            losses.append(loss.item())
    return losses


def test_first_steps_without_a_sample_on_any_rank(tmp_path: Path) -> None:
    for losses in run_ranks(nothing_on_rank, 2, tmp_path):
        assert losses == [0] * len(losses)


def classes_after_nothing_on_rank(rank: int, world_size: int) -> list[int]:
    found = []
    for num_classes in (NUM_CLASSES, MANY):
        criterion = VarConLoss(num_classes=num_classes, process_group="world")
        nothing = torch.empty(0, dtype=torch.int64)
        criterion(torch.randn(0, DIM), nothing)
        terms = criterion.terms(torch.randn(4, DIM), torch.arange(4) + 3 * rank)
        found.append(int(terms.num_classes))
    return found


def test_a_step_without_samples_makes_no_room_for_the_next(tmp_path: Path) -> None:
    for found in run_ranks(classes_after_nothing_on_rank, 2, tmp_path):
        assert found == [7, 7]


def collectives_on_rank(rank: int, world_size: int) -> dict:
    features = torch.randn(8, DIM, requires_grad=True)
    labels = torch.arange(8) % NUM_CLASSES
    counts = {}
    for title, options in (
        ("all-reduce", {"num_classes": NUM_CLASSES}),
        ("many classes", {"num_classes": 100_000}),
        ("unknown", {}),
        ("memory", {"num_classes": NUM_CLASSES, "feature_dim": DIM, "centroid_momentum": 0.9}),
    ):
        criterion = VarConLoss(process_group="world", **options)
        criterion(features, labels)  # the handshake
        with Operators() as forward:
            loss = criterion(features, labels)
        with Operators() as backward:
            loss.backward()
        counts[title] = (forward.collectives(), backward.collectives())
    return counts


def test_one_collective_a_step_and_none_in_backward(tmp_path: Path) -> None:
    for counts in run_ranks(collectives_on_rank, 2, tmp_path):
        assert all(backward == [] for _, backward in counts.values())
        assert counts["all-reduce"][0] == ["allreduce_"]
        assert counts["many classes"][0] == ["_allgather_base_"]
        assert counts["unknown"][0] == ["allreduce_", "_allgather_base_"]
        assert counts["memory"][0] == ["allreduce_"]


def memory_on_rank(rank: int, world_size: int) -> dict:
    results = {}
    for title, num_classes in (("all-reduce", NUM_CLASSES), ("all-gather", MANY)):
        criterion = VarConLoss(
            process_group="world", num_classes=num_classes, feature_dim=DIM,
            centroid_momentum=0.8,
        )  # fmt: skip
        losses = []
        for step in range(4):
            inputs, labels = parts_of("unequal" if step % 2 else "equal", world_size)[rank]
            features = (encoder()(inputs) * (step + 1)).float()
            losses.append(criterion(features, labels).detach())
        # Evaluation is each rank's own: a plain mean over its samples, which are not equally many.
        local = criterion.eval()(features, labels).detach()
        losses.append(local * len(labels) * world_size / 12)
        results[title] = (criterion.centroids[:NUM_CLASSES], torch.stack(losses))
    return results


def test_memories_are_identical_and_those_of_one_process(tmp_path: Path) -> None:
    ranks = run_ranks(memory_on_rank, 3, tmp_path)
    single = VarConLoss(num_classes=NUM_CLASSES, feature_dim=DIM, centroid_momentum=0.8)
    losses = []
    for step in range(5):
        parts = parts_of("unequal" if step % 2 or step == 4 else "equal", 3)
        inputs, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        if step == 4:
            single.eval()
        features = (encoder()(inputs) * (min(step, 3) + 1)).float()
        losses.append(single(features, labels).detach())
    for title in ("all-reduce", "all-gather"):
        for rank in ranks:
            assert torch.equal(rank[title][0], ranks[0][title][0])
            torch.testing.assert_close(rank[title][0], single.centroids, rtol=1e-5, atol=1e-6)
        mean = torch.stack([rank[title][1] for rank in ranks]).mean(0)
        torch.testing.assert_close(mean, torch.stack(losses), rtol=1e-5, atol=1e-6)


def reference_set_on_rank(rank: int, world_size: int) -> tuple:
    inputs, labels = parts_of("equal", world_size)[rank]
    features = encoder()(inputs).detach().requires_grad_()
    terms = VarConLoss(process_group="world").terms(
        features, labels,
        ref_features=torch.eye(NUM_CLASSES, DIM).double()[rank::world_size],
        ref_labels=torch.arange(NUM_CLASSES)[rank::world_size],
    )  # fmt: skip
    return terms.reduced.detach(), terms.loss.detach()


def test_a_reference_set_spread_over_ranks(tmp_path: Path) -> None:
    ranks = run_ranks(reference_set_on_rank, 2, tmp_path)
    inputs, labels = (torch.cat(c) for c in zip(*parts_of("equal", 2), strict=True))
    expected = varcon_terms(
        encoder()(inputs), labels,
        ref_features=torch.eye(NUM_CLASSES, DIM).double(), ref_labels=torch.arange(NUM_CLASSES),
    )  # fmt: skip
    torch.testing.assert_close(torch.cat([r[1] for r in ranks]), expected.loss.detach())
    torch.testing.assert_close(torch.stack([r[0] for r in ranks]).mean(), expected.reduced.detach())


def attempt(criterion: VarConLoss, features: Tensor, labels: Tensor, **reference: Tensor) -> str:
    """What a loss answers that should not be computed."""
    try:
        criterion(features.requires_grad_(), labels, **reference)
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def disagreements_on_rank(rank: int, world_size: int) -> dict[str, str]:
    """Ranks compare what they were told at their first step; the error is one on all."""
    x, y, first = torch.randn(4, DIM), torch.tensor([0, 1, 2, 0]), rank == 0
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    reference = {"ref_features": torch.randn(4, DIM), "ref_labels": torch.arange(4)}
    memory = {"feature_dim": DIM, "centroid_momentum": 0.9}
    with_memory = VarConLoss(num_classes=5, process_group="world", **memory)
    if first:  # a checkpoint
        with_memory.centroids = torch.eye(5, DIM)

    def make(**options) -> VarConLoss:
        return VarConLoss(**{"process_group": "world", "num_classes": 5} | options)

    return {
        "num_classes": attempt(make(num_classes=5 if first else None), x, y),
        "feature width": attempt(make(), x if first else x[:, :3], y),
        "dtype": attempt(make(), x if first else x.double(), y),
        "temperature": attempt(make(temperature=0.2 if first else 0.3), x, y),
        "weight": attempt(make(weight=weight if first else weight.flip(0)), x, y),
        "ref_features, given or not": attempt(make(), x, y, **(reference if first else {})),
        "centroid memory": attempt(with_memory, x, y),
        "nothing": attempt(make(), x, y),
    }


def test_ranks_that_disagree_say_so(tmp_path: Path) -> None:
    first, second = run_ranks(disagreements_on_rank, 2, tmp_path)
    assert first == second
    for field, message in first.items():
        if field != "nothing":
            assert message.startswith(f"ValueError: ranks disagree on {field} (rank 0: ")
    assert first["nothing"] == "nothing"
    assert first["num_classes"].startswith(
        "ValueError: ranks disagree on num_classes (rank 0: 5, rank 1: None): it must be the same"
    )


def crowded_on_rank(rank: int, world_size: int) -> str:
    criterion = VarConLoss(num_classes=50, process_group="world")
    criterion(torch.randn(4, DIM), torch.arange(4))
    if rank == 0:
        return ""  # the error of rank 1 ends the job
    return attempt(criterion, torch.randn(9, DIM), torch.arange(9))


def test_a_batch_larger_than_the_first_says_so(tmp_path: Path) -> None:
    _, message = run_ranks(crowded_on_rank, 2, tmp_path)
    assert message.startswith("ValueError: rank 1 has up to 9 classes, but the first step made")


def hangs_on_rank(rank: int, world_size: int) -> str:
    """Rank 1 raises, and its process ends; the closed connection ends rank 0's wait."""
    criterion = VarConLoss(num_classes=5, process_group="world")
    x, y = torch.randn(4, DIM), torch.tensor([0, 1, 2, 0])
    criterion(x, y)
    if rank == 1:
        return attempt(criterion, x, y + 3)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        criterion(x, y)
    assert time.monotonic() - start < 60
    return ""


def test_a_rank_that_raises_ends_the_job(tmp_path: Path) -> None:
    _, message = run_ranks(hangs_on_rank, 2, tmp_path)
    assert message.startswith("ValueError: labels must lie in [0, 5)")


def eval_mode_on_rank(rank: int, world_size: int) -> str:
    criterion = VarConLoss(process_group="world").eval()
    features = torch.randn(4, DIM, requires_grad=True)
    if rank == 0:
        criterion(features, torch.arange(4) % 2)  # one rank alone may validate
    try:
        criterion(features, torch.arange(4) % 2).backward()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_training_in_eval_mode_says_so(tmp_path: Path) -> None:
    for message in run_ranks(eval_mode_on_rank, 2, tmp_path):
        assert "eval mode" in message
        assert "train()" in message


def unreadable_labels_on_rank(rank: int, world_size: int) -> list[float]:
    """In compiled graphs, as on a GPU, labels out of range cannot be an error."""
    features, labels = torch.randn(4, DIM, requires_grad=True), torch.arange(4)
    losses = []
    for num_classes in (6, MANY):
        criterion = VarConLoss(num_classes=num_classes, process_group="world")
        compiled = torch.compile(criterion, backend="eager")
        losses += [float(compiled(features, labels + shift * rank)) for shift in (0, 2 * MANY, 0)]
    return losses


def test_a_label_that_cannot_be_read_spoils_the_loss_on_all(tmp_path: Path) -> None:
    for losses in run_ranks(unreadable_labels_on_rank, 2, tmp_path):
        assert [math.isnan(loss) for loss in losses] == [False, True, False] * 2


def accumulation_on_rank(rank: int, world_size: int) -> Tensor:
    """Two micro-batches under no_sync, then a compiled criterion, must match plain calls."""
    net = DistributedDataParallel(encoder())
    criterion = VarConLoss(process_group="world", num_classes=NUM_CLASSES)
    batches = [parts_of(case, world_size)[rank] for case in ("equal", "unequal")]
    with net.no_sync():
        criterion(net(batches[0][0]), batches[0][1]).backward()
    torch.compile(criterion, backend="aot_eager")(net(batches[1][0]), batches[1][1]).backward()
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def test_gradient_accumulation_and_compile(tmp_path: Path) -> None:
    ranks = run_ranks(accumulation_on_rank, 2, tmp_path)
    net = encoder()
    for case in ("equal", "unequal"):
        inputs, labels = (torch.cat(c) for c in zip(*parts_of(case, 2), strict=True))
        varcon_terms(net(inputs), labels).reduced.backward()
    expected = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    for gradient in ranks:
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def fsdp_on_rank(rank: int, world_size: int) -> Tensor:
    from torch.distributed.fsdp import fully_shard

    net = fully_shard(encoder())
    inputs, labels = parts_of("unequal", world_size)[rank]
    VarConLoss(process_group="world", num_classes=NUM_CLASSES)(net(inputs), labels).backward()
    return torch.cat([p.grad.full_tensor().flatten() for p in net.parameters()])


def test_fsdp2(tmp_path: Path) -> None:
    ranks = run_ranks(fsdp_on_rank, 2, tmp_path)
    net = encoder()
    inputs, labels = (torch.cat(c) for c in zip(*parts_of("unequal", 2), strict=True))
    varcon_terms(net(inputs), labels).reduced.backward()
    expected = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    for gradient in ranks:
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def subgroups_on_rank(rank: int, world_size: int) -> tuple:
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    group = groups[rank // 2]
    inputs, labels = parts_of("equal", world_size)[rank]
    losses = []
    for options in ({}, {"num_classes": NUM_CLASSES}, OPTIONS["known, gathered"]):
        criterion = VarConLoss(process_group=group, **options)
        losses.append(criterion(encoder()(inputs), labels).detach())
    twin = copy.deepcopy(criterion)
    assert twin.process_group is group
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(criterion)
    if rank == 2:
        with pytest.raises(ValueError, match=r"not a member of process_group"):
            VarConLoss(process_group=groups[0])(encoder()(inputs), labels)
    world = pickle.loads(pickle.dumps(VarConLoss(process_group="world")))
    return torch.stack(losses), world.process_group


def test_subgroups_pickling_and_copies(tmp_path: Path) -> None:
    ranks = run_ranks(subgroups_on_rank, 3, tmp_path)
    parts = parts_of("equal", 3)
    for members in ([0, 1], [2]):
        inputs, labels = (torch.cat(c) for c in zip(*(parts[r] for r in members), strict=True))
        expected = varcon_terms(encoder()(inputs), labels).reduced.detach()
        mean = torch.stack([ranks[r][0] for r in members]).mean(0)
        torch.testing.assert_close(mean, expected.expand(3))
    assert all(group == "world" for _, group in ranks)


def test_world_of_one_without_initialised_processes() -> None:
    features, labels = torch.randn(8, 4), torch.arange(8) % 3
    assert torch.equal(
        VarConLoss(process_group="world")(features, labels), VarConLoss()(features, labels)
    )


def wrapped_memory_on_rank(rank: int, world_size: int) -> list:
    """The loss as a part of the wrapped model, under DDP with and without buffers, and FSDP2."""
    from torch.distributed.fsdp import fully_shard

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = encoder().float()
            self.criterion = VarConLoss(
                process_group="world", num_classes=NUM_CLASSES, feature_dim=DIM,
                centroid_momentum=0.8,
            )  # fmt: skip

        def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
            return self.criterion(self.net(inputs), labels)

    results = []
    for wrap in (
        lambda m: DistributedDataParallel(m, broadcast_buffers=True),
        lambda m: DistributedDataParallel(m, broadcast_buffers=False),
        fully_shard,
    ):
        inner = Model()
        model = wrap(inner)
        for step in range(3):
            inputs, labels = parts_of("unequal" if step % 2 else "equal", world_size)[rank]
            model(inputs.float(), labels).backward()
        results.append(inner.criterion.centroids.clone())
    return results


def test_a_memory_inside_the_wrapped_model(tmp_path: Path) -> None:
    ranks = run_ranks(wrapped_memory_on_rank, 2, tmp_path)
    single = VarConLoss(num_classes=NUM_CLASSES, feature_dim=DIM, centroid_momentum=0.8)
    for step in range(3):
        parts = parts_of("unequal" if step % 2 else "equal", 2)
        inputs, labels = (torch.cat(c) for c in zip(*parts, strict=True))
        single(encoder().float()(inputs.float()), labels)
    for results in ranks:
        for centroids in results:
            torch.testing.assert_close(centroids, single.centroids, rtol=1e-5, atol=1e-6)


def several_criteria_on_rank(rank: int, world_size: int) -> list[float]:
    """Coarse and fine labels, two dtypes, two widths, labels of either kind, on one group."""
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 2, 0])
    soft = torch.eye(40)[labels]
    criteria = [VarConLoss(process_group="world", num_classes=n) for n in (3, 40, None)]
    sets = [torch.randn(4, DIM), torch.randn(4, DIM).double(), torch.randn(4, DIM + 2)]
    losses = []
    for _ in range(2):
        for criterion, features in itertools.product(criteria, sets):
            losses.append(float(criterion(features, labels)))
            losses.append(float(varcon_loss(features, labels, process_group="world")))
        losses += [float(criteria[1](features, soft)) for features in sets]
    return losses


def test_several_criteria_on_one_group(tmp_path: Path) -> None:
    """The ranks' batches are equal: each loss is that of one of them."""
    single = several_criteria_on_rank(0, 1)
    for losses in run_ranks(several_criteria_on_rank, 2, tmp_path):
        assert losses == pytest.approx(single, rel=1e-5)


def forgotten_memory_on_rank(rank: int, world_size: int) -> list[str]:
    """A memory for each rank alone, inside and outside a wrapped model."""
    torch.manual_seed(0)
    labels = torch.arange(8) % 4 + 4 * rank  # no class is on both
    inputs = torch.randn(8, WIDTH)
    options = {"num_classes": 8, "feature_dim": DIM, "centroid_momentum": 0.9}

    class Model(nn.Module):
        def __init__(self, **more) -> None:
            super().__init__()
            self.net, self.criterion = encoder().float(), VarConLoss(**options, **more)

        def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
            return self.criterion(self.net(inputs), labels)

    results = []
    for make in (
        lambda: DistributedDataParallel(Model(), broadcast_buffers=False),
        lambda: DistributedDataParallel(Model(process_group="world")),
        lambda: Model(),
    ):
        model = make()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                model(inputs, labels).backward()
        seen = int(getattr(model, "module", model).criterion.centroids.any(1).sum())
        results.append(f"{seen} classes, {len(caught)} warnings")
        assert all("process_group='world'" in str(w.message) for w in caught)
    return results


def test_ranks_that_remember_by_themselves_say_so_once(tmp_path: Path) -> None:
    for results in run_ranks(forgotten_memory_on_rank, 2, tmp_path):
        by_itself = "4 classes, 1 warnings"
        assert results == [by_itself, "8 classes, 0 warnings", by_itself]


def evaluation_on_rank(rank: int, world_size: int) -> list:
    """Training together, validation on rank 0 alone; a sanity check with a small batch before."""
    torch.manual_seed(rank)
    criterion = VarConLoss(process_group="world", num_classes=50)
    net = encoder().float()
    inputs, labels = torch.randn(12, WIDTH), torch.arange(12) * 4 % 50
    results = []
    criterion.eval()
    results.append(criterion(net(inputs[:2]), labels[:2]).item())
    criterion.train()
    for _ in range(2):
        criterion(net(inputs), labels).backward()
        if rank == 0:
            with Operators() as count, torch.no_grad():
                in_training_mode = criterion(net(inputs[:5]), labels[:5])
            criterion.eval()
            terms = criterion.terms(net(inputs[:5]), labels[:5])
            criterion.train()
            alone = varcon_terms(net(inputs[:5]), labels[:5], num_classes=50)
            assert count.collectives() == []
            torch.testing.assert_close(terms.reduced, alone.reduced)
            torch.testing.assert_close(in_training_mode, alone.reduced)
            assert terms.num_classes == alone.num_classes
    results.append(int(criterion.terms(net(inputs), labels).num_classes))
    return results


def test_one_rank_alone_may_validate(tmp_path: Path) -> None:
    for results in run_ranks(evaluation_on_rank, 2, tmp_path):
        assert results[1] == 12


def sums_on_rank(rank: int, world_size: int) -> dict[str, list[str]]:
    """Which kernels are launched where ranks gather class sums, by implementation."""
    from varcon_loss import fused

    launched: list[str] = []
    plain = fused._launch

    def launch(kernel, *where, **arguments):
        launched.append(kernel.fn.__name__)
        return plain(kernel, *where, **arguments)

    fused._launch = launch
    results = {}
    for impl in ("reference", "eager", "triton"):
        launched.clear()
        criterion = VarConLoss(process_group="world", impl=impl)
        criterion(torch.randn(8, DIM), torch.arange(8) % 3)
        results[impl] = list(launched)
    return results


def test_a_named_implementation_runs_no_other(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    for launched in run_ranks(sums_on_rank, 2, tmp_path):
        assert launched["reference"] == launched["eager"] == []
        assert launched["triton"].count("run_sums_kernel") > 0


def groups_anew_on_rank(rank: int, world_size: int, folder: str) -> list[bool]:
    """Process groups that end are not kept alive by what was settled with them."""
    features, labels = torch.randn(8, DIM, requires_grad=True), torch.arange(8) % NUM_CLASSES
    criterion = VarConLoss(num_classes=NUM_CLASSES, process_group="world")
    held = []
    for again in range(3):
        criterion(features, labels)
        varcon_loss(features, labels, num_classes=NUM_CLASSES, process_group="world")
        group = weakref.ref(dist.group.WORLD)
        leave_group()
        gc.collect()
        held.append(group() is not None)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/again{again}", rank=rank, world_size=world_size
        )
    return held


def test_groups_can_be_destroyed_and_made_anew(tmp_path: Path) -> None:
    for held in run_ranks(groups_anew_on_rank, 2, tmp_path, str(tmp_path)):
        assert held == [False] * 3
