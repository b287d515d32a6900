"""Classes over all ranks of a process group, for one collective a step and none in backward.

No gradient flows through centroids, so ranks need each other's class sums and counts, never each
other's embeddings. A table ``[C, D + 1]`` of all classes is summed where ``C`` is at most the
number of samples of all ranks; else the rows of the classes that each rank holds are gathered. A
rank that raises ends the job, as in DistributedDataParallel.
"""

import ctypes
import sys
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from varcon_loss.centroids import Classes, Table, add_rows, name_rows
from varcon_loss.labels import Labels
from varcon_loss.readable import values_may_be_read


def group_of(process_group: Any) -> Any | None:
    """The ranks to add up over; None: only this process.

    Raises:
        ValueError: this process is not a member of the group.
    """
    if process_group is None or not dist.is_available():
        return None
    if isinstance(process_group, str):
        return dist.group.WORLD if dist.is_initialized() else None
    if process_group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process is not a member of process_group: do not call the loss here")
    return process_group


def size_of(group: Any) -> int:
    """How many ranks a group has; 1 where there is none."""
    return 1 if group is None else dist.get_world_size(group)


def room_of(
    group: Any, exchanges: Any, num_samples: int, labels: Labels, same: dict[str, Any]
) -> int | None:
    """How ranks add up their classes: agreed on once, at their first step, with their options.

    Args:
        group: of ranks.
        exchanges: what was agreed on before, by group; written to.
        num_samples: of this rank; a later batch must not have more classes.
        labels: of this rank; under class probabilities a sample may be of any class.
        same: what the ranks must have alike: numbers, texts and tensors.

    Returns:
        0: they sum a table of all classes. Else they gather so many rows of each rank; None: as
        many as the largest of each step has.

    Raises:
        ValueError: on every rank, if they disagree.
    """
    known = exchanges.setdefault(group, {})
    num_classes = same["num_classes"]
    key = (num_classes, same["feature width"], same["dtype"])
    if key in known:
        return known[key]
    if labels.shares is not None and num_classes is not None and num_samples > 0:
        num_samples = max(num_samples, num_classes)  # each may be of any class
    # A compiled graph breaks here, once. Where nobody compiles its compiler is not imported: that
    # would keep the process group alive.
    agree: Any = torch.compiler.disable(_agree) if "torch._dynamo" in sys.modules else _agree
    held, room = agree(group, num_samples, same), None
    if num_classes is not None:
        room = 0 if num_classes <= sum(held) else min(num_classes, max(held))
    if any(held):  # a step without samples tells nothing of the next
        known[key] = room
    return room


def _agree(group: Any, num_samples: int, same: dict[str, Any]) -> list[int]:
    """The number of samples of each rank, if all have the rest alike."""
    told = {name: _comparable(value) for name, value in same.items()}
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, (num_samples, told), group=group)
    for name in told:
        values = [theirs.get(name) for _, theirs in everyone]
        if any(value != values[0] for value in values):
            listed = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
            do = "it must be the same on all; a checkpoint must be loaded by every rank"
            raise ValueError(f"ranks disagree on {name} ({listed}): {do}")
    return [samples for samples, _ in everyone]


def _comparable(value: Any) -> Any:
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous()
        bits = ctypes.string_at(flat.data_ptr(), flat.numel() * flat.itemsize)
        return f"{list(value.shape)} with checksum {zlib.crc32(bits)}"
    return value


def over_ranks(
    group: Any, room: int | None, classes: Classes, total: Tensor, num_classes: int | None
) -> tuple[Classes, Tensor]:
    """Sums and counts of all ranks, and the sum of their ``total``, 0-d: in one collective.

    Raises:
        ValueError: this rank has more classes than the first step made room for.
    """
    if room == 0 and num_classes is not None:
        classes = classes.of_all(num_classes)
    counts, names = classes.counts.to(classes.sums.dtype), classes.names
    rows = torch.cat((classes.sums, counts.unsqueeze(1)), dim=1)
    width, everyone = rows.shape[1], dist.get_world_size(group)
    if room == 0:
        flat = torch.cat((rows.flatten(), total.view(1)))
        dist.all_reduce(flat, group=group)
        rows, total = flat[:-1].view_as(rows), flat[-1]
        return _poisoned(Classes(rows[:, :-1].contiguous(), rows[:, -1].contiguous(), None), total)
    if names is None:
        names = torch.arange(rows.shape[0], device=rows.device)
    if room is None:
        largest = torch.tensor(rows.shape[0], device=rows.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        room = int(largest)
    elif rows.shape[0] > room:
        mine = f"rank {dist.get_rank(group)} has up to {rows.shape[0]} classes"
        do = "start with a full batch, and with class probabilities where some batches have them"
        raise ValueError(f"{mine}, but the first step made room for {room} a rank: {do}")
    # Class numbers travel as bits: a float would round them. Row 0 carries the total.
    bits = names.unsqueeze(1).view(rows.dtype)
    sent = rows.new_zeros(room + 1, rows.shape[1] + bits.shape[1])
    sent[1 : rows.shape[0] + 1] = torch.cat((rows, bits), dim=1)
    sent[0, 0] = total
    gathered = sent.new_empty(everyone * sent.shape[0], sent.shape[1])
    # The name since torch 2.14, and the one before it, which warns since then.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(gathered, sent, group=group)
    gathered = gathered.view(-1, room + 1, sent.shape[1])
    names = gathered[:, 1:, width:].contiguous().view(torch.int64).flatten()
    rows = gathered[:, 1:, :width].flatten(0, 1)
    merged = merge(rows[:, :-1], rows[:, -1], names, num_classes)
    return _poisoned(merged, gathered[:, 0, 0].sum())


def _poisoned(classes: Classes, total: Tensor) -> tuple[Classes, Tensor]:
    """Where values may not be read, a total of NaN marks invalid labels: no memory learns them."""
    if values_may_be_read(total):
        return classes, total
    sums = classes.sums.masked_fill(total.isnan(), torch.nan)
    return Classes(sums, classes.counts, classes.names), total


def merge(sums: Tensor, counts: Tensor, names: Tensor, num_classes: int | None) -> Classes:
    """Rows ``[R, D]`` of classes ``[R]``, some of them alike, some empty, added up by class."""
    filled = counts > 0
    names = names.masked_fill(~filled, 0)
    merged = name_rows(names, filled, num_classes)[0]
    size: Any = num_classes if merged is None else merged.shape[0]
    slots = Table(sums, None, merged).find(names)
    rows = torch.cat((sums, counts.unsqueeze(1)), dim=1)
    rows = add_rows(rows.masked_fill(~filled.unsqueeze(1), 0.0), slots, size)
    return Classes(rows[:, :-1].contiguous(), rows[:, -1].contiguous(), merged)
