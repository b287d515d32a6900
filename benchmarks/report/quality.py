"""Which features are better: every number of `quality`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.common import methods, paired, plots, results
from benchmarks.report.gains import RIVALS, by_readout, paired_gains
from benchmarks.report.markdown import embedded, folded, grid, how_run, seeds_in_words

PAIRS = (
    *(("VarCon", rival) for rival in RIVALS),
    *(("VarCon memory", rival) for rival in (*RIVALS, "VarCon")),
    ("VarCon leave-one-out", "VarCon"),
    ("VarCon epsilon=0", "VarCon"),
)


def quality_section(rows: list[dict[str, Any]], folder: Path) -> Iterator[str]:
    if not rows:
        return
    yield "## Which features are better?\n"
    yield (
        "`python -m benchmarks quality --data DATA` (`--noise` for wrong labels). Accuracy on "
        "held-out images in percent: mean ± half-width of the 95 % interval over seeds; in "
        "brackets the paired difference from SupCon in points. The learning rate of each method, "
        "batch size and share of wrong labels is chosen on a validation split, from one grid for "
        "all; each set of images below names the methods whose choice lies on its edge (SupCon at "
        "batch 512 of mnist-pairs: lower rates were tried too, and are worse). Probes on few "
        "images learn from the first ones of each class, the same in every run: "
        "`robustness few-shot` draws them many times.\n"
    )
    yield from _epochs_and_origin(rows)
    for data in dict.fromkeys(row["data"] for row in rows):
        of_data = [row for row in rows if row["data"] == data]
        known = [row for row in of_data if row["method"] in methods.METHODS]
        yield f"### {data}\n"
        yield how_run([row for row in known if row["noise"] == 0.0])
        for picture in plots.draw_quality(known, folder):
            yield embedded(picture, f"{data}: accuracy over batch sizes")
        if not (found := paired_gains(known, "VarCon", "SupCon")).empty:
            yield f"VarCon against SupCon: {by_readout(found)}.\n"
        yield from folded(f"{data}: every number", _tables(known))
    yield from _variants_tables(rows)
    yield from folded("Every comparison, in words", _comparisons(rows))


def _epochs_and_origin(rows: list[dict[str, Any]]) -> Iterator[str]:
    dated = [row["environment"] for row in rows if row.get("environment")]
    without = len(rows) - len(dated)
    if without:
        yield (
            ("All runs" if not dated else f"{without} of the {len(rows)} runs")
            + " are from before runs carried versions, device, commit and date (2026-11-25): older "
            "commits, which the history of the files has.\n"
        )
    commits = sorted({env["commit"] for env in dated})
    if commits:
        old = [commit for commit in commits if results.changed_since(commit)]
        yield (
            f"Commits of the others: {', '.join(commits)}"
            + (f"; `varcon_loss/` has changed since {', '.join(old)}" if old else "")
            + ".\n"
        )


def _rates_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The learning rate chosen for each method and batch size, with right labels."""
    clean = [row for row in rows if row["noise"] == 0.0]
    tried = [row["learning_rate"] for row in clean if row["split"] == "validation"]
    chosen = {(r["method"], r["batch_size"]): r["learning_rate"] for r in paired.reported(clean)}
    sizes = sorted({size for _, size in chosen})
    yield "\nlearning rate chosen by one run on validation images (edge: of what was tried)\n"
    yield from grid(
        ["method", *(f"batch {size}" for size in sizes)],
        (
            [method, *(_rate(chosen.get((method, size)), tried) for size in sizes)]
            for method in dict.fromkeys(method for method, _ in chosen)
        ),
    )


def _rate(rate: float | None, tried: list[float]) -> str:
    if rate is None:
        return ""
    return f"{rate:g}" + (", edge" if tried and rate in (min(tried), max(tried)) else "")


def _tables(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield from _rates_table(rows)
    for value, title in paired.TITLES.items():
        if not any(row.get(value) is not None for row in rows):
            continue
        table = paired.summary(rows, value)
        for noise, noisy in table.groupby("noise"):
            sizes = sorted(noisy["batch_size"].unique())
            share = f", {noise:.0%} wrong labels" if noise else ""
            yield f"\n{title}{share}; {seeds_in_words(noisy['seeds'] + noisy['collapsed'])}\n"
            lines = [
                [method, *(paired.text(line[line["batch_size"] == size]) for size in sizes)]
                for method, line in noisy.groupby("method", sort=False)
                if line["mean"].notna().any()
            ]
            yield from grid(["method", *(f"batch {size}" for size in sizes)], lines)


def _variants_tables(rows: list[dict[str, Any]]) -> Iterator[str]:
    variants = list(variants_tried(rows))
    if not variants:
        return
    yield "## Which temperature, and which head?\n"
    yield (
        "`python -m benchmarks quality --methods variants`: tau1 = 0.1 and the head mlp-bn unless "
        "said (epsilon = 0.02; 0.01 at tau1 = 0.05); learning rates chosen as everywhere.\n"
    )
    for sentence in temperature(rows):
        yield f"- {sentence}"
    for data, size, here in variants:
        best = paired.best_by_validation(here, _temperatures("SupCon"))
        tables = [
            paired.summary(here, "linear"),
            paired.summary(here, "knn"),
            paired.summary(here, "linear", best),
        ]
        lines = []
        for method in ("SupCon", "VarCon", *methods.VARIANTS):
            found = [table[table["method"] == method] for table in tables]
            if not found[0].empty:
                rate = found[0]["learning_rate"].iloc[0]
                lines.append([method, f"{rate:g}", *map(paired.text, found)])
        yield from folded(
            f"{data} at batch {size}",
            grid(
                ["method", "learning rate", "linear probe (- SupCon)", "kNN (- SupCon)",
                 f"linear probe (- {best}, SupCon's best by validation)"],
                lines,
            ),
        )  # fmt: skip


def temperature(rows: list[dict[str, Any]]) -> Iterator[str]:
    for data, size, here in variants_tried(rows):
        best = {
            family: paired.best_by_validation(here, _temperatures(family))
            for family in ("VarCon", "SupCon")
        }
        table = paired.summary(here, "linear", best["SupCon"])
        line = table[table["method"] == best["VarCon"]]
        yield (
            f"{data} at batch {size}, each method's chosen by validation, linear probe: "
            f"{best['VarCon']} {paired.text(line)} against {best['SupCon']} "
            "([table](#which-temperature-and-which-head))."
        )


def _temperatures(family: str) -> list[str]:
    return [family, *(name for name in methods.VARIANTS if name.startswith(f"{family} tau"))]


def variants_tried(rows: list[dict[str, Any]]) -> Iterator[tuple[str, int, list[dict[str, Any]]]]:
    """Where other temperatures and heads were tried, and all rows there."""
    tried = [row for row in rows if row["method"] in methods.VARIANTS]
    for data, size in dict.fromkeys((row["data"], row["batch_size"]) for row in tried):
        wanted = (data, size, 0.0)
        yield (
            data,
            size,
            [row for row in rows if (row["data"], row["batch_size"], row["noise"]) == wanted],
        )


def _comparisons(rows: list[dict[str, Any]]) -> Iterator[str]:
    for noisy in (False, True):
        kept = [row for row in rows if (row["noise"] > 0) == noisy]
        for method, baseline in PAIRS:
            for value in ("linear",) if noisy else paired.MAIN:
                both = [r for r in kept if r["method"] in (method, baseline)]
                if not any(row.get(value) is not None for row in both):
                    continue
                listed = _verdicts(paired.summary(both, value, baseline), method)
                if listed:
                    start = "With wrong labels, " if noisy else ""
                    yield f"- {start}{method} against {baseline}, {paired.TITLES[value]}: {listed}."


def _verdicts(table: pd.DataFrame, method: str) -> str:
    part = table[table["method"] == method]
    groups: dict[str, list[str]] = {"ahead": [], "behind": [], "undecided": []}
    part = part.dropna(subset=["gain_half_width"]).sort_values(["data", "noise", "batch_size"])
    for _, line in part.iterrows():
        gain, half = line["gain"], line["gain_half_width"]
        share = f", {line['noise']:.0%} wrong" if line["noise"] else ""
        groups[paired.verdict(gain, half)].append(
            f"{line['data']} at {line['batch_size']}{share} ({100 * gain:+.1f} ± {100 * half:.1f})"
        )
    return "; ".join(f"{name}: {', '.join(cells)}" for name, cells in groups.items() if cells)
