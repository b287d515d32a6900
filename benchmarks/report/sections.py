"""A section of the report a question: pictures, a compact table, and where it comes from."""

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks import distributed as over_ranks
from benchmarks import gpu_proof as proof
from benchmarks import large_batch as chunks
from benchmarks import speed as times
from benchmarks.common import plots, results
from benchmarks.report.markdown import embedded, folded, grid, origin


def speed(folder: Path) -> Iterator[str]:
    for device in ("cpu", "cuda"):
        if (folder / f"speed-{device}.json").exists():
            yield from _speed_on(device, folder)


def _speed_on(device: str, folder: Path) -> Iterator[str]:
    name = f"speed-{device}"
    frame, env = results.read(name, folder)
    absent = frame.groupby("contender").filter(lambda rows: rows["median"].isna().all())
    reasons = absent.groupby("contender")["status"].first()
    frame = frame[~frame["contender"].isin(absent["contender"])]
    given = "" if device == "cpu" else f" --device {device}"
    yield f"## How long does a step take, and how much memory? {device}\n"
    yield origin(
        f"speed{given}",
        env,
        "Medians of interleaved runs; memory is what one forward and backward adds at its peak. "
        "Compiled contenders were compiled for each size, before the time. Quartiles are in "
        f"`results/{name}.csv`.",
        *(f"Not here: {contender} ({reason})." for contender, reason in reasons.items()),
    )
    if device == "cpu" and (folder / f"{chunks.NAME}.json").exists():
        steps, _ = results.read(chunks.NAME, folder)
        picture = plots.draw_hero(frame, steps, folder / "speed-hero.png")
        yield embedded(picture, "time and memory over batch size")
    for picture in plots.draw_speed(frame, folder, name):
        yield embedded(picture, "time and memory over batch size, every contender")
    for (dtype, dim, k), part in frame.groupby(["dtype", "dim", "num_classes"]):
        for mode in times.MODES:
            title = f"K = {k:,}, D = {dim}, {dtype}, {mode.replace('+', ' + ')}"
            yield from folded(title, grid(*times.table(part, mode)))


def soft_labels(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("speed-*-[ms]*.json")):
        frame, env = results.read(path.stem, folder)
        device, labels = path.stem.split("-")[1:]
        given = "" if device == "cpu" else f" --device {device}"
        yield f"## What do class probabilities cost? {labels}, {device}\n"
        yield origin(f"speed --labels {labels}{given}", env, "Forward and backward.")
        for (dtype, dim, k), part in frame.groupby(["dtype", "dim", "num_classes"]):
            (first, *sizes), lines = times.table(part)
            yield from grid([f"K = {k:,}, D = {dim}, {dtype}: {first}", *sizes], lines)


def large_batch(folder: Path) -> Iterator[str]:
    if not (folder / f"{chunks.NAME}.json").exists():
        return
    frame, env = results.read(chunks.NAME, folder)
    yield "## What does a batch in chunks cost?\n"
    yield origin(
        chunks.NAME,
        env,
        f"Forward, loss and backward of a small CNN on images of {chunks.SIDE} x {chunks.SIDE}; "
        f"chunks of {frame['chunk_size'].iloc[0]}. Memory is what a step adds at its peak.",
    )
    picture = plots.draw_large_batch(frame, folder / f"{chunks.NAME}.png")
    yield embedded(picture, "time and memory of a step over batch size, whole and in chunks")
    yield from grid(chunks.COLUMNS, chunks.cells(frame))


def distributed(folder: Path) -> Iterator[str]:
    if not (folder / "distributed.json").exists():
        return
    frame, env = results.read("distributed", folder)
    yield "## What do centroids over ranks cost?\n"
    yield origin(
        "distributed",
        env,
        "gloo processes on one machine, so times are of little meaning and bytes are exact. The "
        "picture is a model of the bytes, which the table holds against what was sent.",
    )
    picture = plots.draw_bytes(over_ranks.extrapolate(), folder / "distributed-model.png")
    yield embedded(picture, "bytes sent over classes")
    yield from folded("Measured", grid(over_ranks.COLUMNS, over_ranks.cells(frame)))


def kernel_code(folder: Path) -> Iterator[str]:
    if not (folder / "kernel-code.json").exists():
        return
    frame, env = results.read("kernel-code", folder)
    yield "## What does the compiler make of the kernels?\n"
    yield origin(
        "kernel-code",
        env,
        f"Triton {env['versions']['triton']}, for GPUs that need not be there. Here: what users "
        "get by default, at D = 128. Other widths and tf32 are in `results/kernel-code.csv`.",
    )
    frame = frame[frame["default"] & (frame["dim"] == 128)]
    frame = frame.assign(shared_kib=(frame["shared_bytes"] / 1024).round().astype(int))
    columns = {
        "target": "target", "dtype": "dtype", "registers": "registers",
        "spills_in_loop": "spills in the loop", "spills_outside": "outside",
        "shared_kib": "shared memory, KiB", "blocks_per_sm": "blocks",
        "instructions_per_logit": "instructions a logit",
    }  # fmt: skip
    yield from grid([*columns.values()], frame[[*columns]].to_numpy().tolist())


def gpu_proof(folder: Path) -> Iterator[str]:
    yield "## What happens on a GPU?\n"
    paths = sorted(folder.glob("gpu-proof*.json"))
    if not paths:
        yield (
            "**No kernel has run on a GPU yet.** What is known without one is in "
            "[docs/kernels.md](../docs/kernels.md); `python -m benchmarks gpu-proof` measures the "
            "rest.\n"
        )
    for path in paths:
        content = json.loads(path.read_text())
        checks = content["checks"].items()
        told = [f"{name}: {found['outcome']}, {found['seconds']} s." for name, found in checks]
        yield origin("gpu-proof", content["environment"], *told, f"**{content['verdict']}**")
        head, *lines = proof.table(content["rows"])
        yield from grid(head, lines)


def paper(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("paper-*.json")):
        frame, env = results.read(path.stem, folder)
        yield f"## Does the authors' recipe reach their number? {path.stem.partition('-')[2]}\n"
        yield origin("paper", env, "Top-1 of the linear probe on test images, %.")
        columns = (
            "epochs",
            "probe_epochs",
            "batch_size",
            "loss_scale",
            "head",
            "processes",
            "seed",
        )
        yield from grid(
            [*columns, "after the last epoch", "after the best"],
            [
                [*(row[key] for key in columns), f"{row['top1']:.2%}", f"{row['best_top1']:.2%}"]
                for row in frame.to_dict("records")
            ],
        )
