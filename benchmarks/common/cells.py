"""Many small training runs, paired by seed, that survive an interruption.

A *cell* is one training run with its read-outs. Cells are appended to a file as they finish, so an
interrupted sweep goes on where it stopped and a crash loses at most the cells under way.
"""

import contextlib
import itertools
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import results
from benchmarks.common.data import ImageData, Split, load
from benchmarks.common.paired import best_rates, setting
from benchmarks.common.probes import further_scores
from benchmarks.common.readouts import (
    accuracy,
    centroid_predictions,
    class_mean_predictions,
    few_of_each,
    knn_predictions,
    linear_predictions,
)
from benchmarks.common.several import multi_hot, several_scores
from benchmarks.common.terminal import progress_bar
from benchmarks.common.training import Recipe, Run, encode, train

TUNING_SEED = 1000  # apart from the seeds that are reported
FEW_SHOTS = (1, 5, 10)  # labelled images a class for the few-shot probes


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
    temperature: float | None = None  # where not 0.1
    epsilon: float | None = None  # where not the method's own
    augmentation: str | None = None  # where not the default strength
    mixup: float | None = None  # alpha, where images are mixed
    several: bool | None = None  # labels are the two digits of a pair, see `several`
    extra: str | None = None  # further read-outs: corruption, transfer, hierarchy


def run_cell(cell: Cell, root: Path | None = None, device: str = "cpu") -> dict[str, Any]:
    """Train and read out; everything about the run as one flat row."""
    data = first_classes(load(cell.data, root), cell.classes)
    recipe = Recipe(
        epochs=cell.epochs,
        batch_size=cell.batch_size,
        learning_rate=cell.learning_rate,
        centroid_momentum=cell.momentum,
        **{
            key: value
            for key in ("temperature", "epsilon", "augmentation", "mixup")
            if (value := getattr(cell, key)) is not None
        },
    )
    labels = with_noise(data.train.labels, data.num_classes, cell.noise, cell.seed)
    if cell.several:
        hot = multi_hot(data, labels)
        data, labels = replace(data, num_classes=hot.shape[1]), hot / hot.sum(1, keepdim=True)
    start = time.perf_counter()
    run = train(data, cell.method, recipe, cell.seed, labels=labels, device=device)
    seconds = time.perf_counter() - start
    held_out = data.test if cell.split == "test" else data.validation
    row = {**asdict(cell), "seconds": round(seconds, 1), "collapsed": run.collapsed}
    if cell.several:
        features, test = (encode(run.encoder, s, device) for s in (data.train, held_out))
        row |= several_scores(features, hot, test, multi_hot(data, held_out.labels))
    else:
        row |= read_out(run, data, held_out, labels, device)
    if cell.extra is not None and row["linear"] is not None:
        row["further"] = further_scores(cell.extra, run.encoder, data, device, root)
    row["history"] = [{k: round(v, 4) for k, v in log.items()} for log in run.history]
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    row["tau2"] = [[round(q, 4) for q in t.quantile(quantiles).tolist()] for t in run.tau2]
    return row


def read_out(
    run: Run, data: ImageData, held_out: Split, labels: Tensor, device: str
) -> dict[str, float | None]:
    features, test = encode(run.encoder, data.train, device), encode(run.encoder, held_out, device)
    if not bool(features.isfinite().all() and test.isfinite().all()):
        return {"linear": None, "knn": None, "class mean": None}
    linear = linear_predictions(features, labels, test)
    scores: dict[str, float | None] = {
        "linear": accuracy(linear, held_out.labels),
        "knn": accuracy(knn_predictions(features, labels, test), held_out.labels),
        "class mean": accuracy(class_mean_predictions(features, labels, test), held_out.labels),
    }
    for part, divisor in data.parts_of_label.items():
        scores[part] = accuracy(linear // divisor % 10, held_out.labels // divisor % 10)
    for shots in FEW_SHOTS:
        few = few_of_each(labels, torch.arange(len(labels)), shots, data.num_classes)
        predictions = linear_predictions(features[few], labels[few], test)
        scores[f"linear, {shots} a class"] = accuracy(predictions, held_out.labels)
    run.objective.cpu()
    predicted = centroid_predictions(run.objective, test)
    if predicted is not None:
        scores["centroids"] = accuracy(predicted, held_out.labels)
    return scores


def with_noise(labels: Tensor, num_classes: int, noise: float, seed: int) -> Tensor:
    """Replace a share of labels by a different class, drawn by the seed."""
    generator = torch.Generator().manual_seed(seed + 77)
    chosen = torch.rand(len(labels), generator=generator) < noise
    shift = torch.randint(1, num_classes, labels.shape, generator=generator)
    return torch.where(chosen, (labels + shift) % num_classes, labels)


def first_classes(data: ImageData, classes: int | None) -> ImageData:
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


def deadline_of(budget: float) -> float:
    """On the clock of `run_cells`, ``budget`` minutes from now; 0: never."""
    return time.monotonic() + 60 * budget if budget else math.inf


def run_cells(
    cells: Iterable[Cell],
    store: Store,
    *,
    workers: int,
    root: Path | None = None,
    device: str = "cpu",
    title: str = "quality",
    deadline: float = math.inf,
) -> list[dict[str, Any]]:
    """The rows of ``cells``, running those that the store lacks, ``workers`` at a time.

    Ends the program with one line when ``time.monotonic()`` passes the ``deadline``.
    """
    cells = list(dict.fromkeys(cells))
    todo = [cell for cell in cells if store.find(cell) is None]
    with progress_bar() as bar, _map_of(workers if todo else 1) as each:
        task = bar.add_task(title, total=len(cells), completed=len(cells) - len(todo), note="")
        env = results.environment(device)
        for row in each(_run_cell, [(cell, root, device) for cell in todo]):
            store.add(row | {"environment": env})
            note = f"{row['data']} {row['method']} batch {row['batch_size']}"
            score = "not finite" if row["linear"] is None else f"linear {row['linear']:.3f}"
            bar.update(task, advance=1, note=f"{note}: {score}")
            if time.monotonic() > deadline and not bar.finished:
                done = sum(store.find(cell) is not None for cell in cells)
                sys.exit(
                    f"stopped by the budget: {done} of {len(cells)} runs of this part are kept in "
                    f"{store.path}; the same command goes on"
                )
    return [row for cell in cells if (row := store.find(cell)) is not None]


@contextlib.contextmanager
def _map_of(workers: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """What maps a function over arguments: in this process, or in several."""
    if workers == 1:
        yield map
        return
    with multiprocessing.get_context("spawn").Pool(
        workers, initializer=_one_thread_each, initargs=(workers,), maxtasksperchild=50
    ) as pool:
        yield pool.imap_unordered


def _run_cell(arguments: tuple[Cell, Path | None, str]) -> dict[str, Any]:
    return run_cell(*arguments)


def _one_thread_each(workers: int) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def tune_and_run(
    bases: Sequence[Cell],
    learning_rates: Sequence[float],
    seeds: int,
    store: Store,
    *,
    workers: int = 1,
    root: Path | None = None,
    device: str = "cpu",
    budget: float = 0.0,
    title: str,
) -> list[dict[str, Any]]:
    """Choose a learning rate for each of ``bases``, then run every seed with it.

    The choice is by linear probe plus kNN on the validation split, whose labels are right, from
    the same grid for all, with a seed of its own; the test split is read only with the rate chosen.
    Where features are to serve few labels it is by probes on one and five images of each class.
    A grid of one rate leaves nothing to choose.

    Args:
        bases: their learning rate, seed and split do not count.
        learning_rates: the grid.
        seeds: reported runs of each.
        store: of finished runs.
        workers: runs at a time.
        root: of the data.
        device: where to train.
        budget: minutes after which to stop; 0 for none.
        title: of the progress bar.
    """
    deadline = deadline_of(budget)
    options: dict[str, Any] = {"workers": workers, "root": root, "device": device}
    if len(learning_rates) == 1:
        rates = {setting(asdict(base)): learning_rates[0] for base in bases}
    else:
        tuned = run_cells(
            [
                replace(base, learning_rate=rate, seed=TUNING_SEED, split="validation", extra=None)
                for base, rate in itertools.product(bases, learning_rates)
            ],
            store, title=f"{title}: learning rates", deadline=deadline, **options,
        )  # fmt: skip
        rates = best_rates(tuned, bases[0].extra)
    return run_cells(
        [
            replace(base, learning_rate=rates[setting(asdict(base))], seed=seed, split="test")
            for seed, base in itertools.product(range(seeds), bases)
        ],
        store, title=f"{title}: seeds", deadline=deadline, **options,
    )  # fmt: skip
