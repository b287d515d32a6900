"""Centroids over all ranks of a process group, for one collective a step.

No gradient flows through centroids, so ranks need each other's class sums and counts, never each
other's embeddings, and backward needs no communication at all. Two ways to exchange them:

``"all-reduce"``   ``[C, D + 1]`` sums and counts of every class; best for ``C <= N_global``.
``"all-gather"``   ``(label, sum, count)`` of the classes each rank holds, padded to the largest
                   number that a rank can hold; best for many classes, and for unknown ones.

Both carry along what every rank must know of the others: the weight of its samples, and whether it
failed before the exchange, so that an error on one rank is an error on all and not a hang.
"""

import weakref
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from varcon_loss.centroids import SumSlots, sum_by_slot
from varcon_loss.labels import ClassIndex, Labels, classes_of_slots, index_classes
from varcon_loss.matching import ClassSummary
from varcon_loss.readable import values_may_be_read

_DTYPES = (torch.float32, torch.float64)
_FIELDS = ("num_classes", "feature width", "dtype", "exchange")


class Plan(NamedTuple):
    """What all ranks agreed on in their first step."""

    group: Any
    rank: int
    world_size: int
    num_classes: int | None
    dim: int
    dtype: torch.dtype
    device: torch.device
    all_reduce: bool
    capacity: int  # classes a rank may send by all-gather; with num_classes


class Exchanged(NamedTuple):
    """The classes of all ranks, as each of them sees it."""

    summary: ClassSummary  # `slots` are those of no sample: look anchors up in `index`
    classes: Tensor  # [S] label of each slot, 0 where empty
    weight: Tensor  # 0-d, summed over ranks
    world_size: int


class Plans:
    """What the ranks agreed on, by group, then by what the first step was called with.

    Each loss module has its own: where one rank fails, it must join the others in the collective
    of the same loss. Copies start with none.
    """

    def __init__(self) -> None:
        self._by_group: weakref.WeakKeyDictionary[Any, dict[_Key, Plan]] = (
            weakref.WeakKeyDictionary()
        )

    def of(self, group: Any) -> "dict[_Key, Plan]":
        """The plans made with ``group``, the latest used last."""
        return self._by_group.setdefault(group, {})

    def __reduce__(self) -> tuple[Any, ...]:
        return Plans, ()

    def __deepcopy__(self, _: Any) -> "Plans":
        return Plans()


class _Key(NamedTuple):
    num_classes: int | None
    exchange: str
    dim: int
    dtype: torch.dtype
    device: torch.device


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
    *,
    num_classes: int | None,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    num_rows: int,
    exchange: str,
) -> Plan:
    """The plan for this call: made together with all ranks the first time, then remembered.

    Raises:
        ValueError: on every rank, if ranks disagree on what the collectives depend on.
    """
    known = plans.of(group)
    key = _Key(num_classes, exchange, dim, dtype, device)
    if key in known:
        known[key] = plan = known.pop(key)  # the latest is last
        return plan
    modes = ("auto", "all-reduce", "all-gather")
    mine = [0, num_classes or -1, dim, _DTYPES.index(dtype), modes.index(exchange), num_rows]
    everyone = _handshake(group, device, mine)
    for field, values in zip(_FIELDS, list(zip(*everyone, strict=True))[1:5], strict=True):
        if len(set(values)) > 1:
            names = {"dtype": _DTYPES, "exchange": modes}.get(field)
            listed = ", ".join(
                f"rank {rank}: {names[v] if names else (None if v == -1 else v)}"
                for rank, v in enumerate(values)
            )
            raise ValueError(f"ranks disagree on {field} ({listed}): it must be the same on all")
    rows = [values[5] for values in everyone]
    all_reduce = exchange == "all-reduce"
    if exchange == "auto":
        all_reduce = num_classes is not None and num_classes <= sum(rows)
    known[key] = Plan(
        group,
        dist.get_rank(group),
        len(everyone),
        num_classes,
        dim,
        dtype,
        device,
        all_reduce,
        max(1, min(num_classes or 1, max(rows))),
    )
    return known[key]


def announce_failure(
    group: Any,
    plans: Plans,
    *,
    num_classes: int | None,
    exchange: str,
    features: Any,
    ref_features: Any,
) -> None:
    """Take part in the step's collectives with nothing but the news that this rank failed.

    In those of the plan that the others follow: the one for such features, or, where the features
    themselves are what is wrong, the latest of this loss.
    """
    sets = [x for x in (features, ref_features) if isinstance(x, Tensor)]
    device = sets[0].device if sets else torch.device("cpu")
    dim = sets[0].shape[1 if sets[0].ndim == 2 else 2 :].numel() if sets else 0
    dtype = torch.float32
    for x in sets:
        dtype = torch.promote_types(dtype, x.dtype)
    known = plans.of(group)
    alike = [key for key in known if key[:2] == (num_classes, exchange)]
    key = _Key(num_classes, exchange, dim, dtype, device)
    if key not in known and alike:
        key = alike[-1]
    if key in known:
        exchange_classes(known[key], None, None, torch.zeros(()), failed=True)
    else:
        _handshake(group, device, [1, 0, 0, 0, 0, 0], raises=False)


def _handshake(group: Any, device: torch.device, mine: list[int], raises: bool = True) -> list:
    sent = torch.tensor(mine, dtype=torch.int64, device=device)
    received = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(received, sent, group=group)
    everyone = [values.tolist() for values in received]
    if raises:
        _raise_for([values[0] for values in everyone])
    return everyone


def _raise_for(failed: list[Any]) -> None:
    ranks = [str(rank) for rank, status in enumerate(failed) if status]
    if ranks:
        raise RuntimeError(
            f"VarCon's exchange failed on rank {', '.join(ranks)}: see the error raised there"
        )


def exchange_classes(
    plan: Plan,
    summary: ClassSummary | None,
    labels: Labels | None,
    weight: Tensor,
    *,
    sum_slots: SumSlots = sum_by_slot,
    failed: bool = False,
) -> Exchanged:
    """Sum over ranks what each says about its classes.

    Args:
        plan: from `make_plan`.
        summary: this rank's; None where it adds nothing.
        labels: the labels that ``summary`` was made of.
        weight: 0-d, this rank's share of the denominator of the mean.
        sum_slots: how the implementation that was chosen sums the rows of all ranks.
        failed: tell the others, and return nothing of use.

    Raises:
        RuntimeError: on a CPU, naming the rank, if another rank failed. Elsewhere everything
            becomes NaN, since looking would synchronise.
        ValueError: this rank holds more classes than the first step made room for.
    """
    empty = torch.zeros(1, plan.dim, dtype=plan.dtype, device=plan.device)
    sums, counts, classes = empty, empty[:, 0], torch.zeros_like(empty[:, 0], dtype=torch.int64)
    if summary is not None and labels is not None:
        assert summary.counts is not None
        sums, counts = summary.sums, summary.counts
        classes = classes_of_slots(labels, summary.slots, summary.classes.size)
    local = torch.cat([sums, counts.unsqueeze(1)], dim=1)  # [S_local, D + 1]
    weight = weight.to(plan.device, plan.dtype)
    if plan.all_reduce:
        exchanged, statuses = _by_all_reduce(plan, local, classes, weight, failed)
    else:
        capacity = plan.capacity
        if plan.num_classes is None:
            largest = torch.tensor(len(local), device=plan.device)
            if summary is not None and summary.classes.num_present is not None:
                largest = summary.classes.num_present.clone()  # the slots after them are empty
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=plan.group)
            capacity = max(1, int(largest))
        crowded = plan.num_classes is not None and len(local) > capacity
        exchanged, statuses = _by_all_gather(
            plan,
            local[:capacity],
            classes[:capacity],
            weight,
            capacity,
            failed or crowded,
            sum_slots,
        )
        if crowded:
            raise ValueError(
                f"rank {plan.rank} holds up to {len(local)} classes, but the first step made room "
                f"for {capacity} a rank, all that its largest batch could hold: start with a full "
                "batch, or choose exchange='all-reduce'"
            )
    if failed:
        return exchanged
    if values_may_be_read(statuses):
        _raise_for(statuses.tolist())
        return exchanged
    poison = torch.where(statuses.sum() > 0, torch.nan, 0.0).to(plan.dtype)
    summary = exchanged.summary._replace(sums=exchanged.summary.sums + poison)
    return exchanged._replace(summary=summary)


def _by_all_reduce(
    plan: Plan, local: Tensor, classes: Tensor, weight: Tensor, failed: bool
) -> tuple[Exchanged, Tensor]:
    assert plan.num_classes is not None
    width, num_classes = plan.dim + 1, plan.num_classes
    tail_rows = -(-(plan.world_size + 1) // width)  # a status for each rank, and the weight
    table = torch.zeros(num_classes + tail_rows, width, dtype=plan.dtype, device=plan.device)
    table.index_add_(0, classes, local)  # empty slots add zeros to class 0
    tail = table[num_classes:].view(-1)
    tail[plan.rank] = float(failed)
    tail[plan.world_size] = weight
    dist.all_reduce(table, group=plan.group)
    sums, counts = table[:num_classes, :-1], table[:num_classes, -1]
    every = torch.arange(num_classes, device=plan.device)
    index = ClassIndex(num_classes, True, torch.where(counts > 0, every, -1), None, False)
    summary = ClassSummary(index, every, sums.contiguous(), counts.contiguous())
    exchanged = Exchanged(summary, every, tail[plan.world_size], plan.world_size)
    return exchanged, tail[: plan.world_size]


def _by_all_gather(
    plan: Plan,
    local: Tensor,
    classes: Tensor,
    weight: Tensor,
    capacity: int,
    failed: bool,
    sum_slots: SumSlots,
) -> tuple[Exchanged, Tensor]:
    # Row 0 carries the status and the weight. Labels travel as bytes: float32 would round them.
    values = local.new_zeros(capacity + 1, plan.dim + 1)
    values[1 : len(local) + 1] = local
    values[0, 0] = weight
    names = classes.new_zeros(capacity + 1)
    names[1 : len(classes) + 1] = classes
    names[0] = int(failed)
    packed = torch.cat([_bytes(names.unsqueeze(1)), _bytes(values)], dim=1)
    gathered = packed.new_empty(plan.world_size * len(packed), packed.shape[1])
    # The name since torch 2.14, and the one before it, which warns since then.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(gathered, packed, group=plan.group)

    gathered = gathered.view(plan.world_size, capacity + 1, -1)
    names = gathered[:, :, :8].contiguous().view(torch.int64).squeeze(2)  # [W, P + 1]
    values = gathered[:, :, 8:].contiguous().view(plan.dtype)  # [W, P + 1, D + 1]
    rows = values[:, 1:].reshape(-1, plan.dim + 1)
    valid = rows[:, -1] > 0
    labels = Labels(names[:, 1:].reshape(-1).masked_fill(~valid, 0), valid, None)
    index, slots = index_classes(labels, plan.num_classes)
    totals = sum_slots(rows, slots, valid, index.size)
    summary = ClassSummary(index, slots, totals[:, :-1].contiguous(), totals[:, -1].contiguous())
    classes = classes_of_slots(labels, slots, index.size)
    exchanged = Exchanged(summary, classes, values[:, 0, 0].sum(), plan.world_size)
    return exchanged, names[:, 0]


def _bytes(tensor: Tensor) -> Tensor:
    """``[R, M]`` of any dtype -> ``[R, M * itemsize]`` uint8."""
    return tensor.contiguous().view(torch.uint8)
