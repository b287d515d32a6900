"""What `evaluate` found: tables whose best is bold, and two pictures."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.common import style
from benchmarks.common.methods import METHODS
from benchmarks.common.paired import CHOSEN_BY, SETTINGS, interval, text
from benchmarks.report.markdown import embedded, grid, origin

BASELINE = "SupCon"
ALONE = [method for method in METHODS if " + " not in method]
JOINT = ["cross-entropy", *(method for method in METHODS if " + " in method)]
Gains = list[tuple[str, dict[str, tuple[float, float]]]]  # by task and method: mean, half-width


@dataclass(frozen=True)
class Line:
    """A row of the table: which runs, which score."""

    task: str
    title: str
    protocol: str
    score: str
    regime: str = "frozen"
    imbalance: float = 0.0
    batch_size: int = 256
    epochs: int = 15
    lower: bool = False  # is lower better?


LINES = (
    Line("Unseen styles", "linear probe", "styles", "top1_probe"),
    Line("Unseen styles", "nearest mean", "styles", "top1_mean"),
    Line("Unseen styles", "5 labels a class", "styles", "top1_5_shot"),
    Line("Unseen styles", "1 label a class", "styles", "top1_1_shot"),
    Line("Unseen classes", "Recall@1", "classes", "recall_at_1"),
    Line("Unseen classes", "MAP@R", "classes", "map_at_r"),
    Line("Imbalance 10", "all classes", "tail", "top1", imbalance=10.0),
    Line("Imbalance 10", "rarest third", "tail", "tail", imbalance=10.0),
    Line("Imbalance 100", "all classes", "tail", "top1", imbalance=100.0),
    Line("Imbalance 100", "rarest third", "tail", "tail", imbalance=100.0),
    Line("Confidence", "ECE ↓", "confidence", "ece", lower=True),
    Line("Confidence", "ECE, fitted ↓", "confidence", "ece_fitted", lower=True),
    Line("Unknown classes", "AUROC", "confidence", "auroc"),
    Line("Unknown classes", "FPR@95 ↓", "confidence", "fpr_at_95", lower=True),
    Line("Whole encoder, styles", "linear probe", "styles", "top1_probe", "whole", epochs=3),
    Line("Whole encoder, styles", "nearest mean", "styles", "top1_mean", "whole", epochs=3),
    Line("Whole encoder, classes", "Recall@1", "classes", "recall_at_1", "whole", epochs=3),
    Line("Whole encoder, classes", "MAP@R", "classes", "map_at_r", "whole", epochs=3),
)


def evidence(folder: Path) -> Iterator[str]:
    path = folder / "icons.jsonl"
    if not path.exists():
        return
    rows = pd.DataFrame(json.loads(line) for line in path.read_text().splitlines())
    rows["weight"] = rows["weight"].astype(float)
    yield "## Embeddings of icons\n"
    yield origin("evaluate", rows[rows["split"] == "test"]["environment"].iloc[0]) + "\n"
    yield (
        "In percent: mean ± 95 % interval over seeds. Bold: the best, and whatever is not told "
        "apart from it, seed by seed. Calibration error and FPR@95: lower is better.\n"
    )
    yield from grid(["", *ALONE], table(rows, ALONE))
    yield "\n### Cross-entropy beside it\n"
    yield from grid(["", *JOINT], table(rows, JOINT, LINES[:6]))
    gains = _gains(rows)
    yield f"\n### Points from {BASELINE}\n"
    yield "Paired by seed; positive is better.\n"
    others = [method for method in METHODS if method != BASELINE]
    cells = ([title, *(_points(of.get(method)) for method in others)] for title, of in gains)
    yield from grid(["", *others], cells)
    _draw_gains(gains, folder / "icons.png")
    yield embedded(folder / "icons.png", "Points from SupCon by task and method")
    yield from _batches(rows, folder)
    yield "\n### Temperature\n"
    yield (
        "Validation runs at the best learning rate, one seed: mean of nearest mean on unseen "
        "styles and Recall@1 on unseen classes, in percent.\n"
    )
    yield from _temperatures(rows)
    yield from _own_settings(rows)
    yield "\n### Settings that validation chose\n"
    yield from grid(["task", "batch", "method", *SETTINGS], _settings(rows))


def values(rows: pd.DataFrame, line: Line, method: str) -> pd.Series:
    """The score of each seed; empty where nothing was run."""
    own = rows.reindex(columns=["chunk_size", "momentum", "epsilon"]).isna().all(axis=1)
    kept = rows[_alike(rows, line) & own & (rows["split"] == "test") & (rows["method"] == method)]
    kept = kept[(kept["protocol"] == line.protocol) & (kept["batch_size"] == line.batch_size)]
    return kept.set_index("seed").get(line.score, pd.Series(dtype=float))


def _alike(rows: pd.DataFrame, line: Line) -> pd.Series:
    """Runs of the kind of a line, whatever their method and batch size."""
    keys = ("regime", "imbalance", "epochs")
    return pd.concat([rows[key] == getattr(line, key) for key in keys], axis=1).all(axis=1)


def level(one: pd.Series, other: pd.Series) -> bool:
    """Does the interval of the paired difference include 0?"""
    mean, half = interval((one - other).dropna())
    return bool(np.isnan(half) or abs(mean) <= half)


def table(
    rows: pd.DataFrame, methods: Sequence[str], lines: Sequence[Line] = LINES
) -> Iterator[list[str]]:
    for line in lines:
        found = {method: values(rows, line, method) for method in methods}
        means = {method: seeds.mean() for method, seeds in found.items() if len(seeds)}
        if len(means) < 2:
            continue
        best = (min if line.lower else max)(means, key=lambda method: means[method])
        cells = []
        for method in methods:
            if method not in means:
                cells.append("")
                continue
            cell = text(*interval(found[method]))
            cells.append(f"**{cell}**" if level(found[method], found[best]) else cell)
        yield [f"{line.task}: {line.title}", *cells]


def _points(gain: tuple[float, float] | None) -> str:
    return (
        ""
        if gain is None
        else f"{gain[0]:+.1f}" + ("" if np.isnan(gain[1]) else f" ± {gain[1]:.1f}")
    )


def _gains(rows: pd.DataFrame) -> Gains:
    """By task: each method's paired difference from SupCon, in points, positive if better."""
    gains = []
    for line in LINES:
        base = values(rows, line, BASELINE)
        of = {}
        for method in METHODS:
            difference = (values(rows, line, method) - base).dropna()
            if method != BASELINE and len(difference):
                mean, half = interval(difference)
                of[method] = (100 * mean * (-1 if line.lower else 1), 100 * half)
        if of:
            gains.append((f"{line.task}: {line.title.removesuffix(' ↓')}", of))
    return gains


def _batches(rows: pd.DataFrame, folder: Path) -> Iterator[str]:
    """Quality and training time by batch size, at one number of epochs."""
    own = rows.reindex(columns=["momentum", "epsilon"]).isna().all(axis=1)
    runs = rows[_alike(rows, LINES[0]) & own & (rows["split"] == "test")]
    several = runs.groupby("method")["batch_size"].nunique() > 1
    lines, points = [], []
    for (size, method), mine in runs.groupby(["batch_size", "method"]):
        if not several[method]:
            continue
        styles, classes = (mine[mine["protocol"] == protocol] for protocol in ("styles", "classes"))
        of = interval(styles["top1_mean"]), interval(classes["map_at_r"])
        seconds = styles["cpu_seconds"].mean()
        lines.append(
            [f"{size:,}", method, text(*of[0]), text(*of[1]), f"{seconds:.0f}", len(styles)]
        )
        points.append((int(size), str(method), seconds, *of[1]))
    if not points:
        return
    yield f"\n### Batch size, at {LINES[0].epochs} epochs\n"
    yield "Time of a whole training on frozen features, one thread, in seconds of CPU time.\n"
    columns = ["batch", "method", "unseen styles", "unseen classes, MAP@R", "CPU seconds", "seeds"]
    yield from grid(columns, lines)
    _draw_times(points, folder / "training-time.png")
    yield embedded(folder / "training-time.png", "Training time over batch size, and quality")


def _temperatures(rows: pd.DataFrame) -> Iterator[str]:
    own = rows.reindex(columns=["weight", "momentum", "epsilon"]).isna().all(axis=1)
    tried = rows[_alike(rows, LINES[0]) & own & (rows["split"] == "validation")]
    tried = tried[(tried["batch_size"] == LINES[0].batch_size) & tried["temperature"].notna()]
    score = tried[[key for key in CHOSEN_BY if key in tried]].mean(axis=1)
    by = score.groupby([tried["method"], tried["temperature"], tried["learning_rate"]]).mean()
    best = by.groupby(level=[0, 1]).max().unstack()
    columns = ["method", *(f"{temperature:g}" for temperature in best.columns)]
    yield from grid(columns, ([m, *(f"{100 * v:.1f}" for v in row)] for m, row in best.iterrows()))


def _own_settings(rows: pd.DataFrame) -> Iterator[str]:
    """VarCon beside itself with another momentum or epsilon: points, paired by seed."""
    lines = []
    runs = rows[_alike(rows, LINES[0]) & (rows["split"] == "test")]
    for key in ("momentum", "epsilon"):
        if key not in runs:
            continue
        for (method, value), mine in runs.groupby(["method", key]):
            gains = []
            for line in LINES[1:6]:
                own = mine[mine["protocol"] == line.protocol].set_index("seed")[line.score]
                mean, half = interval((own - values(rows, line, method)).dropna())
                gains.append(_points((100 * mean, 100 * half)))
            lines.append([f"{method}, {key} {value:g}", *gains])
    if lines:
        yield "\n### Momentum and epsilon\n"
        yield from grid(["points from the usual", *(line.title for line in LINES[1:6])], lines)


def _settings(rows: pd.DataFrame) -> Iterator[list[object]]:
    keys = ["regime", "imbalance", "epochs", "batch_size", "method"]
    for found, mine in rows[rows["split"] == "test"].groupby(keys, sort=False):
        regime, imbalance, epochs, size, method = found
        task = f"{regime}, {epochs} epochs" + (f", imbalance {imbalance:g}" if imbalance else "")
        first = mine.iloc[0]
        yield [task, size, method, *("" if pd.isna(v) else f"{v:g}" for v in first[list(SETTINGS)])]


def _draw_gains(gains: Gains, path: Path) -> None:
    """Points from SupCon, a row a task and score; to the right is better."""
    shown = ("cross-entropy", "NormFace", "VarCon", "VarCon memory")
    figure, axes = style.panels(1, 1, 0.7 + 0.27 * len(gains))
    axis = axes[0, 0]
    for row, (_, of) in enumerate(gains):
        for i, method in enumerate(m for m in shown if m in of):
            drawn = style.line(method)
            mean, half = of[method]
            axis.errorbar(
                mean, row + 0.18 * (i - 1.5), xerr=half, fmt="o", color=drawn["color"], ms=4,
                lw=1.4, label=drawn["label"], mfc="white" if method == "VarCon memory" else None,
            )  # fmt: skip
    axis.axvline(0, color=style.ORANGE, lw=1.3)
    axis.set_yticks(range(len(gains)), [title for title, _ in gains])
    axis.invert_yaxis()
    axis.set_xlabel("points from SupCon, mean and 95 % interval: to the right is better")
    style.legend(figure, [axis], 4)
    style.save(figure, path)


def _draw_times(points: Sequence[tuple[int, str, float, float, float]], path: Path) -> None:
    """CPU seconds of a training, and MAP@R, over batch size."""
    figure, axes = style.panels(1, 2, 3.0)
    sizes = sorted({size for size, *_ in points})
    for method in dict.fromkeys(method for _, method, *_ in points):
        mine = sorted(point for point in points if point[1] == method)
        x = [size for size, *_ in mine]
        axes[0, 0].plot(x, [seconds for _, _, seconds, *_ in mine], **style.line(method))
        axes[0, 1].errorbar(
            x, [100 * mean for *_, mean, _ in mine], [100 * half for *_, half in mine],
            **style.line(method),
        )  # fmt: skip
    style.log_ticks(axes[0, 0], x=sizes, y=True)
    style.log_ticks(axes[0, 1], x=sizes)
    axes[0, 0].set(title="A whole training", xlabel="images a batch", ylabel="CPU seconds")
    axes[0, 1].set(title="Unseen classes", xlabel="images a batch", ylabel="MAP@R, %")
    style.legend(figure, [axes[0, 0]], 4)
    style.save(figure, path)
