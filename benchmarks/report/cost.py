"""Time, memory, bytes between ranks, and what a GPU says."""

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from benchmarks import gpu_proof, large_batch, speed
from benchmarks.common import measure, plots, results
from benchmarks.common.contenders import OURS
from benchmarks.report.markdown import embedded, folded, grid, origin

YARDSTICKS = {
    "the authors' operations": "equations, authors' operations",
    "the lean equations": "equations, lean",
    "pytorch-metric-learning's SupCon": "SupCon (pytorch-metric-learning)",
}


SIZES_IN_WORDS = ((64, 10), (4096, 1000), (8192, 1000), (16384, 1000), (16384, 10))


def speed_words(folder: Path) -> Iterator[str]:
    frame, env = results.read("speed-cpu", folder)
    full = frame[frame["mode"] == "forward+backward"]
    yield "## How fast\n"
    yield (
        f"{origin('speed', env)} float32, D = 128, forward + backward, medians of interleaved "
        "runs. [Evidence](#how-long-does-a-step-take-and-how-much-memory).\n"
    )
    for n, k in SIZES_IN_WORDS:
        here = full[(full["num_rows"] == n) & (full["num_classes"] == k)].set_index("contender")
        if OURS not in here.index:
            continue
        ours = here.loc[OURS]
        ratios = [
            f"{title} {speed.times(here.loc[name, 'median'] / ours['median'])} as long"
            for title, name in YARDSTICKS.items()
            if name in here.index and pd.notna(here.loc[name, "median"])
        ]
        if pd.notna(ours["over_two_products"]):
            floor = speed.times(ours["over_two_products"])
            ratios.append(f"ours is {floor} the two bare matrix products")
        yield f"- N = {n:,}, K = {k:,}: {ours['median'] * 1e3:.3g} ms; " + "; ".join(ratios) + "."
    slower = _slower_than_authors(full)
    yield (
        "- Slower than the authors' operations beyond the quartiles at: "
        + (", ".join(slower) if slower else "no size measured")
        + "."
    )
    here = full[(full["num_rows"] == 8192) & (full["num_classes"] == 1000)].set_index("contender")
    authors = YARDSTICKS["the authors' operations"]
    if {OURS, authors} <= set(here.index):
        ours, theirs = here.loc[OURS, "peak_bytes"], here.loc[authors, "peak_bytes"]
        yield (
            f"- Peak extra memory at N = 8,192, K = 1,000: {ours / 2**20:.0f} MiB against "
            f"{theirs / 2**20:.0f} MiB for the authors' operations ({ours / theirs:.2g}x)."
        )
    yield ""


def _slower_than_authors(full: pd.DataFrame) -> list[str]:
    found = []
    for (n, k), part in full.groupby(["num_rows", "num_classes"]):
        by_name = part.set_index("contender")
        authors = YARDSTICKS["the authors' operations"]
        if not {OURS, authors} <= set(by_name.index):
            continue
        ours, theirs = by_name.loc[OURS], by_name.loc[authors]
        if pd.notna(theirs["median"]) and ours["q1"] > theirs["q3"]:
            found.append(f"N = {n}, K = {k} ({ours['median'] / theirs['median']:.2f}x)")
    return found


def speed_section(folder: Path) -> Iterator[str]:
    if not (folder / "speed-cpu.json").exists():
        return
    frame, _ = results.read("speed-cpu", folder)
    absent = frame.groupby("contender")["median"].agg(lambda values: values.isna().all())
    reasons = frame.groupby("contender")["status"].first()
    names = [
        f"{name} ({'the same as varcon-loss on a CPU' if 'eager' in str(name) else reasons[name]})"
        for name, is_absent in absent.items()
        if is_absent
    ]
    frame = frame[~frame["contender"].isin(absent[absent].index)]
    yield "## How long does a step take, and how much memory?\n"
    yield (
        "`python -m benchmarks speed`. Memory is the peak of a fresh process's resident set in one "
        "forward and backward, beyond what it held before. Compiled contenders were compiled for "
        "each size; compiling is not in the time."
        + (f" Not here: {', '.join(names)}." if names else "")
    )
    whole = (folder / f"{large_batch.NAME}.json").exists()
    steps = results.read(large_batch.NAME, folder)[0] if whole else None
    yield embedded(
        plots.draw_hero(frame, folder / "speed-hero.png", steps=steps),
        "time and memory over batch size",
    )
    for k in sorted(frame["num_classes"].unique()):
        ours = frame[(frame["contender"] == OURS) & (frame["num_classes"] == k)]
        slope = speed.growth(ours[ours["mode"] == "forward+backward"], "median")
        if slope is not None:
            yield f"- Our time grows as N^{slope:.2f} from N = {speed.SLOPE_FROM:,} at K = {k:,}."
    for picture in plots.draw_speed(frame, folder, "speed-cpu"):
        yield embedded(picture, "time and memory over batch size, every contender")
    for (k, mode), part in frame.groupby(["num_classes", "mode"]):
        title = "forward alone, without a gradient" if mode == "forward" else "forward + backward"
        yield from folded(f"K = {k:,}, {title}: ms (times ours)", _speed_table(part))


def labels_section(folder: Path) -> Iterator[str]:
    """Time of class probabilities beside integer labels."""
    for kind, title in (
        ("mixup", "What do mixed labels cost?"), ("smooth", "What do smoothed labels cost?"),
    ):  # fmt: skip
        if not (folder / f"speed-cpu-{kind}.json").exists():
            continue
        frame, env = results.read(f"speed-cpu-{kind}", folder)
        yield f"## {title}\n"
        busy = f" The machine was busy (load {env['load']:.1f})." if env["load"] > 1 else ""
        yield f"{origin(f'speed --labels {kind}', env)} Forward and backward, D = 128.{busy}\n"
        for line in speed.beside_integers(frame):
            yield f"- {line}"
        yield ""


def _speed_table(part: pd.DataFrame) -> Iterator[str]:
    sizes = sorted(part["num_rows"].unique())
    ours = part[part["contender"] == OURS].set_index("num_rows")["median"]
    lines = []
    for name, line in part.groupby("contender", sort=False):
        cells = []
        for _, cell in line.sort_values("num_rows").iterrows():
            if pd.isna(cell["median"]):
                cells.append(str(cell["status"]))
            else:
                ratio = speed.times(cell["median"] / ours[cell["num_rows"]])
                cells.append(f"{cell['median'] * 1e3:.3g} ({ratio})")
        slopes = [speed.growth(line, value) for value in ("median", "peak_bytes")]
        lines.append([name, *cells, *("" if s is None else f"N^{s:.2f}" for s in slopes)])
    columns = ["contender", *(f"N = {n:,}" for n in sizes), "time ~", "memory ~"]
    yield from grid(columns, lines)


def large_batch_section(folder: Path) -> Iterator[str]:
    """A step in chunks beside one batch."""
    if not (folder / "large-batch.json").exists():
        return
    frame, env = results.read("large-batch", folder)
    yield "## What does a batch in chunks cost?\n"
    busy = f" The machine was busy (load {env['load']:.1f})." if env["load"] > 1 else ""
    yield (
        f"{origin('large-batch', env)} Forward, loss and backward of a small CNN on images of "
        f"{large_batch.SIDE} x {large_batch.SIDE}; chunks of {frame['chunk_size'].iloc[0]}. Memory "
        f"is what a step adds at its peak.{busy}\n"
    )
    yield embedded(
        plots.draw_large_batch(frame, folder / "large-batch.png"),
        "time and memory of a step over batch size, in one batch and in chunks",
    )
    yield from grid(large_batch.COLUMNS, large_batch.cells(frame))
    yield ""


def costs_section(folder: Path) -> Iterator[str]:
    """Memories, and exchanges between ranks."""
    if (folder / "memory-cost.json").exists():
        frame, env = results.read("memory-cost", folder)
        yield "## What does the centroid memory cost?\n"
        yield origin("memory-cost", env) + "\n"
        yield from grid(
            ["", "N", "classes C", "time, ms", "peak extra memory, MiB"],
            (
                [row["contender"], row["N"], f"{row['C']:,}", *measure.time_and_memory(dict(row))]
                for _, row in frame.iterrows()
            ),
        )
        yield ""
    if (folder / "metric-learning-memory.json").exists():
        frame, env = results.read("metric-learning-memory", folder)
        yield "## What does CrossBatchMemory cost?\n"
        yield (
            f"{origin('metric-learning --cost', env)} One forward and backward, N = 256, memory "
            "65,536, D = 128.\n"
        )
        yield from grid(
            ["", "time, ms", "peak extra memory, MiB"],
            (
                [row["loss"], *measure.time_and_memory(dict(row))]
                for _, row in frame.dropna(subset=["status"]).iterrows()
            ),
        )
        for ratio in frame["ratio"].dropna():
            yield f"\nThe adapter takes {ratio:.2f}x the core's time at N = 4,096, K = 1,000.\n"
    if (folder / "distributed.json").exists():
        yield from _distributed(folder)


def _distributed(folder: Path) -> Iterator[str]:
    frame, env = results.read("distributed", folder)
    yield "## What do centroids over ranks cost?\n"
    yield (
        f"{origin('distributed', env)} gloo processes on one machine, so times are of little "
        "meaning and bytes are exact.\n"
    )
    expected, _ = results.read("distributed-model", folder)
    picture = plots.draw_bytes(expected.to_dict("records"), folder / "distributed-model.png")
    yield embedded(picture, "bytes over classes")
    lines = [
        [
            row["contender"], row["ranks"], f"{row['C']:,}", f"{row['bytes_per_rank'] / 1e3:,.0f}",
            f"{row['bytes_by_model'] / 1e3:,.0f}", f"{row['seconds'] * 1e3:.1f}",
        ]
        for _, row in frame.iterrows()
    ]  # fmt: skip
    columns = ["", "ranks", "classes C", "sent a rank and step, kB", "by the model, kB", "ms"]
    yield from folded("Measured", grid(columns, lines))
    pivot = expected.pivot_table(
        index=["contender", "ranks"], columns="C", values="MB sent", sort=False
    )
    yield from folded(
        "The same model from 8 to 1024 ranks of 256 samples: MB sent a rank and step",
        grid(
            ["", "ranks", *(f"C = {c:,}" for c in pivot.columns)],
            ([*key, *(f"{value:,.3g}" for value in row)] for key, row in pivot.iterrows()),
        ),
    )


def gpu_section(folder: Path) -> Iterator[str]:
    yield "## What happens on a GPU?\n"
    if not (folder / "gpu-proof.json").exists():
        yield (
            "**No kernel has run on a GPU yet.** What is known without one is in "
            "[docs/kernels.md](../docs/kernels.md); `python -m benchmarks gpu-proof` measures the "
            "rest.\n"
        )
        return
    content = json.loads((folder / "gpu-proof.json").read_text())
    yield origin("gpu-proof", content["environment"]) + "\n"
    for name, found in content["checks"].items():
        yield f"- {name}: {found['outcome']}, {found['seconds']} s"
    yield f"- **{content['verdict']}**\n"
    head, *lines = gpu_proof.table(content["rows"])
    yield from grid(head, lines)
    yield ""
