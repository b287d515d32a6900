"""Statistics of runs that are paired by seed, and the choice of settings on validation data."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

SETTINGS = ("learning_rate", "temperature", "weight")  # chosen on validation data
BASE = (
    "data",
    "regime",
    "method",
    "batch_size",
    "epochs",
    "imbalance",
    "chunk_size",
    "momentum",
    "epsilon",
)
CHOSEN_BY = ("top1_mean", "recall_at_1", "top1")  # as far as a protocol has them


def chosen(rows: Iterable[dict[str, Any]], wanted: dict[str, Any]) -> dict[str, Any]:
    """The settings with the best validation score: the mean over protocols of `CHOSEN_BY`.

    Args:
        rows: of all runs.
        wanted: values of `BASE`.

    Raises:
        ValueError: no validation run of this kind is stored.
    """
    found: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        same = all(row.get(key) == wanted[key] for key in BASE)
        if same and row["split"] == "validation":
            setting = tuple(row[k] for k in SETTINGS)
            found.setdefault(setting, []).extend(row[k] for k in CHOSEN_BY if k in row)
    if not found:
        raise ValueError(
            "no validation run is stored of "
            + ", ".join(f"{key} {wanted[key]}" for key in BASE if wanted.get(key))
            + ": run evaluate without --settings-of-batch for it first"
        )
    best = max(found, key=lambda setting: float(np.mean(found[setting])))
    return dict(zip(SETTINGS, best, strict=True))


def interval(values: Sequence[float] | pd.Series) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval (Student's t); one value has no interval."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(half)


def summary(
    frame: pd.DataFrame, cell: Any, protocol: str, scores: Sequence[str]
) -> dict[str, tuple[float, float]] | None:
    """`interval` of each score over the seeds of a cell, None where there is no run."""
    runs = frame[(frame["split"] == "test") & (frame["protocol"] == protocol)]
    for key in (*BASE, *SETTINGS):
        wanted = getattr(cell, key)
        runs = runs[runs[key].isna() if wanted is None else runs[key] == wanted]
    return {score: interval(runs[score]) for score in scores} if len(runs) else None


def text(mean: float, half: float, sign: str = "") -> str:
    """In percent; one seed has no interval."""
    return f"{100 * mean:{sign}.1f}" + ("" if np.isnan(half) else f" ± {100 * half:.1f}")
