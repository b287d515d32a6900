"""How every picture looks: sizes for a page 800 pixels wide, one colour a method, plain ticks."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

WIDTH = 8.0  # inches: a point is then about 1.4 pixels on a page 800 pixels wide
DPI = 160

# Okabe and Ito's palette, which colour-blind readers can tell apart.
BLUE, SKY, ORANGE, RED = "#0072B2", "#56B4E9", "#E69F00", "#D55E00"
GREEN, PURPLE, BLACK, GREY = "#009E73", "#CC79A7", "#000000", "#767676"

# What a line is called in a picture, and how it is drawn: the same wherever it stands.
LINES: dict[str, tuple[str, str, str]] = {
    "cross-entropy": ("cross-entropy", GREY, "-"),
    "NormFace": ("NormFace", GREEN, "-"),
    "cross-entropy + SupCon": ("cross-entropy + SupCon", ORANGE, ":"),
    "cross-entropy + VarCon": ("cross-entropy + VarCon", BLUE, ":"),
    "SupCon": ("SupCon", ORANGE, "-"),
    "VarCon": ("VarCon", BLUE, "-"),
    "VarCon memory": ("VarCon, centroid memory", BLUE, "--"),
    "varcon-loss": ("VarCon, varcon-loss", BLUE, "-"),
    "varcon-loss, centroid memory": ("VarCon, centroid memory", BLUE, "--"),
    "varcon-loss eager": ("VarCon, varcon-loss eager", SKY, "--"),
    "varcon-loss triton": ("VarCon, varcon-loss triton", SKY, "-"),
    "varcon-loss reference": ("VarCon, varcon-loss reference", SKY, ":"),
    "equations, authors' operations": ("VarCon, authors' operations", RED, "-"),
    "equations, authors' operations, compiled": ("authors' operations, compiled", RED, ":"),
    "equations, lean": ("VarCon, lean equations", PURPLE, "-"),
    "equations, lean, compiled": ("lean equations, compiled", PURPLE, ":"),
    "cut-cross-entropy composition": ("VarCon, cut-cross-entropy", BLACK, "-"),
    "SupCon (pytorch-metric-learning)": ("SupCon, pytorch-metric-learning", ORANGE, "-"),
    "SupCon (one matrix)": ("SupCon, one matrix", ORANGE, "--"),
    "SupCon, CrossBatchMemory": ("SupCon, CrossBatchMemory", ORANGE, ":"),
    "NT-Xent (pytorch-metric-learning)": ("NT-Xent, pytorch-metric-learning", GREEN, "-"),
    "varcon-loss, all-reduce": ("VarCon, all-reduce", BLUE, "-"),
    "varcon-loss, all-gather": ("VarCon, all-gather", BLUE, "--"),
    "VarCon, embeddings gathered": ("embeddings gathered", RED, "-"),
    "VarCon, in chunks": ("VarCon, in chunks", BLUE, "-"),
    "VarCon, one batch": ("VarCon, one batch", BLUE, "--"),
    "SupCon, gradient caching": ("SupCon, gradient caching", ORANGE, "-"),
    "SupCon, one batch": ("SupCon, one batch", ORANGE, "--"),
}

# Ten classes that can be told apart (Petroff, arXiv 2107.02270).
CLASSES = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",
    "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
)  # fmt: skip

plt.rcParams.update(
    {
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "lines.markersize": 3.5,
        "savefig.dpi": DPI,
    }
)


def line(name: str) -> dict[str, object]:
    """Keyword arguments of ``plot`` for a method or contender."""
    label, colour, dashes = LINES.get(name, (name, BLACK, "-"))
    heavy = name in ("varcon-loss", "VarCon", "VarCon, in chunks")
    return {
        "label": label, "color": colour, "ls": dashes, "marker": "o", "lw": 2.2 if heavy else 1.3,
        "zorder": 3 if heavy else 2,
    }  # fmt: skip


def number(value: float, _: object = None) -> str:
    """A tick in plain figures."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def log_ticks(axis: Axes, *, x: Sequence[float] | None = None, y: bool = False) -> None:
    """Logarithmic axes with plain numbers: ticks ``x`` as given, ``y`` at powers of ten."""
    if x is not None:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(list(x)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(number))
    if y:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(10, numticks=9))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(FuncFormatter(number))


Ends = list[tuple[float, float, str, str]]  # (x, y, name, colour) of the last points of lines


def _label_ends(axis: Axes, ends: Ends, gap: float) -> None:
    """Names beside the ends of lines, ``gap`` points apart where they would meet."""
    scale = 72 / axis.figure.dpi

    def height(end: tuple[float, float, str, str]) -> float:
        return axis.transData.transform(end[:2])[1] * scale

    ends = sorted(ends, key=lambda end: round(height(end) / gap))  # as given, where they meet
    at = [height(end) for end in ends]
    placed = list(at)
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    placed[-1] = min(placed[-1], axis.get_window_extent().y1 * scale)
    for i in reversed(range(len(placed) - 1)):
        placed[i] = min(placed[i], placed[i + 1] - gap)
    for (x, y, name, colour), where, end in zip(ends, placed, at, strict=True):
        axis.annotate(
            name, (x, y), (6, where - end), textcoords="offset points", color=colour, va="center",
            annotation_clip=False,
        )  # fmt: skip


def legend(figure: Figure, axes: Iterable[Axes], columns: int) -> None:
    """One legend for all panels, below them."""
    handles = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns)


def points(axis: Axes, flat: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> None:
    """A map of samples whose axes mean nothing, each class named at the middle of its samples."""
    for k, name in enumerate(names):
        mine = flat[labels == k]
        colour = CLASSES[k % len(CLASSES)]
        axis.scatter(*mine.T, color=colour, s=9, lw=0, alpha=0.8)
        if len(mine):
            axis.text(
                *np.median(mine, axis=0), name, weight="bold", fontsize=8, ha="center", va="center",
                path_effects=[withStroke(linewidth=2, foreground="white")],
            )  # fmt: skip
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(True)
    axis.grid(False)


def panels(rows: int, columns: int, height: float, **options: object) -> tuple[Figure, np.ndarray]:
    return plt.subplots(
        rows, columns, figsize=(WIDTH, height), squeeze=False, layout="constrained", **options
    )


def save(
    figure: Figure, path: Path, ends: Mapping[Axes, Ends] | None = None, gap: float = 11
) -> Path:
    """Write the picture, with names at the ``ends`` of lines, at least ``gap`` points apart."""
    figure.draw_without_rendering()  # where things stand is known only now
    figure.set_layout_engine("none")
    for axis, of_axis in (ends or {}).items():
        if of_axis:
            _label_ends(axis, of_axis, gap)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path
