"""Statistics of runs that are paired by seed: means, intervals, differences, choices of a rate."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

READOUTS = {
    "linear": "linear probe",
    "knn": "kNN",
    "class mean": "nearest class mean",
    "centroids": "nearest remembered centroid",
}
DETAILS = {
    **{
        f"linear, {n} a class": f"linear probe on {n} image{'s' * (n > 1)} a class"
        for n in (1, 5, 10)
    },
    **{f"{side} digit": f"linear probe, {side} digit alone" for side in ("left", "right")},
}
TITLES = READOUTS | DETAILS
# What every method is compared by; the other read-outs are parts of these, or of one method.
MAIN = ("linear", "knn", "class mean", *(f"linear, {n} a class" for n in (1, 5, 10)))
KEYS = ("data", "noise", "batch_size", "method", "seed", "learning_rate", "collapsed")


SETTING = (
    "data", "method", "batch_size", "noise", "epochs", "momentum", "classes", "temperature",
    "epsilon", "augmentation", "mixup", "several",
)  # fmt: skip


def setting(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a run is a run of: all but learning rate, seed and split."""
    return tuple(row.get(key) for key in SETTING)


def told_apart(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose method's name says whether its images were mixed."""
    return [
        row | {"method": f"{row['method']}, mixup {row['mixup']:g}"} if row.get("mixup") else row
        for row in rows
    ]


def _few_labels(row: dict[str, Any]) -> float:
    """The score by which rates are chosen where features are to serve few labels."""
    parts = [row["linear, 1 a class"], row["linear, 5 a class"]]
    return -1.0 if None in parts else sum(parts)


def best_rates(
    rows: Iterable[dict[str, Any]], kind: str | None = None
) -> dict[tuple[Any, ...], float]:
    """The learning rate with the best validation score for this ``kind``, by `setting`."""
    score = _few_labels if kind == "few-shot" else _score
    best: dict[tuple[Any, ...], tuple[float, float]] = {}
    for row in rows:
        if row["split"] == "validation":
            key = setting(row)
            best[key] = max(best.get(key, (-2.0, 0.0)), (score(row), row["learning_rate"]))
    return {key: rate for key, (_, rate) in best.items()}


def best_by_validation(rows: Iterable[dict[str, Any]], names: Sequence[str]) -> str:
    """The method among ``names`` with the best validation score, each at its best rate."""
    candidates = [r for r in rows if r["split"] == "validation" and r["method"] in names]
    return max(candidates, key=_score)["method"]


def reported(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs on the test split, but for those whose learning rate a wider grid has overtaken."""
    kinds = {row.get("extra") for row in rows} - {None}
    rates = best_rates(rows, kinds.pop() if len(kinds) == 1 else None)
    return [
        row
        for row in rows
        if row["split"] == "test"
        and row["learning_rate"] == rates.get(setting(row), row["learning_rate"])
    ]


def _score(row: dict[str, Any]) -> float:
    return -1.0 if row["linear"] is None else row["linear"] + row["knn"]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval (Student's t)."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), float("nan")  # one value has no interval
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(half)


def summary(
    rows: Sequence[dict[str, Any]],
    value: str,
    baseline: str = "SupCon",
    by: Sequence[str] = (),
) -> pd.DataFrame:
    """Mean, interval, and paired difference from ``baseline`` by method and batch size.

    Collapsed runs are counted and left out of means and differences. ``by`` names further settings
    that tell groups of runs apart.
    """
    where = ["data", "noise", "batch_size", *by]
    columns = dict.fromkeys((*KEYS, *by, value))
    frame = pd.DataFrame([{key: row.get(key) for key in columns} for row in reported(rows)])
    table = []
    for found, here in frame.groupby(where, sort=False):
        kept = {
            method: group[~group["collapsed"]].dropna(subset=[value]).set_index("seed")[value]
            for method, group in here.groupby("method", sort=False)
        }
        for method, values in kept.items():
            group = here[here["method"] == method]
            mean, half = interval(values) if len(values) else (np.nan, np.nan)
            gain, gain_half = np.nan, np.nan
            if method != baseline and baseline in kept:
                difference = (values - kept[baseline]).dropna()
                gain, gain_half = interval(difference) if len(difference) else (gain, gain_half)
            table.append(
                {
                    **dict(zip(where, found, strict=True)),
                    "method": method,
                    "learning_rate": group["learning_rate"].iloc[0],
                    "seeds": len(values),
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
    if line.empty:
        return ""
    row = line.iloc[0]
    if pd.isna(row["mean"]):
        return f"all {row['collapsed']} collapsed" if row["collapsed"] else ""
    written = _interval(100 * row["mean"], 100 * row["half_width"], "")
    if pd.notna(row["gain"]):
        written += f" ({gain(line)})"
    if row["collapsed"]:
        written += f", {row['collapsed']} of {row['seeds'] + row['collapsed']} collapsed"
    return written


def verdict(gain: float, half: float) -> str:
    """What a difference and the half-width of its interval say: does the interval exclude 0?"""
    return "undecided" if abs(gain) <= half else "ahead" if gain > 0 else "behind"


def gain(line: pd.DataFrame) -> str:
    """The paired difference in one row of a `summary`, in points, with its interval."""
    row = line.iloc[0]
    return _interval(100 * row["gain"], 100 * row["gain_half_width"], "+")


def _interval(mean: float, half: float, sign: str) -> str:
    """One seed has no interval."""
    return f"{mean:{sign}.1f}" + ("" if pd.isna(half) else f" ± {half:.1f}")
