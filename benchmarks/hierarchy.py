"""Do similar classes lie near one another? The tree of class means."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import options, plots
from benchmarks.common.cells import Cell, Store, tune_and_run
from benchmarks.common.paired import reported, summary, text
from benchmarks.common.terminal import print_table, written

TITLES = {
    "cophenetic": "cophenetic correlation",
    "groups found": "mutual information with known groups",
}


def command(
    data: options.Data = "fashion",
    methods: options.Methods = "cross-entropy,SupCon,VarCon,VarCon memory",
    batch_size: Annotated[int, typer.Option(min=2, help="images a step")] = 256,
    learning_rates: options.LearningRates = "0.05,0.15,0.45",
    seeds: options.Seeds = 5,
    epochs: options.Epochs = 12,
    budget: options.Budget = 0.0,
    workers: options.Workers = 2,
    root: options.Root = None,
    device: options.Device = "cpu",
    out: options.Out = Path("runs/hierarchy"),
) -> None:
    """Average-linkage tree of the class means of held-out features, by cosine distance.

    How well the tree keeps the distances (cophenetic correlation), and, where classes have known
    groups, how well cutting it finds them (normalised mutual information).
    """
    options.require(device)
    images = options.loaded(data, root)
    base = Cell(data, "", batch_size, 0.0, 0, "test", epochs, extra="hierarchy")
    bases = [replace(base, method=method) for method in options.chosen_methods(methods)]
    store = Store(out / f"hierarchy-{data}.jsonl")
    rows = tune_and_run(
        bases, options.floats(learning_rates), seeds, store, workers=workers, root=root,
        device=device, budget=budget, title=f"{data}: hierarchy",
    )  # fmt: skip
    columns, lines = tabulate(rows)
    print_table(
        f"{data}, batch {batch_size}, percent, mean ± 95 % interval (difference from SupCon)",
        columns,
        lines,
    )
    picture = plots.draw_trees(trees(rows), images.class_names, out / f"hierarchy-{data}.png")
    written(store.path, picture)


def tabulate(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns, and a line a method, of how well the trees keep distances and groups."""
    flat = [row | (row.get("further") or {}) for row in rows]
    parts = [key for key in TITLES if any(key in row for row in flat)]
    tables = [summary(flat, part) for part in parts]
    lines = [
        [method, *(text(table[table["method"] == method]) for table in tables)]
        for method in dict.fromkeys(row["method"] for row in reported(rows))
    ]
    return ["method", *(TITLES[part] for part in parts)], lines


def trees(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The tree of each method's first seed."""
    found = [row for row in reported(rows) if row["seed"] == 0 and row.get("further")]
    return {row["method"]: row["further"]["tree"] for row in found}
