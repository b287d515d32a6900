"""How long does a step take, and how much memory, over batch size, classes, width and dtype?"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from rich.console import Console

from benchmarks.common import measure, options, plots, results
from benchmarks.common.contenders import BY_HAND, CONTENDERS, INTEGERS, OURS
from benchmarks.common.measure import Limits, Problem
from benchmarks.common.terminal import console, progress_bar, table, written

ROWS, CLASSES = "64,256,1024,4096,8192,16384,65536", "10,100,1000,10000"
ROWS_OF_SOFT, CLASSES_OF_SOFT = "8192", "1000"
MODES = ("forward+backward", "forward")
COMPILE_SECONDS = 60  # torch.compile may take this long, once
SLOPE_FROM = 4096  # growth is fitted from this batch size on, where launches no longer matter
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
    compiled: Annotated[bool, typer.Option(help="include the torch.compile contenders")] = True,
    budget: Annotated[float, typer.Option(help="seconds of timing at each size and mode")] = 6.0,
    max_repeats: Annotated[int, typer.Option(help="repeats at most")] = 200,
    cell_timeout: Annotated[float, typer.Option(help="slower contenders are left out, s")] = 2.0,
    memory_gib: Annotated[
        float, typer.Option(help="address space of a measuring process (CPU); 0: no limit")
    ] = 8.0,
    name: Annotated[str, typer.Option(help="of the result files; --labels is appended")] = (
        "speed-cpu"
    ),
    out: options.Out = Path("runs/speed"),
    resume: Annotated[bool, typer.Option(help="keep sizes already measured")] = True,
) -> None:
    """Time and memory: this package, the plain equations, SupCon and NT-Xent, side by side.

    An interrupted sweep goes on where it stopped when the same command is given again.
    """
    options.require(device)
    if labels not in measure.LABELS:
        known = ", ".join(measure.LABELS)
        raise typer.BadParameter(f"labels must be one of {known}, got {labels!r}")
    plain = labels == "integer"
    run(
        name if plain else f"{name}-{labels}",
        problems(
            options.integers(rows or (ROWS if plain else ROWS_OF_SOFT)),
            options.integers(classes or (CLASSES if plain else CLASSES_OF_SOFT)),
            options.integers(dims),
            options.names(dtypes),
            device,
            labels,
        ),
        chosen_contenders(contenders, compiled=compiled, labels=labels),
        Limits(
            budget,
            max_repeats,
            cell_timeout,
            int(memory_gib * 2**30) if memory_gib and device == "cpu" else None,
        ),
        out=out,
        resume=resume,
    )


def chosen_contenders(text: str, *, compiled: bool, labels: str = "integer") -> list[str]:
    """Names that contain one of the comma-separated parts; ours is always among them.

    Beside class probabilities, those that take them, and ours with integers.
    """
    wanted = options.names(text)
    for part in wanted:
        if not any(part in name for name in CONTENDERS):
            known = "; ".join(CONTENDERS)
            raise typer.BadParameter(f"no contender's name contains {part!r}; there are: {known}")
    if labels != "integer":
        return [
            name
            for name, contender in CONTENDERS.items()
            if name in (OURS, INTEGERS)
            or (contender.soft and (not wanted or any(part in name for part in wanted)))
        ]
    return [
        name
        for name in CONTENDERS
        if name != INTEGERS
        and (compiled or "compiled" not in name)
        and (not wanted or name == OURS or any(part in name for part in wanted))
    ]


def problems(
    rows: Sequence[int],
    classes: Sequence[int],
    dims: Sequence[int],
    dtypes: Sequence[str],
    device: str,
    labels: str = "integer",
) -> list[Problem]:
    unknown = [dtype for dtype in dtypes if dtype not in measure.DTYPES]
    if unknown:
        known = ", ".join(measure.DTYPES)
        raise typer.BadParameter(f"dtypes must be among {known}, got {', '.join(unknown)}")
    return [
        Problem(n, k, d, dtype, device, labels)
        for dtype, d, k, n in itertools.product(dtypes, dims, classes, rows)
    ]


def run(
    name: str,
    wanted: Sequence[Problem],
    contenders: Sequence[str],
    limits: Limits,
    *,
    out: Path,
    resume: bool,
) -> None:
    """Sweep, save as ``name`` after every problem, print, draw."""
    env = results.environment(wanted[0].device) | {"load": os.getloadavg()[0]}
    done: list[dict[str, Any]] = []
    if resume and (out / f"{name}.json").exists():
        frame, before = results.read(name, out)
        done = [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]
        done = [row for row in done if _problem(row) in finished(done, contenders)]
        if done:
            env["kept_from"] = before
            kept = sum(problem in finished(done, contenders) for problem in wanted)
            console.print(
                f"kept {kept} of {len(wanted)} sizes, measured on {before['date']} at commit "
                f"{before['commit']}; --no-resume measures them again"
            )
    rows = sweep(
        wanted,
        contenders,
        limits,
        done=done,
        checkpoint=lambda rows: results.save(name, rows, env, out),
    )
    show(rows, console)
    for line in beside_integers(pd.DataFrame(rows)):
        console.print(line)
    for line in doubts(rows, env["load"]):
        console.print(line)
    saved = results.save(name, rows, env, out)
    pictures = plots.draw_speed(pd.DataFrame(rows), out, name)
    written(saved, saved.with_suffix(".csv"), *pictures)


def finished(rows: Sequence[dict[str, Any]], contenders: Sequence[str]) -> set[Problem]:
    """The problems at which every one of ``contenders`` has a row."""
    seen: dict[Problem, set[str]] = {}
    for row in rows:
        seen.setdefault(_problem(row), set()).add(row["contender"])
    return {problem for problem, names in seen.items() if names >= set(contenders)}


def _problem(row: dict[str, Any]) -> Problem:
    # Before labels could be anything else, rows did not say that they were integers.
    labels = row.get("labels")
    known = row | {"labels": labels if isinstance(labels, str) else "integer"}
    return Problem(*(known[key] for key in Problem.__dataclass_fields__))


def sweep(
    problems: Sequence[Problem],
    contenders: Sequence[str],
    limits: Limits,
    *,
    done: list[dict[str, Any]],
    checkpoint: Callable[[list[dict[str, Any]]], object],
) -> list[dict[str, Any]]:
    """Measure every contender at every problem; failures become rows too.

    Args:
        problems: sizes.
        contenders: names from `CONTENDERS`.
        limits: of time and memory.
        done: rows of an interrupted sweep; their problems are not measured again.
        checkpoint: called with all rows after each problem.
    """
    rows = list(done)
    kept = finished(rows, contenders)
    todo = [problem for problem in problems if problem not in kept]
    with progress_bar() as bar:
        steps = len(contenders) + len(MODES) + 1
        task = bar.add_task("speed", total=len(todo) * steps, note="")
        for problem in todo:
            size = f"N={problem.num_rows} K={problem.num_classes} {problem.dtype}"

            def tell(what: str, size=size) -> None:
                bar.update(task, advance=1, note=f"{size}: {what}")

            rows += _measure_problem(problem, contenders, limits, tell)
            checkpoint(rows)
    return rows


def _measure_problem(
    problem: Problem, contenders: Sequence[str], limits: Limits, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    weighed: dict[str, dict[str, Any]] = {}
    for name in contenders:
        missing = CONTENDERS[name].missing(problem.device)
        weighed[name] = (
            {"status": missing}
            if missing
            else measure.in_child(
                measure.check_and_weigh, name, problem,
                timeout=4 * limits.cell_timeout + COMPILE_SECONDS * ("compiled" in name),
                memory_limit=limits.memory,
            )
        )  # fmt: skip
        tell(name)
    able = [
        name
        for name, row in weighed.items()
        if row["status"] == "ok" and row["seconds"] < limits.cell_timeout
    ]
    timings: dict[str, dict[str, Any]] = {}
    for mode in MODES:
        outcome = measure.in_child(
            measure.time_together, able, problem, mode, limits.budget, limits.max_repeats,
            timeout=4 * COMPILE_SECONDS + 20 * limits.cell_timeout, memory_limit=limits.memory,
        )  # fmt: skip
        timings[mode] = outcome.get("timings", {})
        if outcome["status"] != "ok":
            for name in able:
                weighed[name]["status"] = outcome["status"]
        tell(mode)
    floor = measure.in_child(
        measure.two_products, problem, limits.budget / 4, limits.max_repeats,
        timeout=60 + limits.cell_timeout, memory_limit=limits.memory,
    )  # fmt: skip
    tell("two bare products")
    rows = []
    for name, row in weighed.items():
        for mode in MODES:
            timing = timings[mode].get(name, {})
            status = row["status"]
            if status == "ok" and not timing:
                status = f"over {limits.cell_timeout:.0f} s"
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
    """One table a dtype and class count: median and quartiles, and times slower than ours."""
    frame = pd.DataFrame(rows)
    frame = frame[frame["mode"] == "forward+backward"]
    for (dtype, dim, classes), part in frame.groupby(["dtype", "dim", "num_classes"], sort=False):
        ours = part[part["contender"] == OURS].set_index("num_rows")["median"]
        lines = []
        for name, line in part.groupby("contender", sort=False):
            cells = [
                _cell(cell, ours.get(cell["num_rows"], np.nan))
                for _, cell in line.sort_values("num_rows").iterrows()
            ]
            slope = growth(line, "median")
            lines.append([name, *cells, None if slope is None else f"{slope:.2f}"])
        console.print(
            table(
                f"forward + backward, ms: median (times ours), quartiles below; K = {classes}, "
                f"D = {dim}, {dtype}",
                [
                    "contender",
                    *(f"N = {n}" for n in sorted(part["num_rows"].unique())),
                    "time ~ N^",
                ],
                lines,
            )
        )


def _cell(row: pd.Series, ours: float) -> str:
    if pd.isna(row.get("median")):
        return row["status"]
    q1, median, q3 = (row[key] * 1e3 for key in ("q1", "median", "q3"))
    return f"{median:.3g} ({times(row['median'] / ours)})\n{q1:.3g} to {q3:.3g}"


def beside_integers(frame: pd.DataFrame) -> Iterator[str]:
    """Class probabilities against integer labels and the equations by hand, a line a size."""
    if "labels" not in frame:
        return
    full = frame[(frame["mode"] == "forward+backward") & (frame["labels"] != "integer")]
    sizes = ["labels", "dtype", "num_rows", "num_classes", "dim"]
    for (labels, dtype, n, k, _), part in full.groupby(sizes, sort=False):
        by_name = part.set_index("contender")
        if not {OURS, INTEGERS, BY_HAND} <= set(by_name.index):
            continue
        ours, integers, by_hand = (by_name.loc[name] for name in (OURS, INTEGERS, BY_HAND))
        if pd.isna(ours["median"]):
            continue
        ratios = ", ".join(
            f"{what} {ours[value] / integers[value]:.2f} times integer labels, by hand "
            f"{by_hand[value] / ours[value]:.1f} times ours"
            for what, value in (("median", "median"), ("least CPU time", "least_cpu"))
        )
        mib = [f"{row['peak_bytes'] / 2**20:.0f}" for row in (ours, integers, by_hand)]
        table = n * k * getattr(torch, str(dtype)).itemsize / 2**20
        yield (
            f"{labels}, N = {n:,}, K = {k:,}, {dtype}, {ours['median'] * 1e3:.3g} ms: {ratios}; "
            f"peak extra memory {mib[0]} MiB, with integers {mib[1]}, by hand {mib[2]} (the labels "
            f"themselves, the caller's: {table:.0f})."
        )


def doubts(rows: Sequence[dict[str, Any]], load: float) -> list[str]:
    """What makes these times doubtful, in words: other work on the machine, wide quartiles."""
    found = []
    cores = os.cpu_count() or 1
    if load > cores / 2:
        found.append(
            f"The machine was busy before the first measurement (load {load:.1f} on {cores} "
            "cores): run it again when it is idle."
        )
    timed = [row for row in rows if row.get("median") and not pd.isna(row["median"])]
    wide = [row for row in timed if (row["q3"] - row["q1"]) / row["median"] > NOISY]
    if wide:
        worst = max(wide, key=lambda row: (row["q3"] - row["q1"]) / row["median"])
        found.append(
            f"Noisy: in {len(wide)} of {len(timed)} cells the quartiles are more than {NOISY:.0%} "
            f"of the median apart; widest: {worst['contender']}, {worst['mode']}, "
            f"N = {worst['num_rows']}, K = {worst['num_classes']}."
        )
    return found
