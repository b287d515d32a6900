"""Everything that is still to be shown on a GPU, in stages that fit a short loan of one.

A stage is a process of its own with a time limit, and leaves a file; stages that have one are not
run again. Each answers one question of `docs/kernels.md`.
"""

import functools
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import measure, results
from benchmarks.common.contenders import CONTENDERS
from benchmarks.common.measure import Problem

LIMIT = 460  # seconds a stage
OURS = "varcon-loss"
# What to reach, in bfloat16 with D = 128: (N, K, contender, times as slow as ours at least).
TARGETS = (
    (8_192, 1_000, "equations, authors' operations", 8.0),
    (8_192, 1_000, "equations, authors' operations, compiled", 2.0),
    (8_192, 1_000, "cut-cross-entropy composition", 1.5),
    (8_192, 1_000, "SupCon (pytorch-metric-learning)", 30.0),
    (512, 100, "equations, authors' operations", 1.0),
    (512, 100, "equations, lean", 1.0),
    (512, 100, "equations, lean, compiled", 1.0),
    (512, 100, "varcon-loss eager", 1.0),
)
FLOOR_TARGET = (65_536, 10_000, 2.5)  # N, K, times the floor of two products at most
MEMORY_TARGET = (65_536, 10_000, 3.0)  # N, K, times the bytes of the features at most
KERNEL_TESTS = ["tests/test_triton.py", "tests/test_cuda.py"]
SANITIZED = "odd_shapes or options or sorted_labels or half_operands or many"


def pytest_command(*arguments: str) -> list[str]:
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", "-q", *workers, *arguments]


def sanitizer_command(tool: str) -> list[str]:
    return [
        "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all",
        sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "tests/test_triton.py",
        "-k", SANITIZED,
    ]  # fmt: skip


def stages(device: str) -> dict[str, list[str]]:
    """The command of each stage, in the order in which they are worth running."""
    here = [sys.executable, "-m", "benchmarks.gpu_proof"]
    return {
        "kernels": pytest_command(*KERNEL_TESTS),
        "floors": [*here, "floors", device],
        "targets": [*here, "targets", device],
        "launches": [*here, "launches", device],
        "memcheck": sanitizer_command("memcheck"),
        "racecheck": sanitizer_command("racecheck"),
        "suite": pytest_command("tests", "--ignore=tests/test_timm.py"),
        "speed": [
            sys.executable, "-m", "benchmarks", "speed", "--device", device, "--name",
            f"speed-{device}", "--dtypes", "bfloat16,float32", "--cell-timeout", "1",
            "--budget", "1", "--no-compiled", "--resume",
        ],
    }  # fmt: skip


def run(out: Path, device: str, only: list[str] | None = None) -> list[dict[str, Any]]:
    """Run the stages without a file in ``out``; one row each, saved as they end.

    ``TRITON_INTERPRET`` is taken out of the environment: this is about compiled kernels.
    """
    out.mkdir(parents=True, exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    rows = []
    for name, command in stages(device).items():
        path = out / f"{name}.json"
        if only and name not in only:
            continue
        if not path.exists():
            row = _run_stage(name, command, out, environment)
            path.write_text(json.dumps(row | {"environment": results.environment(device)}))
        rows.append(json.loads(path.read_text()))
    return rows


def _run_stage(
    name: str, command: list[str], out: Path, environment: dict[str, str]
) -> dict[str, Any]:
    start = time.perf_counter()
    log = out / f"{name}.log"
    with log.open("w") as file:
        try:
            code: int | str = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, timeout=LIMIT, env=environment
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"over {LIMIT} s"
        except FileNotFoundError as error:
            code = f"{error.filename} is not installed"
    lines = log.read_text().splitlines()
    measured = next((json.loads(line) for line in reversed(lines) if line.startswith("[{")), None)
    return {
        "stage": name,
        "status": "passed" if code == 0 else f"failed: {code}",
        "seconds": round(time.perf_counter() - start),
        "last_line": next((line for line in reversed(lines) if line.strip()), "")[:200],
        "rows": measured,
    }


def _median_seconds(function: Callable[[], object], device: str) -> float:
    """Median of many calls; on CUDA by Triton's ``do_bench``, caches emptied between calls."""
    if device == "cuda":
        from triton.testing import do_bench

        milliseconds: Any = do_bench(function, warmup=25, rep=100, return_mode="median")
        return milliseconds / 1e3
    function()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def floors(device: str, sizes: list[tuple[int, int]], dim: int = 128) -> list[dict[str, Any]]:
    """No implementation can be faster: two matrix products, and reading and writing features.

    The rates are those that a large ``torch.mm`` and a large copy reach here, in bfloat16.
    """
    side = 8192 if device == "cuda" else 512
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    rate = 2 * side**3 / _median_seconds(lambda: a @ a, device)
    source = torch.empty(side * side * 4, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy_seconds = _median_seconds(lambda: target.copy_(source), device)
    bandwidth = 2 * source.numel() * source.element_size() / copy_seconds
    rows = []
    for num_rows, num_classes in sizes:
        operations = 4 * num_rows * num_classes * dim
        # Features: read for the sums and for the sweep. Gradient: written, read, written scaled.
        moved = 5 * num_rows * dim * 2 + 3 * num_classes * dim * 4
        rows.append(
            {
                "N": num_rows, "K": num_classes, "operations": operations, "bytes": moved,
                "products_s": operations / rate, "traffic_s": moved / bandwidth,
                "mm_tflops": rate / 1e12, "copy_gb_s": bandwidth / 1e9,
            }
        )  # fmt: skip
    return rows


def targets(
    device: str, wanted: tuple[tuple[int, int, str, float], ...] = TARGETS, rounds: int = 3
) -> list[dict[str, Any]]:
    """Each contender against ours, medians of interleaved rounds, after the correctness gate."""
    rows = []
    for num_rows, num_classes in dict.fromkeys((n, k) for n, k, *_ in wanted):
        problem = Problem(num_rows, num_classes, 128, "bfloat16", device)
        features, labels = problem.inputs()
        seconds: dict[str, list[float]] = {}
        status: dict[str, str] = {}
        names = [OURS, *(name for n, k, name, _ in wanted if (n, k) == (num_rows, num_classes))]
        steps = {}
        for name in names:
            missing = CONTENDERS[name].missing(device)
            if missing:
                status[name] = missing
                continue
            loss = CONTENDERS[name].make()
            try:
                measure.gate(name, loss, features, labels)
                steps[name] = functools.partial(measure.step, loss, features, labels)
                steps[name]()
            except Exception as error:  # a contender's failure is a result like any other
                steps.pop(name, None)
                status[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        for _ in range(rounds):
            for name, step in steps.items():
                features.grad = None
                seconds.setdefault(name, []).append(_median_seconds(step, device))
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        for n, k, name, least in wanted:
            if (n, k) != (num_rows, num_classes):
                continue
            ratio = medians[name] / medians[OURS] if name in medians and OURS in medians else None
            rows.append(
                {
                    "N": n, "K": k, "contender": name, "ours_s": medians.get(OURS),
                    "theirs_s": medians.get(name), "times_ours": ratio, "wanted": least,
                    "reached": None if ratio is None else ratio >= least,
                    "status": status.get(name, "ok"),
                }
            )  # fmt: skip
    return rows


def against_floor(device: str, num_rows: int, num_classes: int, most: float) -> dict[str, Any]:
    """Our time as a multiple of the floor of two products."""
    (floor,) = floors(device, [(num_rows, num_classes)])
    features, labels = Problem(num_rows, num_classes, 128, "bfloat16", device).inputs()
    loss = CONTENDERS[OURS].make()
    ours = _median_seconds(lambda: measure.step(loss, features, labels), device)
    ratio = ours / floor["products_s"]
    return {
        "N": num_rows, "K": num_classes, "contender": "floor of two products", "ours_s": ours,
        "theirs_s": floor["products_s"], "times_floor": ratio, "wanted": most,
        "reached": ratio <= most, "status": "ok",
    }  # fmt: skip


def memory(device: str, num_rows: int, num_classes: int, most: float) -> dict[str, Any]:
    """Peak extra memory of one step as a multiple of the features' bytes."""
    features, labels = Problem(num_rows, num_classes, 128, "bfloat16", device).inputs()
    loss = CONTENDERS[OURS].make()
    measure.step(loss, features, labels)
    features.grad = None
    before = measure.reset_peak(device)
    measure.step(loss, features, labels)
    ratio = (measure.peak(device) - before) / (features.numel() * features.element_size())
    return {
        "N": num_rows, "K": num_classes, "contender": "bytes of the features",
        "times_features": ratio, "wanted": most, "reached": ratio <= most, "status": "ok",
    }  # fmt: skip


def launches(device: str, num_rows: int = 512, num_classes: int = 100) -> list[dict[str, Any]]:
    """Kernels that one forward and backward starts, and the time of the same as a CUDA graph."""
    from torch.profiler import ProfilerActivity, profile

    from varcon_loss import VarConLoss

    features, labels = Problem(num_rows, num_classes, 128, "bfloat16", device).inputs()
    criterion = VarConLoss(num_classes=num_classes)

    def step() -> None:
        criterion(features, labels).backward()

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        step()
        torch.cuda.synchronize()
    kernels = [event.name for event in record.events() or () if "Mem" not in event.name]
    eager_seconds = _median_seconds(step, device)
    features.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return [
        {
            "N": num_rows, "K": num_classes, "kernels": len(kernels), "names": kernels,
            "eager_s": eager_seconds, "graph_s": _median_seconds(graph.replay, device),
        }
    ]  # fmt: skip


def main(stage: str, device: str) -> None:
    """One measuring stage: its rows as a line of JSON."""
    if stage == "floors":
        sizes = dict.fromkeys((target[0], target[1]) for target in (*TARGETS, FLOOR_TARGET))
        rows = floors(device, list(sizes))
    elif stage == "targets":
        rows = targets(device)
        rows += [against_floor(device, *FLOOR_TARGET), memory(device, *MEMORY_TARGET)]
    else:
        rows = launches(device)
    clean = [
        {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
        for row in rows
    ]
    print(json.dumps(clean))


if __name__ == "__main__":
    main(*sys.argv[1:])
