"""Pieces of Markdown, and where a result comes from."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.common import paired, results
from benchmarks.common.readouts import PROBE_IMAGES

LARGE_SETS = ("fashion", "fashion-pairs", "cifar10", "cifar100")  # of more than `PROBE_IMAGES`


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows_of_question(folder: Path, question: str) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob(f"{question}-*.jsonl")) for row in rows_of(path)]


def grid(columns: Sequence[str], lines: Iterable[Sequence[object]]) -> Iterator[str]:
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for line in lines:
        yield "| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |"


def folded(title: str, body: Iterable[str]) -> Iterator[str]:
    yield f"\n<details><summary>{title}</summary>\n"
    yield from body
    yield "\n</details>\n"


def embedded(path: Path, what: str) -> str:
    return f"\n![{what}](results/{path.name})\n"


def seeds_in_words(counts: pd.Series) -> str:
    least, most = counts.min(), counts.max()
    return f"{most} seeds" if least == most else f"{least} to {most} seeds"


def origin(command: str, env: dict[str, Any]) -> str:
    """Which command, where and when; and whether the code has changed since."""
    text = (
        f"`python -m benchmarks {command}`; {env['device']}, {env['threads']} threads, torch "
        f"{env['versions']['torch']}, {env['date']}, commit {env['commit']}"
    )
    if results.changed_since(env["commit"]):
        text += " (an older commit: `varcon_loss/` has changed since)"
    return text + "."


def _searched(rows: list[dict[str, Any]]) -> list[float]:
    """The learning rates that were tried on validation images."""
    return sorted({row["learning_rate"] for row in rows if row["split"] == "validation"})


def command_of(rows: list[dict[str, Any]], sizes: str = "--batch-size", but: str = "") -> str:
    """The options that ask for these runs, all but the one named ``but``."""
    runs = paired.reported(rows)
    rates = _searched(rows) or sorted({row["learning_rate"] for row in runs})
    if not _searched(rows) and len(rates) > 1:
        rates = ["RATE"]  # a command for each method, with its rate as `how_run` lists it
    options = {
        "--data": {rows[0]["data"]},
        sizes: {row["batch_size"] for row in runs},
        "--methods": dict.fromkeys(row["method"] for row in rows),
        "--learning-rates": rates,
        "--epochs": {row["epochs"] for row in runs},
        "--seeds": {len({row["seed"] for row in runs})},
    }
    return " ".join(
        f"{name} {listed}" if " " not in listed else f'{name} "{listed}"'
        for name, values in options.items()
        if name != f"--{but}"
        for listed in [",".join(map(str, values))]
    )


def rates_in_words(runs: list[dict[str, Any]]) -> str:
    return "; ".join(
        f"{method} {', '.join(f'{rate:g}' for rate in sorted(set(mine)))}"
        for method, mine in pd.DataFrame(runs).groupby("method", sort=False)["learning_rate"]
    )


def how_run(rows: list[dict[str, Any]]) -> str:
    """What the runs had in common, and how learning rates were found."""
    runs = paired.reported(rows)
    sizes, epochs = (
        ", ".join(str(value) for value in sorted({row[key] for row in runs}))
        for key in ("batch_size", "epochs")
    )
    seeds = seeds_in_words(pd.Series(pd.DataFrame(runs).groupby("method")["seed"].nunique()))
    rates = rates_in_words(runs)
    grid = _searched(rows)
    found = f"chosen from {', '.join(f'{rate:g}' for rate in grid)}" if grid else "not searched"
    edges = {grid[0], grid[-1]} if len(grid) > 1 else set()
    on_edge = dict.fromkeys(row["method"] for row in runs if row["learning_rate"] in edges)
    words = f"Batch {sizes}, {epochs} epochs, {seeds}. Learning rates, {found}: {rates}."
    if on_edge:
        words += f" On the edge of what was tried: {', '.join(on_edge)}."
    if rows[0]["data"] in LARGE_SETS:
        words += f" Linear probes learn from {PROBE_IMAGES:,} of the training images."
    return words
