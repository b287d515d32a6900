"""Time and memory of every contender over batch size, classes, width and dtype."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from benchmarks import measure, results
from benchmarks.contenders import CONTENDERS
from benchmarks.measure import Problem
from benchmarks.progress import progress_bar

MODES = ("forward+backward", "forward")
OURS = "varcon-loss"
COMPILE_SECONDS = 60  # torch.compile may take this long, once
SLOPE_FROM = 4096  # growth is fitted from this batch size on, where launches no longer matter


def sweep(
    problems: Sequence[Problem],
    contenders: Sequence[str],
    *,
    budget: float,
    max_repeats: int,
    cell_timeout: float,
    memory_limit: int | None,
    done: list[dict[str, Any]],
    checkpoint: Any,
) -> list[dict[str, Any]]:
    """Measure every contender at every problem; failures become rows too.

    Args:
        problems: sizes.
        contenders: names from `CONTENDERS`.
        budget: seconds of timing at a size and mode, for all contenders together.
        max_repeats: repeats at most.
        cell_timeout: a contender slower than this once is not timed at that size.
        memory_limit: bytes of address space a measuring process may add (CPU).
        done: rows of an interrupted sweep; their problems are not measured again.
        checkpoint: called with all rows after each problem.
    """
    rows = list(done)
    finished = {tuple(row[key] for key in Problem.__dataclass_fields__) for row in rows}
    todo = [p for p in problems if tuple(vars(p).values()) not in finished]
    with progress_bar() as bar:
        task = bar.add_task("speed", total=len(todo), note="")
        for problem in todo:
            bar.update(task, note=f"N={problem.num_rows} K={problem.num_classes} {problem.dtype}")
            rows += _measure_problem(
                problem, contenders, budget, max_repeats, cell_timeout, memory_limit
            )
            checkpoint(rows)
            bar.advance(task)
    return rows


def _measure_problem(
    problem: Problem,
    contenders: Sequence[str],
    budget: float,
    max_repeats: int,
    cell_timeout: float,
    memory_limit: int | None,
) -> list[dict[str, Any]]:
    weighed: dict[str, dict[str, Any]] = {}
    for name in contenders:
        missing = CONTENDERS[name].missing(problem.device)
        weighed[name] = (
            {"status": missing}
            if missing
            else measure.in_child(
                measure.check_and_weigh, name, problem,
                timeout=4 * cell_timeout + COMPILE_SECONDS * ("compiled" in name),
                memory_limit=memory_limit,
            )
        )  # fmt: skip
    able = [
        name
        for name, row in weighed.items()
        if row["status"] == "ok" and row["seconds"] < cell_timeout
    ]
    timings: dict[str, dict[str, Any]] = {}
    for mode in MODES:
        outcome = measure.in_child(
            measure.time_together, able, problem, mode, budget, max_repeats,
            timeout=4 * COMPILE_SECONDS + 20 * cell_timeout, memory_limit=memory_limit,
        )  # fmt: skip
        timings[mode] = outcome.get("timings", {})
        if outcome["status"] != "ok":
            for name in able:
                weighed[name]["status"] = outcome["status"]
    floor = measure.in_child(
        measure.two_products, problem, budget / 4, max_repeats,
        timeout=60 + cell_timeout, memory_limit=memory_limit,
    )  # fmt: skip
    rows = []
    for name, row in weighed.items():
        for mode in MODES:
            timing = timings[mode].get(name, {})
            status = row["status"]
            if status == "ok" and not timing:
                status = f"over {cell_timeout:.0f} s"
            rows.append(
                {
                    **vars(problem),
                    "contender": name,
                    "mode": mode,
                    "status": status,
                    "peak_bytes": row.get("peak_bytes"),
                    "error": row.get("error"),
                    "over_two_products": floor.get("ratio") if name == OURS else None,
                    **timing,
                }
            )
    return rows


def growth(frame: pd.DataFrame, value: str) -> float | None:
    """Exponent ``b`` of ``value ~ N^b``, by least squares in logarithms; None under 3 sizes."""
    points = frame[frame["num_rows"] >= SLOPE_FROM].dropna(subset=[value])
    points = points[points[value] > 0]
    if points["num_rows"].nunique() < 3:
        return None
    return float(np.polyfit(np.log(points["num_rows"]), np.log(points[value]), 1)[0])


def times(ratio: float) -> str:
    """A ratio for people."""
    return f"{ratio:.2g}x" if ratio < 100 else f"{ratio:.0f}x"


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """One table a dtype and class count: median milliseconds, and times slower than ours."""
    frame = pd.DataFrame(rows)
    frame = frame[frame["mode"] == "forward+backward"]
    for (dtype, dim, classes), part in frame.groupby(["dtype", "dim", "num_classes"], sort=False):
        table = Table(
            "contender",
            *(f"N = {n}" for n in sorted(part["num_rows"].unique())),
            "time ~ N^",
            title=f"forward + backward, ms (times ours), K = {classes}, D = {dim}, {dtype}",
        )
        ours = part[part["contender"] == OURS].set_index("num_rows")["median"]
        for name, line in part.groupby("contender", sort=False):
            cells = []
            for _, cell in line.sort_values("num_rows").iterrows():
                if pd.isna(cell.get("median")):
                    cells.append(cell["status"])
                else:
                    ratio = cell["median"] / ours.get(cell["num_rows"], np.nan)
                    cells.append(f"{cell['median'] * 1e3:.3g} ({times(ratio)})")
            slope = growth(line, "median")
            table.add_row(str(name), *cells, "" if slope is None else f"{slope:.2f}")
        console.print(table)


def problems(
    rows: Sequence[int],
    classes: Sequence[int],
    dims: Sequence[int],
    dtypes: Sequence[str],
    device: str,
) -> list[Problem]:
    return [
        Problem(n, k, d, dtype, device)
        for dtype, d, k, n in itertools.product(dtypes, dims, classes, rows)
    ]


def run(
    name: str,
    wanted: Sequence[Problem],
    contenders: Sequence[str],
    *,
    out: Path,
    resume: bool,
    console: Console,
    budget: float,
    max_repeats: int,
    cell_timeout: float,
    memory_limit: int | None,
) -> None:
    """Sweep, save as ``name`` after every problem, print, draw."""
    from benchmarks.plots import draw_speed

    env = results.environment(wanted[0].device)
    done: list[dict[str, Any]] = []
    if resume and (out / f"{name}.json").exists():
        frame, env = results.read(name, out)
        done = [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]
    rows = sweep(
        wanted,
        contenders,
        budget=budget,
        max_repeats=max_repeats,
        cell_timeout=cell_timeout,
        memory_limit=memory_limit,
        done=done,
        checkpoint=lambda rows: results.save(name, rows, env, out),
    )
    show(rows, console)
    console.print(f"saved: {results.save(name, rows, env, out)}")
    for picture in draw_speed(pd.DataFrame(rows), out, name):
        console.print(f"picture: {picture}")
