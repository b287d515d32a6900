"""Pieces of Markdown, and where a result comes from."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.common import paired, results


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


def how_run(rows: list[dict[str, Any]]) -> str:
    """What the runs had in common, and how learning rates were found."""
    runs = paired.reported(rows)
    sizes, epochs = (
        ", ".join(str(value) for value in sorted({row[key] for row in runs}))
        for key in ("batch_size", "epochs")
    )
    seeds = seeds_in_words(pd.Series(pd.DataFrame(runs).groupby("method")["seed"].nunique()))
    rates = "; ".join(
        f"{method} {', '.join(f'{rate:g}' for rate in sorted(set(mine)))}"
        for method, mine in pd.DataFrame(runs).groupby("method", sort=False)["learning_rate"]
    )
    grid = sorted({row["learning_rate"] for row in rows if row["split"] == "validation"})
    found = f"chosen from {', '.join(f'{rate:g}' for rate in grid)}" if grid else "not searched"
    return f"Batch {sizes}, {epochs} epochs, {seeds}. Learning rates, {found}: {rates}."
