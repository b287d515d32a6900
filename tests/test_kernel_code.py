"""What the compiler makes of the kernels, for GPUs that need not be there.

Each compilation takes a second or more of a whole core, so a few stand for all; the whole table is
in `benchmarks/results/kernel-code.json`. In processes of their own: here Triton interprets.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common import results
from benchmarks.kernel_code import SHARED_KIB, _innermost_loops

pytest.importorskip("triton")

COMPILED = os.environ | {"TRITON_INTERPRET": "0"}


def compile_apart(code: str) -> None:
    program = f"import torch\nfrom benchmarks.kernel_code import *\n{code}"
    subprocess.run([sys.executable, "-c", program], check=True, env=COMPILED, timeout=600)


@pytest.mark.parametrize(
    ("target", "dtype", "dim", "instructions"),
    [
        # With twice these instructions a loop would take longer than its products.
        (90, "bfloat16", 128, 7.0),
        (89, "bfloat16", 128, 40.0),
        (90, "float32", 128, 340.0),
    ],
)
def test_shipped_choices_do_not_spill(
    target: int, dtype: str, dim: int, instructions: float
) -> None:
    compile_apart(
        f"made = compile_sweep(torch.{dtype}, {dim}, LARGE_BATCH, target={target})\n"
        "assert made.spills_in_loop == 0, made\n"
        "assert made.shared_bytes <= made.shared_limit, made\n"
        f"assert made.instructions_per_logit <= {instructions}, made\n"
        f"itemsize, capability = torch.{dtype}.itemsize, divmod({target}, 10)\n"
        "tiles = fused.choose_tiles(LARGE_BATCH, made.dim, itemsize, capability)\n"
        "most = tiles.shared_bytes(made.dim, itemsize, capability, 'ieee')\n"
        "assert made.shared_bytes <= most, (made, most)\n"
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_compiler_takes_what_the_interpreter_takes(dtype: str) -> None:
    """It has rules that the interpreter lacks. Small batch, every option; rows of one number."""
    compile_apart(
        f"compile_sweep(torch.{dtype}, 64, 512, everything=True)\n"
        f"{'compile_helpers(torch.bfloat16, 128)' if dtype == 'bfloat16' else ''}\n"
        f"compile_smallest(torch.{dtype})\n"
    )


def test_the_committed_table_holds_the_limits() -> None:
    rows = json.loads((results.RESULTS / "kernel-code.json").read_text())["rows"]
    assert {row["target"] for row in rows} == {f"sm_{target}" for target in SHARED_KIB}
    for row in rows:
        assert row["spills_in_loop"] == 0 or not row["default"], row
        assert row["shared_bytes"] <= row["shared_limit"], row
    half = [row for row in rows if row["dtype"] == "bf16" and row["dim"] <= 128]
    assert all(row["blocks_per_sm"] >= 2 for row in half)


def test_innermost_loops_are_found() -> None:
    """One loop within another, and a wait after the end that jumps back into the middle."""
    code = """
    .L_x_outer:
            /*0000*/ MOV R1, R2 ;
    .L_x_inner:
            /*0010*/ MUFU.EX2 R1, R2 ;
            /*0020*/ STL [R1], R2 ;
            /*0030*/ @P0 BRA `(.L_x_inner) ;
    .L_x_middle:
            /*0040*/ MUFU.EX2 R1, R2 ;
            /*0050*/ @P1 BRA `(.L_x_outer) ;
            /*0060*/ EXIT ;
            /*0070*/ BRA `(.L_x_middle) ;
    """
    (loop,) = _innermost_loops(code.splitlines())
    assert tuple(loop) == (3, 1)


@pytest.mark.skipif(importlib.util.find_spec("typer") is None, reason="needs typer")
def test_the_command_writes_the_table(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "kernel-code", "--out", str(tmp_path)]
    command += ["--targets", "90", "--modes", "bf16:none", "--widths", "64"]
    subprocess.run(command, check=True, env=COMPILED, timeout=600, capture_output=True)
    (row,) = json.loads((tmp_path / "kernel-code.json").read_text())["rows"]
    assert (row["target"], row["dtype"], row["dim"], row["default"]) == ("sm_90", "bf16", 64, True)
    assert {"registers", "spills_outside", "blocks_per_sm", "precision"} <= set(row)


def test_programs_launches_and_memory_of_a_step() -> None:
    """Over batches of 1 to 20,000 rows; 512 rows by 100 classes, warm; 65,536 by 10,000."""
    command = [sys.executable, "-m", "tests.host_work"]
    done = subprocess.run(command, check=True, env=COMPILED, timeout=600, capture_output=True)
    found = json.loads(done.stdout.splitlines()[-1])
    for programs in found["variants"].values():
        assert {"segments_kernel", "class_sums_kernel", "sweep_kernel"} <= set(programs)
        assert all(number <= 3 for number in programs.values()), programs
    assert found["step"]["kernels"] == 3, found
    assert found["step"]["operators"] <= 10, found
    assert found["step"]["allocations"] <= 19, found
    assert found["memory"]["known"] <= 2.2, found
