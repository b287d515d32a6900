"""What the compiler makes of the kernels, for GPUs that need not be there.

Each compilation takes a second or more of a whole core, so a few stand for all; the whole table is
in `benchmarks/results/kernel-code.json`. In processes of their own: here Triton interprets.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.8")  # that made the committed table
pytest.importorskip("typer")
from benchmarks.kernel_code import DTYPES, TABLE, TARGETS, KernelCode, _innermost_loops
from varcon_loss import fused

COMPILED = os.environ | {"TRITON_INTERPRET": "0"}


def table(path: Path) -> list[KernelCode]:
    return [KernelCode(**row) for row in json.loads(path.read_text())["rows"]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes for the targets and precisions that matter most."""
    out = tmp_path_factory.mktemp("kernel-code")
    old = {"target": "sm_80", "dtype": "bf16", "precision": "none", "dim": 64}
    path = out / TABLE.name
    path.write_text(json.dumps({"rows": [dict.fromkeys(KernelCode._fields, 0) | old]}))
    command = [sys.executable, "-m", "benchmarks", "kernel-code", "--out", str(out)]
    command += ["--targets", "90,89", "--modes", "bf16:none,fp32:ieee", "--widths", "128"]
    subprocess.run(command, check=True, env=COMPILED, timeout=600, capture_output=True)
    return path


# With twice these instructions a loop would take longer than its products.
INSTRUCTIONS = {("sm_90", "bf16"): 7.0, ("sm_89", "bf16"): 40.0, ("sm_90", "fp32"): 340.0}


def test_shipped_choices_do_not_spill(compiled: Path) -> None:
    kept, *made = table(compiled)
    assert (kept.target, kept.dim, kept.registers) == ("sm_80", 64, 0)
    assert [(row.target, row.dtype, row.precision, row.dim, row.default) for row in made] == [
        (target, dtype, precision, 128, True)
        for dtype, precision in (("bf16", "none"), ("fp32", "ieee"))
        for target in ("sm_89", "sm_90")
    ]
    for row in made:
        assert row.spills_in_loop == 0, row
        assert row.instructions_per_logit <= INSTRUCTIONS.get((row.target, row.dtype), 340.0), row


def test_the_committed_table_is_what_the_compiler_makes(compiled: Path) -> None:
    """Compiled by the same Triton; another one may choose otherwise."""
    versions = [
        json.loads(path.read_text())["environment"]["versions"] for path in (TABLE, compiled)
    ]
    if versions[0]["triton"] != versions[1]["triton"]:
        pytest.skip("the table is of another Triton")
    committed = table(TABLE)
    for row in table(compiled)[1:]:
        assert row in committed


def test_the_committed_table_holds_the_limits() -> None:
    rows = table(TABLE)
    assert {row.target for row in rows} == {f"sm_{target}" for target in TARGETS}
    for row in rows:
        assert row.spills_in_loop == 0 or not row.default, row
        assert row.shared_bytes <= row.shared_limit, row
        # What `fused.why_not` goes by.
        itemsize, capability = DTYPES[row.dtype].itemsize, divmod(int(row.target[3:]), 10)
        tiles = fused.choose_tiles(65_536, row.dim, itemsize, capability)
        most = tiles.shared_bytes(row.dim, itemsize, capability, row.precision)
        assert row.shared_bytes <= most <= row.shared_limit, (row, most)
        if itemsize == 2 and row.dim <= 128:
            assert row.blocks_per_sm >= 2, row


def test_the_compiler_takes_what_the_interpreter_takes() -> None:
    """It has rules that the interpreter lacks. Small batch, every option; rows of one number."""
    program = """
import torch
from benchmarks.kernel_code import compile_helpers, compile_smallest, compile_sweep
for dtype in (torch.bfloat16, torch.float32):
    compile_sweep(dtype, 64, 512, everything=True)
    compile_smallest(dtype)
compile_helpers(torch.bfloat16, 128)
"""
    subprocess.run([sys.executable, "-c", program], check=True, env=COMPILED, timeout=600)


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
    # Times the features' bytes. Kept for backward: the gradient, and centroids for a second one.
    most = {"known": (1.75, 2.45), "any": (4.35, 4.15)}
    for case, (forward, backward) in most.items():
        assert found["memory"][case]["forward"] <= forward, found
        assert found["memory"][case]["backward"] <= backward, found
