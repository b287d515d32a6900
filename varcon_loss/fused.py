"""Row lengths, class sums and the sweep as Triton kernels: ``impl="triton"``.

Importing this does not import Triton; the first launch does. Each step is a custom operator that
torch.compile does not look into, so one path serves eager mode, compiled graphs, and Triton's
interpreter, under which the kernels run on CPU tensors (``TRITON_INTERPRET=1``).
"""

import contextlib
import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varcon_loss.operators import SweepResult, make_operator
from varcon_loss.rows import Rows

HAS_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# A block of rows and its gradient stay in registers and shared memory up to this width.
LARGEST_DIM = 1024
OLDEST_CAPABILITY = (8, 0)  # bfloat16 in the matrix units


def why_not(features: Tensor, dtype: torch.dtype) -> str | None:
    """What keeps the kernels from ``features`` ``[N, D]``, computed in ``dtype``; None: nothing."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if features.dtype not in DTYPES or dtype == torch.float64:
        return "features are float64, and the kernels compute in float32"
    if features.shape[1] > LARGEST_DIM:
        return f"features have width {features.shape[1]}, and the kernels take up to {LARGEST_DIM}"
    if features.device.type == "cuda":
        if torch.cuda.get_device_capability(features.device) < OLDEST_CAPABILITY:
            return f"{features.device} is older than compute capability 8.0"
    elif not (features.device.type == "cpu" and _interpreted()):
        return f"features are on {features.device}, and the kernels run on CUDA devices"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any) -> None:
    """``arguments`` end in a dict of the kernel's constants."""
    *tensors, constants = arguments
    if 0 in grid:
        return
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        kernel[grid](*tensors, **constants)


@torch.library.custom_op("varcon_loss::row_norms", mutates_args=())
def row_norms(features: Tensor, valid: Tensor | None) -> Tensor:
    """As `varcon_loss.norms.row_norms`: ``[N, D]`` -> ``[N]`` float32; infinity if not valid."""
    from varcon_loss import kernels

    num_rows, dim = features.shape
    norms = features.new_empty(num_rows, dtype=torch.float32)
    block_d = min(_power_of_two(dim), 256)
    block_n = 4096 // block_d
    constants = {"BLOCK_N": block_n, "BLOCK_D": block_d, "HAS_VALID": valid is not None}
    _launch(
        kernels.row_norms_kernel,
        (-(-num_rows // block_n),),
        features.device,
        *(features, valid, norms, num_rows, dim, *features.stride()),
        constants,
    )
    return norms


@row_norms.register_fake
def _(features: Tensor, valid: Tensor | None) -> Tensor:
    return features.new_empty(len(features), dtype=torch.float32)


@torch.library.custom_op("varcon_loss::class_sums", mutates_args=())
def class_sums(
    features: Tensor, norms: Tensor | None, valid: Tensor | None, slots: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Sum the unit rows of each class and count them: -> ``[S, D]``, ``[S]``, float32.

    The members of a class are added in their order in the batch, so two runs give the same bits.
    """
    from varcon_loss import kernels

    num_rows, dim = features.shape
    keys = slots if valid is None else slots.masked_fill(~valid, size)
    ordered, order = keys.to(torch.int32).sort(stable=True)
    borders = torch.arange(size + 1, dtype=torch.int32, device=slots.device)
    starts = torch.searchsorted(ordered, borders)
    # Large classes are cut into pieces that run side by side.
    pieces = min(64, _power_of_two(num_rows // (32 * size)))
    partial = features.new_empty(size, pieces, dim, dtype=torch.float32)
    block_d = min(_power_of_two(dim), 128)
    constants = {
        "PIECES": pieces,
        "BLOCK_N": 4096 // block_d,
        "BLOCK_D": block_d,
        "HAS_NORMS": norms is not None,
    }
    _launch(
        kernels.class_sums_kernel,
        (size, pieces, -(-dim // block_d)),
        features.device,
        *(features, norms, order, starts, partial, dim, *features.stride()),
        constants,
    )
    sums = partial.squeeze(1) if pieces == 1 else partial.sum(1)
    return sums, starts.diff().to(torch.float32)


@class_sums.register_fake
def _(
    features: Tensor, norms: Tensor | None, valid: Tensor | None, slots: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    sums = features.new_empty(size, features.shape[1], dtype=torch.float32)
    return sums, features.new_empty(size, dtype=torch.float32)


class Tiles(NamedTuple):
    """How the sweep is cut up."""

    rows: int
    keys: int
    warps: int
    stages: int


def choose_tiles(num_rows: int, dim: int, itemsize: int) -> Tiles:
    """Rows as many as registers allow, fewer where a small batch would leave the GPU idle."""
    width = max(16, _power_of_two(dim))
    if itemsize == 2:
        rows, keys = {16: (128, 128), 32: (128, 128), 64: (128, 64), 128: (128, 64)}.get(
            width, (max(16, 16384 // width), max(16, 16384 // width))
        )
    else:
        rows, keys = max(16, min(64, 8192 // width)), max(16, min(32, 4096 // width))
    while rows > 16 and num_rows < 128 * rows:
        rows //= 2
    return Tiles(rows, keys, 8 if rows * width >= 16384 else 4, 2)


def sweep(rows: Rows, temperature: float, epsilon: float, need_grad: bool) -> SweepResult:
    """See `operators`. The gradient has the dtype of the features, its scale is float32."""
    from varcon_loss import kernels

    (features, _, norms, valid), slots, (w, present, num_classes, packed), own = rows
    num_rows, dim = features.shape
    loss = w.new_empty(num_rows)
    others = w.new_empty(4, num_rows)
    gradient = features.new_empty((num_rows, dim) if need_grad else 0)
    scale = w.new_empty(num_rows if need_grad else 0)
    w = w.contiguous()
    own = None if own is None else own.contiguous()
    tiles = choose_tiles(num_rows, dim, features.itemsize)
    constants = {
        "BLOCK_N": tiles.rows,
        "BLOCK_K": tiles.keys,
        "BLOCK_D": max(16, _power_of_two(dim)),
        "HAS_NORMS": norms is not None,
        "HAS_VALID": valid is not None,
        "HAS_PRESENT": present is not None and not packed,
        "HAS_OWN": own is not None,
        "PACKED": packed,
        # A small logit's exponential fits float32, but as an operand of a product not float16.
        "PLAIN_EXP": rows.have_small_logits(temperature) and features.dtype != torch.float16,
        "NEED_GRAD": need_grad,
        "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        # Triton's interpreter multiplies bfloat16 as if its bits were integers.
        "UPCAST": features.device.type == "cpu",
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    _launch(
        kernels.sweep_kernel,
        (-(-num_rows // tiles.rows),),
        features.device,
        *(features, norms, valid, slots, w, w.to(features.dtype), w.sum(0), present, num_classes),
        *(own, loss, others, gradient, scale, num_rows, len(w), dim, *features.stride()),
        *(temperature, epsilon),
        constants,
    )
    return loss, others, gradient, scale


fused_terms = make_operator("varcon_loss::fused_sweep", sweep, keeps_dtype=True)
