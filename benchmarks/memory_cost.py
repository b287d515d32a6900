"""What the centroid memory costs, beside plain VarCon and SupCon with a queue of the same bytes."""

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from pytorch_metric_learning.losses import CrossBatchMemory, SupConLoss
from torch import nn

from benchmarks.common import measure, options, results
from benchmarks.common.terminal import print_table, progress_bar, written
from varcon_loss import VarConLoss

CONTENDERS = ("VarCon", "VarCon memory", "SupCon, CrossBatchMemory")


def command(
    rows: Annotated[int, typer.Option(min=2, help="batch size N")] = 512,
    classes: Annotated[str, typer.Option(help="numbers of classes C")] = "1000,100000",
    dim: options.Dim = 128,
    out: options.Out = Path("runs/speed"),
) -> None:
    """The centroid memory beside plain VarCon, and SupCon with a queue of the same bytes."""
    measured = []
    with progress_bar() as bar:
        task = bar.add_task("memory-cost", total=len(options.integers(classes)), note="")
        for num_classes in options.integers(classes):
            bar.update(task, note=f"C = {num_classes:,}")
            measured += compare(rows, num_classes, dim)
            bar.advance(task)
    print_table(
        f"One forward and backward, N = {rows}, D = {dim}",
        ("", "classes C", "time, ms", "peak extra memory, MiB"),
        [(row["contender"], f"{row['C']:,}", *measure.time_and_memory(row)) for row in measured],
    )
    saved = results.save("memory-cost", measured, results.environment(), out)
    written(saved, saved.with_suffix(".csv"))


def compare(num_rows: int, num_classes: int, dim: int) -> list[dict[str, Any]]:
    """Time and peak memory of forward and backward, every class in the memory, a process each."""
    return [
        {
            "contender": name, "N": num_rows, "C": num_classes, "D": dim,
            **measure.in_child(
                _weigh, name, num_rows, num_classes, dim, timeout=300, memory_limit=12 * 2**30
            ),
        }
        for name in CONTENDERS
    ]  # fmt: skip


def _weigh(name: str, num_rows: int, num_classes: int, dim: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, dim, generator=generator, requires_grad=True)
    # As many classes as fit in a batch, so that plain VarCon has its hardest case too.
    y = torch.randperm(max(num_rows, num_classes), generator=generator)[:num_rows] % num_classes
    loss = _full(name, num_classes, dim, generator)
    measure.step(loss, x[:8].detach().requires_grad_(), y[:8])
    before = measure.reset_peak("cpu")
    measure.step(loss, x, y)
    extra = measure.peak("cpu") - before
    times = []
    for _ in range(9):
        x.grad = None
        start = time.perf_counter()
        measure.step(loss, x, y)
        times.append(time.perf_counter() - start)
        if sum(times) > 20:
            break
    return {"median": sorted(times)[len(times) // 2], "peak_bytes": extra}


def _full(name: str, num_classes: int, dim: int, generator: torch.Generator) -> nn.Module:
    if name == "VarCon":
        return VarConLoss(num_classes=num_classes)
    remembered = F.normalize(torch.randn(num_classes, dim, generator=generator), dim=1)
    if name == "VarCon memory":
        loss = VarConLoss(num_classes=num_classes, feature_dim=dim, centroid_momentum=0.99)
        loss.centroids = remembered
        return loss
    queue = CrossBatchMemory(SupConLoss(), dim, memory_size=num_classes)
    queue.embedding_memory.copy_(remembered)  # type: ignore[operator]
    queue.label_memory.copy_(torch.randint(num_classes, (num_classes,), generator=generator))  # type: ignore[operator]
    queue.has_been_filled = True
    return queue
