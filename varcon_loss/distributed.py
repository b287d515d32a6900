"""Centroids over all ranks of a process group, for one collective a step.

No gradient flows through centroids, so ranks need each other's class sums and counts, never each
other's embeddings, and backward needs no communication at all. Two ways to exchange them:

``"all-reduce"``   ``[C, D + 1]`` sums and counts of every class; best for ``C <= N_global``.
``"all-gather"``   ``(label, sum, count)`` of the classes each rank holds, padded to the largest
                   number that a rank can hold; best for many classes, and for unknown ones.

Both carry along what every rank must know of the others: the denominator of its mean, and if it
failed before the exchange, so that an error on one rank is an error on all and not a hang.
"""

import struct
import weakref
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from varcon_loss.checks import EXCHANGES
from varcon_loss.classes import (
    Classes,
    ClassIndex,
    index_classes,
)
from varcon_loss.readable import values_may_be_read
from varcon_loss.records import changed
from varcon_loss.sums import SumSlots, sum_slots

HANDSHAKE = 32  # numbers in it, so that one that fails need not know what it would have said
_DTYPES = (torch.float32, torch.float64)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FIELDS = ("num_classes", "feature width", "dtype", "exchange")


class Plan(NamedTuple):
    """How the ranks exchange their classes: as one of them wants it, or as all have settled it.

    All but the device must be the same on all ranks, since the collectives depend on it.
    """

    num_classes: int | None
    exchange: str  # settled: not "auto"
    dim: int
    dtype: torch.dtype  # in which everything is computed
    device: torch.device
    capacity: int = 0  # settled: classes a rank may send by all-gather; with num_classes


class Plans:
    """What the ranks have settled, by group, then by what the first step wanted.

    Each loss module has its own: where one rank fails, it must join the others in the collective
    of the same loss. Copies start with none.
    """

    def __init__(self) -> None:
        self._by_group: weakref.WeakKeyDictionary[Any, dict[Plan, Plan]] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, group: Any) -> dict[Plan, Plan]:
        """The plans made with ``group``, the latest used last."""
        return self._by_group.setdefault(group, {})

    def __reduce__(self) -> tuple[Any, ...]:
        return Plans, ()

    def __deepcopy__(self, _: Any) -> "Plans":
        return Plans()


PLANS_OF_FUNCTIONS = Plans()


def several_ranks() -> bool:
    """Is this one of several processes of an initialised world?"""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def resolve_group(process_group: Any) -> Any | None:
    """The group to exchange with; None for ``None``, and for ``"world"`` in a single process.

    Raises:
        TypeError: neither ``"world"`` nor a group.
        ValueError: this process is not a member of the group.
    """
    if process_group is None or not dist.is_available():
        return None
    if isinstance(process_group, str):
        return dist.group.WORLD if dist.is_initialized() else None
    if process_group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process is not a member of process_group: do not call the loss here")
    return process_group


def make_plan(
    group: Any,
    plans: Plans,
    wanted: Plan,
    num_held: int,
    settings: Callable[[], Mapping[str, Any]] = dict,
) -> Plan:
    """The plan for this call: settled with all ranks the first time, then remembered.

    Args:
        group: of ranks.
        plans: the loss's.
        wanted: by this call.
        num_held: how many classes this rank's batch can hold, 0 where there is no sample.
        settings: what else ranks should have alike, asked when a plan is settled: numbers, strings
            and tensors.

    Raises:
        ValueError: on every rank, if ranks disagree.
    """
    known = plans.of(group)
    if wanted in known:
        known[wanted] = plan = known.pop(wanted)  # the latest is last
        return plan
    needed = {
        "num_classes": wanted.num_classes or -1,
        "feature width": wanted.dim,
        "dtype": _DTYPES.index(wanted.dtype),
        "exchange": EXCHANGES.index(wanted.exchange),
    }
    told = {name: _as_number(value) for name, value in settings().items()}
    mine = [num_held, *needed.values(), *told.values()]
    held, *columns = zip(*_handshake(group, wanted.device, mine), strict=True)
    for field, values in zip([*needed, *told], columns, strict=False):
        if len(set(values)) > 1:
            raise ValueError(f"ranks disagree on {field} ({_disagreement(field, values)}")
    exchange = wanted.exchange
    if exchange == "auto":
        fits = wanted.num_classes is not None and wanted.num_classes <= sum(held)
        exchange = "all-reduce" if fits else "all-gather"
    capacity = max(1, min(wanted.num_classes or 1, max(held)))
    plan = changed(wanted, exchange=exchange, capacity=capacity)
    if any(held):  # a step without samples tells nothing of the next
        known[wanted] = plan
    return plan


def _disagreement(field: str, values: tuple[int, ...]) -> str:
    if field not in _FIELDS:
        others = [str(rank) for rank, value in enumerate(values) if value != values[0]]
        return (
            f"rank {', '.join(others)} from rank 0): it must be the same on all; a checkpoint must "
            "be loaded by every rank"
        )
    names = {"dtype": _DTYPES, "exchange": EXCHANGES}.get(field)
    listed = ", ".join(
        f"rank {rank}: {names[v] if names else (None if v == -1 else v)}"
        for rank, v in enumerate(values)
    )
    return f"{listed}): it must be the same on all"


def announce_failure(group: Any, plans: Plans, wanted: Plan, *, has_reference: bool) -> None:
    """Take part in the step's collectives with nothing but the news that this rank failed.

    In those of the plan that the others follow: the one for such features, or, where the features
    themselves are what is wrong, or the labels that would tell how many classes there are, the
    latest of this loss.
    """
    known = plans.of(group)
    alike = list(known)
    if wanted.exchange in EXCHANGES:  # else that is what is wrong
        alike = [other for other in alike if other.exchange == wanted.exchange]
    if type(wanted.num_classes) is int:
        alike = [other for other in alike if other.num_classes == wanted.num_classes]
    if wanted not in known and alike:
        wanted = alike[-1]
    if wanted in known:
        exchange_classes(group, known[wanted], None, torch.zeros((), device="cpu"), failed=True)
        failed = torch.ones((), dtype=torch.bool, device=wanted.device)
        if has_reference and not values_may_be_read(failed):  # elsewhere the others have raised
            tell_of_failure(group, failed)
    else:
        _handshake(group, wanted.device, None)


def _as_number(value: Any) -> int:
    """Equal numbers for equal values, bit by bit."""
    if isinstance(value, Tensor):
        if value.numel() == 0:
            return 0
        bits = value.detach().contiguous().view(_INTEGERS[value.element_size()])
        sums = bits.view(len(value), -1).sum(1, dtype=torch.int64)
        return int((sums * torch.arange(1, len(sums) + 1, device=sums.device)).sum())
    if isinstance(value, float):
        return int.from_bytes(struct.pack("<d", value), "little", signed=True)
    if isinstance(value, str):
        return zlib.crc32(value.encode())
    return -1 if value is None else int(value)


def _handshake(group: Any, device: torch.device, mine: list[int] | None) -> list[list[int]]:
    """Every rank's numbers; None where this one fails, and only tells so."""
    numbers = [int(mine is None), *(mine or [])]
    assert len(numbers) <= HANDSHAKE
    numbers += [0] * (HANDSHAKE - len(numbers))
    sent = torch.tensor(numbers, dtype=torch.int64, device=device)
    received = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(received, sent, group=group)
    everyone = [values.tolist() for values in received]
    if mine is not None:
        _raise_for([failed for failed, *_ in everyone])
    return [told for _, *told in everyone]


def _raise_for(failed: list[Any]) -> None:
    ranks = [str(rank) for rank, status in enumerate(failed) if status]
    if ranks:
        raise RuntimeError(
            f"VarCon's exchange failed on rank {', '.join(ranks)}: see the error raised there"
        )


def tell_of_failure(group: Any, failed: Tensor) -> Tensor:
    """Did any rank fail after the exchange? ``failed`` 0-d bool, of this one.

    Raises:
        RuntimeError: another rank did and this one did not, on a CPU in eager mode.
    """
    statuses = torch.zeros(dist.get_world_size(group), device=failed.device)
    statuses[dist.get_rank(group)] = failed
    dist.all_reduce(statuses, group=group)
    if values_may_be_read(failed) and not failed:
        _raise_for(statuses.tolist())
    return statuses.sum() > 0


def exchange_classes(
    group: Any,
    plan: Plan,
    classes: Classes | None,
    denominator: Tensor,
    *,
    sum_slots: SumSlots = sum_slots,
    broken: Tensor | None = None,
    failed: bool = False,
) -> tuple[Classes, Tensor]:
    """Sum over ranks what each says about its classes.

    Args:
        group: of ranks.
        plan: from `make_plan`.
        classes: this rank's; None where it adds nothing.
        denominator: 0-d, this rank's part of that of the mean.
        sum_slots: how the implementation that was chosen sums the rows of all ranks.
        broken: 0-d bool, does a label here make the loss NaN? Then it is NaN on all ranks.
        failed: tell the others, and return nothing of use.

    Returns:
        The classes of all ranks, as each of them sees it, and the denominator over ranks.

    Raises:
        RuntimeError: on a CPU, naming the rank, if another rank failed. Elsewhere everything
            becomes NaN, since looking would synchronise.
        ValueError: this rank holds more classes than the first step made room for.
    """
    empty = torch.zeros(1, plan.dim, dtype=plan.dtype, device=plan.device)
    sums, counts, labels = empty, empty[:, 0], torch.zeros_like(empty[:, 0], dtype=torch.int64)
    if classes is not None:
        sums, counts, labels = classes.sums, classes.known_counts(), classes.slot_labels()
    local = torch.cat([sums, counts.unsqueeze(1)], dim=1)  # [S_local, D + 1]
    denominator = denominator.to(plan.device, plan.dtype)
    status = failed if broken is None else broken
    if plan.exchange == "all-reduce":
        merged, total, statuses = _by_all_reduce(group, plan, local, labels, denominator, status)
    else:
        capacity = plan.capacity
        if plan.num_classes is None:
            largest = torch.tensor(len(local), device=plan.device)
            if classes is not None and classes.lookup.num_present is not None:
                largest = classes.lookup.num_present.clone()  # the slots after them are empty
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
            capacity = max(1, int(largest))
        crowded = plan.num_classes is not None and len(local) > capacity
        # Row 0 carries the status and the denominator.
        values = local.new_zeros(capacity + 1, plan.dim + 1)
        values[1 : len(local) + 1] = local[:capacity]
        values[0, 0] = denominator
        names = labels.new_zeros(capacity + 1)
        names[1 : len(labels) + 1] = labels[:capacity]
        names[0] = True if crowded else status
        merged, total, statuses = _by_all_gather(group, plan, values, names, sum_slots)
        if crowded:
            raise ValueError(
                f"rank {dist.get_rank(group)} holds up to {len(local)} classes, but the first step "
                f"made room for {capacity} a rank, all that its largest batch could hold: start "
                "with a full batch, or, where class probabilities follow on integer labels, choose "
                "exchange='all-reduce'"
            )
    if failed:
        return merged, total
    if values_may_be_read(statuses):
        _raise_for(statuses.tolist())
        return merged, total
    anywhere = statuses.sum() > 0
    return changed(
        merged, sums=merged.sums.masked_fill(anywhere, torch.nan), failed=anywhere
    ), total


def _by_all_reduce(
    group: Any,
    plan: Plan,
    local: Tensor,
    labels: Tensor,
    denominator: Tensor,
    status: Tensor | bool,
) -> tuple[Classes, Tensor, Tensor]:
    """Classes and denominator of all ranks, and which of them failed ``[W]``."""
    assert plan.num_classes is not None
    num_ranks, width, num_classes = dist.get_world_size(group), plan.dim + 1, plan.num_classes
    tail_rows = -(-(num_ranks + 1) // width)  # a status for each rank, and the denominator
    # Empty slots add zeros to some class.
    table = sum_slots(local, labels, None, num_classes + tail_rows)
    tail = table[num_classes:].view(-1)
    tail[dist.get_rank(group)] = status
    tail[num_ranks] = denominator
    dist.all_reduce(table, group=group)
    sums, counts = table[:num_classes, :-1], table[:num_classes, -1]
    merged = Classes(
        lookup=ClassIndex(size=num_classes, gaps="anywhere", present=counts > 0),
        sums=sums.contiguous(),
        counts=counts.contiguous(),
    )
    return merged, tail[num_ranks], tail[:num_ranks]


def _by_all_gather(
    group: Any, plan: Plan, values: Tensor, names: Tensor, sum_slots: SumSlots
) -> tuple[Classes, Tensor, Tensor]:
    """Classes and denominator of all ranks, and which of them failed ``[W]``.

    Args:
        group: of ranks.
        plan: from `make_plan`.
        values: ``[P + 1, D + 1]`` of this rank: a row for the denominator, then sums and counts.
        names: ``[P + 1]`` int64: whether it failed, then the labels of those rows.
        sum_slots: as above.
    """
    # Labels travel as bytes: float32 would round them.
    packed = torch.cat([_bytes(names.unsqueeze(1)), _bytes(values)], dim=1)
    num_ranks = dist.get_world_size(group)
    gathered = packed.new_empty(num_ranks * len(packed), packed.shape[1])
    # The name since torch 2.14, and the one before it, which warns since then.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(gathered, packed, group=group)

    gathered = gathered.view(num_ranks, len(packed), -1)
    names = gathered[:, :, :8].contiguous().view(torch.int64).squeeze(2)  # [W, P + 1]
    values = gathered[:, :, 8:].contiguous().view(plan.dtype)  # [W, P + 1, D + 1]
    rows = values[:, 1:].reshape(-1, plan.dim + 1)
    valid = rows[:, -1] > 0
    labels = names[:, 1:].reshape(-1).masked_fill(~valid, 0)
    index, slots = index_classes(labels, valid, plan.num_classes)
    totals = sum_slots(rows, slots, valid, index.size)
    counts = totals[:, -1].contiguous()
    merged = Classes(
        lookup=index.among(counts),
        sums=totals[:, :-1].contiguous(),
        counts=counts,
    )
    return merged, values[:, 0, 0].sum(), names[:, 0]


def _bytes(tensor: Tensor) -> Tensor:
    """``[R, M]`` of any dtype -> ``[R, M * itemsize]`` uint8."""
    return tensor.contiguous().view(torch.uint8)
