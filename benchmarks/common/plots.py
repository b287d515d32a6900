"""Every picture, from plain data: no question draws for itself."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator
from scipy.cluster.hierarchy import dendrogram

from benchmarks.common import style
from benchmarks.common.data import has_hundred_classes
from benchmarks.common.paired import TITLES, reported, summary
from benchmarks.common.probes import CORRUPTIONS, SEVERITIES

HERO = {  # contenders, and what the picture calls them
    "varcon-loss": "varcon-loss",
    "equations, lean": "lean\nequations",
    "equations, authors' operations": "authors'\noperations",
    "SupCon (pytorch-metric-learning)": "SupCon",
}
SIZE_TICKS = (64, 1024, 16384)
SPEED_PANELS = (("median", 1e3, "time, ms"), ("peak_bytes", 2**-20, "memory, MiB"))
WHERE_LINES_END = "(a line ends where a step takes over 2 s or its process ran out of memory)"


STEP_MEMORY = {  # what the third panel shows of a training step, and its names there
    "VarCon, in chunks": "VarCon\nin chunks",
    "VarCon, one batch": "VarCon\none batch",
    "SupCon, gradient caching": "SupCon\ncaching",
}


def draw_hero(
    frame: pd.DataFrame, path: Path, num_classes: int = 1000, steps: pd.DataFrame | None = None
) -> Path:
    """Time and memory over batch size, ours against what it replaces; memory of ``steps`` too."""
    full = frame[(frame["mode"] == "forward+backward") & (frame["num_classes"] == num_classes)]
    figure, axes = style.panels(1, 2 if steps is None else 3, 3.4)
    ends: dict[Axes, style.Ends] = {}
    last = full["num_rows"].max()
    if steps is not None:
        ends[axes[0, 2]] = _draw_step_memory(axes[0, 2], steps)
    for axis, (value, scale, title) in zip(axes[0], SPEED_PANELS, strict=False):
        for contender, name in HERO.items():
            mine = _positive(full[full["contender"] == contender], value)
            if mine.empty:
                continue
            drawn = style.line(contender)
            axis.plot(mine["num_rows"], mine[value] * scale, **drawn)
            x, y = mine["num_rows"].iloc[-1], mine[value].iloc[-1] * scale
            if x == last:
                ends.setdefault(axis, []).append((x, y, name, drawn["color"]))
            else:
                over = 6 if name == "SupCon" else 20  # the next line ends beside it
                axis.annotate(
                    name, (x, y), (6, over), textcoords="offset points", color=drawn["color"],
                    ha="right", va="bottom",
                )  # fmt: skip
        style.log_ticks(axis, x=SIZE_TICKS, y=True)
        axis.set(title=title, xlabel="batch size N")
        axis.set_xlim(50, (12 if steps is None else 50) * last)  # room for the names
        axis.set_ylim(top=15 * axis.get_ylim()[1])
    with_encoder = "" if steps is None else "; right: with a small CNN, 100 classes"
    figure.suptitle(
        f"One forward and backward, K = {num_classes:,} classes, D = {full['dim'].iloc[0]}, "
        f"{full['dtype'].iloc[0]}, two CPU cores{with_encoder}\n{WHERE_LINES_END}",
        fontsize=9,
    )
    return style.save(figure, path, ends, gap=25)


def _draw_step_memory(axis: Axes, steps: pd.DataFrame) -> style.Ends:
    steps = steps[steps["status"] == "ok"]
    ends = []
    for contender, name in STEP_MEMORY.items():
        mine = steps[steps["contender"] == contender]
        drawn, memory = style.line(contender), mine["peak_bytes"] / 2**20
        axis.plot(mine["num_images"], memory, **drawn)
        if len(mine):
            ends.append((mine["num_images"].iloc[-1], memory.iloc[-1], name, drawn["color"]))
    style.log_ticks(axis, x=(256, 4096), y=True)
    axis.set(title="whole step: memory, MiB", xlabel="batch size N")
    axis.set_xlim(right=20 * steps["num_images"].max())
    low, high = axis.get_ylim()
    axis.set_ylim(low / 2, 4 * high)
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
        classes = sorted(part["num_classes"].unique())
        figure, axes = style.panels(2, len(classes), 6.4, sharex=True, sharey="row")
        for column, k in zip(axes.T, classes, strict=True):
            for contender, mine in part[part["num_classes"] == k].groupby("contender", sort=False):
                for axis, (value, scale, _) in zip(column, SPEED_PANELS, strict=True):
                    mine_here = _positive(mine, value)
                    if len(mine_here):
                        axis.plot(
                            mine_here["num_rows"], mine_here[value] * scale, **style.line(contender)
                        )
            column[0].set(title=f"K = {k:,}")
            column[1].set(xlabel="batch size N")
            for axis in column:
                sizes = sorted(part["num_rows"].unique())
                shown = [size for size in SIZE_TICKS if size in sizes] or sizes
                style.log_ticks(axis, x=shown, y=True)
        for axis, (_, _, title) in zip(axes[:, 0], SPEED_PANELS, strict=True):
            axis.set_ylabel(title)
        figure.suptitle(f"Forward + backward, D = {dim}, {dtype}\n{WHERE_LINES_END}", fontsize=9)
        style.legend(figure, axes.flat, 3)
        paths.append(style.save(figure, out / f"{name}-{dtype}-{dim}.png"))
    return paths


def _positive(mine: pd.DataFrame, value: str) -> pd.DataFrame:
    mine = mine.dropna(subset=[value]).sort_values("num_rows")
    return mine[mine[value] > 0]


def draw_quality(rows: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """Accuracy over batch size by method, and tau2 while VarCon trains, for one data set."""
    data = rows[0]["data"]
    methods = dict.fromkeys(row["method"] for row in rows)
    plotted = [m for name in style.LINES for m in methods if m.partition(", mixup ")[0] == name]
    figure, axes = style.panels(2, 2, 6.6)
    sizes = sorted({row["batch_size"] for row in rows})
    shown = {
        "linear": "linear probe",
        "knn": "kNN",
        "linear, 5 a class": "linear probe on 5 images a class",
    }
    for axis, (value, title) in zip(axes.flat, shown.items(), strict=False):
        table = summary(rows, value)
        table = table[table["noise"] == 0.0]
        for index, method in enumerate(plotted):
            mine = table[table["method"] == method].sort_values("batch_size")
            mine = mine.dropna(subset=["mean"])
            # A little apart, so that no interval covers another.
            beside = mine["batch_size"] * 1.035 ** (index - len(plotted) / 2)
            axis.errorbar(
                beside, 100 * mine["mean"], 100 * mine["half_width"].fillna(0), capsize=2,
                **style.line(method),
            )  # fmt: skip
        style.log_ticks(axis, x=sizes)
        axis.set_xlim(min(sizes) / 1.4, max(sizes) * 1.4)
        axis.set(title=title, ylabel="accuracy, %", xlabel="batch size")
        axis.set_ylim(top=min(100.0, axis.get_ylim()[1]))
    tau2 = _draw_tau2(axes[1, 1], rows)
    if not tau2:
        axes[1, 1].remove()
    seeds = len({row["seed"] for row in rows if row["split"] == "test"})
    figure.suptitle(f"{data}: mean and 95 % interval over {seeds} seeds")
    style.legend(figure, axes.flat[:3], 3)
    return [style.save(figure, out / f"quality-{data}.png", {axes[1, 1]: tau2} if tau2 else {})]


def draw_gains(gains: Mapping[str, pd.DataFrame], path: Path) -> Path:
    """Paired differences from SupCon over the images of a class that a step sees.

    Args:
        gains: by method, with columns ``data``, ``images``, ``readout``, ``gain`` and
            ``gain_half_width``.
        path: of the picture.
    """
    shown = {"linear": "linear probe", "linear, 5 a class": "on 5 images a class"}
    sets = sorted(
        {data for frame in gains.values() for data in frame["data"]},
        key=lambda data: (has_hundred_classes(data), data),
    )
    figure, axes = style.panels(len(shown), len(sets), 6.4, sharex="col")
    for column, data in zip(axes.T, sets, strict=True):
        for axis, (value, title) in zip(column, shown.items(), strict=True):
            axis.axhline(0, color=style.BLACK, lw=0.8)
            for index, (method, frame) in enumerate(gains.items()):
                mine = frame[(frame["readout"] == value) & (frame["data"] == data)]
                mine = mine.sort_values("images")
                axis.errorbar(
                    mine["images"] * 1.06**index, 100 * mine["gain"],
                    100 * mine["gain_half_width"], capsize=2, **style.line(method),
                )  # fmt: skip
            axis.yaxis.set_major_formatter(lambda v, _: f"{v:+g}" if v else "0")
            axis.set_title(title)
            style.log_ticks(axis, x=(0.3, 1, 3, 10, 30, 100))
            axis.margins(x=0.1)
        number = 100 if has_hundred_classes(data) else 10
        column[0].set_title(f"{data},\n{number} classes\n{shown['linear']}")
        column[-1].set_xlabel("samples of a class in\na step, views counted")
    for axis in axes[:, 0]:
        axis.set_ylabel("points ahead of SupCon")
    figure.suptitle("Difference from SupCon, 95 % interval; each panel has its own scale")
    style.legend(figure, axes.flat, 5)
    return style.save(figure, path)


def _epochs(axis: Axes, last: int, room: float) -> None:
    """Whole epochs up to the last, and room to the right for names."""
    axis.set_xlim(0.5, room * last)
    ticks = MaxNLocator(5, integer=True).tick_values(1, last)
    axis.set_xticks([tick for tick in ticks if 1 <= tick <= last])
    axis.set_xlabel("epoch")


def _draw_tau2(axis: Axes, rows: Sequence[dict[str, Any]]) -> style.Ends:
    """Median and quartiles by epoch, of one run of VarCon for each batch size."""
    runs = [
        row
        for row in reported(rows)
        if row["method"].partition(", mixup ")[0] == "VarCon" and row["seed"] == row["noise"] == 0
    ]
    ends = []
    for index, run in enumerate(sorted(runs, key=lambda r: r["batch_size"])):
        quantiles = np.array(run["tau2"]).T  # 5, 25, 50, 75, 95 %
        epochs = np.arange(1, quantiles.shape[1] + 1)
        colour = style.ORDERED[index % len(style.ORDERED)]
        axis.plot(epochs, quantiles[2], color=colour, marker="o")
        axis.fill_between(epochs, quantiles[1], quantiles[3], color=colour, alpha=0.15, lw=0)
        ends.append((epochs[-1], quantiles[2][-1], f"batch {run['batch_size']}", colour))
    axis.set(title=r"VarCon: $\tau_2$ in training, median and quartiles")
    if ends:
        _epochs(axis, max(end[0] for end in ends), 1.3)
        low, high = axis.get_ylim()
        axis.set_ylim(top=high + 0.25 * (high - low))  # room for the names, one above another
    return ends


def draw_momentum(table: pd.DataFrame, out: Path) -> Path:
    """Accuracy over the momentum of the centroid memory, a panel for each number of classes."""
    classes, momenta = sorted(table["classes"].unique()), sorted(table["momentum"].unique())
    figure, axes = style.panels(1, len(classes), 3.2)
    ends: dict[Axes, style.Ends] = {}
    for axis, k in zip(axes[0], classes, strict=True):
        problems = table[table["classes"] == k].groupby("batch_size")
        for index, (size, mine) in enumerate(problems):
            mine = mine.sort_values("momentum")
            at = np.array([momenta.index(m) for m in mine["momentum"]])
            colour = style.ORDERED[index % len(style.ORDERED)]
            axis.errorbar(
                at + 0.06 * (index - 1), 100 * mine["mean"], 100 * mine["half_width"], color=colour,
                capsize=2, marker="o",
            )  # fmt: skip
            end = (at[-1] + 0.15, 100 * mine["mean"].iloc[-1], f"batch {size}", colour)
            ends.setdefault(axis, []).append(end)
        axis.set(title=f"{k:.0f} classes", xlabel="momentum", xlim=(-0.3, len(momenta)))
        axis.set_xticks(range(len(momenta)), [f"{m:g}" for m in momenta])
    axes[0, 0].set_ylabel("accuracy, %\n(mean of linear probe and kNN)")
    return style.save(figure, out / "momentum.png", ends)


def draw_evolution(
    maps: Mapping[str, Mapping[int, np.ndarray]],
    labels: np.ndarray,
    names: Sequence[str],
    tau2: Mapping[int, np.ndarray],
    bounds: tuple[float, float],
    path: Path,
) -> Path:
    """Maps of held-out images, a row a method; below them the density of tau2, a column an epoch.

    Args:
        maps: ``[N, 2]`` by method and epoch.
        labels: ``[N]``.
        names: of the classes.
        tau2: per sample, by epoch.
        bounds: the least and the most that tau2 can be.
        path: of the picture.
    """
    columns = len(tau2)
    figure, axes = style.panels(len(maps) + 1, columns, 2 * (len(maps) + 1) + 0.6)
    for row, (method, by_epoch) in zip(axes, maps.items(), strict=False):
        for axis, (epoch, flat) in zip(row, by_epoch.items(), strict=True):
            style.points(axis, flat, labels, names)
            axis.set_title(f"{method}, epoch {epoch}")
    for axis, (epoch, values) in zip(axes[-1], tau2.items(), strict=True):
        axis.hist(values, np.linspace(*bounds, 41), density=True, color=style.BLUE)
        axis.axvline(values.mean(), color=style.BLACK, lw=1)
        axis.set(title=f"epoch {epoch}: mean {values.mean():.3f}", xlabel=r"$\tau_2$", yticks=[])
    axes[-1, 0].set_ylabel("VarCon: density\nover a batch")
    figure.suptitle("t-SNE of held-out images, each class named at its middle")
    return style.save(figure, path)


def draw_bytes(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Bytes that a rank sends in a step over classes, a panel for each number of ranks."""
    frame = pd.DataFrame(rows)
    ranks = sorted(frame["ranks"].unique())
    figure, axes = style.panels(1, len(ranks), 3.4, sharey=True)
    for axis, count in zip(axes[0], ranks, strict=True):
        here = dict(list(frame[frame["ranks"] == count].groupby("contender", sort=False)))
        for names, mine in _alike(here, "MB sent"):
            label = "; ".join(str(style.line(name)["label"]) for name in names)
            axis.plot(mine["C"], mine["MB sent"], **style.line(names[0]) | {"label": label})
        style.log_ticks(axis, x=(1_000, 100_000), y=True)
        axis.set(title=f"{count} ranks", xlabel="classes C")
    axes[0, 0].set_ylabel("sent a rank and step, MB\n(model, 256 samples a rank)")
    style.legend(figure, axes.flat, 1)
    return style.save(figure, path)


def _alike(lines: Mapping[str, pd.DataFrame], value: str) -> list[tuple[list[str], pd.DataFrame]]:
    """Lines that the eye could not tell apart, joined under the first one's values."""
    joined: list[tuple[list[str], pd.DataFrame]] = []
    for name, mine in lines.items():
        for names, first in joined:
            if np.allclose(mine[value].to_numpy(), first[value].to_numpy(), rtol=0.05):
                names.append(name)
                break
        else:
            joined.append(([name], mine))
    return joined


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
        axis.set_title(title)
        _epochs(axis, max(end[0] for end in ends[axis]), 1.9)
    figure.suptitle(
        "Held-out images of ten of the 100 classes (t-SNE; classes share their left digit)"
    )
    return style.save(figure, path, ends)


def draw_settings(table: pd.DataFrame, vary: str, path: Path) -> Path:
    """Accuracy over the values of one setting, a panel a read-out, for the first batch size."""
    table = table[table["batch_size"] == table["batch_size"].min()]
    shown = [v for v in ("linear", "knn", "linear, 5 a class") if v in set(table["readout"])]
    figure, axes = style.panels(1, len(shown), 3.6)
    settings = list(dict.fromkeys(table[vary]))
    for axis, value in zip(axes[0], shown, strict=True):
        here = table[table["readout"] == value]
        for index, (method, mine) in enumerate(here.groupby("method", sort=False)):
            at = np.array([settings.index(setting) for setting in mine[vary]])
            axis.errorbar(
                at + 0.06 * index, 100 * mine["mean"], 100 * mine["half_width"].fillna(0),
                capsize=2, **style.line(method),
            )  # fmt: skip
        axis.set_xticks(range(len(settings)), [str(setting) for setting in settings])
        axis.set(title=TITLES[value].replace(" on ", "\non "), xlabel=vary)
    axes[0, 0].set_ylabel("accuracy, %")
    first = table.iloc[0]
    figure.suptitle(
        f"{first['data']}, batch {first['batch_size']}: mean and 95 % interval over "
        f"{table['seeds'].max()} seeds"
    )
    style.legend(figure, axes.flat, 4)
    return style.save(figure, path)


def draw_corruption(table: pd.DataFrame, path: Path) -> Path:
    """Accuracy over severity, a panel a corruption; severity 0 is the clean images."""
    figure, axes = style.panels(2, 3, 5.2, sharex=True, sharey=True)
    for axis, name in zip(axes.flat, CORRUPTIONS, strict=True):
        parts = ["linear", *(f"{name}, {severity}" for severity in SEVERITIES)]
        for index, (method, mine) in enumerate(table.groupby("method", sort=False)):
            by_part = mine.set_index("readout").loc[parts]
            axis.errorbar(
                np.arange(len(parts)) + 0.08 * index, 100 * by_part["mean"],
                100 * by_part["half_width"].fillna(0), capsize=2, **style.line(method),
            )  # fmt: skip
        axis.set(title=name, ylim=(0, 100))
    for axis in axes[1]:
        axis.set_xlabel("severity")
    for axis in axes[:, 0]:
        axis.set_ylabel("linear probe, %")
    first = table.iloc[0]
    figure.suptitle(
        f"{first['data']}, batch {first['batch_size']}: mean and 95 % interval over "
        f"{table['seeds'].max()} seeds; severity 0 is clean"
    )
    style.legend(figure, axes.flat, 3)
    return style.save(figure, path)


def draw_transfer(table: pd.DataFrame, path: Path) -> Path:
    """Accuracy on the set that was trained on, and on others: a panel a read-out."""
    parts = list(dict.fromkeys(table["readout"]))
    methods = list(dict.fromkeys(table["method"]))
    figure, axes = style.panels(1, len(parts), 0.32 * len(methods) + 1.5, sharey=True)
    for axis, part in zip(axes[0], parts, strict=True):
        title = str(TITLES.get(part, part))
        here = table[table["readout"] == part].set_index("method")
        for index, method in enumerate(methods):
            row = here.loc[method]
            axis.errorbar(
                100 * row["mean"], index, xerr=100 * np.nan_to_num(row["half_width"]), capsize=2,
                **style.line(method) | {"ls": "none"},
            )  # fmt: skip
        axis.set(title=title.replace(" on ", "\non "), xlabel="%")
        axis.xaxis.set_major_locator(MaxNLocator(2))
        axis.xaxis.set_major_formatter(FuncFormatter(style.number))
    axes[0, 0].set_yticks(range(len(methods)), methods)
    axes[0, 0].invert_yaxis()
    first = table.iloc[0]
    figure.suptitle(
        f"Trained on {first['data']}, batch {first['batch_size']}: mean and 95 % interval over "
        f"{table['seeds'].max()} seeds"
    )
    return style.save(figure, path)


def draw_trees(trees: Mapping[str, Any], names: Sequence[str], path: Path) -> Path:
    """The tree of class means of each method, one seed."""
    rows = (len(trees) + 1) // 2
    height = max(2.2, 0.11 * len(names))
    figure, axes = style.panels(rows, 2, rows * height + 0.4)
    for axis in axes.flat[len(trees) :]:
        axis.remove()
    for axis, (method, tree) in zip(axes.flat, trees.items(), strict=False):
        dendrogram(
            np.array(tree), labels=list(names), orientation="right", ax=axis, color_threshold=0,
            above_threshold_color=style.line(method)["color"],
            leaf_font_size=8 if len(names) <= 20 else 4,
        )  # fmt: skip
        axis.set_title(method)
        axis.grid(False)
    for axis in axes[-1]:
        if axis.figure is not None:
            axis.set_xlabel("cosine distance")
    figure.suptitle("Average-linkage trees of class means, held-out images, one seed")
    return style.save(figure, path)
