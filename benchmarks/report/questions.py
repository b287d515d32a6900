"""One setting, one change of the data, one property at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import hierarchy, momentum, robustness, settings
from benchmarks.common import paired, plots, results
from benchmarks.common.data import class_names
from benchmarks.common.probes import DRAWS
from benchmarks.report.markdown import command_of, embedded, folded, grid, how_run, origin, rows_of

QUESTIONS = {
    "temperature": "Which temperature?",
    "epsilon": "Which epsilon?",
    "epochs": "How many epochs?",
    "augmentation": "How strong an augmentation?",
}


FEW_SHOT_WORDS = (
    "Linear probe and nearest class mean learned on one and on five labelled images of each "
    f"class: means over {DRAWS} draws of them, the same for all. Such probes chose the rates.\n"
)


def epochs_words(folder: Path) -> Iterator[str]:
    """VarCon against SupCon over epochs: does it only converge faster?"""
    for path in sorted(folder.glob("epochs-*.jsonl")):
        rows = rows_of(path)
        table = settings.tabulate(rows, "epochs")
        table = table[(table["readout"] == "linear") & (table["method"] == "VarCon")]
        for size, part in table.dropna(subset=["gain"]).groupby("batch_size"):
            gains = ", ".join(
                f"{paired.gain(part[part['epochs'] == epochs])} after {epochs}"
                for epochs in sorted(part["epochs"])
            )
            yield (
                f"{rows[0]['data']} at batch {size}, linear probe, VarCon's points from SupCon: "
                f"{gains} epochs, each a whole schedule. "
                f"[Evidence](#how-many-epochs-{rows[0]['data']})."
            )


def _command(vary: str, rows: list[dict[str, Any]]) -> str:
    values = ",".join(str(value) for value in dict.fromkeys(row[vary] for row in rows))
    return f"settings {vary} --values {values} {command_of(rows, '--batch-sizes', but=vary)}"


def settings_section(folder: Path) -> Iterator[str]:
    """Results of `settings`, where there are any."""
    for vary in settings.SETTINGS:
        for path in sorted(folder.glob(f"{vary}-*.jsonl")):
            rows = rows_of(path)
            table = settings.tabulate(rows, vary)
            best = table.loc[table[table["readout"] == "linear"].groupby("method")["mean"].idxmax()]
            yield f"## {QUESTIONS[vary]} {rows[0]['data']}\n"
            yield (
                f"{origin(_command(vary, rows), rows[-1]['environment'])} {how_run(rows)} Best "
                "linear probe: "
                + ", ".join(
                    f"{row['method']} at {row[vary]} ({100 * row['mean']:.1f} %)"
                    for _, row in best.iterrows()
                )
                + ".\n"
            )
            yield from _gains_over_values(table, vary)
            yield embedded(
                plots.draw_settings(table, vary, path.with_suffix(".png")), f"accuracy over {vary}"
            )
            values = list(dict.fromkeys(table[vary]))
            for (size, readout), part in table.groupby(["batch_size", "readout"], sort=False):
                lines = (
                    [method, *(paired.text(mine[mine[vary] == value]) for value in values)]
                    for method, mine in part.groupby("method", sort=False)
                )
                yield from folded(
                    f"batch {size}: {paired.TITLES[readout]}, %",
                    grid(["method", *(f"{vary} {value}" for value in values)], lines),
                )


def _gains_over_values(table: pd.DataFrame, vary: str) -> Iterator[str]:
    """VarCon's points from SupCon at each value, where SupCon was run."""
    mine = table[(table["method"] == "VarCon")].dropna(subset=["gain"])
    for (size, readout), part in mine.groupby(["batch_size", "readout"], sort=False):
        if readout in ("linear", "linear, 5 a class"):
            gains = ", ".join(
                f"{paired.gain(line)} at {value}" for value, line in part.groupby(vary, sort=False)
            )
            yield f"- Batch {size}, {paired.TITLES[readout]}, VarCon's points from SupCon: {gains}."


def robustness_section(folder: Path) -> Iterator[str]:
    """Results of `robustness`, where there are any."""
    for kind, title in (
        ("corruption", "Do features survive corrupted images?"),
        ("transfer", "Do features serve other data?"),
        ("few-shot", "Do features serve few labels?"),
    ):
        for path in sorted(folder.glob(f"{kind}-*.jsonl")):
            rows = rows_of(path)
            table = robustness.tabulate(rows)
            yield f"## {title} {rows[0]['data']}\n"
            command = f"robustness {kind} {command_of(rows)}"
            yield f"{origin(command, rows[-1]['environment'])} {how_run(rows)}\n"
            if kind == "corruption":
                picture = plots.draw_corruption(table, path.with_suffix(".png"))
                yield embedded(picture, "accuracy over severity")
            else:
                if kind == "few-shot":
                    yield FEW_SHOT_WORDS
                yield from _transfer_words(table)
                picture = plots.draw_transfer(table, path.with_suffix(".png"))
                yield embedded(picture, f"accuracy, {kind}")
            parts = list(dict.fromkeys(table["readout"]))
            lines = (
                [part, *(paired.text(mine[mine["readout"] == part]) for _, mine in
                         table.groupby("method", sort=False))]
                for part in parts
            )  # fmt: skip
            yield from folded(
                "Linear probe (and kNN where named), %: mean ± 95 % interval (difference from "
                "SupCon)",
                grid(["images", *dict.fromkeys(table["method"])], lines),
            )


def _transfer_words(table: pd.DataFrame) -> Iterator[str]:
    """Points from SupCon on the other sets, by method."""
    others = table[table["readout"].str.contains(" on ")].dropna(subset=["gain"])
    for method, mine in others.groupby("method", sort=False):
        if str(method).startswith("VarCon"):
            gains = ", ".join(
                f"{part} {paired.gain(line)}" for part, line in mine.groupby("readout", sort=False)
            )
            yield f"- {method}, points from SupCon: {gains}."


def hierarchy_section(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("hierarchy-*.jsonl")):
        rows = rows_of(path)
        name = rows[0]["data"]
        yield f"## Do similar classes lie near one another? {name}\n"
        command = f"hierarchy {command_of(rows)}"
        yield (
            f"{origin(command, rows[-1]['environment'])} {how_run(rows)} Trees of class means "
            "of held-out features, by cosine distance: how well a tree keeps the distances, and "
            "how well cutting it finds known groups (kinds of clothes; the left digit of a pair). "
            "Percent: mean ± 95 % interval (difference from SupCon).\n"
        )
        yield from grid(*hierarchy.tabulate(rows))
        trees = hierarchy.trees(rows)
        names = class_names(name, len(next(iter(trees.values()))) + 1)
        picture = plots.draw_trees(trees, names, path.with_suffix(".png"))
        yield embedded(picture, "trees of class means")


def momentum_section(folder: Path) -> Iterator[str]:
    path = folder / "momentum.jsonl"
    if not path.exists():
        return
    table = momentum.summary(rows_of(path))
    best = table.loc[table.groupby(["classes", "batch_size"])["mean"].idxmax()]
    yield "## Which momentum of the centroid memory?\n"
    yield (
        "`python -m benchmarks momentum`: mean of linear probe and kNN on the validation split of "
        "mnist-pairs, at one learning rate, percent, mean ± half-width of the 95 % interval over "
        f"{table['seeds'].max()} seeds. Highest mean: "
        + ", ".join(
            f"{row['momentum']:g} ({row['classes']:.0f} classes, batch {row['batch_size']:.0f})"
            for _, row in best.iterrows()
        )
        + ".\n"
    )
    yield embedded(plots.draw_momentum(table, path.parent), "accuracy over momentum")
    columns, lines = momentum.by_momentum(table)
    yield from folded("Every number", grid(columns, lines))


def evolution_section(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("evolution-*.json")):
        frame, env = results.read(path.stem, folder)
        yield f"## How do embeddings and temperatures come to be? {frame['data'].iloc[0]}\n"
        yield (
            f"{origin('evolution', env)} Batch {env['batch_size']}, learning rate "
            f"{env['learning_rate']}, one seed: to look at and not to compare. t-SNE of held-out "
            "images' features, whose axes mean nothing; τ2 over the last batch of an epoch.\n"
        )
        yield embedded(path.with_suffix(".png"), "t-SNE and density of tau2")
