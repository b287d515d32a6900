"""Pictures of saved results."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

from benchmarks import speed


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
