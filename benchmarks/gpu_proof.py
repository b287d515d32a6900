"""What a GPU shows of the kernels: are they right, and are they faster than what they replace?

Needs torch, Triton and pytest alone: ``python -m benchmarks.gpu_proof`` on a bare machine.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import measure, results
from benchmarks.common.contenders import CONTENDERS, Loss, Problem
from varcon_loss import VarConLoss
from varcon_loss.proven import Proof

OURS, EAGER = "varcon-loss triton", "varcon-loss eager"
IMPLS = {OURS: "triton", EAGER: "eager"}
NAMES = (
    OURS,
    EAGER,
    "equations, lean",
    "equations, lean, compiled",
    "NLL alone (linear_cross_entropy)",
    "SupCon (pytorch-metric-learning)",
)


class Row(NamedTuple):
    """One size; ``graph``: the step is captured in a CUDA graph, and the replay is timed."""

    num_rows: int
    num_classes: int
    dim: int
    dtype: str
    graph: bool = False


ROWS = (
    Row(256, 100, 128, "bfloat16"),
    Row(256, 100, 128, "bfloat16", graph=True),
    Row(8_192, 1_000, 128, "float32"),
    Row(8_192, 1_000, 768, "bfloat16"),
    Row(65_536, 10_000, 128, "bfloat16"),
)
ROUNDS = 5
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:xdist")
CHECKS = {
    "tests": (*PYTEST, *(f"tests/test_{name}.py" for name in ("triton", "cuda", "eager_cuda"))),
    "memcheck": (
        "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9",
        "--target-processes", "all", "--kernel-regex", "kns=_kernel",
        # torch asks for functions that some drivers lack, which is no error of the kernels.
        "--report-api-errors", "no",
        *PYTEST, "tests/test_triton.py", "-k", "test_odd_shapes and 33-16-17",
    ),
}  # fmt: skip
LIMIT = 300  # seconds a check


def command(out: Path = Path("runs/gpu-proof")) -> None:
    """What a GPU shows of the kernels: tests, memcheck, one table of times and memory, a verdict.

    Under ten minutes on one card. --out is the folder of gpu-proof.json.
    """
    if not torch.cuda.is_available():
        raise SystemExit(measure.NO_DEVICE)
    env = results.environment("cuda") | {"capability": torch.cuda.get_device_capability()}
    content: dict[str, Any] = {"environment": env, "checks": {}, "rows": []}
    out.mkdir(parents=True, exist_ok=True)
    for name, arguments in CHECKS.items():
        content["checks"][name] = check(arguments, out / f"{name}.log")
        print(f"{name}: {content['checks'][name]['outcome']}", flush=True)
    for row in ROWS:
        print(f"measuring {row}", flush=True)
        content["rows"] += measured(row)
        content["verdict"] = verdict(content)
        (out / "gpu-proof.json").write_text(json.dumps(content, indent=1))
    for line in table(content["rows"]):
        print(" | ".join(f"{cell:>34}" for cell in line))
    print(f"Verdict: {content['verdict']}\n{out / 'gpu-proof.json'}")


def check(arguments: tuple[str, ...], log: Path) -> dict[str, Any]:
    """Run a command; ``outcome`` is "passed", or what went wrong."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Inside torch's caching allocator nothing would be out of bounds.
    variables |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if "memcheck" in arguments else {}
    start, last = time.perf_counter(), ""
    try:
        with log.open("w") as file:
            done = subprocess.run(
                arguments, stdout=file, stderr=subprocess.STDOUT, env=variables, timeout=LIMIT
            )
        lines = log.read_text(errors="replace").split("\n")
        last = next((line[:200] for line in reversed(lines) if line.strip()), "")
        outcome = "passed" if done.returncode == 0 else f"failed ({done.returncode}): {last}"
    except FileNotFoundError:
        outcome = f"{arguments[0]} is not installed"
    except subprocess.TimeoutExpired:
        outcome = f"over {LIMIT} s"
    return {"outcome": outcome, "last_line": last, "seconds": round(time.perf_counter() - start)}


def measured(row: Row, device: str = "cuda", names: tuple[str, ...] = NAMES) -> list[dict]:
    """Time and peak memory of one forward and backward of each contender that is right."""
    torch.compiler.reset()  # else the last of many sizes would not be compiled
    problem = Problem(*row[:4], device)
    features, labels = problem.inputs()
    steps, peaks, status = {}, {}, {}
    for name in names:
        missing = None if name in IMPLS else CONTENDERS[name].missing(device)
        status[name] = missing or "ok"
        if status[name] != "ok":
            continue
        try:
            loss = _make(name, problem)
            measure.gate(name, loss, features, labels)
            step = functools.partial(_step, loss, features, labels)
            step()
            peaks[name] = measure.weigh(step, device)["peak_bytes"]
            steps[name] = captured(step) if row.graph else step
        except Exception as error:  # a contender's failure is a result like any other
            status[name] = measure.failure(error)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            seconds[name].append(wall_seconds(step, device))
    return [
        {
            **row._asdict(),
            "contender": name,
            "status": status[name],
            "seconds": statistics.median(seconds[name]) if name in seconds else None,
            "peak_bytes": peaks.get(name) if name in seconds else None,
        }
        for name in names
    ]


def _make(name: str, problem: Problem) -> Loss:
    """A contender; ours are given the number of classes, as users are advised."""
    if name in IMPLS:
        return VarConLoss(num_classes=problem.num_classes, impl=IMPLS[name])
    loss = CONTENDERS[name].make(problem)
    if not name.startswith("equations"):
        return loss
    # As ours compute: in bfloat16 they are wrong by up to 40 % where classes are small.
    return lambda features, labels: loss(features.float(), labels)


def _step(loss: Loss, features: Tensor, labels: Tensor) -> Tensor:
    """Forward and backward; nothing is added to a gradient of before."""
    return torch.autograd.grad(loss(features, labels), features)[0]


def captured(step: Callable[[], object]) -> Callable[[], None]:
    """``step`` as a CUDA graph; raises where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except Exception:
        torch.cuda.set_stream(torch.cuda.default_stream())  # a failed capture leaves its own
        torch.cuda.synchronize()
        raise
    return graph.replay


def wall_seconds(function: Callable[[], object], device: str) -> float:
    """Time of a call where one follows the other, the host's part included."""

    def seconds(calls: int) -> float:
        measure.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        measure.synchronize(device)
        return (time.perf_counter() - start) / calls

    return seconds(max(1, min(1000, round(0.1 / seconds(1)))))


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A line a contender, a column a size: milliseconds / MiB of peak memory, or "-"."""
    sizes = list(dict.fromkeys(tuple(row[key] for key in Row._fields) for row in rows))
    heads = [
        f"{n:,} x {k:,}, D {dim}, {dtype}{', graph' if graph else ''}"
        for n, k, dim, dtype, graph in sizes
    ]
    lines = [["forward and backward, ms / MiB", *heads]]
    for name in dict.fromkeys(row["contender"] for row in rows):
        own = [row for row in rows if row["contender"] == name]
        lines.append([name, *(_cell(row) for row in own)])
    return lines


def _cell(row: dict[str, Any]) -> str:
    if row["seconds"] is None:
        return "-"
    return f"{row['seconds'] * 1e3:.3g} / {row['peak_bytes'] / 2**20:.3g}"


def verdict(content: dict[str, Any]) -> str:
    """Right or not, and for which dtypes and widths not slower than eager."""
    wrong = [name for name in CHECKS if _outcome(content, name) != "passed"]
    if wrong:
        return f"not proven: {', '.join(wrong)} did not pass"
    proofs = proofs_of(content)
    if not proofs:
        return "right, but slower than eager in every dtype"
    return "right, and not slower than eager: " + ", ".join(
        f"{str(proof.dtype).removeprefix('torch.')} with D from {proof.widths[0]} to "
        f"{proof.widths[1]}" for proof in proofs
    )  # fmt: skip


def _outcome(content: dict[str, Any], check: str) -> str:
    return content["checks"].get(check, {}).get("outcome", "not run")


def proofs_of(content: dict[str, Any], results: str = "gpu-proof") -> list[Proof]:
    """What ``content`` of a results file proves: entries of `varcon_loss.proven.PROVEN`."""
    if any(_outcome(content, name) != "passed" for name in CHECKS):
        return []
    env, proofs = content["environment"], []
    triton = ".".join(env["versions"]["triton"].split(".")[:2])
    for dtype in dict.fromkeys(row["dtype"] for row in content["rows"]):
        own = [row for row in content["rows"] if row["dtype"] == dtype]
        ours, eager = (
            [row["seconds"] for row in own if row["contender"] == name] for name in (OURS, EAGER)
        )
        # Where eager could not run, or be captured, nothing is replaced.
        if all(a is not None and (b is None or a <= b) for a, b in zip(ours, eager, strict=True)):
            widths = [row["dim"] for row in own]
            capability = tuple(env["capability"])
            proofs.append(
                Proof(
                    capability, getattr(torch, dtype), (min(widths), max(widths)), triton, results
                )
            )
    return proofs


def supports(proof: Proof, folder: Path) -> bool:
    """Whether the results file that ``proof`` names shows as much, or more.

    Raises:
        FileNotFoundError: there is no such file.
    """
    content = json.loads((folder / f"{proof.results}.json").read_text())
    return any(
        shown._replace(widths=proof.widths) == proof
        and shown.widths[0] <= proof.widths[0] <= proof.widths[1] <= shown.widths[1]
        for shown in proofs_of(content, proof.results)
    )


if __name__ == "__main__":
    command()
