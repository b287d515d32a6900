"""Do the features survive corrupted images, other data than they were trained on, few labels?"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from benchmarks.common import options, plots
from benchmarks.common.cells import Cell, Store, tune_and_run
from benchmarks.common.paired import summary, text
from benchmarks.common.probes import CORRUPTIONS, SEVERITIES
from benchmarks.common.terminal import print_table, written

KINDS = ("corruption", "transfer", "few-shot")
METHODS = "cross-entropy,SupCon,SINCERE,NormFace,VarCon,VarCon memory"


def command(
    kind: Annotated[str, typer.Argument(help=", ".join(KINDS))],
    data: options.Data = "mnist5k",
    methods: options.Methods = METHODS,
    batch_size: Annotated[int, typer.Option(min=2, help="images a step")] = 256,
    learning_rates: options.LearningRates = "0.05,0.15,0.45",
    seeds: options.Seeds = 5,
    epochs: options.Epochs = 12,
    budget: options.Budget = 0.0,
    workers: options.Workers = 2,
    root: options.Root = None,
    device: options.Device = "cpu",
    out: options.Out = Path("runs/robustness"),
) -> None:
    """A linear probe on clean images, tried on corrupted ones; or further probes.

    Corruption: noise, blur, contrast, brightness, shift and occlusion at five severities. Transfer:
    the encoder, frozen, is read out on the other data sets at hand. Few-shot: it is read out by
    one and by five labelled images of each class, drawn twenty times.
    """
    options.require(device)
    if kind not in KINDS:
        raise typer.BadParameter(f"one of {', '.join(KINDS)}, got {kind!r}")
    options.loaded(data, root)
    base = Cell(data, "", batch_size, 0.0, 0, "test", epochs, extra=kind)
    bases = [replace(base, method=method) for method in options.chosen_methods(methods)]
    store = Store(out / f"{kind}-{data}.jsonl")
    rows = tune_and_run(
        bases, options.floats(learning_rates), seeds, store, workers=workers, root=root,
        device=device, budget=budget, title=f"{data}: {kind}",
    )  # fmt: skip
    table = tabulate(rows)
    parts = list(dict.fromkeys(table["readout"]))
    if kind == "corruption":
        parts = ["linear", *(f"{name}, mean" for name in CORRUPTIONS)]
    print_table(
        f"{data}, batch {batch_size}: read-outs, %, mean ± 95 % interval (difference from "
        "SupCon)" + (f"; means over {len(SEVERITIES)} severities" if kind == "corruption" else ""),
        ["method", *parts],
        [
            [method, *(text(mine[mine["readout"] == part]) for part in parts)]
            for method, mine in table.groupby("method", sort=False)
        ],
    )
    table.to_csv(store.path.with_suffix(".csv"), index=False)
    written(store.path, store.path.with_suffix(".csv"))
    draw = plots.draw_corruption if kind == "corruption" else plots.draw_transfer
    written(draw(table, out / f"{kind}-{data}.png"))


def tabulate(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """A `summary` of the linear probe and of each further read-out that the rows carry."""
    rows = [row | (row.get("further") or {}) for row in rows]
    keys = dict.fromkeys(key for row in rows for key in (row.get("further") or {}))
    for name in CORRUPTIONS:
        for row in rows:
            values = [row[f"{name}, {s}"] for s in SEVERITIES if f"{name}, {s}" in row]
            if values:
                row[f"{name}, mean"] = sum(values) / len(values)
                keys[f"{name}, mean"] = None
    return pd.concat(
        [summary(rows, key).assign(readout=key) for key in ("linear", *keys)], ignore_index=True
    )
