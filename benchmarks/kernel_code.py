"""What the compiler makes of the sweep, without a GPU: registers, spills, matrix instructions.

Triton compiles for a named target anywhere; ``ptxas -v`` then says what a thread needs.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from varcon_loss import fused

WIDTHS = (64, 128, 256, 512, 1024)
POINTERS = {
    **dict.fromkeys(
        ("sorted_ptr", "order_ptr", "values_ptr", "slots_ptr", "classes_ptr", "num_present_ptr",
         "num_classes_ptr"), "*i64"),
    **dict.fromkeys(("starts_ptr", "ends_ptr"), "*i32"),
    **dict.fromkeys(("valid_ptr", "broken_ptr", "present_ptr"), "*i1"),
    **dict.fromkeys(("x_ptr", "keys_ptr", "gradient_ptr"), None),  # the dtype of the features
}  # fmt: skip  # all others are float32
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class KernelCode(NamedTuple):
    """One compiled kernel."""

    dtype: str
    dim: int
    tiles: str
    registers: int  # a thread; 255 is the most there are
    spilled_bytes: int  # a thread, stores
    loop_spills: int | None  # stores and loads of spilled registers a step of the main loop
    shared_bytes: int  # a block; 232448 is the most on compute capability 9.0
    matrix_instructions: int  # wgmma or mma in the PTX


def compile_sweep(
    dtype: torch.dtype, dim: int, num_rows: int, *, capability: int = 90, everything: bool = False
) -> KernelCode:
    """Compile the sweep as `fused.sweep` would launch it, with unit rows and a gradient.

    ``everything``: with gaps between the classes and an own centroid for each row, too.
    """
    from varcon_loss import kernels

    tiles = fused.choose_tiles(num_rows, dim, dtype.itemsize)
    constants: dict[str, Any] = {
        "BLOCK_N": tiles.rows, "BLOCK_K": tiles.keys, "BLOCK_D": max(16, dim),
        "HAS_NORMS": True, "HAS_VALID": True, "HAS_PRESENT": everything, "HAS_OWN": everything,
        "HAS_BROKEN": True,
        "PACKED": not everything, "PLAIN_EXP": dtype != torch.float16, "NEED_GRAD": True,
        "PRECISION": "tf32", "UPCAST": False,
        "stride_dim": 1,
    }  # fmt: skip
    if not everything:
        constants |= {"present_ptr": None, "own_ptr": None}
    compiled = compile_kernel(
        kernels.sweep_kernel, dtype, constants, capability, tiles.warps, tiles.stages
    )
    ptx = compiled.asm["ptx"]
    ptx = ptx if isinstance(ptx, str) else ptx.decode()
    report = _assemble(ptx, capability)
    return KernelCode(
        NAMES[dtype],
        dim,
        f"{tiles.rows} x {tiles.keys}, {tiles.warps} warps, {tiles.stages} stages",
        _number(r"Used (\d+) registers", report),
        _number(r"(\d+) bytes spill stores", report),
        _spills_in_main_loop(compiled.asm["cubin"]),
        compiled.metadata.shared,
        len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)),
    )


def compile_helpers(dtype: torch.dtype, dim: int, *, capability: int = 90) -> int:
    """Compile every other kernel with every flag on and off; how many programs that were."""
    from varcon_loss import kernels

    blocks = {"BLOCK_N": 4096 // dim, "BLOCK_D": dim}
    yes_no = (True, False)
    variants: list[tuple[Any, dict[str, Any]]] = [
        *((kernels.row_norms_kernel, blocks | {"HAS_VALID": flag}) for flag in yes_no),
        *(
            (kernels.class_sums_kernel, blocks | {"PIECES": pieces, "NORMALIZE": flag})
            for pieces in (1, 8)
            for flag in yes_no
        ),
        (kernels.join_pieces_kernel, {"PIECES": 8, "BLOCK_D": dim}),
        *(
            (
                kernels.segments_kernel,
                {"HAS_IGNORE": ignore, "HAS_RANGE": known, "BLOCK": block},
            )
            for ignore in yes_no
            for known in yes_no
            for block in (16, 2048)
        ),
    ]
    for kernel, constants in variants:
        compile_kernel(kernel, dtype, constants, capability, 4, 3)
    return len(variants)


def compile_smallest(dtype: torch.dtype, *, capability: int = 90) -> int:
    """Compile what one row of one number launches: a launch makes each integer 1 a constant."""
    from varcon_loss import kernels

    blocks = {"BLOCK_N": 16, "BLOCK_D": 16}
    flags = {
        "HAS_NORMS": True, "HAS_VALID": True, "HAS_PRESENT": True, "HAS_OWN": True,
        "HAS_BROKEN": True, "PACKED": False, "PLAIN_EXP": False, "NEED_GRAD": True,
        "PRECISION": "ieee", "UPCAST": False,
    }  # fmt: skip
    variants: list[tuple[Any, dict[str, Any]]] = [
        (kernels.row_norms_kernel, blocks | {"HAS_VALID": True}),
        (kernels.class_sums_kernel, blocks | {"PIECES": 1, "NORMALIZE": True}),
        (kernels.segments_kernel, {"HAS_IGNORE": True, "HAS_RANGE": True, "BLOCK": 16}),
        (kernels.sweep_kernel, blocks | flags | {"BLOCK_K": 16}),
    ]
    for kernel, constants in variants:
        integers = set(kernel.arg_names) & {
            *("num_rows", "num_slots", "dim", "stride_row", "stride_dim"),
            *("ignore_index", "num_classes"),
        }
        compile_kernel(kernel, dtype, constants | dict.fromkeys(integers, 1), capability, 4, 2)
    return len(variants)


def compile_kernel(
    kernel: Any,
    dtype: torch.dtype,
    constants: dict[str, Any],
    capability: int,
    warps: int,
    stages: int,
) -> Any:
    """What Triton makes of ``kernel``, for features of ``dtype``; ``constants`` by name."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types: dict[str, str] = {}
    for argument in kernel.arg_names:
        if argument in constants:
            types[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            types[argument] = POINTERS.get(argument, "*fp32") or f"*{NAMES[dtype]}"
        else:
            types[argument] = "fp32" if argument in ("temperature", "epsilon") else "i32"
    # As a launch finds them: pointers and widths divisible by 16.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (argument, kind) in enumerate(types.items())
        if kind.startswith("*") or (kind == "i32" and argument in ("dim", "stride_row", "num_rows"))
    }
    source = ASTSource(kernel, types, constants, aligned)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _spills_in_main_loop(cubin: bytes) -> int | None:
    """Spill stores and loads in the loop with the most matrix instructions; None: no disassembler.

    Outside it a spill costs once a block of rows, inside it once a tile.
    """
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "nvdisasm"
    if not tool.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    labels = {
        found[1]: number
        for number, line in enumerate(lines)
        if (found := re.match(r"\s*(\.L_\w+):", line))
    }
    loops = [
        lines[labels[found[1]] : number]
        for number, line in enumerate(lines)
        if (found := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line))
        and labels.get(found[1], number) < number
    ]
    if not loops:
        return None
    main = max(loops, key=lambda loop: sum("MMA" in line for line in loop))
    return sum(bool(re.search(r"\b(STL|LDL)\b", line)) for line in main)


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
