"""What the compiler makes of the kernels, for GPUs that need not be there.

Each compilation takes a second or more of a whole core, so a few stand for all; the whole table is
in `benchmarks/results/kernel-code.json`. In processes of their own: here Triton interprets.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton", minversion="3.8")  # that made the committed table
pytest.importorskip("typer")
from benchmarks.kernel_code import DTYPES, TABLE, TARGETS, most_shared

SAVED = json.loads(TABLE.read_text())


def run(program: str) -> Any:
    """What ``program`` prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, timeout=600,
        env=os.environ | {"TRITON_INTERPRET": "0"},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


COMPILED = """
import json, torch, triton
from benchmarks.kernel_code import compile_kernel, compile_sweep
from varcon_loss import kernels
rows = [
    compile_sweep(dtype, 128, target, precision)._asdict()
    for dtype, precision in ((torch.bfloat16, "none"), (torch.float32, "ieee"))
    for target in (89, 90)
]
# The compiler has rules that the interpreter lacks: every option, the sums.
compile_sweep(torch.float16, 64, HAS_OWN=True, PROJECT=False, NEED_GRAD=False)
for order in ({"HAS_ORDER": True}, {"HAS_ORDER": False, "order_ptr": None}):
    constants = {"BLOCK_N": 32, "BLOCK_D": 128, "dim": 1} | order  # a launch makes 1 a constant
    pointers = {"order_ptr": "i64", "borders_ptr": "i32"}
    compile_kernel(kernels.run_sums_kernel, constants, pointers, 90, {})
print(json.dumps([triton.__version__, rows]))
"""


def test_the_committed_table_is_what_the_compiler_makes() -> None:
    """Compiled by the same Triton; another one may choose otherwise, but must not spill."""
    version, made = run(COMPILED)
    for row in made:
        assert row["spills_in_loop"] == 0, row
        assert version != SAVED["environment"]["versions"]["triton"] or row in SAVED["rows"], row


def test_the_committed_table_holds_the_limits() -> None:
    rows = SAVED["rows"]
    assert {row["target"] for row in rows} == {f"sm_{target}" for target in TARGETS}
    for row in rows:
        assert row["spills_in_loop"] == 0 or not row["default"], row
        assert row["shared_bytes"] <= most_shared(row) <= row["shared_limit"], row
        if DTYPES[row["dtype"]].itemsize == 2 and row["dim"] <= 128:
            assert row["blocks_per_sm"] >= 2, row


LAUNCHED = """
import collections, json, torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from varcon_loss import fused

class Driver:
    get_current_device = get_current_stream = lambda *_: 0
    get_current_target = lambda _: GPUTarget("cuda", 90, 32)

class Kernel:
    function = packed_metadata = None
    launch_metadata = run = lambda *_: None

programs = collections.Counter()

def compile_nothing(kernel, key, *_):
    programs[kernel.fn.__name__] += 1
    kernel.device_caches[0][0][key] = Kernel()
    return Kernel()

driver.set_active(Driver())
JITFunction._do_compile = compile_nothing
for n in (1, 2, 15, 16, 17, 100, 512, 513, 1024, 1025, 5000, 8192, 20000):
    z, w, slots = torch.zeros(n, 128), torch.zeros(1 + n // 3, 128), torch.zeros(n, 1).long()
    fused.class_sums(z, slots[:, 0], len(w))
    fused.sweep(z, w, w[:, 0] > 0, slots, None, None, 0.1, 0.02, True, True, True, torch.bfloat16)
print(json.dumps(programs))
"""


def test_batches_of_all_sizes_share_programs() -> None:
    """A driver that runs nothing takes the launches, so Triton's real front end does its part."""
    assert run(LAUNCHED) == {"run_sums_kernel": 2, "sweep_kernel": 1}
