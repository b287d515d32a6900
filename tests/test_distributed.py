"""Centroids over ranks, in real gloo processes, against one process on the concatenated batch.

A function `check_...` runs on every rank. All of one number of ranks share their processes, which
take seconds to start; what ranks agree on is kept by each loss for itself.
"""

import copy
import gc
import importlib.util
import itertools
import math
import pickle
import time
import traceback
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common.ranks import leave_group, run_ranks
from tests.counting import Operators
from varcon_loss import VarConLoss, VarConTerms, fused, varcon_loss, varcon_terms

NUM_CLASSES, DIM, WIDTH = 7, 6, 9
HAS_FSDP = torch.__version__ >= "2.7"  # FSDP2 wants a GPU in torch 2.6
MANY = 500  # more classes than all ranks have samples: rows are gathered, not a table summed

EXACT = {"rtol": 1e-10, "atol": 1e-12}
WEIGHT = torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0, 1.0, 0.1], dtype=torch.float64)


def drawn(count: int, g: torch.Generator) -> Tensor:
    return torch.randint(NUM_CLASSES, (count,), generator=g)


# How a rank's share of the batch may look; each entry gives (labels) for rank r.
PARTS = {
    "equal": lambda rank, g: drawn(8, g), "unequal": lambda rank, g: drawn(5 - rank, g),
    "disjoint classes": lambda rank, g: torch.full((6,), rank),
    "one rank ignores all": lambda rank, g: drawn(6, g) if rank else torch.full((4,), -100),
    "one rank is empty": lambda rank, g: drawn(6 if rank else 0, g),
    "all ignored": lambda rank, g: torch.full((3,), -100),
}  # fmt: skip
KNOWN = {"num_classes": NUM_CLASSES}
MEMORY = KNOWN | {"feature_dim": DIM, "centroid_momentum": 0.9}
OPTIONS = {
    "known": KNOWN, "known, gathered": {"num_classes": MANY}, "unknown": {},
    "leave-one-out": KNOWN | {"leave_one_out": True},
    "leave-one-out, unknown": {"leave_one_out": True}, "sum": KNOWN | {"reduction": "sum"},
    "weight": {"weight": WEIGHT},
    "weight, leave-one-out": {"weight": WEIGHT, "leave_one_out": True},
    "reference": KNOWN | {"impl": "reference"},
}  # fmt: skip


def over_ranks(**options) -> VarConLoss:
    return VarConLoss(process_group="world", **options)


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


def whole(case: str, members: int | list[int]) -> tuple[Tensor, Tensor]:
    """The batch of so many ranks, or of these of three."""
    parts = parts_of(case, members if isinstance(members, int) else 3)
    parts = parts if isinstance(members, int) else [parts[rank] for rank in members]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def gradient_of(net: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


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
        criterion, features = over_ranks(**options), net(inputs)
        if fused and "impl" not in options:
            features, criterion.impl = features.float(), "triton"
        terms = criterion.terms(features, names(labels, options))
        terms.reduced.backward()
        found = terms.reduced, terms.loss, terms.tau2, terms.num_classes, gradient_of(net)
        results[case, title] = [value.detach().double() for value in found[:3]] + [*found[3:]]
    return results


@pytest.mark.parametrize(("world_size", "fused"), [(1, 0), (2, 0), (3, 0), (4, 0), (3, 1)])
def test_equals_one_process_on_the_concatenated_batch(world_size, fused, tmp_path: Path) -> None:
    """``fused``: float32 through the Triton kernels, where there is a Triton."""
    if fused:
        pytest.importorskip("triton")
    ranks = run_ranks(sweep_on_rank, world_size, tmp_path, fused)
    close = {"rtol": 2e-5, "atol": 2e-6} if fused else EXACT
    for case, (title, options) in itertools.product(PARTS, OPTIONS.items()):
        inputs, labels = whole(case, world_size)
        labels, net = names(labels, options), encoder()
        expected = varcon_terms(net(inputs), labels, **options)
        expected.reduced.backward()
        got = [rank[case, title] for rank in ranks]

        def message(m: str, case: str = case, title: str = title) -> str:
            return f"{case}, {title}: {m}"

        losses = torch.stack([g[0] for g in got])
        torch.testing.assert_close(losses.mean(), expected.reduced.detach(), msg=message, **close)
        for index, name in ((1, "loss"), (2, "tau2")):
            each = torch.cat([g[index] for g in got])
            torch.testing.assert_close(each, getattr(expected, name), msg=message, **close)
        for g in got:
            assert g[3] == expected.num_classes
            # A sum over samples has the rounding errors of them all.
            scale = len(labels) if fused and title == "sum" else 1
            torch.testing.assert_close(
                g[4], gradient_of(net), msg=message, rtol=close["rtol"], atol=scale * close["atol"]
            )


def check_first_steps_without_a_sample_on_any_rank(rank: int, world_size: int) -> None:
    for options in (*OPTIONS.values(), MEMORY):
        criterion = over_ranks(**options)
        for _ in range(2):  # the handshake, then what it was remembered for
            features = torch.randn(0, DIM, dtype=torch.float64, requires_grad=True)
            loss = criterion(features, torch.empty(0, dtype=torch.int64))
            loss.backward()
            assert loss == 0


def check_a_step_without_samples_makes_no_room_for_the_next(rank: int, world_size: int) -> None:
    for num_classes in (NUM_CLASSES, MANY):
        criterion = over_ranks(num_classes=num_classes)
        criterion(torch.randn(0, DIM), torch.empty(0, dtype=torch.int64))
        assert criterion.terms(torch.randn(4, DIM), torch.arange(4) + 3 * rank).num_classes == 7


def check_one_collective_a_step_and_none_in_backward(rank: int, world_size: int) -> None:
    features, labels = torch.randn(8, DIM, requires_grad=True), torch.arange(8) % NUM_CLASSES
    for options, expected in (
        (KNOWN, ["allreduce_"]), ({"num_classes": 100_000}, ["_allgather_base_"]),
        ({}, ["allreduce_", "_allgather_base_"]), (MEMORY, ["allreduce_"]),
    ):  # fmt: skip
        criterion = over_ranks(**options)
        criterion(features, labels)  # the handshake
        with Operators() as forward:
            loss = criterion(features, labels)
        with Operators() as backward:
            loss.backward()
        assert (forward.collectives(), backward.collectives()) == (expected, []), options


def mean_over_ranks(value: Tensor) -> Tensor:
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def check_memories_are_identical_and_those_of_one_process(rank: int, world_size: int) -> None:
    memory = MEMORY | {"centroid_momentum": 0.8}
    for num_classes in (NUM_CLASSES, MANY):  # reduced, gathered
        single = VarConLoss(**memory)
        criterion = over_ranks(**memory | {"num_classes": num_classes})
        for step in range(5):
            case, scale = "unequal" if step % 2 or step == 4 else "equal", min(step, 3) + 1
            if step == 4:  # evaluation is each rank's own: a plain mean over its samples
                single.eval()
                criterion.eval()
            inputs, labels = parts_of(case, world_size)[rank]
            loss = criterion((encoder()(inputs) * scale).float(), labels)
            loss = loss * len(labels) * world_size / 12 if step == 4 else loss
            inputs, labels = whole(case, world_size)
            expected = single((encoder()(inputs) * scale).float(), labels).detach()
            torch.testing.assert_close(mean_over_ranks(loss), expected, rtol=1e-5, atol=1e-6)
        held = criterion.centroids[:NUM_CLASSES]
        torch.testing.assert_close(held, single.centroids, rtol=1e-5, atol=1e-6)
        others = [torch.empty_like(held) for _ in range(world_size)]
        dist.all_gather(others, held)
        assert all(torch.equal(other, held) for other in others)


def check_a_reference_set_spread_over_ranks(rank: int, world_size: int) -> None:
    reference = torch.eye(NUM_CLASSES, DIM).double(), torch.arange(NUM_CLASSES)

    def terms(criterion: VarConLoss, batch: tuple, rows: slice) -> VarConTerms:
        given = {"ref_features": reference[0][rows], "ref_labels": reference[1][rows]}
        return criterion.terms(encoder()(batch[0]).detach().requires_grad_(), batch[1], **given)

    part = terms(over_ranks(), parts_of("equal", world_size)[rank], slice(rank, None, world_size))
    expected = terms(VarConLoss(), whole("equal", world_size), slice(None))
    mine = expected.loss.view(world_size, -1)[rank]
    torch.testing.assert_close(part.loss, mine)
    torch.testing.assert_close(mean_over_ranks(part.reduced), expected.reduced.detach())


def attempt(criterion: VarConLoss, features: Tensor, labels: Tensor, **reference: Tensor) -> str:
    """What a loss answers that should not be computed."""
    try:
        criterion(features.requires_grad_(), labels, **reference)
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def check_ranks_that_disagree_say_so(rank: int, world_size: int) -> None:
    """They compare what they were told at their first step; the error is one on all."""
    x, y, first = torch.randn(4, DIM), torch.tensor([0, 1, 2, 0]), rank == 0
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    reference = {"ref_features": torch.randn(4, DIM), "ref_labels": torch.arange(4)}

    def make(**options) -> VarConLoss:
        return over_ranks(**{"num_classes": 5} | options)

    with_memory = make(feature_dim=DIM, centroid_momentum=0.9)
    if first:  # a checkpoint
        with_memory.centroids = torch.eye(5, DIM)
    said = {
        "num_classes": attempt(make(num_classes=5 if first else None), x, y),
        "feature width": attempt(make(), x if first else x[:, :3], y),
        "dtype": attempt(make(), x if first else x.double(), y),
        "temperature": attempt(make(temperature=0.2 if first else 0.3), x, y),
        "weight": attempt(make(weight=weight if first else weight.flip(0)), x, y),
        "ref_features, given or not": attempt(make(), x, y, **(reference if first else {})),
        "centroid memory": attempt(with_memory, x, y),
    }
    assert attempt(make(), x, y) == "nothing"
    for field, message in said.items():
        assert message.startswith(f"ValueError: ranks disagree on {field} (rank 0: "), message
    assert "num_classes (rank 0: 5, rank 1: None): it must be the same" in said["num_classes"]
    on_all: list = [None] * world_size
    dist.all_gather_object(on_all, said)
    assert on_all == [said] * world_size


def check_a_batch_larger_than_the_first_says_so(rank: int, world_size: int) -> None:
    criterion = over_ranks(num_classes=50)
    criterion(torch.randn(4, DIM), torch.arange(4))
    if rank == 1:  # its error ends the job
        message = attempt(criterion, torch.randn(9, DIM), torch.arange(9))
        assert "rank 1 has up to 9 classes, but the first step made" in message


def check_a_rank_that_raises_ends_the_job(rank: int, world_size: int) -> None:
    """Rank 1 raises, and leaves; the closed connection ends rank 0's wait."""
    criterion = over_ranks(num_classes=5)
    x, y = torch.randn(4, DIM), torch.tensor([0, 1, 2, 0])
    criterion(x, y)
    if rank == 1:
        assert attempt(criterion, x, y + 3).startswith("ValueError: labels must lie in [0, 5)")
        return
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        criterion(x, y)
    assert time.monotonic() - start < 60


def check_training_in_eval_mode_says_so(rank: int, world_size: int) -> None:
    criterion = over_ranks().eval()
    features = torch.randn(4, DIM, requires_grad=True)
    if rank == 0:
        criterion(features, torch.arange(4) % 2)  # one rank alone may validate
    with pytest.raises(RuntimeError, match=r"(?s)eval mode.*train\(\)"):
        criterion(features, torch.arange(4) % 2).backward()


def check_a_label_that_cannot_be_read_spoils_the_loss_on_all(rank: int, world_size: int) -> None:
    """In compiled graphs, as on a GPU, labels out of range cannot be an error."""
    features, labels = torch.randn(4, DIM, requires_grad=True), torch.arange(4)
    for num_classes in (6, MANY):
        compiled = torch.compile(over_ranks(num_classes=num_classes), backend="eager")
        losses = [compiled(features, labels + shift * rank) for shift in (0, 2 * MANY, 0)]
        assert [math.isnan(loss) for loss in losses] == [False, True, False]


def check_fsdp_and_accumulation_take_the_true_step(rank: int, world_size: int) -> None:
    """Two micro-batches, under no_sync and by a compiled criterion, are two plain calls."""
    for cases in (["equal", "unequal"], ["unequal"])[: 2 if HAS_FSDP else 1]:
        batches = [parts_of(case, world_size)[rank] for case in cases]
        criterion = over_ranks(num_classes=NUM_CLASSES)
        if len(cases) == 1:
            net = fully_shard(encoder())
        else:
            net = DistributedDataParallel(encoder())
            with net.no_sync():
                criterion(net(batches[0][0]), batches[0][1]).backward()
            criterion = torch.compile(criterion, backend="aot_eager")
        criterion(net(batches[-1][0]), batches[-1][1]).backward()
        alone = encoder()
        for case in cases:
            inputs, labels = whole(case, world_size)
            varcon_terms(alone(inputs), labels).reduced.backward()
        got = [p.grad.full_tensor() if len(cases) == 1 else p.grad for p in net.parameters()]
        got = torch.cat([gradient.flatten() for gradient in got])
        torch.testing.assert_close(got, gradient_of(alone), **EXACT)


def check_subgroups_pickling_and_copies(rank: int, world_size: int) -> None:
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    group, members = groups[rank // 2], ([0, 1], [2])[rank // 2]
    inputs, labels = parts_of("equal", world_size)[rank]
    together, together_labels = whole("equal", members)
    expected = varcon_terms(encoder()(together), together_labels).reduced.detach()
    for options in ({}, KNOWN, OPTIONS["known, gathered"]):
        criterion = VarConLoss(process_group=group, **options)
        loss = criterion(encoder()(inputs), labels).detach()
        dist.all_reduce(loss, group=group)
        torch.testing.assert_close(loss / len(members), expected)
    assert copy.deepcopy(criterion).process_group is group
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(criterion)
    if rank == 2:
        with pytest.raises(ValueError, match=r"not a member of process_group"):
            VarConLoss(process_group=groups[0])(encoder()(inputs), labels)
    assert pickle.loads(pickle.dumps(over_ranks())).process_group == "world"


class Model(nn.Module):
    """The loss as a part of the model that is wrapped."""

    def __init__(self, criterion: VarConLoss) -> None:
        super().__init__()
        self.net, self.criterion = encoder().float(), criterion

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return self.criterion(self.net(inputs.float()), labels)


def check_a_memory_inside_the_wrapped_model(rank: int, world_size: int) -> None:
    memory = MEMORY | {"centroid_momentum": 0.8}
    cases, single = ("equal", "unequal", "equal"), Model(VarConLoss(**memory))
    for case in cases:
        single(*whole(case, world_size))
    for wrap in (
        lambda m: DistributedDataParallel(m, broadcast_buffers=True),
        lambda m: DistributedDataParallel(m, broadcast_buffers=False), *[fully_shard] * HAS_FSDP,
    ):  # fmt: skip
        inner = Model(over_ranks(**memory))
        model = wrap(inner)
        for case in cases:
            model(*parts_of(case, world_size)[rank]).backward()
        expected = single.criterion.centroids
        torch.testing.assert_close(inner.criterion.centroids, expected, rtol=1e-5, atol=1e-6)


def check_ranks_that_remember_by_themselves_say_so_once(rank: int, world_size: int) -> None:
    """A memory for each rank alone, inside and outside a wrapped model."""
    memory = MEMORY | {"num_classes": 8}
    labels = torch.arange(8) % 4 + 4 * rank  # no class is on both
    alone, wrapped = Model(VarConLoss(**memory)), Model(VarConLoss(**memory))
    for model, seen, told in (
        (DistributedDataParallel(wrapped, broadcast_buffers=False), 4, ["process_group='world'"]),
        (DistributedDataParallel(Model(over_ranks(**memory))), 8, []),
        (alone, 4, ["process_group='world'"]),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                model(torch.randn(8, WIDTH), labels).backward()
        assert getattr(model, "module", model).criterion.centroids.any(1).sum() == seen
        assert len(caught) == len(told)
        assert all(words in str(w.message) for words, w in zip(told, caught, strict=True))


def several_losses(process_group: str | None) -> list[float]:
    """Coarse and fine labels, two dtypes, two widths, labels of either kind, on one group."""
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 2, 0])
    soft = torch.eye(40)[labels]
    criteria = [VarConLoss(process_group=process_group, num_classes=n) for n in (3, 40, None)]
    sets = [torch.randn(4, DIM), torch.randn(4, DIM).double(), torch.randn(4, DIM + 2)]
    losses = []
    for _ in range(2):
        for criterion, features in itertools.product(criteria, sets):
            losses.append(float(criterion(features, labels)))
            losses.append(float(varcon_loss(features, labels, process_group=process_group)))
        losses += [float(criteria[1](features, soft)) for features in sets]
    return losses


def check_several_criteria_on_one_group(rank: int, world_size: int) -> None:
    """The ranks' batches are equal: each loss is that of one of them."""
    assert several_losses("world") == pytest.approx(several_losses(None), rel=1e-5)


def check_one_rank_alone_may_validate(rank: int, world_size: int) -> None:
    """Training together, validation on rank 0 alone; a sanity check with a small batch before."""
    torch.manual_seed(rank)
    criterion, net = over_ranks(num_classes=50), encoder().float()
    inputs, labels = torch.randn(12, WIDTH), torch.arange(12) * 4 % 50
    criterion.eval()
    criterion(net(inputs[:2]), labels[:2])
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
    assert criterion.terms(net(inputs), labels).num_classes == 12


def check_a_named_implementation_runs_no_other(rank: int, world_size: int) -> None:
    """Which kernels are launched where ranks gather class sums."""
    if importlib.util.find_spec("triton") is None:
        return
    plain, launched = fused._launch, []

    def launch(kernel, *where, **arguments):
        launched.append(kernel.fn.__name__)
        return plain(kernel, *where, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_launch", launch)
        for impl in ("reference", "eager", "triton"):
            assert launched == []
            over_ranks(impl=impl)(torch.randn(8, DIM), torch.arange(8) % 3)
        assert "run_sums_kernel" in launched


def check_a_compiled_step_is_one_graph_after_a_plain_one(rank: int, world_size: int) -> None:
    """As `docs/distributed.md` says: before it, it is an error, or several graphs."""
    features, labels = torch.randn(8, 4, requires_grad=True), torch.arange(8) % 3
    criterion, found = over_ranks(num_classes=3), []
    for fullgraph in (True, False, True):
        torch.compiler.reset()
        graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        try:
            loss = torch.compile(criterion, fullgraph=fullgraph, backend=graphs)(features, labels)
        except Exception:  # torch's, of many kinds
            found.append(None)
        else:
            torch.testing.assert_close(loss, criterion(features, labels))
            found.append(graphs.frame_count)
    early, broken, whole = found
    assert early is None
    assert broken > 1
    assert whole == 1 or torch.__version__ < "2.7"  # torch 2.6 traces no weak dictionary


THREE = [check_memories_are_identical_and_those_of_one_process, check_subgroups_pickling_and_copies]
LAST = check_a_rank_that_raises_ends_the_job
TWO = [f for name, f in list(globals().items()) if name.startswith("check_") and f not in THREE]
CHECKS = {2: [*(f for f in TWO if f is not LAST), LAST], 3: THREE}


def run_checks(rank: int, world_size: int) -> str:
    """What failed first."""
    try:
        for check in CHECKS[world_size]:
            check(rank, world_size)
    except Exception:
        return traceback.format_exc()
    return ""


@pytest.mark.parametrize("world_size", CHECKS)
def test_checks_on_every_rank(world_size: int, tmp_path: Path) -> None:
    failures = run_ranks(run_checks, world_size, tmp_path)
    assert not any(failures), "\n".join(failures)


def groups_anew_on_rank(rank: int, world_size: int, folder: str) -> list[bool]:
    """Process groups that end are not kept alive by what was settled with them."""
    features, labels = torch.randn(8, DIM, requires_grad=True), torch.arange(8) % NUM_CLASSES
    criterion, held = over_ranks(num_classes=NUM_CLASSES), []
    for again in range(3):
        criterion(features, labels)
        varcon_loss(features, labels, num_classes=NUM_CLASSES, process_group="world")
        group, file = weakref.ref(dist.group.WORLD), f"file://{folder}/again{again}"
        leave_group()
        gc.collect()
        held.append(group() is not None)
        dist.init_process_group("gloo", init_method=file, rank=rank, world_size=world_size)
    return held


def test_groups_can_be_destroyed_and_made_anew(tmp_path: Path) -> None:
    for held in run_ranks(groups_anew_on_rank, 2, tmp_path, str(tmp_path)):
        assert held == [False] * 3


def test_world_of_one_without_initialised_processes() -> None:
    features, labels = torch.randn(8, 4), torch.arange(8) % 3
    assert torch.equal(over_ranks()(features, labels), VarConLoss()(features, labels))
