"""What the compiler makes of the sweep, without a GPU: registers, spills, instructions.

Triton compiles for a named target anywhere; what is read here is the machine code.
"""

import itertools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

from varcon_loss import fused

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
WIDTHS = (64, 128, 256, 512, 1024)
# What users get by default, and float32 where torch is told to use tf32.
MODES = (("bf16", "none"), ("fp32", "ieee"), ("fp16", "none"), ("fp32", "tf32"))
TABLE = Path(__file__).parent / "results" / "kernel-code.json"
REGISTERS = 65_536  # of a multiprocessor
THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}  # of one
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # a block; one more in all
TARGETS = tuple(SHARED_KIB)


class KernelCode(NamedTuple):
    """One compiled sweep."""

    target: str
    dtype: str  # of the operands
    precision: str  # of float32 products
    dim: int
    default: bool  # do users get this precision without asking?
    registers: int  # a thread; 255 is the most there are
    spills_in_loop: int  # loads and stores of spilled registers, a step of the loop
    spills_outside: int  # once a block of rows
    shared_bytes: int
    shared_limit: int
    blocks_per_sm: int
    instructions_per_logit: float  # that a thread runs in the loop


def command(
    out: Annotated[Path, typer.Option(help="folder of the result files")] = TABLE.parent,
) -> None:
    """Compile the sweep for GPUs that need not be there: registers, spills, instructions.

    All that the kernels take, in three minutes.
    """
    # Imported only now: what compiles a kernel needs none of what these import.
    from benchmarks.common import results
    from benchmarks.common.terminal import console, written

    rows = []
    for mode, dim, target in itertools.product(MODES, WIDTHS, TARGETS):
        named = {"dtype": mode[0], "precision": mode[1], "dim": dim, "target": f"sm_{target}"}
        if most_shared(named) <= SHARED_KIB[target] * 1024:  # else `fused.why_not` refuses
            rows.append(compile_sweep(DTYPES[mode[0]], dim, target, mode[1])._asdict())
            console.print(rows[-1])
    path = results.save(TABLE.stem, rows, results.environment(), out)
    written(path, path.with_suffix(".csv"))


def most_shared(row: dict[str, Any]) -> int:
    """Bytes of shared memory that `fused.why_not` goes by; ``row`` as in the table."""
    itemsize, capability = DTYPES[row["dtype"]].itemsize, divmod(int(row["target"][3:]), 10)
    tiles = fused.choose_tiles(row["dim"], itemsize)
    return tiles.shared_bytes(row["dim"], itemsize, capability, row["precision"])


def compile_sweep(
    dtype: torch.dtype, dim: int, target: int = 90, precision: str = "none", **flags: bool
) -> KernelCode:
    """Compile the sweep as `fused.sweep` launches it, for unit rows and their gradient."""
    from varcon_loss import kernels

    tiles = fused.choose_tiles(dim, dtype.itemsize)
    constants = {
        "BLOCK_N": tiles.rows, "BLOCK_K": tiles.keys, "BLOCK_D": max(16, dim),
        "HAS_OWN": False, "PLAIN_EXP": dtype != torch.float16,
        "PROJECT": True, "NEED_GRAD": True, "UPCAST": False,
        "PRECISION": "ieee" if precision == "none" else precision,
    } | flags  # fmt: skip
    constants |= {} if constants["HAS_OWN"] else {"own_ptr": None}
    pointers = {"keys_ptr": NAMES[dtype]}
    pointers |= dict.fromkeys(("slots_ptr", "num_present_ptr"), "i64")
    options = {"num_warps": tiles.warps, "num_stages": fused.STAGES}
    compiled = compile_kernel(kernels.sweep_kernel, constants, pointers, target, options)
    registers, spills, instructions, spills_in_loop = _read_machine_code(compiled.asm["cubin"])
    threads, shared = 32 * tiles.warps, compiled.metadata.shared
    return KernelCode(
        target=f"sm_{target}",
        dtype=NAMES[dtype],
        precision=precision,
        dim=dim,
        default=precision != "tf32",
        registers=registers,
        spills_in_loop=spills_in_loop,
        spills_outside=spills - spills_in_loop,
        shared_bytes=shared,
        shared_limit=SHARED_KIB[target] * 1024,
        blocks_per_sm=min(
            REGISTERS // (-(-registers // 8) * 8 * threads),
            (SHARED_KIB[target] + 1) * 1024 // (shared + 1024),
            THREADS[target] // threads,
        ),
        instructions_per_logit=round(instructions * threads / (tiles.rows * tiles.keys), 1),
    )


def compile_kernel(
    kernel: Any,
    constants: dict[str, Any],
    pointers: dict[str, str],
    target: int,
    options: dict[str, int],
) -> Any:
    """What Triton makes of ``kernel``, ``constants`` by name; other ``pointers`` are float32."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {}
    for argument in kernel.arg_names:
        if argument in constants:
            types[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            types[argument] = "*" + pointers.get(argument, "fp32")
        else:
            types[argument] = "fp32" if argument in ("temperature", "epsilon") else "i32"
    # As a launch finds them: pointers and widths divisible by 16.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (argument, kind) in enumerate(types.items())
        if kind.startswith("*") or (kind == "i32" and argument == "dim")
    }
    source = ASTSource(kernel, types, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def _read_machine_code(cubin: bytes) -> tuple[int, int, int, int]:
    """Registers of a thread, spills in all, and instructions and spills of the sweep's loop."""
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
            for command in ([tools / "cuobjdump", "-res-usage"], [tools / "nvdisasm", "-c"])
        )
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump does not tell the registers: {usage}")
    lines = code.splitlines()
    return int(registers[1]), count_spills(lines), *read_loop(lines)


def read_loop(lines: list[str]) -> tuple[int, int]:
    """Instructions and spills of the shortest jump back over exponentials.

    (Waits for barriers, which come after the end of the program, jump back into its middle.)
    """
    labels = {
        found[1]: number
        for number, line in enumerate(lines)
        if (found := re.match(r"\s*(\.L_\w+):", line))
    }
    jumps = [
        lines[labels[found[1]] : number + 1]
        for number, line in enumerate(lines)
        if (found := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line))
        and labels.get(found[1], number) < number
    ]
    loops = [body for body in jumps if _count("MUFU.EX2", body) and not _count(r"\bEXIT\b", body)]
    if not loops:
        raise RuntimeError("no loop with exponentials in the machine code of the sweep")
    loop = min(loops, key=len)
    return _count(r"/\*[0-9a-f]{4,}\*/\s", loop), count_spills(loop)


def count_spills(lines: list[str]) -> int:
    return _count(r"\b(STL|LDL)\b", lines)


def _count(pattern: str, lines: list[str]) -> int:
    return sum(bool(re.search(pattern, line)) for line in lines)
