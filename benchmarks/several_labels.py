"""Can an image have several labels? The two digits of a pair, against binary cross-entropy."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import options
from benchmarks.common.cells import Cell, Store, tune_and_run
from benchmarks.common.methods import SEVERAL
from benchmarks.common.paired import summary, text
from benchmarks.common.several import multi_hot
from benchmarks.common.terminal import print_table, written

TITLES = {
    "linear": "labels right, linear probes",
    "all labels": "images with both labels right, linear probes",
    "average precision": "average precision, linear probes",
    "knn": "labels right, kNN",
}
BASELINE = "binary cross-entropy"
FLOOR = "a probe that says no to every label has 90 % of them right"


def command(
    data: options.Data = "mnist-pairs",
    methods: Annotated[str, typer.Option(help="comma-separated")] = ",".join(SEVERAL),
    batch_size: Annotated[int, typer.Option(min=2, help="images a step")] = 64,
    learning_rates: options.LearningRates = "0.05,0.15,0.45",
    seeds: options.Seeds = 5,
    epochs: options.Epochs = 12,
    budget: options.Budget = 0.0,
    workers: options.Workers = 2,
    root: options.Root = None,
    device: options.Device = "cpu",
    out: options.Out = Path("runs/several-labels"),
) -> None:
    """Encoders trained on two labels an image, out of twenty; then a probe for each label.

    VarCon takes the multi-hot rows, divided by their sums, as class probabilities.
    """
    options.require(device)
    images = options.loaded(data, root)
    chosen = options.names(methods)
    for method in chosen:
        if method not in SEVERAL:
            raise typer.BadParameter(f"methods must be among {', '.join(SEVERAL)}, got {method!r}")
    try:
        multi_hot(images, images.test.labels)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    bases = [
        Cell(data, method, batch_size, 0.0, 0, "test", epochs, several=True) for method in chosen
    ]
    store = Store(out / f"several-labels-{data}.jsonl")
    rows = tune_and_run(
        bases, options.floats(learning_rates), seeds, store, workers=workers, root=root,
        device=device, budget=budget, title=f"{data}: several labels",
    )  # fmt: skip
    print_table(
        f"{data}, two labels an image, batch {batch_size}, %, mean ± 95 % interval (difference "
        f"from {BASELINE}); {FLOOR}",
        ["method", *TITLES.values()],
        lines(rows),
    )
    written(store.path)


def lines(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """A line a method: every read-out, as `paired.text`."""
    tables = [summary(rows, value, BASELINE) for value in TITLES]
    for method in tables[0]["method"]:
        yield [method, *(text(table[table["method"] == method]) for table in tables)]
