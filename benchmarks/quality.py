"""What each objective's features are worth: many small runs, paired by seed.

A *cell* is one training run with its read-outs. Cells are appended to a file as they finish, so an
interrupted sweep goes on where it stopped and a crash loses at most the cells under way.
"""

import itertools
import json
import multiprocessing
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import Tensor

from benchmarks import results
from benchmarks.data import ImageData, Split, load
from benchmarks.progress import progress_bar
from benchmarks.readouts import (
    accuracy,
    centroid_predictions,
    knn_predictions,
    linear_predictions,
)
from benchmarks.training import Recipe, Run, encode, train

READOUTS = {"linear": "linear probe", "knn": "kNN", "centroids": "nearest remembered centroid"}
DETAILS = {
    **{f"linear, {n} a class": f"linear probe on {n} images a class" for n in (1, 5, 10)},
    **{f"{side} digit": f"linear probe, {side} digit alone" for side in ("left", "right")},
}
FEW_SHOTS = (1, 5, 10)  # labelled images a class for the few-shot probes
TUNING_SEED = 1000  # apart from the seeds that are reported


@dataclass(frozen=True)
class Cell:
    """What names a run: two runs with equal cells are the same run."""

    data: str
    method: str
    batch_size: int
    learning_rate: float
    seed: int
    split: str  # "validation" for choosing the learning rate, "test" for what is reported
    epochs: int
    noise: float = 0.0  # share of training labels replaced by another class
    momentum: float | None = None  # of the centroid memory, where not the method's own
    classes: int | None = None  # only the first so many classes


def run_cell(cell: Cell, root: Path | None = None, device: str = "cpu") -> dict[str, Any]:
    """Train and read out; everything about the run as one flat row."""
    data = _first_classes(load(cell.data, root), cell.classes)
    recipe = Recipe(
        epochs=cell.epochs,
        batch_size=cell.batch_size,
        learning_rate=cell.learning_rate,
        centroid_momentum=cell.momentum,
    )
    labels = _with_noise(data.train.labels, data.num_classes, cell.noise, cell.seed)
    start = time.perf_counter()
    run = train(data, cell.method, recipe, cell.seed, labels=labels, device=device)
    seconds = time.perf_counter() - start
    held_out = data.test if cell.split == "test" else data.validation
    row = {**asdict(cell), "seconds": round(seconds, 1), "collapsed": run.collapsed}
    row |= _read_out(run, data, held_out, labels, device)
    row["history"] = [{k: round(v, 4) for k, v in log.items()} for log in run.history]
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    row["tau2"] = [[round(q, 4) for q in t.quantile(quantiles).tolist()] for t in run.tau2]
    return row


def _read_out(
    run: Run, data: ImageData, held_out: Split, labels: Tensor, device: str
) -> dict[str, float | None]:
    features, test = encode(run.encoder, data.train, device), encode(run.encoder, held_out, device)
    if not bool(features.isfinite().all() and test.isfinite().all()):
        return {"linear": None, "knn": None}
    linear = linear_predictions(features, labels, test)
    scores: dict[str, float | None] = {
        "linear": accuracy(linear, held_out.labels),
        "knn": accuracy(knn_predictions(features, labels, test), held_out.labels),
    }
    for part, divisor in data.parts_of_label.items():
        scores[part] = accuracy(linear // divisor % 10, held_out.labels // divisor % 10)
    for shots in FEW_SHOTS:
        few = torch.cat(
            [(labels == k).nonzero().flatten()[:shots] for k in range(data.num_classes)]
        )
        predictions = linear_predictions(features[few], labels[few], test)
        scores[f"linear, {shots} a class"] = accuracy(predictions, held_out.labels)
    run.objective.cpu()
    predicted = centroid_predictions(run.objective, test)
    if predicted is not None:
        scores["centroids"] = accuracy(predicted, held_out.labels)
    return scores


def _with_noise(labels: Tensor, num_classes: int, noise: float, seed: int) -> Tensor:
    """Replace a share of labels by a different class, drawn by the seed."""
    generator = torch.Generator().manual_seed(seed + 77)
    chosen = torch.rand(len(labels), generator=generator) < noise
    shift = torch.randint(1, num_classes, labels.shape, generator=generator)
    return torch.where(chosen, (labels + shift) % num_classes, labels)


def _first_classes(data: ImageData, classes: int | None) -> ImageData:
    if classes is None:
        return data

    def cut(split: Split) -> Split:
        kept = split.labels < classes
        return Split(split.images[kept], split.labels[kept])

    return replace(
        data,
        train=cut(data.train),
        validation=cut(data.validation),
        test=cut(data.test),
        num_classes=classes,
    )


class Store:
    """Finished cells, one JSON line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
        if text and not text.endswith("\n"):
            path.write_text(text + "\n")  # a crash cut the last line short
        lines = text.splitlines()
        self.rows: list[dict[str, Any]] = []
        for line in lines:
            try:
                self.rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue

    def find(self, cell: Cell) -> dict[str, Any] | None:
        wanted = asdict(cell)
        return next((r for r in self.rows if all(r.get(k) == v for k, v in wanted.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def run_cells(
    cells: Iterable[Cell],
    store: Store,
    *,
    workers: int,
    root: Path | None = None,
    device: str = "cpu",
    title: str = "quality",
) -> list[dict[str, Any]]:
    """The rows of ``cells``, running those that the store lacks, ``workers`` at a time."""
    cells = list(dict.fromkeys(cells))
    todo = [cell for cell in cells if store.find(cell) is None]
    with (
        progress_bar() as bar,
        multiprocessing.get_context("spawn").Pool(
            workers, initializer=_one_thread_each, initargs=(workers,), maxtasksperchild=50
        ) as pool,
    ):
        task = bar.add_task(title, total=len(cells), completed=len(cells) - len(todo), note="")
        env = results.environment(device)
        for row in pool.imap_unordered(_run_cell, [(cell, root, device) for cell in todo]):
            store.add(row | {"environment": env})
            note = f"{row['data']} {row['method']} batch {row['batch_size']}"
            bar.update(task, advance=1, note=f"{note}: linear {row['linear'] or float('nan'):.3f}")
    return [row for cell in cells if (row := store.find(cell)) is not None]


def _run_cell(arguments: tuple[Cell, Path | None, str]) -> dict[str, Any]:
    return run_cell(*arguments)


def _one_thread_each(workers: int) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


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
    workers: int = 1,
    root: Path | None = None,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Choose a learning rate for each method, batch size and noise, then run every seed with it.

    The choice is by linear probe plus kNN on the validation split, whose labels are right, from
    the same grid for all, with a seed of its own; the test split is read only with the rate chosen.
    """
    base = [
        Cell(data, method, size, rate, TUNING_SEED, "validation", epochs, noise)
        for noise, size, method, rate in itertools.product(
            noises, batch_sizes, methods, learning_rates
        )
    ]
    tuned = run_cells(
        base, store, workers=workers, root=root, device=device, title=f"{data}: learning rates"
    )
    chosen = best_rates(tuned)
    final = [
        Cell(data, method, size, chosen[data, method, size, noise], seed, "test", epochs, noise)
        for noise, size, seed, method in itertools.product(
            noises, batch_sizes, range(seeds), methods
        )
    ]
    return run_cells(
        final, store, workers=workers, root=root, device=device, title=f"{data}: seeds"
    )


def best_rates(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str, int, float], float]:
    """The learning rate with the best validation score, by data, method, batch size and noise."""
    best: dict[tuple[str, str, int, float], tuple[float, float]] = {}
    for row in rows:
        if row["split"] == "validation":
            key = _setting(row)
            best[key] = max(best.get(key, (-2.0, 0.0)), (_score(row), row["learning_rate"]))
    return {key: rate for key, (_, rate) in best.items()}


def best_by_validation(rows: Iterable[dict[str, Any]], names: Sequence[str]) -> str:
    """The method among ``names`` with the best validation score, each at its best rate."""
    candidates = [r for r in rows if r["split"] == "validation" and r["method"] in names]
    return max(candidates, key=_score)["method"]


def reported(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs on the test split, but for those whose learning rate a wider grid has overtaken."""
    rates = best_rates(rows)
    return [
        row
        for row in rows
        if row["split"] == "test"
        and row["learning_rate"] == rates.get(_setting(row), row["learning_rate"])
    ]


def _setting(row: dict[str, Any]) -> tuple[str, str, int, float]:
    return row["data"], row["method"], row["batch_size"], row["noise"]


def _score(row: dict[str, Any]) -> float:
    return -1.0 if row["linear"] is None else row["linear"] + row["knn"]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval (Student's t)."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(half)


def summary(rows: Sequence[dict[str, Any]], value: str, baseline: str = "SupCon") -> pd.DataFrame:
    """Mean, interval, and paired difference from ``baseline`` by method and batch size.

    Collapsed runs are counted and left out of means and differences.
    """
    frame = pd.DataFrame(reported(rows))
    table = []
    for (data, noise, size, method), group in frame.groupby(
        ["data", "noise", "batch_size", "method"], sort=False
    ):
        kept = group[~group["collapsed"]].dropna(subset=[value]).set_index("seed")[value]
        other = frame[
            (frame["data"] == data)
            & (frame["noise"] == noise)
            & (frame["batch_size"] == size)
            & (frame["method"] == baseline)
            & ~frame["collapsed"]
        ].set_index("seed")[value]
        difference = (kept - other).dropna()
        mean, half = interval(kept) if len(kept) else (np.nan, np.nan)
        gain, gain_half = (
            interval(difference) if len(difference) and method != baseline else (np.nan, np.nan)
        )
        table.append(
            {
                "data": data,
                "noise": noise,
                "batch_size": size,
                "method": method,
                "learning_rate": group["learning_rate"].iloc[0],
                "seeds": len(kept),
                "collapsed": int(group["collapsed"].sum()),
                "mean": mean,
                "half_width": half,
                "gain": gain,
                "gain_half_width": gain_half,
            }
        )
    return pd.DataFrame(table)


def text(line: pd.DataFrame) -> str:
    """One row of a `summary` for people, in percent: mean, interval, difference, collapses."""
    if line.empty or pd.isna(line["mean"].iloc[0]):
        return ""
    row = line.iloc[0]
    written = f"{100 * row['mean']:.1f} ± {100 * row['half_width']:.1f}"
    if pd.notna(row["gain"]):
        written += f" ({100 * row['gain']:+.1f} ± {100 * row['gain_half_width']:.1f})"
    if row["collapsed"]:
        written += f", {row['collapsed']} collapsed"
    return written


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """A table of methods over batch sizes for linear probe and kNN, and each share of noise."""
    for value in ("linear", "knn"):
        for noise, part in summary(rows, value).groupby("noise"):
            sizes = sorted(part["batch_size"].unique())
            title = f"{READOUTS[value]}, % (difference from SupCon)"
            table = Table(
                "method",
                *(f"batch {size}" for size in sizes),
                title=title + (f", {noise:.0%} wrong labels" if noise else ""),
            )
            for method, line in part.groupby("method", sort=False):
                cells = (text(line[line["batch_size"] == size]) for size in sizes)
                table.add_row(str(method), *cells)
            console.print(table)


def save(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Every read-out's `summary` as one CSV."""
    tables = [
        summary(rows, value).assign(readout=value)
        for value in READOUTS | DETAILS
        if any(row.get(value) is not None for row in rows)
    ]
    pd.concat(tables).to_csv(path, index=False)


def momentum_sweep(
    momenta: Sequence[float],
    batch_sizes: Sequence[int],
    classes: Sequence[int],
    seeds: int,
    epochs: int,
    learning_rate: float,
    store: Store,
    *,
    workers: int,
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
    return run_cells(cells, store, workers=workers, title="momentum")


def momentum_table(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
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
