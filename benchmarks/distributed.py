"""What centroids over ranks cost in bytes and time, measured on gloo, then extrapolated.

Bytes are read from the network interfaces' own counters, so they are what was really sent.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.ranks import run_ranks
from benchmarks.supcon import supcon_loss
from varcon_loss import VarConLoss, varcon_loss

Step = Callable[[Tensor, Tensor], Tensor]


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


def contenders(num_classes: int) -> dict[str, Step]:
    """The ways compared; all but SupCon compute the same loss."""
    ours = {
        f"varcon-loss, {exchange}": VarConLoss(
            num_classes=num_classes, process_group="world", exchange=exchange
        )
        for exchange in ("all-reduce", "all-gather")
    }
    return {
        **ours,
        "VarCon, embeddings gathered": gather_everything(varcon_loss),
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
    for name, step in contenders(num_classes).items():
        gradient = _step(step, features, labels)
        if "SupCon" not in name:
            # The gradient before DDP's averaging; the value is scaled in ways of their own.
            expected = gradient.clone() if expected is None else expected
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)
        dist.barrier()
        before, start = _sent_bytes(), time.perf_counter()
        for _ in range(steps):
            _step(step, features, labels)
        dist.barrier()
        seconds = (time.perf_counter() - start) / steps
        sent = (_sent_bytes() - before) / steps / world_size
        rows.append(
            {
                "contender": name,
                "ranks": world_size,
                "N_local": num_rows,
                "C": num_classes,
                "D": dim,
                "bytes_per_rank": sent,
                "bytes_by_model": model_bytes(name, world_size, num_rows, num_classes, dim),
                "seconds": seconds,
            }
        )
        dist.barrier()
    return rows


def _step(step: Step, features: Tensor, labels: Tensor) -> Tensor:
    features.grad = None
    step(features, labels).backward()
    assert features.grad is not None
    return features.grad


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


def extrapolate(num_rows: int = 256, dim: int = 128) -> list[dict[str, Any]]:
    """Bytes, memory and arithmetic a rank, by `model_bytes`, for 8 to 1024 ranks."""
    rows = []
    for ranks in (8, 64, 256, 1024):
        for num_classes in (1_000, 10_000, 100_000, 1_000_000):
            everyone = ranks * num_rows
            present = min(num_classes, everyone)
            ways = {
                # bytes held beyond the local features, and floating-point operations of the rows
                "varcon-loss, all-reduce": (
                    4 * num_classes * (dim + 1),
                    4 * num_rows * present * dim,
                ),
                "varcon-loss, all-gather": (
                    ranks * min(num_rows, num_classes) * (8 + 4 * (dim + 1)),
                    4 * num_rows * present * dim,
                ),
                "VarCon, embeddings gathered": (4 * everyone * dim, 4 * everyone * present * dim),
                "SupCon, embeddings gathered": (4 * everyone**2, 4 * everyone**2 * dim),
            }
            for name, (memory, operations) in ways.items():
                rows.append(
                    {
                        "contender": name,
                        "ranks": ranks,
                        "C": num_classes,
                        "MB sent": model_bytes(name, ranks, num_rows, num_classes, dim) / 1e6,
                        "MB held": memory / 1e6,
                        "GFLOP": operations / 1e9,
                    }
                )
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bytes sent a rank over classes, a panel for each number of ranks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import pandas as pd

    frame = pd.DataFrame(rows)
    ranks = sorted(frame["ranks"].unique())
    figure, axes = plt.subplots(1, len(ranks), figsize=(4.4 * len(ranks), 4), sharey=True)
    for axis, count in zip(axes, ranks, strict=True):
        for name, line in frame[frame["ranks"] == count].groupby("contender", sort=False):
            axis.plot(line["C"], line["MB sent"], marker="o", label=name)
        axis.set(
            title=f"{count} ranks, 256 samples each", xscale="log", yscale="log", xlabel="classes C"
        )
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("MB sent a rank and step (model)")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
