"""Measurements that each run in a process of their own, so that a failure is only a result."""

import ctypes
import gc
import multiprocessing
import random
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.contenders import CONTENDERS, INTEGERS, Loss

NO_DEVICE = "this needs a CUDA device, and torch finds none here"
LABELS = ("integer", "mixup", "smooth")
SMOOTHING = 0.1
GATE_ROWS = 256  # correctness is judged on the first rows: the oracle is quadratic
FEWEST_REPEATS = 3
DTYPES = ("float32", "bfloat16", "float16", "float64")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Limits:
    """How long and how large a measurement may be."""

    budget: float = 6.0  # seconds of timing at a size and mode, for all contenders together
    max_repeats: int = 200
    cell_timeout: float = 2.0  # seconds; a contender slower than this once is not timed
    memory: int | None = None  # bytes of address space that a measuring process may add (CPU)


@dataclass(frozen=True)
class Problem:
    """One size at which losses are compared."""

    num_rows: int
    num_classes: int
    dim: int
    dtype: str
    device: str
    labels: str = "integer"  # or class probabilities: "mixup", two a row; "smooth", all of a row

    def inputs(self, contender: str = "") -> tuple[Tensor, Tensor]:
        """Features and labels, for `INTEGERS` the classes that the others' labels come from."""
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, self.dtype)
        features = torch.randn(self.num_rows, self.dim, generator=generator).to(dtype)
        labels = torch.randint(self.num_classes, (self.num_rows,), generator=generator)
        if self.labels != "integer" and contender != INTEGERS:
            soft = F.one_hot(labels, self.num_classes).to(dtype)
            if self.labels == "mixup":
                share = torch.rand(self.num_rows, 1, generator=generator).to(dtype)
                soft = share * soft + (1 - share) * soft.roll(1, 0)
            else:
                soft = (1 - SMOOTHING) * soft + SMOOTHING / self.num_classes
            labels = soft
        return features.to(self.device).requires_grad_(), labels.to(self.device)


def in_child(
    function: Callable[..., Any], *arguments: Any, timeout: float, memory_limit: int | None
) -> dict[str, Any]:
    """Call ``function`` in a new process and return its dict, or one that says how it failed.

    ``memory_limit`` (bytes) caps the child's address space; exceeding it reads ``out of memory``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "benchmarks.common.contenders"])
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(
        target=_child_main, args=(sender, memory_limit, function, arguments), daemon=True
    )
    child.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            return {"status": f"over {timeout:.0f} s"}
        return receiver.recv()
    except EOFError:
        child.join()
        return {"status": "out of memory" if child.exitcode == -9 else f"died ({child.exitcode})"}
    finally:
        child.kill()
        child.join()


def _child_main(
    sender: Any, memory_limit: int | None, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    if memory_limit is not None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory_limit,) * 2)
    try:
        sender.send({"status": "ok", **function(*arguments)})
    except Exception as error:  # a contender's failure is a result like any other
        sender.send({"status": failure(error)})


def failure(error: Exception) -> str:
    """An error in one line; "out of memory" by whatever name it comes."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(sign in text for sign in ("out of memory", "can't allocate memory", "bad_alloc"))
    ):
        return "out of memory"
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def time_and_memory(row: dict[str, Any]) -> tuple[str, str]:
    """Milliseconds and MiB of a measured row for people, or how it failed."""
    if row["status"] != "ok":
        return row["status"], ""
    return f"{row['median'] * 1e3:.3g}", f"{row['peak_bytes'] / 2**20:.0f}"


def check_and_weigh(name: str, problem: Problem) -> dict[str, Any]:
    """Correctness gate, peak memory of one forward and backward, and a rough time."""
    torch.manual_seed(0)
    loss = CONTENDERS[name].make()
    features, labels = problem.inputs(name)
    error = gate(name, loss, features, labels)
    # The gate has also warmed up libraries, threads and autograd; compile for the real size.
    if "compiled" in name:
        step(loss, features, labels)
    features.grad = None
    gc.collect()
    before = reset_peak(problem.device)
    start = time.perf_counter()
    step(loss, features, labels)
    _synchronize(problem.device)
    seconds = time.perf_counter() - start
    extra = peak(problem.device) - before
    return {"error": error, "peak_bytes": max(0, extra), "seconds": seconds}


def time_together(
    names: list[str], problem: Problem, mode: str, budget: float, max_repeats: int
) -> dict[str, Any]:
    """Median, quartiles and least CPU time of several contenders, interleaved in one process.

    Args:
        names: contenders that passed `check_and_weigh` at this size.
        problem: the size.
        mode: ``"forward"`` (evaluation, no gradient) or ``"forward+backward"``.
        budget: seconds for all of them together. Each has an equal share, so the fast ones repeat
            more often, in rounds of their own once the slow ones have had theirs.
        max_repeats: rounds at most.
    """
    features, _ = problem.inputs()
    labels = {name: problem.inputs(name)[1] for name in names}
    losses = {name: CONTENDERS[name].make() for name in names}
    run = step if mode == "forward+backward" else _evaluate
    for name, loss in losses.items():
        for _ in range(2):
            run(loss, features, labels[name])
    times: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    shuffle = random.Random(0).shuffle
    for _ in range(max_repeats):
        order = [
            name
            for name, spent in times.items()
            if len(spent) < FEWEST_REPEATS or sum(spent) < budget / len(names)
        ]
        shuffle(order)  # nobody always follows the same neighbour, and finds the caches it left
        for name in order:
            features.grad = None
            _synchronize(problem.device)
            begin, cpu_begin = time.perf_counter(), time.process_time()
            run(losses[name], features, labels[name])
            _synchronize(problem.device)
            times[name].append(time.perf_counter() - begin)
            cpu[name].append(time.process_time() - cpu_begin)
    return {
        "timings": {
            name: dict(
                zip(("q1", "median", "q3"), statistics.quantiles(values, n=4), strict=True),
                repeats=len(values),
                least_cpu=min(cpu[name]),
            )
            for name, values in times.items()
        }
    }


def two_products(problem: Problem, budget: float, max_repeats: int) -> dict[str, Any]:
    """The floor: ``(z w^T) w`` and nothing else, beside `varcon-loss`, interleaved."""
    features, labels = problem.inputs()
    z = features.detach()
    w = torch.randn(problem.num_classes, problem.dim, dtype=z.dtype, device=z.device)
    loss = CONTENDERS["varcon-loss"].make()
    candidates: dict[str, Callable[[], object]] = {
        "two products": lambda: (z @ w.T) @ w,
        "varcon-loss": lambda: step(loss, features, labels),
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    start = time.perf_counter()
    for repeat in range(max_repeats):
        for name, candidate in candidates.items():
            features.grad = None
            _synchronize(problem.device)
            begin = time.perf_counter()
            candidate()
            _synchronize(problem.device)
            times[name].append(time.perf_counter() - begin)
        if repeat >= 5 and time.perf_counter() - start > budget:
            break
    medians = {name: statistics.median(values[2:]) for name, values in times.items()}
    return {"ratio": medians["varcon-loss"] / medians["two products"], **medians}


def step(loss: Loss, features: Tensor, labels: Tensor) -> None:
    loss(features, labels).backward()


@torch.no_grad()
def _evaluate(loss: Loss, features: Tensor, labels: Tensor) -> None:
    loss(features, labels)


def gate(name: str, loss: Loss, features: Tensor, labels: Tensor) -> float | None:
    """Relative error against float64 on the first rows; raises if it is too large."""
    from benchmarks.common.supcon import supcon_loss
    from benchmarks.common.transcriptions import nll_alone
    from varcon_loss import varcon_loss

    oracles = {
        "varcon": lambda x, y: varcon_loss(x, y, impl="reference"),
        "supcon": supcon_loss,
        "nll": nll_alone,
    }
    x, y = features.detach()[:GATE_ROWS].clone().requires_grad_(), labels[:GATE_ROWS]
    value = loss(x, y)
    value.backward()
    oracle = oracles.get(CONTENDERS[name].family)
    if oracle is None:
        return None
    exact_x = x.detach().double().requires_grad_()
    y = y.double() if y.is_floating_point() else y
    exact = oracle(exact_x, y)
    exact.backward()
    assert x.grad is not None
    assert exact_x.grad is not None
    errors = [
        # Where the exact value is 0 (no anchor has a positive), the error itself counts.
        float((got.detach().double() - want.detach()).norm() / (want.detach().norm() or 1.0))
        for got, want in ((value, exact), (x.grad, exact_x.grad))
    ]
    if not max(errors) <= TOLERANCE[features.dtype]:
        raise ValueError(f"wrong by {max(errors):.1e}: not timed")
    return max(errors)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: str) -> int:
    """Start a new peak; returns what is in use now (bytes)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # Hand freed memory back to the system, else the peak could hide in it.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")
