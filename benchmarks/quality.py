"""Which features are better, over batch sizes and shares of wrong labels?"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from rich.console import Console

from benchmarks.common import options, plots
from benchmarks.common.cells import Cell, Store, tune_and_run
from benchmarks.common.methods import MIXABLE
from benchmarks.common.paired import TITLES, summary, text, told_apart
from benchmarks.common.terminal import console, table, written


def command(
    data: options.Data = "mnist-pairs",
    methods: options.Methods = "",
    batch_sizes: options.BatchSizes = "16,64,128,512",
    learning_rates: options.LearningRates = "0.05,0.15,0.45",
    seeds: options.Seeds = 5,
    epochs: options.Epochs = 12,
    noise: Annotated[str, typer.Option(help="shares of wrong training labels")] = "0",
    mixup: Annotated[
        float, typer.Option(min=0, help=f"alpha of mixup, for {', '.join(MIXABLE)} among methods")
    ] = 0.0,
    budget: options.Budget = 0.0,
    workers: options.Workers = 2,
    root: options.Root = None,
    device: options.Device = "cpu",
    out: options.Out = Path("runs/quality"),
) -> None:
    """Linear probe, kNN and few-shot accuracy of each method over batch sizes, with intervals.

    An interrupted sweep goes on where it stopped when the same command is given again.
    """
    options.require(device)
    chosen = options.chosen_methods(methods)
    options.loaded(data, root)
    store = Store(out / f"{data}.jsonl")
    rows = sweep(
        data,
        chosen,
        options.integers(batch_sizes),
        options.floats(learning_rates),
        seeds,
        epochs,
        store,
        noises=options.floats(noise),
        mixup=mixup,
        workers=workers,
        root=root,
        device=device,
        budget=budget,
    )
    rows = told_apart(rows)
    show(rows, console)
    save(rows, out / f"{data}.csv")
    written(store.path, out / f"{data}.csv", *plots.draw_quality(rows, out))


def sweep(
    data: str,
    methods: Sequence[str],
    batch_sizes: Sequence[int],
    learning_rates: Sequence[float],
    seeds: int,
    epochs: int,
    store: Store,
    *,
    noises: Sequence[float] = (0.0,),
    mixup: float = 0.0,
    workers: int = 1,
    root: Path | None = None,
    device: str = "cpu",
    budget: float = 0.0,
) -> list[dict[str, Any]]:
    """Every method at every batch size and share of wrong labels, by `tune_and_run`.

    Methods that cannot be mixed are run without ``mixup``, to compare with.
    """
    bases = [
        Cell(
            data, method, size, 0.0, 0, "test", epochs, noise,
            mixup=mixup if mixup and method in MIXABLE else None,
        )
        for noise, size, method in itertools.product(noises, batch_sizes, methods)
    ]  # fmt: skip
    return tune_and_run(
        bases, learning_rates, seeds, store, workers=workers, root=root, device=device,
        budget=budget, title=data,
    )  # fmt: skip


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Methods over batch sizes, a table for each share of noise and each of the main read-outs."""
    for value in ("linear", "knn", "class mean", "linear, 5 a class"):
        if not any(row.get(value) is not None for row in rows):
            continue
        for noise, part in summary(rows, value).groupby("noise"):
            sizes = sorted(part["batch_size"].unique())
            title = f"{TITLES[value]}, %, mean ± 95 % interval (difference from SupCon)"
            lines = [
                [method, *(text(line[line["batch_size"] == size]) for size in sizes)]
                for method, line in part.groupby("method", sort=False)
            ]
            console.print(
                table(
                    title + (f", {noise:.0%} wrong labels" if noise else ""),
                    ["method", *(f"batch {size}" for size in sizes)],
                    lines,
                )
            )


def save(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Every read-out's `summary` as one CSV."""
    tables = [
        summary(rows, value).assign(readout=value)
        for value in TITLES
        if any(row.get(value) is not None for row in rows)
    ]
    pd.concat(tables).to_csv(path, index=False)
