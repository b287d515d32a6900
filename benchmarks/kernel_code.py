"""What the compiler makes of the sweep, without a GPU: registers, spills, instructions.

Triton compiles for a named target anywhere; what is read here is the machine code.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

from varcon_loss.sweeps import fused

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
WIDTHS = (64, 128, 256, 512, 1024)
# What users get by default, and float32 where torch is told to use tf32.
MODES = (("bf16", "none"), ("fp32", "ieee"), ("fp16", "none"), ("fp32", "tf32"))
LARGE_BATCH = 65_536
TABLE = Path(__file__).parent / "results" / "kernel-code.json"
LARGEST_PROGRAM_THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
REGISTERS = 65_536  # of a multiprocessor
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # a block; one more in all
TARGETS = (90, 100, 89, 80, 120, 86)
POINTERS = {
    **dict.fromkeys(
        ("labels_ptr", "order_ptr", "counts_ptr", "values_ptr", "classes_ptr", "num_present_ptr",
         "sorted_ptr"), "*i64"),
    **dict.fromkeys(("starts_ptr", "ends_ptr", "runs_ptr"), "*i32"),
    **dict.fromkeys(("valid_ptr", "broken_ptr", "present_ptr"), "*i1"),
    **dict.fromkeys(("x_ptr", "keys_ptr", "gradient_ptr"), None),  # the dtype of the features
}  # fmt: skip  # all others are float32


def command(
    targets: Annotated[str, typer.Option(help="compute capabilities, as in sm_90")] = ",".join(
        map(str, TARGETS)
    ),
    modes: Annotated[str, typer.Option(help="dtype:precision")] = ",".join(
        f"{dtype}:{precision}" for dtype, precision in MODES
    ),
    widths: Annotated[str, typer.Option(help="embedding widths D")] = ",".join(map(str, WIDTHS)),
    out: Annotated[Path, typer.Option(help="folder of the result files")] = TABLE.parent,
    resume: Annotated[bool, typer.Option(help="keep what is there of these already")] = False,
) -> None:
    """Compile the sweep for GPUs that need not be there: registers, spills, instructions.

    Rows of other targets, modes and widths stay in the table.
    """
    # Imported only now: what compiles a kernel needs none of what these import.
    from benchmarks.common import options, results
    from benchmarks.common.terminal import console, written

    pairs = [(mode.partition(":")[0], mode.partition(":")[2]) for mode in options.names(modes)]
    unknown = [
        f"{dtype}:{precision}" for dtype, precision in pairs if (dtype, precision) not in MODES
    ]
    numbers = options.integers(targets)
    unknown += [str(number) for number in numbers if number not in TARGETS]
    if unknown:
        known = (*map(str, TARGETS), *(":".join(mode) for mode in MODES))
        raise typer.BadParameter(f"got {', '.join(unknown)}; there are {', '.join(known)}")
    path, env = out / TABLE.name, results.environment()
    saved = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = {(row["target"], row["dtype"], row["precision"], row["dim"]): row for row in saved}
    for target, dtype, precision, dim in wanted(numbers, pairs, options.integers(widths)):
        key = (f"sm_{target}", dtype, precision, dim)
        if resume and key in rows:
            continue
        torch_precision = "ieee" if precision == "none" else precision
        made = compile_sweep(
            DTYPES[dtype], dim, LARGE_BATCH, target=target, precision=torch_precision
        )
        rows[key] = made._asdict()
        console.print(rows[key])
        results.save(path.stem, [rows[key] for key in sorted(rows, key=_place)], env, out)
    written(path, path.with_suffix(".csv"))


def _place(key: tuple[str, str, str, int]) -> tuple[int, int, int]:
    """Of a row in the table: by dtype and precision, width, target."""
    target, dtype, precision, dim = key
    return MODES.index((dtype, precision)), dim, int(target.removeprefix("sm_"))


class KernelCode(NamedTuple):
    """One compiled sweep."""

    target: str
    dtype: str
    precision: str  # of float32 products
    dim: int
    default: bool  # do users get this precision without asking?
    registers: int  # a thread; 255 is the most there are
    spills_in_loop: int  # loads and stores of spilled registers, a step of the worst inner loop
    spills_outside: int  # once a block of rows
    shared_bytes: int
    shared_limit: int
    blocks_per_sm: int
    instructions_per_logit: float  # that a thread runs in the loop without masks


class Loop(NamedTuple):
    """An innermost loop of machine code, a step of it."""

    instructions: int
    spills: int


def compile_sweep(
    dtype: torch.dtype,
    dim: int,
    num_rows: int,
    *,
    target: int = 90,
    precision: str = "ieee",
    everything: bool = False,
) -> KernelCode:
    """Compile the sweep as `fused.sweep` would launch it, with unit rows and a gradient.

    ``everything``: with gaps between the classes and an own centroid for each row, too.
    """
    from varcon_loss.sweeps import kernels

    tiles = fused.choose_tiles(num_rows, dim, dtype.itemsize, divmod(target, 10))
    ordered = num_rows == LARGE_BATCH
    constants: dict[str, Any] = {
        "BLOCK_N": tiles.rows, "BLOCK_K": tiles.keys, "BLOCK_D": max(16, dim),
        "HAS_ORDER": ordered, "HAS_NORMS": True, "HAS_VALID": True, "HAS_PRESENT": everything,
        "HAS_OWN": everything, "HAS_BROKEN": True, "PACKED": not everything,
        "PLAIN_EXP": dtype != torch.float16, "NEED_GRAD": True, "PRECISION": precision,
        "UPCAST": False, "stride_dim": 1,
    }  # fmt: skip
    absent = [] if everything else ["present_ptr", "own_ptr"]
    absent += [] if ordered else ["order_ptr"]
    constants |= dict.fromkeys(absent)
    pointers = {"slots_ptr": "*i16" if ordered else "*i64"}
    compiled = compile_kernel(
        kernels.sweep_kernel, dtype, constants, target, tiles.warps, tiles.stages, pointers
    )
    registers, all_spills, loops = _read_machine_code(compiled.asm["cubin"])
    threads = 32 * tiles.warps
    shared = compiled.metadata.shared
    fewest = min(loop.instructions for loop in loops)
    in_loop = max(loop.spills for loop in loops)
    return KernelCode(
        target=f"sm_{target}",
        dtype=NAMES[dtype],
        precision=precision if dtype == torch.float32 else "none",
        dim=dim,
        default=precision == "ieee",
        registers=registers,
        spills_in_loop=in_loop,
        spills_outside=all_spills - sum(loop.spills for loop in loops),
        shared_bytes=shared,
        shared_limit=SHARED_KIB[target] * 1024,
        blocks_per_sm=min(
            REGISTERS // (-(-registers // 8) * 8 * threads),
            (SHARED_KIB[target] + 1) * 1024 // (shared + 1024),
            LARGEST_PROGRAM_THREADS[target] // threads,
        ),
        instructions_per_logit=round(fewest * threads / (tiles.rows * tiles.keys), 1),
    )


def compile_helpers(dtype: torch.dtype, dim: int, *, target: int = 90) -> int:
    """Compile every other kernel, its flags all on and all off; how many programs that were."""
    from varcon_loss.sweeps import kernels

    rows = {"BLOCK_N": 4096 // dim, "BLOCK_D": dim}
    sums = rows | {"LONG": fused.LONG_CLASS}
    labels = {"BLOCK": fused.LABELS_A_BLOCK}
    flags: list[tuple[Any, dict[str, Any], tuple[str, ...]]] = [
        (kernels.row_norms_kernel, rows, ("HAS_VALID",)),
        (kernels.class_pieces_kernel, sums, ("NORMALIZE",)),
        (kernels.class_sums_kernel, sums, ("NORMALIZE", "KEEP_SUMS")),
        (kernels.count_segments_kernel, labels, ("HAS_IGNORE", "HAS_RANGE")),
        (kernels.segments_kernel, labels, ("HAS_IGNORE", "HAS_RANGE", "HAS_COUNTS")),
    ]
    for kernel, constants, names in flags:
        for on in (True, False):
            keys = {"sorted_ptr": "*i16" if on else "*i64"}
            chosen = constants | dict.fromkeys(names, on)
            compile_kernel(kernel, dtype, chosen, target, 4, 3, keys)
    return 2 * len(flags)


def compile_smallest(dtype: torch.dtype, *, target: int = 90) -> int:
    """Compile what rows of one number launch: a launch makes a width or stride of 1 a constant."""
    from varcon_loss.sweeps import kernels

    blocks = {"BLOCK_N": 16, "BLOCK_D": 16}
    flags = {
        "HAS_ORDER": False, "HAS_NORMS": True, "HAS_VALID": True, "HAS_PRESENT": True,
        "HAS_OWN": True, "HAS_BROKEN": True, "PACKED": False, "PLAIN_EXP": False,
        "NEED_GRAD": True, "PRECISION": "ieee", "UPCAST": False, "order_ptr": None,
    }  # fmt: skip
    variants: list[tuple[Any, dict[str, Any]]] = [
        (kernels.row_norms_kernel, blocks | {"HAS_VALID": True}),
        (
            kernels.class_sums_kernel,
            blocks | {"LONG": fused.LONG_CLASS, "NORMALIZE": True, "KEEP_SUMS": True},
        ),
        (kernels.sweep_kernel, blocks | flags | {"BLOCK_K": 16}),
    ]
    for kernel, constants in variants:
        ones = set(kernel.arg_names) & {"dim", "stride_row", "stride_dim"}
        compile_kernel(kernel, dtype, constants | dict.fromkeys(ones, 1), target, 4, 2)
    return len(variants)


def compile_kernel(
    kernel: Any,
    dtype: torch.dtype,
    constants: dict[str, Any],
    target: int,
    warps: int,
    stages: int,
    pointers: dict[str, str] | None = None,
) -> Any:
    """What Triton makes of ``kernel``, for features of ``dtype``; ``constants`` by name."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    known = POINTERS | {"slots_ptr": "*i64"} | (pointers or {})
    types: dict[str, str] = {}
    for argument in kernel.arg_names:
        if argument in constants:
            types[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            types[argument] = known.get(argument, "*fp32") or f"*{NAMES[dtype]}"
        else:
            types[argument] = "fp32" if argument in ("temperature", "epsilon") else "i32"
    # As a launch finds them: pointers and widths divisible by 16.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (argument, kind) in enumerate(types.items())
        if kind.startswith("*") or (kind == "i32" and argument in ("dim", "stride_row"))
    }
    source = ASTSource(kernel, types, constants, aligned)
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def _read_machine_code(cubin: bytes) -> tuple[int, int, list[Loop]]:
    """Registers of a thread, spill instructions in all, and the innermost loops of the sweep."""
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
            for command in ([tools / "cuobjdump", "-res-usage"], [tools / "nvdisasm", "-c"])
        )
    found = re.search(r"REG:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump does not tell the registers: {usage}")
    lines = code.splitlines()
    loops = _innermost_loops(lines)
    if not loops:
        raise RuntimeError("no loop with exponentials in the machine code of the sweep")
    return int(found[1]), _count(r"\b(STL|LDL)\b", lines), loops


def _innermost_loops(lines: list[str]) -> list[Loop]:
    """Jumps back over exponentials, and over no other such jump, nor over the end of the program.

    (What comes after that are waits for barriers, which jump back into its middle.)
    """
    labels = {
        found[1]: number
        for number, line in enumerate(lines)
        if (found := re.match(r"\s*(\.L_\w+):", line))
    }
    spans = [
        (labels[found[1]], number)
        for number, line in enumerate(lines)
        if (found := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line))
        and labels.get(found[1], number) < number
        and _count("MUFU.EX2", lines[labels[found[1]] : number])
        and not _count(r"\bEXIT\b", lines[labels[found[1]] : number])
    ]
    inner = [
        (first, last)
        for first, last in spans
        if not any(
            first <= start and end <= last and (start, end) != (first, last) for start, end in spans
        )
    ]
    bodies = [lines[first : last + 1] for first, last in inner]
    return [
        Loop(
            _count(r"/\*[0-9a-f]{4,}\*/\s", body),
            _count(r"\b(STL|LDL)\b", body),
        )
        for body in bodies
    ]


def _count(pattern: str, lines: list[str]) -> int:
    return sum(bool(re.search(pattern, line)) for line in lines)


def wanted(
    targets: list[int], modes: list[tuple[str, str]], widths: list[int]
) -> Iterator[tuple[int, str, str, int]]:
    """Target, dtype, precision and width that the kernels take; what matters most comes first."""
    for dtype, precision in modes:
        for dim in widths:
            for target in targets:
                capability, itemsize = divmod(target, 10), DTYPES[dtype].itemsize
                tiles = fused.choose_tiles(LARGE_BATCH, dim, itemsize, capability)
                needed = tiles.shared_bytes(dim, itemsize, capability, precision)
                if needed <= SHARED_KIB[target] * 1024:  # else `fused.why_not` refuses
                    yield target, dtype, precision, dim
