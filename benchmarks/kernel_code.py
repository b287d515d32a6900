"""What the compiler makes of the sweep, without a GPU: registers, spills, matrix instructions.

Triton compiles for a named target anywhere; ``ptxas -v`` then says what a thread needs.
"""

import re
import subprocess
import tempfile
from typing import Any, NamedTuple

import torch

from varcon_loss import fused

WIDTHS = (64, 128, 256, 512, 1024)
POINTERS = {
    "norms_ptr": "*fp32", "valid_ptr": "*i1", "slots_ptr": "*i64", "w_ptr": "*fp32",
    "key_sum_ptr": "*fp32", "num_classes_ptr": "*i64", "loss_ptr": "*fp32",
    "others_ptr": "*fp32", "scale_ptr": "*fp32", "present_ptr": "*i1", "own_ptr": "*fp32",
}  # fmt: skip


class KernelCode(NamedTuple):
    """One compiled kernel."""

    dtype: str
    dim: int
    tiles: str
    registers: int  # a thread; 255 is the most there are
    spilled_bytes: int  # a thread, stores
    shared_bytes: int  # a block; 232448 is the most on compute capability 9.0
    matrix_instructions: int  # wgmma or mma in the PTX


def compile_sweep(
    dtype: torch.dtype, dim: int, num_rows: int, *, capability: int = 90, everything: bool = False
) -> KernelCode:
    """Compile the sweep as `fused.sweep` would launch it, with unit rows and a gradient.

    ``everything``: with gaps between the classes and an own centroid for each row, too.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from varcon_loss import kernels

    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    tiles = fused.choose_tiles(num_rows, dim, dtype.itemsize)
    constants: dict[str, Any] = {
        "BLOCK_N": tiles.rows, "BLOCK_K": tiles.keys, "BLOCK_D": max(16, dim),
        "HAS_NORMS": True, "HAS_VALID": True, "HAS_PRESENT": everything, "HAS_OWN": everything,
        "PACKED": not everything, "PLAIN_EXP": dtype != torch.float16, "NEED_GRAD": True,
        "PRECISION": "tf32", "UPCAST": False,
        "stride_dim": 1,
    }  # fmt: skip
    if not everything:
        constants |= {"present_ptr": None, "own_ptr": None}
    types: dict[str, str] = {}
    for argument in kernels.sweep_kernel.arg_names:
        if argument in constants:
            types[argument] = "constexpr"
        elif argument in POINTERS:
            types[argument] = POINTERS[argument]
        elif argument.endswith("_ptr"):
            types[argument] = f"*{name}"
        else:
            types[argument] = "fp32" if argument in ("temperature", "epsilon") else "i32"
    # As a launch finds them: pointers and widths divisible by 16.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (argument, kind) in enumerate(types.items())
        if kind.startswith("*") or argument in ("dim", "stride_row", "num_rows")
    }
    source = ASTSource(kernels.sweep_kernel, types, constants, aligned)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    ptx = ptx if isinstance(ptx, str) else ptx.decode()
    report = _assemble(ptx, capability)
    return KernelCode(
        name,
        dim,
        f"{tiles.rows} x {tiles.keys}, {tiles.warps} warps",
        _number(r"Used (\d+) registers", report),
        _number(r"(\d+) bytes spill stores", report),
        compiled.metadata.shared,
        len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)),
    )


def _number(pattern: str, report: str) -> int:
    found = re.search(pattern, report)
    if found is None:
        raise RuntimeError(f"no {pattern!r} in what ptxas reports: {report}")
    return int(found[1])


def _assemble(ptx: str, capability: int) -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    ptxas = get_ptxas(capability).path
    suffix = "a" if capability >= 90 else ""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", f"-arch=sm_{capability}{suffix}", file.name, "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"ptxas failed: {done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def inspect_sweep() -> list[KernelCode]:
    """Every width and dtype, for a large batch."""
    return [
        compile_sweep(dtype, dim, 65536)
        for dtype in (torch.bfloat16, torch.float32)
        for dim in WIDTHS
    ]


if __name__ == "__main__":
    import pandas as pd

    print(pd.DataFrame(inspect_sweep()).to_string(index=False))
