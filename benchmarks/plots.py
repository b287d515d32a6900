"""Pictures of saved results."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from benchmarks import quality, speed


def draw_speed(frame: pd.DataFrame, out: Path, name: str) -> list[Path]:
    """Time, memory and speed-up over batch size, log-log, a panel for each number of classes."""
    frame = frame[frame["mode"] == "forward+backward"]
    paths = []
    for (dtype, dim), part in frame.groupby(["dtype", "dim"], sort=False):
        classes = sorted(part["num_classes"].unique())
        figure, axes = plt.subplots(
            3, len(classes), figsize=(4.6 * len(classes), 11), squeeze=False, sharex=True
        )
        for column, k in zip(axes.T, classes, strict=True):
            of_k = part[part["num_classes"] == k]
            ours = of_k[of_k["contender"] == speed.OURS].set_index("num_rows")["median"]
            for index, (contender, line) in enumerate(of_k.groupby("contender", sort=False)):
                line = line.sort_values("num_rows")
                style = {"marker": "o", "ms": 3, "color": f"C{index}"}
                style["lw"] = 2.4 if contender == speed.OURS else 1.2
                for axis, value, scale in (
                    (column[0], "median", 1e3),
                    (column[1], "peak_bytes", 2**-20),
                ):
                    points = line.dropna(subset=[value])
                    points = points[points[value] > 0]
                    slope = speed.growth(line, value)
                    label = contender if slope is None else f"{contender}  ~N^{slope:.2f}"
                    axis.plot(points["num_rows"], points[value] * scale, label=label, **style)
                timed = line.dropna(subset=["median"]).set_index("num_rows")["median"]
                column[2].plot(timed.index, timed / ours.reindex(timed.index), **style)
            column[0].set(title=f"K = {k}", ylabel="forward + backward, ms")
            column[1].set(ylabel="peak extra memory, MiB")
            column[2].set(ylabel="time / ours", xlabel="batch size N")
            column[2].axhline(1, color="grey", lw=0.8)
            for axis in column:
                axis.set(xscale="log", yscale="log")
                axis.grid(alpha=0.3)
            for axis in column[:2]:
                axis.legend(fontsize=5.5)
        figure.suptitle(f"D = {dim}, {dtype}")
        figure.tight_layout()
        paths.append(out / f"{name}-{dtype}-{dim}.png")
        figure.savefig(paths[-1], dpi=80)
        plt.close(figure)
    return paths


def draw_quality(rows: list[dict], out: Path) -> list[Path]:
    """Accuracy over batch size by method, and tau2 while VarCon trains, for one data set."""
    data = rows[0]["data"]
    figure, axes = plt.subplots(1, 4, figsize=(19, 4.2))
    shown = {
        "linear": "linear probe",
        "knn": "kNN",
        "linear, 1 a class": "probe on 1 image a class",
    }
    for axis, (value, title) in zip(axes, shown.items(), strict=False):
        table = quality.summary(rows, value)
        table = table[table["noise"] == 0.0]
        for method, line in table.groupby("method", sort=False):
            line = line.sort_values("batch_size").dropna(subset=["mean"])
            axis.errorbar(
                line["batch_size"],
                line["mean"],
                line["half_width"],
                label=method,
                capsize=2,
                lw=1.2,
            )
        axis.set(title=f"{data}: {title}", xscale="log", xlabel="batch size")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    wanted = {"method": "VarCon", "split": "test", "seed": 0, "noise": 0.0}
    runs = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    for index, run in enumerate(sorted(runs, key=lambda r: r["batch_size"])):
        quantiles = np.array(run["tau2"]).T  # 5, 25, 50, 75, 95 %
        epochs = np.arange(1, quantiles.shape[1] + 1)
        axes[3].plot(epochs, quantiles[2], color=f"C{index}", label=f"batch {run['batch_size']}")
        axes[3].fill_between(epochs, quantiles[1], quantiles[3], color=f"C{index}", alpha=0.15)
    axes[3].set(title=r"VarCon: $\tau_2$ in training (quartiles)", xlabel="epoch")
    if runs:
        axes[3].legend(fontsize=7)
    figure.tight_layout()
    path = out / f"quality-{data}.png"
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return [path]


def draw_momentum(table: pd.DataFrame, out: Path) -> Path:
    """Accuracy over the momentum of the centroid memory, a line for each problem."""
    figure, axis = plt.subplots(figsize=(6, 4))
    for (classes, size), line in table.groupby(["classes", "batch_size"]):
        label = f"{classes:.0f} classes, batch {size}"
        axis.errorbar(
            1 - line["momentum"], line["mean"], line["half_width"], label=label, capsize=2
        )
    axis.set(xscale="log", xlabel="1 - momentum", ylabel="accuracy (linear probe and kNN)")
    axis.invert_xaxis()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.tight_layout()
    path = out / "momentum.png"
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path
