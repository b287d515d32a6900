"""Everything that is still to be shown on a GPU, in stages that fit a short loan of one.

A stage is a process of its own with a time limit, and leaves a file; one that passed is not run
again. Needs torch, Triton and pytest alone: ``python -m benchmarks.gpu_proof run OUT [STAGE ...]``.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import measure
from benchmarks.common.checkout import git
from benchmarks.common.contenders import CONTENDERS, Loss
from benchmarks.common.measure import Problem
from varcon_loss import VarConLoss
from varcon_loss.sweeps import fused
from varcon_loss.sweeps.proven import Proof

LIMIT = 400  # seconds a stage
OURS, EAGER = "varcon-loss", "varcon-loss eager"
# What to reach, in bfloat16 with D = 128: (N, K, contender, times as slow as ours at least).
TARGETS = (
    (8_192, 1_000, "equations, authors' operations", 8.0),
    (8_192, 1_000, "equations, authors' operations, compiled", 2.0),
    (8_192, 1_000, "cut-cross-entropy composition", 1.5),
    (8_192, 1_000, "SupCon (pytorch-metric-learning)", 30.0),
    (512, 100, "equations, authors' operations", 1.0),
    (512, 100, "equations, lean", 1.0),
    (512, 100, "equations, lean, compiled", 1.0),
    (512, 100, EAGER, 1.0),
    (8_192, 1_000, EAGER, 1.0),
)
TINY_TARGETS = (
    (64, 10, "equations, lean", 1.0),
    (64, 10, "cut-cross-entropy composition", 1.5),
)
SIZES = ((512, 100), (8_192, 1_000), (65_536, 10_000))
TINY_SIZES = ((64, 10),) * 3
FLOOR_TARGET = (65_536, 10_000, 2.5)  # N, K, times the floor of two products at most
MEMORY_TARGET = (65_536, 10_000, 3.0)  # N, K, times the bytes of the features at most
# Tiles to be timed against those that ship, bfloat16 with D = 128.
CANDIDATES = (
    fused.Tiles(64, 128, 4, 2),
    fused.Tiles(64, 64, 4, 3),
    fused.Tiles(128, 64, 8, 3),
    fused.Tiles(128, 128, 8, 2),
    fused.Tiles(64, 64, 8, 3),
    fused.Tiles(32, 64, 4, 3),
)
TESTS = ("test_triton.py", "test_cuda.py", "test_eager_cuda.py")
SANITIZED = ("odd_shapes", "options", "sorted_labels", "half_operands", "large_classes", "order_of")
# The files of the test suite that need more than torch, Triton and pytest.
NEEDS = {
    "test_metric_learning.py": ("pytorch_metric_learning", "pandas"),
    "test_trainers.py": ("lightning", "accelerate"),
    "test_values.py": ("hypothesis",),
    "test_expectation.py": ("hypothesis",),
    "test_golden.py": ("numpy",),
    "test_gpu_proof.py": ("typer", "rich", "pandas", "sklearn"),
}
# What shows nothing about a GPU, or is a stage of its own.
NOT_IN_SUITE = (
    *("test_timm.py", "test_package.py", "test_docs.py", "test_benchmarks*.py"),
    *("test_accelerator.py", "test_kernel_code.py"),  # on CPU tensors, and for other devices
    *TESTS,
)


def command(only: str = "", out: Path = Path("runs/gpu-proof")) -> None:
    """What only a GPU can show: tests, sanitizers, launches, times against floors and targets.

    Each stage takes under seven minutes; one that passed with this code is not run again. --only
    names some of kernels, device, launches, targets, large, memcheck, tiles, racecheck, initcheck,
    suite, speed-512-100, speed-8192-1000, speed-65536-10000; --out is the folder of the result
    files, of which gpu-proof.json goes into benchmarks/results.
    """
    import typer  # and no other package of the benchmarks: a machine with a GPU may lack them

    if not torch.cuda.is_available():
        raise typer.BadParameter(measure.NO_DEVICE)
    main("run", str(out), *only.replace(",", " ").split())


def pytest_command(*arguments: str, tiny: bool) -> list[str]:
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") and not tiny else []
    only_look = ["--collect-only"] if tiny else []
    return [sys.executable, "-m", "pytest", "-q", *only_look, *workers, *arguments]


def sanitizer_command(tool: str, *, tiny: bool) -> list[str]:
    sanitizer = [
        "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all",
        # torch asks for functions that some drivers lack, which is no error of the kernels.
        *(("--report-api-errors", "no") if tool == "memcheck" else ()),
        # initcheck must see who writes what; the others look at our kernels alone.
        *(() if tool == "initcheck" else ("--kernel-regex", "kns=_kernel")),
    ]  # fmt: skip
    tests = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "tests/test_triton.py",
        "-k", " or ".join(SANITIZED),
    ]  # fmt: skip
    return [*tests, "--collect-only"] if tiny else sanitizer + tests


def suite_command(*, tiny: bool) -> list[str]:
    """What can be run of the test suite with the packages that are there."""
    left_out = [
        *NOT_IN_SUITE,
        *(
            name
            for name, packages in NEEDS.items()
            if any(importlib.util.find_spec(package) is None for package in packages)
        ),
    ]
    ignored = [f"--ignore-glob=tests/{name}" for name in left_out]
    # Compiled kernels take no CPU tensors, on which these tests run.
    return pytest_command("tests", *ignored, "-k", "not triton and not named_impl", tiny=tiny)


def speed_command(num_rows: int, num_classes: int, device: str, out: Path) -> list[str]:
    return [
        sys.executable, "-m", "benchmarks", "speed", "--device", device, "--name",
        f"speed-{device}-{num_rows}-{num_classes}", "--rows", str(num_rows), "--classes",
        str(num_classes), "--dtypes", "bfloat16" if device == "cuda" else "float32",
        "--budget", "1", "--cell-timeout", "20", "--no-compiled", "--out", str(out),
    ]  # fmt: skip


def stages(device: str, out: Path, *, tiny: bool = False) -> dict[str, list[str]]:
    """The command of each stage, in the order in which they are worth running.

    ``tiny``: sizes for a CPU, and tests are collected only: shows that the commands are right.
    """
    size = ["tiny"] if tiny else []
    here = [sys.executable, "-m", "benchmarks.gpu_proof"]
    measured = {name: [*here, name, device, *size] for name in MEASURED}
    sizes = TINY_SIZES[:1] if tiny else SIZES
    return {
        "kernels": pytest_command("tests/test_triton.py", tiny=tiny),
        "device": pytest_command(*(f"tests/{name}" for name in TESTS[1:]), tiny=tiny),
        "launches": measured["launches"],
        "targets": measured["targets"],
        "large": measured["large"],
        "memcheck": sanitizer_command("memcheck", tiny=tiny),
        "tiles": measured["tiles"],
        "racecheck": sanitizer_command("racecheck", tiny=tiny),
        "initcheck": sanitizer_command("initcheck", tiny=tiny),
        "suite": suite_command(tiny=tiny),
        **{f"speed-{n}-{k}": speed_command(n, k, device, out) for n, k in sizes},
    }


# The stages without which nothing becomes a default.
PROOF = ("kernels", "device", "targets", "memcheck")


def supports(proof: Proof, folder: Path) -> bool:
    """Does the results file that ``proof`` names say that its device passed?

    All that a proof is made of must be of the same code.

    Raises:
        FileNotFoundError: there is no such file.
    """
    content = json.loads((folder / f"{proof.results}.json").read_text())
    rows = {row["stage"]: row for row in content["rows"] if row["status"] == "passed"}
    if not rows.keys() >= set(PROOF) or len({rows[name]["code"] for name in PROOF}) > 1:
        return False
    environment = content["environment"]
    here = tuple(environment["capability"]), environment["versions"]["triton"]
    if here[0] != proof.capability or not here[1].startswith(f"{proof.triton}."):
        return False
    # What would be replaced must not be faster.
    replaced = [row for row in rows["targets"]["rows"] if row["contender"] == EAGER]
    return bool(replaced) and all(row["reached"] for row in replaced)


def fingerprint() -> str:
    """Of the code that a proof is about: git may be missing where it runs, or have changes."""
    root = Path(__file__).parents[1]
    files = sorted((root / "varcon_loss").glob("**/*.py"))
    files += [Path(__file__), *(root / "tests" / name for name in TESTS)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def environment(device: str) -> dict[str, Any]:
    """As `results.environment`, with nothing but torch."""
    versions = {
        package: importlib.metadata.version(package)
        for package in ("torch", "triton", "numpy")
        if importlib.util.find_spec(package)
    }
    on_gpu = device == "cuda"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": git("rev-parse", "--short", "HEAD"),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "capability": torch.cuda.get_device_capability() if on_gpu else None,
        "versions": {"python": sys.version.split()[0], **versions},
    }


def run(
    out: Path, device: str, only: list[str] | None = None, *, tiny: bool = False
) -> list[dict[str, Any]]:
    """Run the stages that have not passed with this code, one by one; a row each, saved at its end.

    On CUDA ``TRITON_INTERPRET`` is taken out of the environment: this is about compiled kernels.
    """
    out.mkdir(parents=True, exist_ok=True)
    commands = stages(device, out, tiny=tiny)
    code = fingerprint()
    unknown = set(only or ()) - set(commands)
    if unknown:
        raise ValueError(f"no stage {sorted(unknown)}: there are {', '.join(commands)}")
    rows = []
    for name, command in commands.items():
        path = out / f"{name}.json"
        if only and name not in only:
            continue
        row = json.loads(path.read_text()) if path.exists() else None
        if row is None or row["status"] != "passed" or row.get("code") != code:
            row = _run_stage(name, command, out, device) | {"code": code}
            path.write_text(json.dumps(row | {"environment": environment(device)}))
        rows.append(row)
        save(out, device, tiny=tiny)  # a loan may end at any time
        print(f"{name}: {row['status']}, {row['seconds']} s: {row['last_line']}", flush=True)
    return rows


def save(out: Path, device: str, *, tiny: bool = False) -> Path:
    """Write ``gpu-proof.json``: all stages that have left a file on this device, on any day.

    ``report`` makes its part of RESULTS.md from it.
    """
    env = environment(device)
    left = [out / f"{name}.json" for name in stages(device, out, tiny=tiny)]
    rows = [json.loads(path.read_text()) for path in left if path.exists()]
    rows = [row for row in rows if row.pop("environment")["device"] == env["device"]]
    path = out / "gpu-proof.json"
    path.write_text(json.dumps({"environment": env, "rows": rows}, indent=1))
    return path


def _run_stage(name: str, command: list[str], out: Path, device: str) -> dict[str, Any]:
    variables = dict(os.environ)
    if device == "cuda":
        variables.pop("TRITON_INTERPRET", None)
    if "compute-sanitizer" in command:
        # Inside torch's caching allocator nothing is out of bounds, and nothing uninitialised.
        variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    start = time.perf_counter()
    log = out / f"{name}.log"
    with log.open("w") as file:
        code = _run_to_the_end(command, file, variables)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    measured = next((json.loads(line) for line in reversed(lines) if line.startswith("[{")), None)
    last = lines[-1][:200] if lines else ""
    return {
        "stage": name,
        "status": "passed" if code == 0 else f"failed: {code}",
        "seconds": round(time.perf_counter() - start),
        "last_line": f"{len(measured)} rows" if measured and last.startswith("[{") else last,
        "rows": measured,
    }


def _run_to_the_end(command: list[str], log: Any, variables: dict[str, str]) -> int | str:
    """The exit status, or what kept it from one; nothing that it started is left."""
    try:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=variables, start_new_session=True
        )
    except FileNotFoundError as error:
        return f"{error.filename} is not installed"
    try:
        return process.wait(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f"over {LIMIT} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # all gone, as they should be
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wall_seconds(function: Callable[[], object], device: str) -> float:
    """Time a call takes where one follows the other, the host's part included."""
    for _ in range(3 if device == "cuda" else 1):
        function()
    _synchronize(device)
    start = time.perf_counter()
    function()
    _synchronize(device)
    once = time.perf_counter() - start
    if device != "cuda":  # this only shows that it runs
        return once
    calls = max(1, min(1000, round(0.1 / once)))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        _synchronize(device)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def graph_seconds(function: Callable[[], object], device: str) -> float | None:
    """The same as a CUDA graph: what the GPU needs alone. None where it cannot be captured."""
    if device != "cuda":
        return None
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
    except Exception as error:  # a contender that reads values, say
        print(f"no graph: {type(error).__name__}: {error}".splitlines()[0][:200])
        torch.cuda.set_stream(torch.cuda.default_stream())  # a failed capture leaves its own
        torch.cuda.synchronize()
        return None
    return wall_seconds(graph.replay, device)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _step(loss: Loss, features: Tensor, labels: Tensor) -> Tensor:
    """Forward and backward; nothing is added to a gradient of before."""
    return torch.autograd.grad(loss(features, labels), features)[0]


def _make(name: str, num_classes: int) -> Loss:
    """A contender; ours are told the number of classes and what to run, as users are advised."""
    impls = {OURS: "triton", EAGER: "eager"}
    if name in impls:
        return VarConLoss(num_classes=num_classes, impl=impls[name])
    return CONTENDERS[name].make()


def floors(device: str, sizes: list[tuple[int, int]], dim: int = 128) -> list[dict[str, Any]]:
    """No implementation can be faster: two matrix products, and reading and writing features.

    The rates are those that a large ``torch.mm`` and a large copy reach here, in bfloat16.
    """
    side = 8192 if device == "cuda" else 256
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    rate = 2 * side**3 / wall_seconds(lambda: a @ a, device)
    source = torch.empty(side * side * 4, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy_seconds = wall_seconds(lambda: target.copy_(source), device)
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
    device: str, wanted: tuple[tuple[int, int, str, float], ...], rounds: int = 3
) -> list[dict[str, Any]]:
    """Each contender against ours, medians of interleaved rounds, after the correctness gate."""
    rows = []
    for num_rows, num_classes in dict.fromkeys((n, k) for n, k, *_ in wanted):
        problem = Problem(num_rows, num_classes, 128, "bfloat16", device)
        features, labels = problem.inputs()
        names = [OURS, *(name for n, k, name, _ in wanted if (n, k) == (num_rows, num_classes))]
        steps: dict[str, Callable[[], object]] = {}
        status: dict[str, str] = {}
        for name in names:
            missing = None if name in (OURS, EAGER) else CONTENDERS[name].missing(device)
            if missing:
                status[name] = missing
                continue
            try:
                loss = _make(name, num_classes)
                measure.gate(name, loss, features, labels)
                step = functools.partial(_step, loss, features, labels)
                step()
            except Exception as error:  # a contender's failure is a result like any other
                status[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            else:
                steps[name] = step
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                seconds[name].append(wall_seconds(step, device))
        wall = {name: statistics.median(values) for name, values in seconds.items()}
        graph = {name: graph_seconds(step, device) for name, step in steps.items()}
        for n, k, name, least in wanted:
            if (n, k) != (num_rows, num_classes):
                continue
            ratio = _ratio(wall.get(name), wall.get(OURS))
            rows.append(
                {
                    "N": n, "K": k, "contender": name, "ours_s": wall.get(OURS),
                    "theirs_s": wall.get(name), "times_ours": ratio, "wanted": least,
                    "reached": None if ratio is None else ratio >= least,
                    "ours_graph_s": graph.get(OURS), "theirs_graph_s": graph.get(name),
                    "times_ours_graphs": _ratio(graph.get(name), graph.get(OURS)),
                    "status": status.get(name, status.get(OURS, "ok")),
                    "ours": status.get(OURS, "ok"),
                }
            )  # fmt: skip
    return rows


def _ratio(theirs: float | None, ours: float | None) -> float | None:
    return None if theirs is None or ours is None else theirs / ours


def against_floor(device: str, num_rows: int, num_classes: int, most: float) -> dict[str, Any]:
    """Our time as a multiple of the floor of two products."""
    (floor,) = floors(device, [(num_rows, num_classes)])
    features, labels = Problem(num_rows, num_classes, 128, "bfloat16", device).inputs()
    step = functools.partial(_step, _make(OURS, num_classes), features, labels)
    ours, graph = wall_seconds(step, device), graph_seconds(step, device)
    ratio = ours / floor["products_s"]
    return {
        "N": num_rows, "K": num_classes, "contender": "floor of two products", "ours_s": ours,
        "ours_graph_s": graph, "theirs_s": floor["products_s"], "times_floor": ratio,
        "wanted": most, "reached": ratio <= most, "status": "ok", "floor": floor,
    }  # fmt: skip


def memory(device: str, num_rows: int, num_classes: int, most: float) -> dict[str, Any]:
    """Peak extra memory of one step as a multiple of the features' bytes."""
    features, labels = Problem(num_rows, num_classes, 128, "bfloat16", device).inputs()
    loss = _make(OURS, num_classes)
    _step(loss, features, labels)
    before = measure.reset_peak(device)
    _step(loss, features, labels)
    ratio = (measure.peak(device) - before) / (features.numel() * features.element_size())
    return {
        "N": num_rows, "K": num_classes, "contender": "bytes of the features",
        "times_features": ratio, "wanted": most, "reached": ratio <= most, "status": "ok",
    }  # fmt: skip


def launches(device: str, sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Kernels that one forward and backward starts, with their times, and the step's time."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device == "cuda"
    rows = []
    for num_rows, num_classes in sizes:
        features, labels = Problem(num_rows, num_classes, 128, "bfloat16", device).inputs()
        step = functools.partial(_step, _make(OURS, num_classes), features, labels)
        for _ in range(3 if on_gpu else 1):
            step()
        _synchronize(device)
        activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
        with profile(activities=[activity]) as record:
            step()
            _synchronize(device)
        where = DeviceType.CUDA if on_gpu else DeviceType.CPU
        events = [
            event
            for event in record.events() or ()
            if event.device_type == where and "Mem" not in event.name
        ]
        rows.append(
            {
                "N": num_rows, "K": num_classes, "kernels": len(events) if on_gpu else None,
                "microseconds": [
                    [event.name[:60], event.time_range.elapsed_us()] for event in events
                ],
                "wall_s": wall_seconds(step, device), "graph_s": graph_seconds(step, device),
            }
        )  # fmt: skip
    return rows


def tiles(
    device: str, sizes: list[tuple[int, int]], candidates: tuple[fused.Tiles, ...]
) -> list[dict[str, Any]]:
    """Other ways to cut up the sweep: bfloat16, D = 128. The shipped one is `fused.TILES`."""
    shipped = fused.choose_tiles
    rows = []
    for num_rows, num_classes in sizes:
        features, labels = Problem(num_rows, num_classes, 128, "bfloat16", device).inputs()
        step = functools.partial(_step, _make(OURS, num_classes), features, labels)
        expected = step()
        for candidate in candidates:
            fused.choose_tiles = lambda *_, chosen=candidate: chosen
            row: dict[str, Any] = {"N": num_rows, "K": num_classes, "tiles": list(candidate)}
            try:
                row["error"] = float((step() - expected).abs().max() / expected.abs().max())
                row["wall_s"] = wall_seconds(step, device)
                row["graph_s"] = graph_seconds(step, device)
            except Exception as error:  # too large for this device, say
                row["status"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            finally:
                fused.choose_tiles = shipped
            rows.append(row)
    return rows


def _measure(stage: str, device: str, *, tiny: bool) -> list[dict[str, Any]]:
    small, middle, large = TINY_SIZES if tiny else SIZES
    if stage == "launches":
        return launches(device, [small] if tiny else [small, middle, large])
    if stage == "targets":
        return targets(device, TINY_TARGETS if tiny else TARGETS, rounds=1 if tiny else 3)
    if stage == "tiles":
        chosen = (fused.Tiles(32, 16, 4, 2),) if tiny else CANDIDATES
        return tiles(device, [small] if tiny else [middle, large], chosen)
    floor, peak = ((64, 10, 2.5), (64, 10, 3.0)) if tiny else (FLOOR_TARGET, MEMORY_TARGET)
    return [against_floor(device, *floor), memory(device, *peak)]


MEASURED = ("launches", "targets", "large", "tiles")


def main(stage: str = "", *arguments: str) -> None:
    """``run OUT [STAGE ...]``, or one measuring stage: its rows as a line of JSON."""
    if stage == "run":
        if not arguments:
            raise SystemExit("run needs a folder for the result files: run OUT [STAGE ...]")
        if not torch.cuda.is_available():
            raise SystemExit(measure.NO_DEVICE)
        # A loan that ends kills this process: then the stage that runs must end too.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))
        out, *only = arguments
        rows = run(Path(out), "cuda", only)
        print(f"copy {Path(out) / 'gpu-proof.json'} to benchmarks/results and run report")
        raise SystemExit(any(row["status"] != "passed" for row in rows))
    if stage not in MEASURED:
        raise SystemExit(f"no stage {stage!r}: there are {', '.join(MEASURED)}, and run")
    rows = _measure(stage, arguments[0], tiny="tiny" in arguments)
    print(json.dumps(rows))
    if any(row.get("ours") not in (None, "ok") for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
