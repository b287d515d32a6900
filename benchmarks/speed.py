"""How long does a step take, and how much memory, over batch size, classes, width and dtype?"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from benchmarks.common import measure, options, plots
from benchmarks.common.contenders import CONTENDERS, INTEGERS, LABELS, OURS, Contender, Problem
from benchmarks.common.measure import TWO_PRODUCTS, in_child
from benchmarks.common.sweep import Note, Row, sweep
from benchmarks.common.terminal import console, print_table, written

ROWS, CLASSES = "64,256,1024,4096,8192,16384,65536", "10,100,1000,10000"
ROWS_OF_SOFT, CLASSES_OF_SOFT = "8192", "1000"
MODES = ("forward+backward", "forward")
SLOWEST = 2.0  # seconds: what takes longer once is not timed
COMPILE_SECONDS = 60  # torch.compile may take this long, once
NOISY = 0.25  # quartiles further apart than this share of the median say that the machine was busy


def command(
    rows: Annotated[
        str,
        typer.Option(help=f"batch sizes N; by default {ROWS}, or {ROWS_OF_SOFT} with --labels"),
    ] = "",
    classes: Annotated[
        str,
        typer.Option(
            help=f"numbers of classes K; by default {CLASSES}, or {CLASSES_OF_SOFT} with --labels"
        ),
    ] = "",
    dims: Annotated[str, typer.Option(help="embedding widths D")] = "128",
    dtypes: Annotated[str, typer.Option(help="torch dtypes")] = "float32",
    labels: Annotated[
        str,
        typer.Option(help="integer; or class probabilities, held against integers: mixup, smooth"),
    ] = "integer",
    device: options.Device = "cpu",
    contenders: Annotated[
        str, typer.Option(help="comma-separated parts of names; all by default")
    ] = "",
    budget: Annotated[float, typer.Option(help="seconds of timing at each size and mode")] = 6.0,
    memory_gib: options.MemoryGib = 8.0,
    out: options.Out = Path("runs/speed"),
    resume: options.Resume = True,
) -> None:
    """Time and memory: this package, the plain equations, SupCon and NT-Xent, side by side.

    An interrupted sweep goes on where it stopped when the same command is given again.
    """
    options.require(device)
    options.check("labels", [labels], LABELS)
    known = [str(dtype).removeprefix("torch.") for dtype in measure.TOLERANCE]
    options.check("dtypes", options.names(dtypes), known)
    soft = labels != "integer"
    sizes = [
        vars(Problem(n, k, d, dtype, device, labels))
        for dtype, d, k, n in itertools.product(
            options.names(dtypes),
            options.integers(dims),
            options.integers(classes or (CLASSES_OF_SOFT if soft else CLASSES)),
            options.integers(rows or (ROWS_OF_SOFT if soft else ROWS)),
        )
    ]
    names = chosen_contenders(contenders, soft=soft)
    limit = int(memory_gib * 2**30) if device == "cpu" else None

    def measured(size: Row, _: list[Row], note: Note) -> Iterator[Row]:
        yield from side_by_side(Problem(**size), names, budget, limit, note)

    name = f"speed-{device}" + (f"-{labels}" if soft else "")
    frame = sweep(name, sizes, names, measured, device=device, folder=out, resume=resume)
    for (dtype, d, k), part in frame.groupby(["dtype", "dim", "num_classes"], sort=False):
        print_table(f"forward + backward; K = {k}, D = {d}, {dtype}", *table(part))
    timed = frame.dropna(subset=["median"])
    noisy = timed[timed["q3"] - timed["q1"] > NOISY * timed["median"]]
    if len(noisy):
        console.print(
            f"In {len(noisy)} of {len(timed)} timings the quartiles lie more than {NOISY:.0%} of "
            "the median apart: the machine was busy, or the step short."
        )
    saved = out / f"{name}.json"
    written(saved, saved.with_suffix(".csv"), *plots.draw_speed(frame, out, name))


def chosen_contenders(text: str, *, soft: bool = False) -> list[str]:
    """Names that contain one of the comma-separated parts; ours is always among them.

    Beside class probabilities, those that take them, and ours with integers.
    """
    parts = options.names(text)
    for part in parts:
        if not any(part in name for name in CONTENDERS):
            known = "; ".join(CONTENDERS)
            raise typer.BadParameter(f"no contender's name contains {part!r}; there are: {known}")

    def wanted(name: str, contender: Contender) -> bool:
        if name == OURS or (soft and name == INTEGERS):
            return True
        able = contender.soft if soft else name != INTEGERS
        return able and (not parts or any(part in name for part in parts))

    return [name for name, contender in CONTENDERS.items() if wanted(name, contender)]


def side_by_side(
    problem: Problem, names: Sequence[str], budget: float, limit: int | None, note: Note
) -> Iterator[Row]:
    """A row for each contender and mode; failures are rows too."""
    weighed: dict[str, Row] = {}
    for name in names:
        note(name)
        seconds = 4 * SLOWEST + COMPILE_SECONDS * ("compiled" in name)
        missing = CONTENDERS[name].missing(problem.device)
        weighed[name] = {"status": missing} if missing else in_child(
            measure.check_and_weigh, name, problem, timeout=seconds, memory_limit=limit
        )  # fmt: skip
        if weighed[name].get("seconds", 0) > SLOWEST:
            weighed[name]["status"] = f"over {SLOWEST:.0f} s"
    able = [name for name, row in weighed.items() if row["status"] == "ok"]
    for mode in MODES:
        note(mode)
        seconds = 4 * COMPILE_SECONDS + 20 * SLOWEST
        outcome = in_child(
            measure.time_together, able, problem, mode, budget, timeout=seconds, memory_limit=limit
        )
        timings = outcome.get("timings", {})
        for name, row in weighed.items():
            found = {"contender": name, "mode": mode, **row, **timings.get(name, {})}
            found.pop("seconds", None)
            if name in able and outcome["status"] != "ok":
                found["status"] = outcome["status"]
            if name == OURS and TWO_PRODUCTS in timings:
                floor = timings[TWO_PRODUCTS]["median"]
                found["over_two_products"] = found["median"] / floor
            yield found


def times(ratio: float) -> str:
    """A ratio for people."""
    return f"{ratio:.2g}x" if ratio < 100 else f"{ratio:.0f}x"


def table(part: pd.DataFrame, mode: str = MODES[0]) -> tuple[list[str], list[list[str]]]:
    """Milliseconds (times ours) and MiB, a line a contender, a column a batch size."""
    part = part[part["mode"] == mode]
    sizes = sorted(part["num_rows"].unique())
    ours = part[part["contender"] == OURS].set_index("num_rows")
    lines = []
    for name, line in part.groupby("contender", sort=False):
        cells = line.set_index("num_rows")
        lines.append([str(name), *(_cell(cells.loc[n], ours.loc[n], mode) for n in sizes)])
    if mode == MODES[0] and "over_two_products" in ours:
        over = ours["over_two_products"]
        cells = ["" if pd.isna(over[n]) else times(over[n]) for n in sizes]
        lines.append([f"(ours, times {TWO_PRODUCTS})", *cells])
    what = "ms (times ours)" + ("; MiB" if mode == MODES[0] else "")
    return [what, *(f"N = {n:,}" for n in sizes)], lines


def _cell(row: pd.Series, ours: pd.Series, mode: str) -> str:
    if pd.isna(row.get("median")):
        return str(row["status"])
    ratio = f" ({times(row['median'] / ours['median'])})" if pd.notna(ours["median"]) else ""
    memory = f"; {row['peak_bytes'] / 2**20:,.0f}" if mode == MODES[0] else ""
    milliseconds = 1e3 * row["median"]
    return f"{milliseconds:{'.3g' if milliseconds < 1000 else ',.0f'}}{ratio}{memory}"
