"""Which temperature, which epsilon, how many epochs, how strong an augmentation?"""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from benchmarks.common import options, plots
from benchmarks.common.cells import Cell, Store, tune_and_run
from benchmarks.common.paired import TITLES, summary, text
from benchmarks.common.terminal import print_table, written

READOUTS = ("linear", "knn", "class mean", "linear, 5 a class")
CONTRASTIVE = "SupCon,NormFace,VarCon,VarCon memory"
# What may be varied: the values tried, and the methods that have it.
SETTINGS: dict[str, tuple[str, str]] = {
    "temperature": ("0.05,0.07,0.1,0.15,0.2,0.3,0.5", CONTRASTIVE),
    "epsilon": ("0,0.005,0.01,0.02,0.05", "VarCon,VarCon memory"),
    "epochs": ("5,10,20,50,100", "cross-entropy,SupCon,VarCon,VarCon memory"),
    "augmentation": ("weak,default,strong", "cross-entropy,SupCon,VarCon,VarCon memory"),
}


def command(
    vary: Annotated[str, typer.Argument(help=", ".join(SETTINGS))],
    values: Annotated[str, typer.Option(help="comma-separated; a choice by default")] = "",
    data: options.Data = "mnist-pairs",
    methods: options.Methods = "",
    batch_sizes: options.BatchSizes = "64",
    learning_rates: options.LearningRates = "0.05,0.15,0.45,1.35",
    seeds: options.Seeds = 5,
    epochs: options.Epochs = 12,
    budget: options.Budget = 0.0,
    workers: options.Workers = 2,
    root: options.Root = None,
    device: options.Device = "cpu",
    out: options.Out = Path("runs/settings"),
) -> None:
    """Accuracy over the values of one setting, all else as in `quality`.

    The learning rate is chosen anew for each value, on validation images.
    """
    options.require(device)
    if vary not in SETTINGS:
        raise typer.BadParameter(f"vary one of {', '.join(SETTINGS)}, got {vary!r}")
    wanted, by_default = SETTINGS[vary]
    read = {"epochs": options.integers, "augmentation": options.names}.get(vary, options.floats)
    chosen = options.chosen_methods(methods or by_default)
    options.loaded(data, root)
    bases = [
        replace(Cell(data, method, size, 0.0, 0, "test", epochs), **{vary: value})
        for size, value, method in itertools.product(
            options.integers(batch_sizes), read(values or wanted), chosen
        )
    ]
    store = Store(out / f"{vary}-{data}.jsonl")
    rows = tune_and_run(
        bases, options.floats(learning_rates), seeds, store, workers=workers, root=root,
        device=device, budget=budget, title=f"{data}: {vary}",
    )  # fmt: skip
    table = tabulate(rows, vary)
    for (size, value), part in table.groupby(["batch_size", "readout"], sort=False):
        settings = list(dict.fromkeys(part[vary]))
        print_table(
            f"{data}, batch {size}: {TITLES[value]}, %, mean ± 95 % interval (difference from "
            "SupCon)",
            ["method", *(f"{vary} {setting}" for setting in settings)],
            [
                [method, *(text(mine[mine[vary] == setting]) for setting in settings)]
                for method, mine in part.groupby("method", sort=False)
            ],
        )
    table.to_csv(store.path.with_suffix(".csv"), index=False)
    picture = plots.draw_settings(table, vary, out / f"{vary}-{data}.png")
    written(store.path, store.path.with_suffix(".csv"), picture)


def tabulate(rows: list[dict[str, Any]], vary: str) -> pd.DataFrame:
    """Every read-out's `summary`, by the values of the setting."""
    tables = [
        summary(rows, value, by=(vary,)).assign(readout=value)
        for value in READOUTS
        if any(row.get(value) is not None for row in rows)
    ]
    return pd.concat(tables, ignore_index=True)
