"""One page, made by rule: when to choose VarCon."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.common import paired, plots
from benchmarks.report.cost import speed_words
from benchmarks.report.gains import (
    by_readout,
    gains_over_supcon,
    gains_table,
    verdicts_table,
)
from benchmarks.report.markdown import embedded
from benchmarks.report.mixing import mixed_groups, mixup_words
from benchmarks.report.quality import temperature
from benchmarks.report.questions import epochs_words


def first_page(
    rows: list[dict[str, Any]], mixed: list[dict[str, Any]], folder: Path
) -> Iterator[str]:
    yield "# Results\n"
    yield (
        "Rebuilt by `python -m benchmarks report` from the files in `benchmarks/results/`; every "
        "sentence with a number is made by rule from them. Small data sets, a small CNN, two CPU "
        "cores: nothing here says what happens on ImageNet.\n"
    )
    yield "## When to choose VarCon\n"
    yield (
        "What to choose is said in [docs/results.md](../docs/results.md#when-to-choose-it). This "
        "is what it rests on.\n"
    )
    if rows:
        gains = gains_over_supcon(rows)
        yield from verdicts_table(rows)
        yield (
            "Read-outs (probe, kNN, nearest class mean, few-shot) of each data set and batch: "
            "*ahead* and *behind* where the 95 % interval of the paired difference over seeds "
            "excludes 0. A step sees *samples of a class*, two views of each image counted. "
            "[Evidence](#which-features-are-better).\n"
        )
        if "VarCon" in gains:
            yield f"- **By read-out**, VarCon against SupCon: {by_readout(gains['VarCon'])}."
        for sentence in temperature(rows):
            yield f"- **Temperature**: {sentence}"
        for sentence in epochs_words(folder):
            yield f"- **Epochs**: {sentence}"
        for group in mixed_groups(mixed, rows + mixed):
            yield f"- **Mixup**: {mixup_words(*group)} [Evidence](#does-mixup-help)."
        yield from _collapsed(rows)
        if gains:
            yield embedded(
                plots.draw_gains(gains, folder / "gains.png"),
                "difference from SupCon over the samples of a class that a step sees",
            )
            yield from gains_table(rows, gains)
    if (folder / "speed-cpu.json").exists():
        yield from speed_words(folder)


def _collapsed(rows: list[dict[str, Any]]) -> Iterator[str]:
    frame = pd.DataFrame([{key: row[key] for key in paired.KEYS} for row in paired.reported(rows)])
    bad = frame[frame["collapsed"].astype(bool)]
    where = [
        f"{n} of {method} on {data} at {size}{f' with {noise:.0%} wrong labels' if noise else ''}"
        for (data, method, size, noise), n in bad.groupby(
            ["data", "method", "batch_size", "noise"]
        ).size().items()
    ]  # fmt: skip
    yield (
        f"- **Collapse** (all embeddings alike): {len(bad)} of {len(frame)} runs"
        + (f": {'; '.join(where)}" if where else "")
        + ". They are left out of means."
    )
