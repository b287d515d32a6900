"""What does a step in chunks cost, beside one batch and beside SupCon's gradient caching?"""

import ctypes
import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from benchmarks.common import measure, options, plots, results
from benchmarks.common.data import load
from benchmarks.common.encoders import SmallCNN
from benchmarks.common.supcon import supcon_loss
from benchmarks.common.terminal import console, print_table, progress_bar, written
from varcon_loss import VarConLoss, backward_in_chunks

NAME, DATA, SIDE = "large-batch", "mnist-pairs", 28
COLUMNS = ("", "images", "time, s", "beside one batch", "by CPU time", "peak extra memory, MiB")
EXACT = 1e-9  # relative error of gradients in float64
PAIR_BYTES = 24  # the SupCon of this harness holds six [N, N] matrices
MAX_REPEATS = 50

Step = Callable[[nn.Module, Tensor, Tensor, int], object]  # model, images, labels, chunk size


def varcon(model: nn.Module, images: Tensor, labels: Tensor, _: int) -> None:
    VarConLoss()(model(images), labels).backward()


def varcon_in_chunks(model: nn.Module, images: Tensor, labels: Tensor, chunk_size: int) -> None:
    backward_in_chunks(model, VarConLoss(), images, labels, chunk_size)


def supcon(model: nn.Module, images: Tensor, labels: Tensor, _: int) -> None:
    supcon_loss(model(images), labels).backward()


def supcon_in_chunks(model: nn.Module, images: Tensor, labels: Tensor, chunk_size: int) -> None:
    """Gradient caching (Gao et al., arXiv 2101.06983): the loss sees all embeddings at once."""
    chunks = images.split(chunk_size)
    with torch.no_grad():
        features = torch.cat([model(chunk) for chunk in chunks])
    features.requires_grad_()
    supcon_loss(features, labels).backward()
    assert features.grad is not None
    for chunk, gradient in zip(chunks, features.grad.split(chunk_size), strict=True):
        model(chunk).backward(gradient)


AT_ONCE, CHUNKED = "VarCon, one batch", "VarCon, in chunks"
CONTENDERS: dict[str, tuple[Step, Step]] = {  # a step, and the one whose gradient it must have
    AT_ONCE: (varcon, varcon),
    CHUNKED: (varcon_in_chunks, varcon),
    "SupCon, one batch": (supcon, supcon),
    "SupCon, gradient caching": (supcon_in_chunks, supcon),
}


def command(
    sizes: Annotated[str, typer.Option(help="images of a step")] = "256,1024,4096,16384",
    chunk_size: Annotated[int, typer.Option(min=1, help="images of a chunk")] = 256,
    device: options.Device = "cpu",
    budget: Annotated[float, typer.Option(help="seconds of timing at each size")] = 40.0,
    timeout: Annotated[float, typer.Option(help="seconds of a size at most")] = 900.0,
    memory_gib: Annotated[float, typer.Option(help="memory that a step may take")] = 12.0,
    out: options.Out = Path("runs/speed"),
    resume: Annotated[bool, typer.Option(help="keep sizes already measured")] = True,
) -> None:
    """Peak memory and time of a training step: forward, loss, backward.

    An interrupted run goes on where it stopped when the same command is given again.
    """
    options.require(device)
    wanted = sorted(options.integers(sizes))
    env = results.environment(device) | {"load": os.getloadavg()[0]}
    rows: list[dict[str, Any]] = []
    if resume and (out / f"{NAME}.json").exists():
        frame, before = results.read(NAME, out)
        same = (frame["chunk_size"] == chunk_size) & (frame["device"] == device)
        rows = frame[same & frame["num_images"].isin(wanted)].to_dict("records")
        if rows:
            env["kept_from"] = before
            kept = len({row["num_images"] for row in rows})
            console.print(f"kept {kept} of {len(wanted)} sizes, measured on {before['date']}")
    with progress_bar() as bar:
        todo = [n for n in wanted if n not in {row["num_images"] for row in rows}]
        task = bar.add_task(NAME, total=len(todo), note="")
        for n in todo:
            bar.update(task, note=f"{n:,} images")
            rows += step_at(n, chunk_size, device, rows, budget, timeout, memory_gib)
            rows.sort(key=lambda row: row["num_images"])
            results.save(NAME, rows, env, out)
            bar.advance(task)
    frame = pd.DataFrame(rows)
    print_table("A training step", COLUMNS, cells(frame))
    if env["load"] > (os.cpu_count() or 1) / 2:
        console.print(f"The machine was busy (load {env['load']:.1f}): run it again when idle.")
    saved = results.save(NAME, rows, env, out)
    written(saved, saved.with_suffix(".csv"), plots.draw_large_batch(frame, out / f"{NAME}.png"))


def step_at(
    num_images: int, chunk_size: int, device: str, smaller: Sequence[dict[str, Any]],
    budget: float, timeout: float, memory_gib: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row a contender at one size, all measured in one process."""
    limit = int(memory_gib * 2**30)
    size = {"num_images": num_images, "chunk_size": chunk_size, "device": device}
    rows = []
    for name in CONTENDERS:
        needed = estimate(name, smaller, num_images)
        row = {**size, "contender": name, "status": "", "estimate": needed}
        if needed > limit:
            row["status"] = f"would take {needed / 2**30:.2g} GiB"
        rows.append(row)
    able = [row["contender"] for row in rows if not row["status"]]
    measured = measure.in_child(
        side_by_side, able, *size.values(), budget,
        timeout=timeout, memory_limit=limit if device == "cpu" else None,
    )  # fmt: skip
    for row in rows:
        if not row["status"]:
            row |= measured.get(row["contender"], {"status": measured["status"]})
    return rows


def estimate(name: str, smaller: Sequence[dict[str, Any]], num_images: int) -> float:
    """Bytes of a step: those of the largest smaller one by image, and SupCon's for each pair."""
    n, peak = max(
        (
            (row["num_images"], row["peak_bytes"])
            for row in smaller
            if row["contender"] == name and row["status"] == "ok" and row["num_images"] < num_images
        ),
        default=(0, 0),
    )
    a_pair = PAIR_BYTES if name.startswith("SupCon") else 0
    return peak / max(1, n) * num_images + a_pair * (num_images - n) * num_images


def problem(num_images: int, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A small CNN, and images of 100 classes, repeated where there are not enough.

    Its BatchNorm is replaced: it would normalise each chunk by itself, and so be another model.
    """
    torch.manual_seed(0)
    model = SmallCNN()
    for i, layer in enumerate(model.layers):
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            model.layers[i] = nn.GroupNorm(8, layer.num_features)
    train = load(DATA).train
    chosen = torch.randperm(len(train.labels)).repeat(num_images // len(train.labels) + 1)
    chosen = chosen[:num_images]
    images = F.interpolate(train.images[chosen], (SIDE, SIDE), mode="bilinear")
    return model.to(device), images.to(device), train.labels[chosen].to(device)


def side_by_side(
    names: Sequence[str], num_images: int, chunk_size: int, device: str, budget: float
) -> dict[str, Any]:
    """Correctness, then peak memory one by one, then times interleaved."""
    rows: dict[str, dict[str, Any]] = {}
    map_from(2**16)  # so that freed memory goes back at once, and no peak hides in it
    for name in names:
        try:
            error = error_of(name, min(num_images, 2 * chunk_size), device)
            peak = peak_of(name, num_images, chunk_size, device)
        except Exception as failed:
            rows[name] = {"status": measure.failure(failed)}
        else:
            rows[name] = {"status": "ok", "error": error, "peak_bytes": peak}
    map_from(2**25)  # where glibc ends up by itself
    able = [name for name, row in rows.items() if row["status"] == "ok"]
    for name, times in time_together(able, num_images, chunk_size, device, budget).items():
        seconds, cpu = zip(*times, strict=True)
        quartiles = zip(("q1", "median", "q3"), statistics.quantiles(seconds, n=4), strict=True)
        rows[name] |= dict(quartiles, repeats=len(times), least_cpu=min(cpu))
    return rows


def error_of(name: str, num_images: int, device: str) -> float:
    """Of the gradient in float64, two chunks beside one batch; raises where there is one."""
    model, images, labels = problem(num_images, device)
    gradients = []
    for step in CONTENDERS[name]:
        model.double().zero_grad()
        step(model, images.double(), labels, max(1, num_images // 2))
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    got, right = gradients
    error = float((got - right).norm() / right.norm())
    if not error <= EXACT:
        raise ValueError(f"wrong by {error:.1e}: not timed")
    return error


def peak_of(name: str, num_images: int, chunk_size: int, device: str) -> int:
    """Bytes that a step adds to what is held before it: weights, images and their labels."""
    model, images, labels = problem(num_images, device)
    step, _ = CONTENDERS[name]
    step(model, images[:chunk_size], labels[:chunk_size], chunk_size)  # libraries warm up
    model.zero_grad()
    gc.collect()
    before = measure.reset_peak(device)
    step(model, images, labels, chunk_size)
    synchronize(device)
    return max(0, measure.peak(device) - before)


def time_together(
    names: Sequence[str], num_images: int, chunk_size: int, device: str, budget: float
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of a step, and of the CPU in it, by contender, interleaved."""
    model, images, labels = problem(num_images, device)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    shuffle = random.Random(0).shuffle
    for _ in range(MAX_REPEATS):
        order = [
            name
            for name, spent in times.items()
            if len(spent) < measure.FEWEST_REPEATS
            or sum(seconds for seconds, _ in spent) < budget / len(names)
        ]
        shuffle(order)
        for name in order:
            model.zero_grad()
            synchronize(device)
            start, cpu_start = time.perf_counter(), time.process_time()
            CONTENDERS[name][0](model, images, labels, chunk_size)
            synchronize(device)
            took = (time.perf_counter() - start, time.process_time() - cpu_start)
            times[name].append(took)
    return times


def map_from(num_bytes: int) -> None:
    """Allocations from this size on get pages of their own."""
    ctypes.CDLL("libc.so.6").mallopt(-3, num_bytes)  # M_MMAP_THRESHOLD


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def cells(frame: pd.DataFrame) -> Iterator[tuple[str, ...]]:
    """A line a contender and size, for people, under `COLUMNS`."""
    rows = frame.to_dict("records")
    whole = {row["num_images"]: row for row in rows if row["contender"] == AT_ONCE}
    for row in sorted(rows, key=lambda row: list(CONTENDERS).index(row["contender"])):
        first = (row["contender"], f"{row['num_images']:,}")
        if row["status"] != "ok":
            yield *first, row["status"], "", "", ""
            continue
        yardstick = whole[row["num_images"]]
        beside = (
            f"{row[time] / yardstick[time]:.2f}x" if yardstick["status"] == "ok" else ""
            for time in ("median", "least_cpu")
        )
        yield *first, f"{row['median']:.3g}", *beside, f"{row['peak_bytes'] / 2**20:,.0f}"
