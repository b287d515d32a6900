"""How good are the embeddings that each loss trains, on data and classes that it has not seen?"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer

from benchmarks.common import options, results
from benchmarks.common.data import DATASETS
from benchmarks.common.methods import METHODS, MOMENTUM, has_temperature
from benchmarks.common.paired import chosen, summary, text
from benchmarks.common.scores import (
    by_frequency,
    class_means,
    confidence,
    few_labels,
    linear_probe,
    nearest_mean,
    retrieval,
)
from benchmarks.common.tasks import Task, long_tailed, make_task
from benchmarks.common.terminal import print_table, progress_bar, written
from benchmarks.common.training import Recipe, Run, embed, train

# What each question trains, and the scores that answer it.
QUESTIONS = {
    "styles": ("top1_probe", "top1_mean", "top1_5_shot", "top1_1_shot"),
    "classes": ("recall_at_1", "map_at_r"),
    "confidence": ("top1", "ece", "ece_fitted", "auroc", "fpr_at_95"),
    "tail": ("top1", "head", "middle", "tail"),
    "images": ("top1_probe", "top1_mean", "top1_5_shot", "top1_1_shot"),
}
TUNING_SEED = 1000  # apart from the seeds that are reported


@dataclass(frozen=True)
class Cell:
    """What names a run: two runs with equal cells are the same run."""

    data: str
    regime: str
    method: str
    batch_size: int
    epochs: int
    imbalance: float  # largest class over smallest; 0: as the data is
    learning_rate: float
    temperature: float | None  # None where the method has none
    weight: float | None  # of the contrastive part beside cross-entropy
    seed: int
    split: str  # "validation" for choosing the three above, "test" for what is reported
    chunk_size: int | None = None
    momentum: float | None = None  # of a memory, where not the usual
    epsilon: float | None = None  # of VarCon, where not in proportion to the temperature


def command(
    data: Annotated[str, typer.Option(help=f"icons, {', '.join(DATASETS)}")] = "icons",
    question: Annotated[
        str, typer.Option(help=f"{', '.join(QUESTIONS)}; by default all but tail")
    ] = "",
    methods: Annotated[str, typer.Option(help="comma-separated")] = ",".join(METHODS),
    regime: Annotated[
        str, typer.Option(help="frozen: a head on features; whole: the encoder too")
    ] = "frozen",
    batch_sizes: Annotated[str, typer.Option(help="images a step, each in two views")] = "256",
    epochs: options.Epochs = 15,
    tuning_epochs: Annotated[int, typer.Option(help="of validation runs; 0: as many")] = 0,
    imbalance: Annotated[str, typer.Option(help="of question tail")] = "10,100",
    learning_rates: Annotated[str, typer.Option(help="grid")] = "1e-3,3e-3,1e-2",
    temperatures: Annotated[str, typer.Option(help="grid")] = "0.05,0.1,0.2,0.5",
    weights: Annotated[str, typer.Option(help="grid, beside cross-entropy")] = "0.3,1,3",
    settings_of_batch: Annotated[
        int, typer.Option(help="take what was chosen at this batch size; 0: choose")
    ] = 0,
    chunk_size: Annotated[int, typer.Option(help="images a chunk, for VarCon; 0: one batch")] = 0,
    momentum: Annotated[float, typer.Option(help=f"of the memory; 0: {MOMENTUM}")] = 0.0,
    epsilon: Annotated[float, typer.Option(help="of VarCon; -1: by the temperature")] = -1.0,
    seeds: Annotated[int, typer.Option(min=1, help="runs of each method")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="of a run")] = 1,
    root: Annotated[Path | None, typer.Option(help="of --data folder")] = None,
    icons: Annotated[Path | None, typer.Option(help="the .tgz of npm's @iconify/json")] = None,
    fetch: Annotated[bool, typer.Option(help="get it by npm pack")] = False,
    device: options.Device = "cpu",
    out: options.Out = Path("runs/evaluate"),
) -> None:
    """Train each method, choose its settings on validation data, and score it on test data.

    An interrupted run goes on where it stopped when the same command is given again.
    """
    options.require(device)
    names = options.names(methods)
    options.check("--methods", names, METHODS)
    try:
        task = make_task(
            data, regime=regime, root=root, icons=icons, cache=options.CACHE, fetch=fetch
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    of_data = ("styles", "classes", "confidence") if data == "icons" else ("images",)
    asked = options.names(question) or list(of_data)
    options.check("--question", asked, (*of_data, "tail"))
    torch.set_num_threads(threads)
    store = Store(out / f"{data}.jsonl", device)
    grids = [options.floats(listed) for listed in (learning_rates, temperatures, weights)]
    imbalances = [0.0] * any(q != "tail" for q in asked)
    imbalances += options.floats(imbalance) if "tail" in asked else []
    bases = [
        Cell(
            data, regime, method, size, epochs, uneven, 0.0, None, None, 0, "test",
            chunk_size=(chunk_size or None) if method.startswith("VarCon") else None,
            momentum=(momentum or None) if method == "VarCon memory" else None,
            epsilon=epsilon if epsilon >= 0 and method.startswith("VarCon") else None,
        )
        for uneven in imbalances
        for size in options.integers(batch_sizes)
        for method in names
    ]  # fmt: skip
    with progress_bar() as bar:
        picked = []
        for base in bases:
            tuned = replace(
                base, epochs=tuning_epochs or epochs, seed=TUNING_SEED, split="validation"
            )
            if settings_of_batch:
                tuned = replace(tuned, batch_size=settings_of_batch, chunk_size=None)
            else:
                _run(_grid(tuned, *grids), task, store, bar, device)
            try:
                picked.append(replace(base, **chosen(store.rows, asdict(tuned))))
            except ValueError as error:
                raise typer.BadParameter(str(error)) from None
        # Seed by seed, so that what the machine does at a time falls on all methods.
        _run([replace(c, seed=s) for s in range(seeds) for c in picked], task, store, bar, device)
    show(store.rows, picked, asked)
    written(store.path)


def _grid(base: Cell, *grids: Sequence[float]) -> list[Cell]:
    """Each learning rate, temperature and weight that the method has, on validation data."""
    rates, temperatures, weights = grids
    temperatures = temperatures if has_temperature(base.method) else [None]
    weights = weights if " + " in base.method else [None]
    settings = itertools.product(rates, temperatures, weights)
    return [replace(base, learning_rate=r, temperature=t, weight=w) for r, t, w in settings]


class Store:
    """Rows of finished runs, one JSON line for each protocol that a run was measured by."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.device = path, device
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows = [json.loads(line) for line in lines]

    def has(self, cell: Cell) -> bool:
        wanted = asdict(cell)
        return any(all(row.get(k) == v for k, v in wanted.items()) for row in self.rows)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        environment = results.environment(self.device)
        self.rows += [row | {"environment": environment} for row in rows]
        # Replaced whole, so that a crash leaves all rows of a run or none.
        written = self.path.with_suffix(".part")
        written.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        written.replace(self.path)


def _run(cells: Sequence[Cell], task: Task, store: Store, bar: Any, device: str) -> None:
    cells = list(dict.fromkeys(cells))
    todo = [cell for cell in cells if not store.has(cell)]
    line = bar.add_task(cells[0].split, total=len(cells), completed=len(cells) - len(todo), note="")
    for cell in todo:
        store.add(run_cell(cell, task, device))
        bar.update(line, advance=1, note=cell.method)


def run_cell(cell: Cell, task: Task, device: str = "cpu") -> list[dict[str, Any]]:
    """Train and score; a row for each protocol."""
    if cell.imbalance:
        task = long_tailed(task, cell.imbalance)
    recipe = Recipe(
        cell.epochs,
        cell.batch_size,
        learning_rate=cell.learning_rate,
        temperature=cell.temperature or 0.1,
        weight=cell.weight or 1.0,
        momentum=cell.momentum,
        epsilon=cell.epsilon,
        chunk_size=cell.chunk_size,
    )
    run = train(task, cell.method, recipe, cell.seed, device=device)
    common = {
        **asdict(cell),
        "seconds": round(run.seconds, 2),
        "cpu_seconds": round(run.cpu_seconds, 2),
        "threads": torch.get_num_threads(),
        "loss": run.losses[-1],
    }
    scores = score(run, task, cell.split, device)
    return [
        {**common, "protocol": protocol, **{k: round(v, 5) for k, v in found.items()}}
        for protocol, found in scores.items()
    ]


def score(run: Run, task: Task, split: str, device: str = "cpu") -> dict[str, dict[str, float]]:
    """What each protocol of the task measures, by name; probes only for what is reported."""
    run.method.cpu()
    held_out = {
        protocol: (embed(run.encoder, task, samples, device), samples.labels)
        for (protocol, part), samples in task.held_out.items()
        if part == split
    }
    known, labels = embed(run.encoder, task, task.train, device), task.train.labels
    means = class_means(known, labels, task.num_classes)
    scores: dict[str, dict[str, float]] = {}
    for protocol, (test, truth) in held_out.items():
        if protocol == "classes":
            scores[protocol] = retrieval(test, truth)
        elif protocol == "tail":
            scores[protocol] = by_frequency(nearest_mean(means, test), truth, task.num_classes)
        elif protocol in ("styles", "images"):
            right = (nearest_mean(means, test) == truth).float().mean()
            scores[protocol] = {"top1_mean": float(right)}
            if split == "test":
                probe = linear_probe(known, labels).score(test.numpy(), truth.numpy())
                scores[protocol] |= {"top1_probe": float(probe)}
                scores[protocol] |= few_labels(known, labels, test, truth, task.num_classes)
    if "unknown" in held_out and split == "test":
        validation = task.held_out["styles", "validation"]
        with torch.no_grad():
            logits = [
                run.method.logits(embeddings, means).nan_to_num()
                for embeddings in (
                    held_out["styles"][0],
                    held_out["unknown"][0],
                    embed(run.encoder, task, validation, device),
                )
            ]
        scores["confidence"] = confidence(
            logits[0], held_out["styles"][1], logits[1], logits[2], validation.labels
        )
    return scores


def show(rows: Sequence[dict[str, Any]], picked: Sequence[Cell], asked: Sequence[str]) -> None:
    """A table a question: mean and 95 % interval of each score, over seeds."""
    frame = pd.DataFrame(rows)
    for protocol in asked:
        table = []
        for cell in picked:
            line = summary(frame, cell, protocol, QUESTIONS[protocol])
            if line is not None:
                where = f"{cell.method}, batch {cell.batch_size}"
                where += f", imbalance {cell.imbalance:g}" if cell.imbalance else ""
                table.append([where, *(text(*line[score]) for score in QUESTIONS[protocol])])
        if table:
            print_table(f"{protocol}, %", ["method", *QUESTIONS[protocol]], table)
