"""What does a step in chunks cost, beside one batch and beside SupCon's gradient caching?"""

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from torch import Tensor, nn

from benchmarks.common import measure, options, plots
from benchmarks.common.measure import in_child
from benchmarks.common.supcon import supcon_loss
from benchmarks.common.sweep import Note, Row, sweep
from benchmarks.common.terminal import print_table, written
from varcon_loss import VarConLoss, backward_in_chunks

NAME, SIDE, CLASSES = "large-batch", 28, 100
COLUMNS = ("", "images", "time, s", "beside one batch", "by CPU time", "peak extra memory, MiB")
EXACT = 1e-9  # relative error of gradients in float64
PAIR_BYTES = 24  # the SupCon of this harness holds six [N, N] matrices
SECONDS = 900  # of a size at most

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
    (gradient,) = torch.autograd.grad(supcon_loss(features, labels), features)
    for chunk, part in zip(chunks, gradient.split(chunk_size), strict=True):
        model(chunk).backward(part)


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
    memory_gib: options.MemoryGib = 12.0,
    out: options.Out = Path("runs/speed"),
    resume: options.Resume = True,
) -> None:
    """Peak memory and time of a training step: forward, loss, backward.

    An interrupted run goes on where it stopped when the same command is given again.
    """
    options.require(device)
    same = {"chunk_size": chunk_size, "device": device}
    wanted = [{"num_images": n, **same} for n in sorted(options.integers(sizes))]
    limit = int(memory_gib * 2**30)

    def measured(size: Row, smaller: list[Row], note: Note) -> list[Row]:
        return step_at(size, smaller, budget, limit, note)

    frame = sweep(NAME, wanted, CONTENDERS, measured, device=device, folder=out, resume=resume)
    frame = frame[(frame["chunk_size"] == chunk_size) & (frame["device"] == device)]
    print_table("A training step", COLUMNS, cells(frame))
    saved = out / f"{NAME}.json"
    picture = plots.draw_large_batch(frame, out / f"{NAME}.png")
    written(saved, saved.with_suffix(".csv"), picture)


def step_at(size: Row, smaller: Sequence[Row], budget: float, limit: int, note: Note) -> list[Row]:
    """A row a contender; those that would not fit are not tried."""
    cap = limit if size["device"] == "cpu" else None
    rows = []
    for name in CONTENDERS:
        note(name)
        needed = estimate(name, smaller, size["num_images"])
        row = {"contender": name, "estimate": needed}
        if needed > limit:
            row["status"] = f"would take {needed / 2**30:.2g} GiB"
        else:
            row |= in_child(
                check_and_weigh, name, *size.values(), timeout=SECONDS, memory_limit=cap
            )
        rows.append(row)
    note("times")
    able = [row["contender"] for row in rows if row["status"] == "ok"]
    timed = in_child(time_together, able, *size.values(), budget, timeout=SECONDS, memory_limit=cap)
    for row in rows:
        if row["status"] == "ok":
            row |= timed.get(row["contender"], {"status": timed["status"]})
    return rows


def estimate(name: str, smaller: Sequence[Row], num_images: int) -> float:
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
    """A small CNN, and images of 100 classes.

    GroupNorm and not BatchNorm, which would normalise each chunk by itself: another model.
    """
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for wide_in, wide_out, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2)):
        layers += [
            nn.Conv2d(wide_in, wide_out, 3, stride, padding=1, bias=False),
            nn.GroupNorm(8, wide_out),
            nn.ReLU(inplace=True),
        ]
    layers += [nn.AdaptiveAvgPool2d((2, 4)), nn.Flatten(), nn.Linear(512, 128, bias=False)]
    model = nn.Sequential(*layers, nn.GroupNorm(8, 128), nn.ReLU(inplace=True))
    images, labels = torch.randn(num_images, 1, SIDE, SIDE), torch.randint(CLASSES, (num_images,))
    return model.to(device), images.to(device), labels.to(device)


def check_and_weigh(name: str, num_images: int, chunk_size: int, device: str) -> dict[str, Any]:
    """Error of the gradient on two chunks, and peak memory of a step beyond what it is given."""
    # M_MMAP_THRESHOLD: freed memory goes back at once, and no peak hides in it.
    ctypes.CDLL("libc.so.6").mallopt(-3, 2**16)
    error = error_of(name, min(num_images, 2 * chunk_size), device)
    model, images, labels = problem(num_images, device)
    step, _ = CONTENDERS[name]
    step(model, images[:chunk_size], labels[:chunk_size], chunk_size)  # libraries warm up
    model.zero_grad()
    weighed = measure.weigh(lambda: step(model, images, labels, chunk_size), device)
    return {"error": error, "peak_bytes": weighed["peak_bytes"]}


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


def time_together(
    names: Sequence[str], num_images: int, chunk_size: int, device: str, budget: float
) -> dict[str, Any]:
    model, images, labels = problem(num_images, device)
    calls = {
        name: functools.partial(CONTENDERS[name][0], model, images, labels, chunk_size)
        for name in names
    }
    return measure.interleaved(calls, device, budget, model.zero_grad)


def cells(frame: pd.DataFrame) -> Iterator[tuple[str, ...]]:
    """A line a contender and size, for people, under `COLUMNS`."""
    whole = frame[frame["contender"] == AT_ONCE].set_index("num_images")
    for name in CONTENDERS:
        for _, row in frame[frame["contender"] == name].iterrows():
            first = (name, f"{row['num_images']:,}")
            if row["status"] != "ok":
                yield *first, row["status"], "", "", ""
                continue
            beside = [
                row[key] / whole[key].get(row["num_images"]) for key in ("median", "least_cpu")
            ]
            ratios = ("" if pd.isna(ratio) else f"{ratio:.2f}x" for ratio in beside)
            yield *first, f"{row['median']:.3g}", *ratios, f"{row['peak_bytes'] / 2**20:,.0f}"
