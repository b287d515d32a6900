"""How far ahead or behind, over how many samples of a class a step sees."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from benchmarks.common import methods, paired
from benchmarks.common.data import has_hundred_classes
from benchmarks.report.markdown import folded, grid, seeds_in_words

FEW, MANY = 4, 20  # samples of a class that a step sees: fewer than, and at least

RIVALS = ("SupCon", "SupCon queue", "cross-entropy", "NormFace", "SINCERE")
COMPARED = (
    ("VarCon", "SupCon"),
    ("VarCon memory", "SupCon"),
    ("VarCon memory", "cross-entropy"),
    ("VarCon memory", "NormFace"),
)


def paired_gains(rows: list[dict[str, Any]], method: str, baseline: str) -> pd.DataFrame:
    """Differences of ``method`` from ``baseline`` with right labels, a row a setting and read-out.

    Columns are those of `paired.summary`, and ``readout``, ``images`` (of a class that a step
    sees), ``verdict``.
    """
    clean = [row for row in rows if row["noise"] == 0.0 and row["method"] in (method, baseline)]
    parts = []
    for value in paired.MAIN:
        if not any(row.get(value) is not None for row in clean):
            continue
        table = paired.summary(clean, value, baseline)
        parts.append(table[table["method"] == method].assign(readout=value))
    if not parts or not any(method in part["method"].values for part in parts):
        return pd.DataFrame()
    frame = pd.concat(parts).dropna(subset=["gain", "gain_half_width"])
    frame["images"] = _images(frame)
    frame["verdict"] = [
        paired.verdict(gain, half)
        for gain, half in zip(frame["gain"], frame["gain_half_width"], strict=True)
    ]
    return frame.reset_index(drop=True)


def gains_over_supcon(rows: list[dict[str, Any]]) -> dict[str, pd.DataFrame]:
    """Of the methods that there are differences of."""
    found = {m: paired_gains(rows, m, "SupCon") for m in ("VarCon", "VarCon memory")}
    return {method: frame for method, frame in found.items() if not frame.empty}


def _images(frame: pd.DataFrame) -> list[float]:
    """Samples of a class that a step sees: two views of each image."""
    return [
        2 * size / (100 if has_hundred_classes(data) else 10)
        for data, size in zip(frame["data"], frame["batch_size"], strict=True)
    ]


def _counts(part: pd.DataFrame) -> str:
    found = part["verdict"].value_counts()
    gain = 100 * part["gain"]
    words = [f"{found.get(name, 0)} {name}" for name in ("ahead", "behind", "undecided")]
    return f"{', '.join(words)} (points: {gain.min():+.1f} to {gain.max():+.1f})"


def _groups(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Few, some and many samples of a class in a step."""
    images = frame["images"]
    for name, mask in (
        (f"few (under {FEW})", images < FEW),
        (f"some ({FEW} to {MANY})", (images >= FEW) & (images < MANY)),
        (f"many ({MANY} and more)", images >= MANY),
    ):
        if mask.any():
            yield name, frame[mask]


def verdicts_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line for few, some and many samples a class: who is highest, and who ahead of whom."""
    compared = {
        f"{method} against {baseline}": dict(_groups(frame))
        for method, baseline in COMPARED
        if not (frame := paired_gains(rows, method, baseline)).empty
    }
    best = ranking(rows)
    names = [name for name in best if any(name in groups for groups in compared.values())]
    if not names:
        return
    yield from grid(
        [
            "samples of a class in a step, views counted",
            "mean over these data sets and read-outs, %",
            *compared,
        ],
        (
            [name, best[name], *(_counts(g[name]) if name in g else "" for g in compared.values())]
            for name in names
        ),
    )
    yield ""


def ranking(rows: list[dict[str, Any]], shown: int = 4) -> dict[str, str]:
    """For few, some and many samples a class: the best methods by their mean over read-outs."""
    clean = [
        row
        for row in rows
        if row["noise"] == 0.0 and row["method"] in ("VarCon", "VarCon memory", *RIVALS)
    ]
    parts = [
        paired.summary(clean, value).assign(readout=value)
        for value in paired.MAIN
        if any(row.get(value) is not None for row in clean)
    ]
    if not parts:
        return {}
    frame = pd.concat(parts).dropna(subset=["mean"])
    frame["images"] = _images(frame)
    found = {}
    for name, part in _groups(frame):
        # A mean over harder data would be another's: only where as many methods as anywhere ran.
        runs = part.groupby(["data", "batch_size", "readout"])["method"].transform("nunique")
        means = part[runs == runs.max()].groupby("method")["mean"].mean().sort_values()[::-1]
        listed = {method: mean for i, (method, mean) in enumerate(means.items()) if i < shown}
        listed |= {method: means[method] for method in ("SupCon", "VarCon") if method in means}
        found[name] = ", ".join(f"{method} {100 * mean:.1f}" for method, mean in listed.items())
    return found


def by_readout(gains: pd.DataFrame) -> str:
    return "; ".join(
        f"{paired.TITLES[value]}: {_counts(part)}"
        for value, part in gains.groupby("readout", sort=False)
    )


def gains_table(rows: list[dict[str, Any]], gains: dict[str, pd.DataFrame]) -> Iterator[str]:
    shown = ("linear", "knn", "linear, 5 a class", "linear, 1 a class")
    columns = [
        "data, batch", "samples a class",
        *(f"VarCon: {paired.TITLES[value]}" for value in shown),
        *(f"VarCon memory: {paired.TITLES[value]}" for value in (shown[0], shown[2])),
        "best linear probe",
    ]  # fmt: skip
    best = paired.summary(
        [row for row in rows if row["noise"] == 0.0 and row["method"] in methods.METHODS], "linear"
    )
    lines = []
    every = pd.concat(gains.values())
    settings = every[["data", "batch_size", "images"]].drop_duplicates()
    for _, (data, size, images) in settings.sort_values(["images", "data"]).iterrows():
        cells = []
        for method, values in (("VarCon", shown), ("VarCon memory", ("linear", shown[2]))):
            here = gains.get(method, every[:0])
            here = here[(here["data"] == data) & (here["batch_size"] == size)].set_index("readout")
            cells += [_gain(here.loc[value]) if value in here.index else "" for value in values]
        top = best[(best["data"] == data) & (best["batch_size"] == size)]
        top = top.loc[top["mean"].idxmax()]
        lines.append(
            [f"{data}, {size}", f"{images:.3g}", *cells,
             f"{top['method']} {100 * top['mean']:.1f}"]
        )  # fmt: skip
    title = (
        "Every data set and batch: points from SupCon, with 95 % intervals over "
        f"{seeds_in_words(every['seeds'])}; bold where the interval excludes 0"
    )
    yield from folded(title, grid(columns, lines))


def _gain(row: pd.Series) -> str:
    text = f"{100 * row['gain']:+.1f} ± {100 * row['gain_half_width']:.1f}"
    return text if row["verdict"] == "undecided" else f"**{text}**"
