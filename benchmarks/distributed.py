"""What centroids over ranks cost in bytes and time, measured on gloo, then extrapolated.

Bytes are read from the network interfaces' own counters, so they are what was really sent.
"""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import torch.distributed as dist
import typer
from torch import Tensor

from benchmarks.common import options, plots
from benchmarks.common.ranks import run_ranks
from benchmarks.common.supcon import supcon_loss
from benchmarks.common.sweep import Row, sweep
from benchmarks.common.terminal import print_table, written
from varcon_loss import VarConLoss, varcon_loss

Step = Callable[[Tensor, Tensor], Tensor]

COLUMNS = ("", "ranks", "classes C", "sent a rank, kB", "by the model, kB", "time, ms")
GATHERED = "VarCon, embeddings gathered"


def command(
    ranks: Annotated[str, typer.Option(help="gloo processes on this machine")] = "2,4",
    rows: Annotated[int, typer.Option(min=1, help="samples a rank")] = 256,
    classes: Annotated[str, typer.Option(help="numbers of classes")] = "100,1000,100000",
    dim: options.Dim = 128,
    steps: Annotated[int, typer.Option(min=1, help="steps measured")] = 20,
    out: options.Out = Path("runs/distributed"),
) -> None:
    """Bytes and time of global centroids against gathered embeddings; then 8 to 1024 ranks."""
    pairs = itertools.product(options.integers(ranks), options.integers(classes))
    sizes = [{"ranks": w, "N_local": rows, "C": c, "D": dim} for w, c in pairs]

    def measured(size: Row, *_: object) -> list[Row]:
        return measure(*size.values(), steps, out.absolute() / "work")

    frame = sweep(
        "distributed", sizes, [GATHERED], measured, device="cpu", folder=out, resume=False
    )
    print_table(
        f"A step of {rows} samples a rank, D = {dim}; gloo on one machine, so bytes say more than "
        "times",
        COLUMNS,
        cells(frame),
    )
    picture = plots.draw_bytes(extrapolate(rows, dim), out / "distributed-model.png")
    written(out / "distributed.json", out / "distributed.csv", picture)


def cells(frame: pd.DataFrame) -> list[list[str]]:
    """What was measured, for people, under `COLUMNS`."""
    return [
        [
            row["contender"], str(row["ranks"]), f"{row['C']:,}",
            f"{row['bytes_per_rank'] / 1e3:,.0f}", f"{row['bytes_by_model'] / 1e3:,.0f}",
            f"{row['seconds'] * 1e3:.1f}",
        ]
        for row in frame.to_dict("records")
    ]  # fmt: skip


def gather_everything(loss: Step) -> Step:
    """All embeddings on every rank, every row evaluated there, the local slice differentiated."""

    def step(features: Tensor, labels: Tensor) -> Tensor:
        world_size, rank = dist.get_world_size(), dist.get_rank()
        every = [torch.empty_like(features) for _ in range(world_size)]
        dist.all_gather(every, features.detach().contiguous())
        every[rank] = features
        names = [torch.empty_like(labels) for _ in range(world_size)]
        dist.all_gather(names, labels)
        return loss(torch.cat(every), torch.cat(names)) * world_size

    return step


def contenders(num_classes: int, num_samples: int) -> dict[str, Step]:
    """The ways compared; all but SupCon compute the same loss.

    Ours sums a table of all classes where those are at most the samples of all ranks.
    """
    exchange = "all-reduce" if num_classes <= num_samples else "all-gather"
    return {
        f"varcon-loss, {exchange}": VarConLoss(num_classes=num_classes, process_group="world"),
        GATHERED: gather_everything(varcon_loss),
        "SupCon, embeddings gathered": gather_everything(supcon_loss),
    }


def measure(
    world_size: int, num_rows: int, num_classes: int, dim: int, steps: int, folder: Path
) -> list[dict[str, Any]]:
    """Bytes sent a rank and seconds a step, by contender, after a correctness gate."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("r*"):
        stale.unlink()
    sizes = (num_rows, num_classes, dim, steps)
    return run_ranks(_on_rank, world_size, folder, *sizes, seconds=300)[0]


def _on_rank(
    rank: int, world_size: int, num_rows: int, num_classes: int, dim: int, steps: int
) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(rank)
    features = torch.randn(num_rows, dim, generator=generator, requires_grad=True)
    labels = torch.randint(num_classes, (num_rows,), generator=generator)
    rows, expected = [], None
    for name, loss in contenders(num_classes, world_size * num_rows).items():
        (gradient,) = torch.autograd.grad(loss(features, labels), features)
        if "SupCon" not in name:
            # The gradient before DDP's averaging; the value is scaled in ways of their own.
            expected = gradient if expected is None else expected
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)
        dist.barrier()
        before, start = _sent_bytes(), time.perf_counter()
        for _ in range(steps):
            torch.autograd.grad(loss(features, labels), features)
        dist.barrier()
        seconds = (time.perf_counter() - start) / steps
        sent = (_sent_bytes() - before) / steps / world_size
        model = model_bytes(name, world_size, num_rows, num_classes, dim)
        rows.append(
            {
                "contender": name,
                "bytes_per_rank": sent,
                "bytes_by_model": model,
                "seconds": seconds,
            }
        )
        dist.barrier()
    return rows


def _sent_bytes() -> int:
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    return sum(int(line.partition(":")[2].split()[8]) for line in lines)


def model_bytes(name: str, ranks: int, num_rows: int, num_classes: int, dim: int) -> float:
    """Bytes that a rank sends in a step: ring all-reduce, or each block to every other rank."""
    if name.endswith("all-reduce"):
        return 2 * (ranks - 1) / ranks * 4 * (num_classes + 1) * (dim + 1)
    if name.endswith("all-gather"):
        held = min(num_rows, num_classes) + 1
        return (ranks - 1) * held * (8 + 4 * (dim + 1))
    return (ranks - 1) * num_rows * (4 * dim + 8)


def extrapolate(num_rows: int = 256, dim: int = 128) -> pd.DataFrame:
    """MB that a rank sends in a step, by `model_bytes`, for 8 to 1024 ranks."""
    ways = ("varcon-loss, all-reduce", "varcon-loss, all-gather", GATHERED)
    rows = [
        (way, ranks, c, model_bytes(way, ranks, num_rows, c, dim) / 1e6)
        for ranks in (8, 64, 256, 1024)
        for way in ways
        for c in (1_000, 10_000, 100_000, 1_000_000)
    ]
    return pd.DataFrame(rows, columns=["contender", "ranks", "C", "MB sent"])
