"""Correctness, memory and time of what is compared, in processes of their own."""

import ctypes
import functools
import gc
import multiprocessing
import random
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.contenders import CONTENDERS, OURS, Loss, Problem

NO_DEVICE = "this needs a CUDA device, and torch finds none here"
GATE_ROWS = 256  # correctness is judged on the first rows: the oracle is quadratic
FEWEST_REPEATS, MOST_REPEATS = 3, 200
TWO_PRODUCTS = "two bare matrix products"
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


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


def check_and_weigh(name: str, problem: Problem) -> dict[str, Any]:
    """Error, peak memory and a rough time of a step; raises where it is wrong."""
    torch.manual_seed(0)
    loss = CONTENDERS[name].make(problem)
    features, labels = problem.inputs(name)
    error = gate(name, loss, features, labels)
    # The gate has also warmed up libraries, threads and autograd; compile for the real size.
    if "compiled" in name:
        step(loss, features, labels)
    features.grad = None
    return {
        "error": error,
        **weigh(functools.partial(step, loss, features, labels), problem.device),
    }


def weigh(call: Callable[[], object], device: str) -> dict[str, Any]:
    """Bytes that a call adds at its peak to what is held before it, and its seconds."""
    gc.collect()
    before = _reset_peak(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")
    return {"peak_bytes": max(0, peak - before), "seconds": seconds}


def time_together(
    names: Sequence[str], problem: Problem, mode: str, budget: float
) -> dict[str, Any]:
    """Times of contenders that passed `check_and_weigh` at this size; beside ours, `TWO_PRODUCTS`.

    ``mode`` is "forward" (evaluation, no gradient) or "forward+backward".
    """
    features, _ = problem.inputs()
    run = step if mode == "forward+backward" else _evaluate
    calls: dict[str, Callable[[], object]] = {
        name: functools.partial(
            run, CONTENDERS[name].make(problem), features, problem.inputs(name)[1]
        )
        for name in names
    }
    if OURS in names:
        z = features.detach()
        w = torch.randn(problem.num_classes, problem.dim, dtype=z.dtype, device=z.device)
        calls[TWO_PRODUCTS] = lambda: (z @ w.T) @ w
    for call in (*calls.values(), *calls.values()):
        call()
    clear = functools.partial(setattr, features, "grad", None)
    return {"timings": interleaved(calls, problem.device, budget, clear)}


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    device: str,
    budget: float,
    clear: Callable[[], object],
) -> dict[str, dict[str, float]]:
    """Median, quartiles, repeats and least CPU time of each call, in rounds of changing order.

    Each has an equal share of ``budget`` seconds, so the fast ones repeat more often, in rounds of
    their own once the slow ones have had theirs. ``clear`` is called before each, untimed.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    shuffle = random.Random(0).shuffle
    for _ in range(MOST_REPEATS):
        order = [
            name
            for name, spent in times.items()
            if len(spent) < FEWEST_REPEATS or sum(wall for wall, _ in spent) < budget / len(calls)
        ]
        shuffle(order)  # nobody always follows the same neighbour, and finds the caches it left
        for name in order:
            clear()
            synchronize(device)
            start, cpu_start = time.perf_counter(), time.process_time()
            calls[name]()
            synchronize(device)
            took = (time.perf_counter() - start, time.process_time() - cpu_start)
            times[name].append(took)
    return {name: _summary(*zip(*spent, strict=True)) for name, spent in times.items()}


def _summary(wall: Sequence[float], cpu: Sequence[float]) -> dict[str, float]:
    quartiles = zip(("q1", "median", "q3"), statistics.quantiles(wall, n=4), strict=True)
    return dict(quartiles, repeats=len(wall), least_cpu=min(cpu))


def step(loss: Loss, features: Tensor, labels: Tensor) -> None:
    loss(features, labels).backward()


@torch.no_grad()
def _evaluate(loss: Loss, features: Tensor, labels: Tensor) -> None:
    loss(features, labels)


def gate(name: str, loss: Loss, features: Tensor, labels: Tensor) -> float | None:
    """Relative error against float64 on the first rows; raises if it is too large."""
    oracle = CONTENDERS[name].oracle
    x, y = features.detach()[:GATE_ROWS].clone().requires_grad_(), labels[:GATE_ROWS]
    value = loss(x, y)
    (gradient,) = torch.autograd.grad(value, x)
    if oracle is None:
        return None
    exact_x = x.detach().double().requires_grad_()
    exact = oracle(exact_x, y.double() if y.is_floating_point() else y)
    (exact_gradient,) = torch.autograd.grad(exact, exact_x)
    errors = [
        # Where the exact value is 0 (no anchor has a positive), the error itself counts.
        float((got.detach().double() - want.detach()).norm() / (want.detach().norm() or 1.0))
        for got, want in ((value, exact), (gradient, exact_gradient))
    ]
    if not max(errors) <= TOLERANCE[features.dtype]:
        raise ValueError(f"wrong by {max(errors):.1e}: not timed")
    return max(errors)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _reset_peak(device: str) -> int:
    """Start a new peak; returns what is in use now (bytes)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # Hand freed memory back to the system, else the peak could hide in it.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")
