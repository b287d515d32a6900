"""What a step of the kernels costs the host, its memory, its programs: without a GPU.

A stand-in driver takes launches and runs nothing, so Triton's real front end does its part on CPU
tensors. ``python -m tests.host_work`` prints a line of JSON. A process of its own: the driver and
the environment are the whole process's.
"""

import collections
import dataclasses
import json
import os
import sys
from typing import Any

if __name__ == "__main__":  # not where doctests are collected
    os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tests import blind
from tests.counting import Operators
from varcon_loss import VarConLoss
from varcon_loss.implementations import IMPLEMENTATIONS
from varcon_loss.rows import nothing_prevents
from varcon_loss import fused, kernels

LAUNCHED: collections.Counter[str] = collections.Counter()
COMPILED: dict[str, set[str]] = collections.defaultdict(set)
# Operators that give a tensor without a launch.
VIEWS = ("view", "expand", "unsqueeze", "slice", "select", "detach", "alias", "t.", "reshape")


class Driver:
    """What Triton asks of a driver before a launch."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Kernel:
    """What a compiled kernel is to a launch."""

    function = packed_metadata = None

    def __init__(self, name: str) -> None:
        self.name = name

    def launch_metadata(self, *_: object) -> None:
        return None

    def run(self, *_: object) -> None:
        LAUNCHED[self.name] += 1


def compile_nothing(self: Any, key: str, *_: object) -> Kernel:
    name = self.fn.__name__
    COMPILED[name].add(str(key))
    kernel = Kernel(name)
    self.device_caches[0][0][key] = kernel
    return kernel


def stand_in() -> None:
    driver.set_active(Driver())
    JITFunction._do_compile = compile_nothing
    IMPLEMENTATIONS["triton"] = dataclasses.replace(fused.FUSED, why_not=nothing_prevents)
    blind.look_at_nothing()


def problem(num_rows: int, num_classes: int, known: bool) -> tuple[Tensor, Tensor, VarConLoss]:
    features = torch.randn(num_rows, 128, dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(num_classes, (num_rows,))
    return features, labels, VarConLoss(num_classes=num_classes if known else None, impl="triton")


def step(num_rows: int, num_classes: int, known: bool) -> Any:
    features, labels, criterion = problem(num_rows, num_classes, known)
    return lambda: torch.autograd.grad(criterion(features, labels), features)


def count(run: Any) -> dict[str, int]:
    """Launches, allocations and Python calls of one step that is warm."""
    for _ in range(3):
        run()
    LAUNCHED.clear()
    with Operators() as operators:
        run()
    launched = sum(LAUNCHED.values())
    allocations = [name for name in operators.names if "empty" in name]
    views = [name for name in operators.names if name.startswith(VIEWS)]
    calls = 0

    def on_event(_: object, event: str, __: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(on_event)
    run()
    sys.setprofile(None)
    return {
        "kernels": launched,
        "operators": len(operators.names) - len(allocations) - len(views),
        "allocations": len(allocations),
        "python_calls": calls,
    }


def variants(sizes: list[int], known: bool) -> dict[str, int]:
    """Programs a kernel is compiled to over batches of all these sizes."""
    COMPILED.clear()
    for kernel in vars(kernels).values():
        if isinstance(kernel, JITFunction):
            kernel.device_caches.clear()
    for size in sizes:
        step(size, 37, known)()
    return {name: len(keys) for name, keys in COMPILED.items()}


class Allocations(TorchDispatchMode):
    """The most bytes alive at a time that operators have made, those of backward too."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage()._cdata for tensor in given}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.given:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return made


def peak_over_features(num_rows: int, num_classes: int, known: bool) -> dict[str, float]:
    """The most memory that a step has at a time, in units of the features' bytes."""
    features, labels, criterion = problem(num_rows, num_classes, known)
    with Allocations(features, labels) as allocations:
        loss = criterion(features, labels)
        forward = allocations.most
        allocations.most = 0
        torch.autograd.grad(loss, features)
    unit = features.numel() * features.element_size()
    return {"forward": forward / unit, "backward": allocations.most / unit}


SIZES = [1, 2, 15, 16, 17, 100, 512, 513, 1024, 1025, 4095, 4096, 5000, 8191, 16384, 20000]

if __name__ == "__main__":
    stand_in()
    torch.set_num_threads(1)
    answer = {"triton": triton.__version__, "step": count(step(512, 100, True))}
    answer["variants"] = {known: variants(SIZES, known == "known") for known in ("known", "any")}
    answer["memory"] = {
        known: peak_over_features(65_536, 10_000, known == "known") for known in ("known", "any")
    }
    print(json.dumps(answer))
