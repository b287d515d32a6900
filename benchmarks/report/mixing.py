"""Labels that are not one class: mixup, and several labels."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import several_labels
from benchmarks.common import paired
from benchmarks.report.markdown import (
    command_of,
    folded,
    grid,
    how_run,
    origin,
    rates_in_words,
    rows_of,
    seeds_in_words,
)


def mixup_section(mixed: list[dict[str, Any]], rows: list[dict[str, Any]]) -> Iterator[str]:
    """With and without mixup, beside SupCon, which cannot be trained on mixed images."""
    if not mixed:
        return
    yield "## Does mixup help?\n"
    searched = any(row.get("mixup") and row["split"] == "validation" for row in rows)
    rates = "chosen with it" if searched else f"those chosen without it{_other_rates(mixed, rows)}"
    last = f"{mixed[-1]['mixup']:g}"
    yield (
        f"{origin(f'quality --mixup {last}', mixed[-1]['environment'])} Mixed images have class "
        "probabilities as labels; each view is mixed on its own. Learning rates with mixup are "
        f"{rates}. Runs with and without are paired by seed. An extension of the paper; SupCon "
        "does not take such labels.\n"
    )
    shown = ("linear", "knn", "linear, 5 a class", "linear, 1 a class")
    for name, part, here in mixed_groups(mixed, rows):
        plain = [paired.summary(here, value) for value in shown]
        lines = [["SupCon", *(paired.text(table[table["method"] == "SupCon"]) for table in plain)]]
        for method in dict.fromkeys(part["method"]):
            tables = [_with_and_without(method, here, value) for value in shown]
            for which in (method.partition(", mixup ")[0], method):
                found = [table[table["method"] == which] for table in tables]
                lines.append([which, *map(paired.text, found)])
        yield f"{mixup_words(name, part, here)}\n"
        yield f"{_repeated_by(here)}\n"
        yield from folded(
            f"{name}: accuracy, %: mean ± 95 % interval (difference from the same without mixup)",
            grid(["method", *(paired.TITLES[value] for value in shown)], lines),
        )


def _other_rates(mixed: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """Which methods were mixed at another rate than the one that is reported without."""
    without = {
        (row["data"], row["batch_size"], row["method"]): row["learning_rate"]
        for row in paired.reported(rows)
        if not row.get("mixup") and not row["noise"]
    }
    told = {}
    for row in mixed:
        method = row["method"].partition(", mixup ")[0]
        rate = without.get((row["data"], row["batch_size"], method))
        if rate is not None and rate != row["learning_rate"]:
            name = f"{method} on {row['data']}"
            told[name] = f"{name} ({row['learning_rate']:g} with mixup, {rate:g} without)"
    return f", but for {', '.join(told.values())}" if told else ""


def _repeated_by(here: list[dict[str, Any]]) -> str:
    """The mixed runs' commands; their rates, where they need a command for each."""
    said = []
    for alpha in sorted({row["mixup"] for row in here if row.get("mixup")}):
        runs = [
            row | {"method": row["method"].partition(", mixup ")[0]}
            for row in here
            if row.get("mixup") == alpha
        ]
        command = command_of(runs, "--batch-sizes")
        said.append(
            f"`python -m benchmarks quality --mixup {alpha:g} {command}`; learning rates: "
            f"{rates_in_words(paired.reported(runs))}."
        )
    return " ".join(said)


def mixed_groups(
    mixed: list[dict[str, Any]], rows: list[dict[str, Any]]
) -> Iterator[tuple[str, pd.DataFrame, list[dict[str, Any]]]]:
    """Data, mixed runs and all runs, for each data set and batch size that has mixed ones."""
    if not mixed:
        return
    for (name, size), part in pd.DataFrame(mixed).groupby(["data", "batch_size"]):
        wanted = (name, size, 0.0)
        here = [r for r in rows if (r["data"], r["batch_size"], r["noise"]) == wanted]
        yield name, part, here


def _with_and_without(method: str, here: list[dict[str, Any]], value: str) -> pd.DataFrame:
    base = method.partition(", mixup ")[0]
    return paired.summary([row for row in here if row["method"] in (base, method)], value, base)


def mixup_words(name: str, part: pd.DataFrame, here: list[dict[str, Any]]) -> str:
    said = []
    for method in dict.fromkeys(part["method"]):
        table = _with_and_without(method, here, "linear")
        said.append(f"{method.partition(', ')[0]} {paired.gain(table[table['method'] == method])}")
    alphas = ", ".join(f"{alpha:g}" for alpha in sorted(set(part["mixup"])))
    seeds = seeds_in_words(part.groupby("method")["seed"].nunique())
    return (
        f"{name}, batch {part['batch_size'].iloc[0]}, alpha {alphas}, {seeds}: linear probe with "
        f"mixup, points from without: {'; '.join(said)}."
    )


def several_labels_section(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("several-labels-*.jsonl")):
        rows = rows_of(path)
        yield f"## Can an image have several labels? {rows[0]['data']}\n"
        yield (
            f"{origin('several-labels', rows[-1]['environment'])} The two digits of a pair are "
            "two labels out of twenty; VarCon takes the multi-hot rows, divided by their sums, as "
            f"class probabilities. An extension of the paper. {how_run(rows)} Percent: mean ± 95 % "
            f"interval (difference from {several_labels.BASELINE}); {several_labels.FLOOR}.\n"
        )
        columns = ["method", *several_labels.TITLES.values()]
        yield from grid(columns, several_labels.lines(rows))
        yield ""
