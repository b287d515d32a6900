"""Every picture, from plain data: no question draws for itself."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from benchmarks.common import style

HERO = {  # contenders, and what the picture calls them
    "varcon-loss": "varcon-loss",
    "equations, lean": "lean\nequations",
    "equations, authors' operations": "authors'\noperations",
    "SupCon (pytorch-metric-learning)": "SupCon",
}
STEP_MEMORY = {  # of a whole training step
    "VarCon, in chunks": "VarCon\nin chunks",
    "VarCon, one batch": "VarCon\none batch",
    "SupCon, gradient caching": "SupCon\ncaching",
}
SIZE_TICKS = (64, 1024, 16384)
SPEED_PANELS = (("median", 1e3, "time, ms"), ("peak_bytes", 2**-20, "memory, MiB"))
WHERE_LINES_END = "(a line ends where a step takes over 2 s or its process ran out of memory)"


def draw_hero(frame: pd.DataFrame, steps: pd.DataFrame, path: Path) -> Path:
    """Time and memory over batch size, ours against what it replaces; memory of ``steps`` too."""
    full = frame[(frame["mode"] == "forward+backward") & (frame["num_classes"] == 1000)]
    figure, axes = style.panels(1, 3, 3.4)
    ends = {
        axis: _named_lines(axis, full, HERO, "num_rows", value, scale)
        for axis, (value, scale, _) in zip(axes[0], SPEED_PANELS, strict=False)
    }
    ends[axes[0, 2]] = _named_lines(
        axes[0, 2], steps, STEP_MEMORY, "num_images", "peak_bytes", 2**-20
    )
    titles = [title for *_, title in SPEED_PANELS]
    for axis, title in zip(axes[0], [*titles, "whole step: memory, MiB"], strict=True):
        style.log_ticks(axis, x=SIZE_TICKS if axis is not axes[0, 2] else (256, 4096), y=True)
        (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
        axis.set(title=title, xlabel="batch size N")
        axis.set(xlim=(left, 12 * right), ylim=(low / 2, 12 * high))  # room for the names
    figure.suptitle(
        f"One forward and backward, K = 1,000 classes, D = {full['dim'].iloc[0]}, "
        f"{full['dtype'].iloc[0]}, two CPU cores; right: with a small CNN, 100 classes\n"
        f"{WHERE_LINES_END}",
        fontsize=9,
    )
    return style.save(figure, path, ends, gap=25)


def _named_lines(
    axis: Axes, frame: pd.DataFrame, names: Mapping[str, str], x: str, value: str, scale: float
) -> style.Ends:
    """Draw a line a contender; returns the ends of those that reach the last size, and names."""
    ends = []
    for contender, name in names.items():
        mine = frame[(frame["contender"] == contender) & (frame[value] > 0)].sort_values(x)
        if len(mine):
            drawn = style.line(contender)
            axis.plot(mine[x], mine[value] * scale, **drawn)
            end = (mine[x].iloc[-1], mine[value].iloc[-1] * scale)
            if end[0] == frame[x].max():
                ends.append((*end, name, drawn["color"]))
            else:
                over = 6 if name == "SupCon" else 20  # the next line ends beside it
                axis.annotate(name, end, (6, over), textcoords="offset points",
                              color=drawn["color"], ha="right", va="bottom")  # fmt: skip
    return ends


def draw_large_batch(frame: pd.DataFrame, path: Path) -> Path:
    """Time for each image and memory of a training step over batch size, whole and in chunks."""
    figure, axes = style.panels(1, 2, 3.6)
    frame = frame[frame["status"] == "ok"]
    # On a CPU the least CPU time: other work on the machine is not in it.
    seconds, title = (
        ("least_cpu", "CPU time") if set(frame["device"]) == {"cpu"} else ("median", "time")
    )
    frame = frame.assign(
        each=1e3 * frame[seconds] / frame["num_images"], memory=frame["peak_bytes"] / 2**20
    )
    for name, mine in frame.groupby("contender", sort=False):
        for axis, value in zip(axes[0], ("each", "memory"), strict=True):
            axis.plot(mine["num_images"], mine[value], **style.line(str(name)))
    for axis, logarithmic in zip(axes[0], (False, True), strict=True):
        style.log_ticks(axis, x=sorted(set(frame["num_images"])), y=logarithmic)
        axis.set(xlabel="images of a step", ylim=None if logarithmic else (0, None))
    axes[0, 0].set_title(f"{title} for each image, ms")
    axes[0, 1].set_title("memory of a step, MiB")
    figure.suptitle(
        f"Forward, loss and backward of a small CNN, chunks of {frame['chunk_size'].iloc[0]} images"
    )
    style.legend(figure, axes.flat, 4)
    return style.save(figure, path)


def draw_speed(frame: pd.DataFrame, out: Path, name: str) -> list[Path]:
    """Time and memory of every contender over batch size, a panel for each number of classes."""
    frame = frame[frame["mode"] == "forward+backward"]
    paths = []
    for (dtype, dim), part in frame.groupby(["dtype", "dim"], sort=False):
        figure, axes = style.panels(
            2, part["num_classes"].nunique(), 6.4, sharex=True, sharey="row"
        )
        sizes = sorted(part["num_rows"].unique())
        for column, (k, here) in zip(axes.T, part.groupby("num_classes"), strict=True):
            for axis, (value, scale, _) in zip(column, SPEED_PANELS, strict=True):
                names = dict.fromkeys(here["contender"], "")
                _named_lines(axis, here, names, "num_rows", value, scale)
                style.log_ticks(axis, x=[n for n in SIZE_TICKS if n in sizes] or sizes, y=True)
            column[0].set(title=f"K = {k:,}")
            column[1].set(xlabel="batch size N")
        for axis, (_, _, title) in zip(axes[:, 0], SPEED_PANELS, strict=True):
            axis.set_ylabel(title)
        figure.suptitle(f"Forward + backward, D = {dim}, {dtype}\n{WHERE_LINES_END}", fontsize=9)
        style.legend(figure, axes.flat, 3)
        paths.append(style.save(figure, out / f"{name}-{dtype}-{dim}.png"))
    return paths


def draw_bytes(frame: pd.DataFrame, path: Path) -> Path:
    """MB that a rank sends in a step over classes, a panel for each number of ranks."""
    figure, axes = style.panels(1, frame["ranks"].nunique(), 3.4, sharey=True)
    for axis, (count, here) in zip(axes[0], frame.groupby("ranks"), strict=True):
        for name, mine in here.groupby("contender"):
            axis.plot(mine["C"], mine["MB sent"], **style.line(str(name)))
        style.log_ticks(axis, x=(1_000, 100_000), y=True)
        axis.set(title=f"{count} ranks", xlabel="classes C")
    axes[0, 0].set_ylabel("sent a rank and step, MB\n(model, 256 samples a rank)")
    style.legend(figure, axes.flat, 3)
    return style.save(figure, path)


def draw_quickstart(
    maps: Mapping[str, np.ndarray],
    titles: Mapping[str, str],
    labels: np.ndarray,
    names: Sequence[str],
    examples: Sequence[np.ndarray],
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    path: Path,
) -> Path:
    """A map of ten classes for each method; below, the classes, confidence and tau2 in training.

    Args:
        maps: ``[N, 2]`` by method.
        titles: by method.
        labels: ``[N]``, an index into ``names``.
        names: of the classes.
        examples: an image ``[height, width]`` of each class.
        histories: what was logged in each epoch, by method.
        path: of the picture.
    """
    figure, axes = style.panels(2, 12, 4.9)
    for axis in axes.flat:
        axis.remove()
    grid = axes[0, 0].get_gridspec()
    wide = 12 // len(maps)
    for index, (method, flat) in enumerate(maps.items()):
        axis = figure.add_subplot(grid[0, wide * index : wide * (index + 1)])
        style.points(axis, flat, labels, names)
        axis.set_title(titles[method], color=style.line(method)["color"])
    axis = figure.add_subplot(grid[1, :4])
    height, width = examples[0].shape
    sheet = np.full((5 * (height + 2), 2 * (width + 12)), np.min(examples))
    for index, (name, image) in enumerate(zip(names, examples, strict=True)):
        top, left = (index % 5) * (height + 2), (index // 5) * (width + 12)
        sheet[top : top + height, left + 10 : left + 10 + width] = image
        colour = style.CLASSES[index % len(style.CLASSES)]
        axis.text(left + 5, top + height / 2, name, color=colour, weight="bold",
                  ha="center", va="center")  # fmt: skip
    axis.imshow(sheet, cmap="gray", aspect="auto")
    axis.set(title="the ten classes shown above", xticks=[], yticks=[])
    axis.grid(False)
    ends: dict[Axes, style.Ends] = {}
    for position, key, title in (
        (slice(4, 8), "confidence", "confidence $p(y|z)$ in training"),
        (slice(8, 12), "tau2", r"adaptive temperature $\tau_2$"),
    ):
        axis = figure.add_subplot(grid[1, position])
        for method, history in histories.items():
            values = [log[key] for log in history if key in log]
            if values:
                drawn = style.line(method)
                axis.plot(np.arange(1, len(values) + 1), values, **drawn)
                end = (len(values), values[-1], method, drawn["color"])
                ends.setdefault(axis, []).append(end)
        last = max(end[0] for end in ends[axis])
        ticks = MaxNLocator(5, integer=True).tick_values(1, last)
        axis.set(title=title, xlabel="epoch", xticks=[t for t in ticks if 1 <= t <= last])
        axis.set_xlim(0.5, 1.9 * last)  # room for the names
    figure.suptitle(
        "Held-out images of ten of the 100 classes (t-SNE; classes share their left digit)"
    )
    return style.save(figure, path, ends)
