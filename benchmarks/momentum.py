"""Which momentum of the centroid memory suits which batch size and number of classes?"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from benchmarks.common import options, plots
from benchmarks.common.cells import Cell, Store, deadline_of, run_cells
from benchmarks.common.paired import interval
from benchmarks.common.terminal import print_table, written


def command(
    momenta: Annotated[str, typer.Option(help="of the centroid memory")] = "0.5,0.9,0.99,0.999",
    batch_sizes: options.BatchSizes = "16,64,256",
    classes: Annotated[str, typer.Option(help="numbers of classes")] = "20,100",
    seeds: options.Seeds = 5,
    epochs: options.Epochs = 12,
    learning_rate: Annotated[float, typer.Option(help="the same for all")] = 0.15,
    budget: options.Budget = 0.0,
    workers: options.Workers = 2,
    device: options.Device = "cpu",
    out: options.Out = Path("runs/quality"),
) -> None:
    """A good momentum of the centroid memory for a batch size and number of classes."""
    options.require(device)
    store = Store(out / "momentum.jsonl")
    rows = sweep(
        options.floats(momenta),
        options.integers(batch_sizes),
        options.integers(classes),
        seeds,
        epochs,
        learning_rate,
        store,
        workers=workers,
        device=device,
        budget=budget,
    )
    means = summary(rows)
    columns, lines = by_momentum(means)
    print_table("mean of linear probe and kNN, validation split, %", columns, lines)
    means.to_csv(out / "momentum.csv", index=False)
    written(store.path, out / "momentum.csv", plots.draw_momentum(means, out))


def sweep(
    momenta: Sequence[float],
    batch_sizes: Sequence[int],
    classes: Sequence[int],
    seeds: int,
    epochs: int,
    learning_rate: float,
    store: Store,
    *,
    workers: int,
    device: str = "cpu",
    budget: float = 0.0,
) -> list[dict[str, Any]]:
    """Which momentum suits which batch size and number of classes, on ``mnist-pairs``.

    At one learning rate, on the validation split: this chooses a default, it reports no accuracy.
    """
    cells = [
        Cell(
            "mnist-pairs",
            "VarCon memory",
            size,
            learning_rate,
            seed,
            "validation",
            epochs,
            momentum=momentum,
            classes=k,
        )
        for seed, k, size, momentum in itertools.product(
            range(seeds), classes, batch_sizes, momenta
        )
    ]
    return run_cells(
        cells, store, workers=workers, device=device, title="momentum",
        deadline=deadline_of(budget),
    )  # fmt: skip


def summary(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Linear probe plus kNN, halved: mean and half-width by classes, batch size and momentum."""
    frame = pd.DataFrame(rows).dropna(subset=["momentum"])
    frame["score"] = (frame["linear"] + frame["knn"]) / 2
    table = []
    for keys, group in frame.groupby(["classes", "batch_size", "momentum"]):
        mean, half = interval(group["score"])
        table.append(
            dict(zip(("classes", "batch_size", "momentum"), keys, strict=True), mean=mean,
                 half_width=half, seeds=len(group))
        )  # fmt: skip
    return pd.DataFrame(table)


def by_momentum(means: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """A `summary` as a table for people, in percent: a line a problem, a column a momentum."""
    momenta = sorted(means["momentum"].unique())
    lines = []
    for (classes, size), part in means.groupby(["classes", "batch_size"]):
        found = part.set_index("momentum")
        cells = [
            f"{100 * found.loc[m, 'mean']:.1f} ± {100 * found.loc[m, 'half_width']:.1f}"
            if m in found.index
            else ""
            for m in momenta
        ]
        lines.append([f"{classes:.0f}", str(size), *cells])
    return ["classes", "batch", *(f"momentum {m:g}" for m in momenta)], lines
