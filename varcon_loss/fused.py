"""The sweep and the sums by class as Triton kernels: ``impl="triton"``.

The functions have the signatures of those in `sweep` and `centroids`, and neither autograd nor
torch.compile enters here. Importing this does not import Triton; the first launch does. Under
Triton's interpreter (``TRITON_INTERPRET=1``) the kernels run on CPU tensors.
"""

import importlib.util
import os
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varcon_loss.proven import is_proven

HAS_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# A block of rows and its gradient stay in registers and shared memory up to this width.
LARGEST_DIM = 1024
OLDEST_CAPABILITY = (8, 0)  # bfloat16 in the matrix units
SMALLEST_SHARED = 99 * 1024  # bytes of shared memory on every device from there on
LARGEST_PLAIN_LOGIT = 40.0  # its exponential, times any number of classes, fits float32
LONG_RUN = 512  # rows that one program adds


class Tiles(NamedTuple):
    """How the sweep is cut up."""

    rows: int
    keys: int
    warps: int

    def shared_bytes(
        self, dim: int, itemsize: int, capability: tuple[int, int], precision: str
    ) -> int:
        """What a block of threads needs at most: its rows, tiles of keys, and barriers."""
        width = max(16, _power_of_two(dim))
        if itemsize == 4 and precision == "ieee":
            numbers = (self.rows + self.keys) * width + self.rows * self.keys
        else:  # matrix units, which those of 10.x feed from there alone
            numbers = (self.rows + STAGES * self.keys) * width
            if capability[0] == 10 and self.rows >= 64:
                numbers += self.rows * width
        return numbers * itemsize + 1024


# By bytes of an operand, and width up to which. `benchmarks/kernel_code.py` shows what the compiler
# makes of them: no default spills registers in its loop, and half operands up to a width of 128 let
# two blocks share a multiprocessor: one computes exponentials while the other waits for products.
TILES = {
    2: {
        64: Tiles(rows=64, keys=64, warps=4),
        128: Tiles(rows=64, keys=64, warps=4),
        256: Tiles(rows=64, keys=64, warps=8),
        512: Tiles(rows=32, keys=32, warps=8),
        1024: Tiles(rows=16, keys=16, warps=8),
    },
    4: {
        64: Tiles(rows=64, keys=32, warps=8),
        128: Tiles(rows=32, keys=16, warps=8),
        256: Tiles(rows=32, keys=16, warps=8),
        512: Tiles(rows=16, keys=16, warps=8),
        1024: Tiles(rows=16, keys=16, warps=8),
    },
}
STAGES = 2  # tiles of keys in flight


def choose_tiles(dim: int, itemsize: int) -> Tiles:
    """For operands of ``itemsize`` bytes."""
    return TILES[itemsize][max(64, _power_of_two(dim))]


def runs_by_default(features: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``impl="auto"`` runs the kernels: only where `proven` has an entry."""
    if features.device.type != "cuda" or torch.version.hip is not None:
        return False
    if not is_proven(_capability(features.device), features.dtype, features.shape[1]):
        return False
    return why_not(features, dtype) is None


def why_not(features: Tensor, dtype: torch.dtype) -> str | None:
    """What keeps the kernels from ``features`` ``[N, D]``, computed in ``dtype``; None: nothing."""
    dim, device = features.shape[1], features.device
    if not HAS_TRITON:
        return "Triton is not installed"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "inside torch.func transforms tensors have no memory that a kernel could read"
    if features.dtype not in DTYPES or dtype == torch.float64:
        return "features are float64, and the kernels compute in float32"
    if dim > LARGEST_DIM:
        return f"features have width {dim}, and the kernels take up to {LARGEST_DIM}"
    if device.type == "cpu" and _interpreted():
        return None
    if device.type != "cuda":
        return f"features are on {device}, and the kernels run on CUDA devices"
    if torch.version.hip is not None:
        return f"{device} runs under ROCm {torch.version.hip}, and the kernels are for NVIDIA GPUs"
    capability, shared_bytes = _capability(device), _shared_bytes(device)
    if capability < OLDEST_CAPABILITY:
        return f"{device} has compute capability {capability[0]}.{capability[1]}, older than 8.0"
    needed = choose_tiles(dim, features.itemsize).shared_bytes(
        dim, features.itemsize, capability, float32_precision()
    )
    if needed > shared_bytes:
        dtype_name = str(features.dtype).removeprefix("torch.")
        return (
            f"{dtype_name} features of width {dim} need {needed // 1024} KiB of shared memory, and "
            f"{device} has {shared_bytes // 1024} KiB"
        )
    return None


def class_sums(z: Tensor, slots: Tensor, size: int) -> Tensor:
    """Sums ``[size, D]`` of the float32 rows ``z`` ``[N, D]`` by slot, without atomics.

    Rows are sorted by slot and cut where a slot starts and at every multiple of `LONG_RUN`. The
    pieces are summed side by side, and then the pieces of each slot, always in the same order.
    """
    from varcon_loss import kernels

    ordered, order = slots.to(torch.int32).sort(stable=True)
    bounds = torch.arange(size + 1, dtype=torch.int32, device=z.device)
    borders = torch.searchsorted(ordered, bounds, out_int32=True)
    if len(z) <= LONG_RUN:
        return _run_sums(kernels.run_sums_kernel, z.contiguous(), order, borders)
    multiples = torch.arange(0, len(z), LONG_RUN, dtype=torch.int32, device=z.device)
    cuts = torch.cat((borders, multiples)).sort().values
    pieces = _run_sums(kernels.run_sums_kernel, z.contiguous(), order, cuts)
    first_pieces = torch.searchsorted(cuts, borders, out_int32=True)
    return _run_sums(kernels.run_sums_kernel, pieces, None, first_pieces)


def _run_sums(kernel: Any, rows: Tensor, order: Tensor | None, borders: Tensor) -> Tensor:
    dim, block_d = rows.shape[1], _power_of_two(rows.shape[1])
    sums = rows.new_empty(len(borders) - 1, dim)
    _launch(
        kernel,
        len(sums),
        rows.device,
        x_ptr=rows,
        order_ptr=order,
        borders_ptr=borders,
        sums_ptr=sums,
        dim=dim,
        BLOCK_N=max(1, 4096 // block_d),
        BLOCK_D=block_d,
        HAS_ORDER=order is not None,
    )
    return sums


def sweep(
    z: Tensor,
    w: Tensor,
    present: Tensor | None,
    slots: Tensor,
    shares: Tensor | None,
    own: Tensor | None,
    temperature: float,
    epsilon: float,
    unit: bool,
    need_grad: bool,
    need_terms: bool,
    operands: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `sweep.sweep`, for integer labels.

    The products multiply ``z`` and ``w`` rounded to ``operands``. The logit of the own class and
    the sum of all logits are computed from float32.
    """
    from varcon_loss import kernels

    assert shares is None, "the kernels take integer labels"
    (num_rows, dim), num_slots = z.shape, len(w)
    loss, terms = z.new_empty(num_rows), z.new_empty(4, num_rows)
    gradient = z.new_empty((num_rows, dim) if need_grad else 0)
    w = w.contiguous()
    bias, num_present = w.new_zeros(num_slots), slots.new_full((), num_slots)
    if present is not None:
        bias, num_present = bias.masked_fill_(~present, -inf), present.sum()
    tiles = choose_tiles(dim, operands.itemsize)
    _launch(
        kernels.sweep_kernel,
        -(-num_rows // tiles.rows),
        z.device,
        z_ptr=z.contiguous(),
        w_ptr=w,
        keys_ptr=w.to(operands),
        key_sum_ptr=w.sum(0),
        bias_ptr=bias,
        num_present_ptr=num_present,
        slots_ptr=slots.contiguous(),
        own_ptr=None if own is None else own.contiguous(),
        loss_ptr=loss,
        terms_ptr=terms,
        gradient_ptr=gradient,
        num_rows=num_rows,
        num_slots=num_slots,
        dim=dim,
        temperature=temperature,
        epsilon=epsilon,
        BLOCK_N=tiles.rows,
        BLOCK_K=tiles.keys,
        BLOCK_D=max(16, _power_of_two(dim)),
        HAS_OWN=own is not None,
        # A small logit's exponential fits float32, but as an operand of a product not float16.
        PLAIN_EXP=unit and 1 / temperature <= LARGEST_PLAIN_LOGIT and operands != torch.float16,
        PROJECT=unit,
        NEED_GRAD=need_grad,
        PRECISION=float32_precision(),
        # Triton's interpreter multiplies bfloat16 as if its bits were integers.
        UPCAST=z.device.type == "cpu",
        num_warps=tiles.warps,
        num_stages=STAGES,
    )
    return loss, terms if need_terms else terms.new_empty(4, 0), gradient


def float32_precision() -> str:
    """What torch's own products of float32 matrices use on CUDA: ``"ieee"`` or ``"tf32"``."""
    # Asking for the older setting raises where somebody has used the newer one, of torch 2.9.
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if newer is None:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if newer == "tf32" else "ieee"


# What `torch.compiler.assume_constant_result` does, which first imports all of torch._dynamo:
# torch.compile takes the answer of its first call instead of looking inside.
float32_precision._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _launch(kernel: Any, programs: int, device: torch.device, **arguments: Any) -> None:
    if programs == 0:
        return
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[(programs,)](**arguments)
    else:
        with torch.cuda.device(device):
            kernel[(programs,)](**arguments)


def _capability(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


def _shared_bytes(device: torch.device) -> int:
    """Shared memory that a block of threads can have."""
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", SMALLEST_SHARED)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
