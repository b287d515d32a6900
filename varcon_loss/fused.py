"""Labels, row lengths, class sums and the sweep as Triton kernels: ``impl="triton"``.

Importing this does not import Triton; the first launch does. Each step is a custom operator that
torch.compile does not look into, so one path serves eager mode, compiled graphs, and Triton's
interpreter, under which the kernels run on CPU tensors (``TRITON_INTERPRET=1``).
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varcon_loss.classes import Centroids, Classes, ClassIndex
from varcon_loss.operators import SweepResult, make_operator
from varcon_loss.options import Options
from varcon_loss.proven import is_proven
from varcon_loss.readable import values_may_be_read
from varcon_loss.rows import Implementation, Rows
from varcon_loss.samples import Batch, Samples, read_labels

HAS_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# A block of rows and its gradient stay in registers and shared memory up to this width.
LARGEST_DIM = 1024
OLDEST_CAPABILITY = (8, 0)  # bfloat16 in the matrix units
SMALLEST_SHARED = 99 * 1024  # bytes of shared memory on every device from there on
# All else fits that; float32 rows wider than this take so much, by precision, as compiled.
NARROW_FLOAT32 = 512
WIDE_FLOAT32_BYTES = {"ieee": 129 * 1024, "tf32": 257 * 1024}


def runs_by_default(features: Tensor, dtype: torch.dtype) -> bool:
    """Does ``impl="auto"`` run the kernels? Only where `varcon_loss.proven` has an entry."""
    if features.device.type != "cuda" or torch.version.hip is not None:
        return False
    capability = _device_limits(features.device).capability
    if not is_proven(capability, features.dtype, features.shape[1]):
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
    capability, shared_bytes = _device_limits(device)
    if capability < OLDEST_CAPABILITY:
        return f"{device} has compute capability {capability[0]}.{capability[1]}, older than 8.0"
    if features.itemsize == 4 and dim > NARROW_FLOAT32:
        needed = WIDE_FLOAT32_BYTES[float32_precision()]
        if needed > shared_bytes:
            return (
                f"float32 features of width {dim} need {needed // 1024} KiB of shared memory, and "
                f"{device} has {shared_bytes // 1024} KiB"
            )
    return None


class DeviceLimits(NamedTuple):
    """What kernels must fit into."""

    capability: tuple[int, int]
    shared_bytes: int  # of a block of threads


def _device_limits(device: torch.device) -> DeviceLimits:
    properties = torch.cuda.get_device_properties(device)
    shared_bytes = getattr(properties, "shared_memory_per_block_optin", SMALLEST_SHARED)
    return DeviceLimits((properties.major, properties.minor), shared_bytes)


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


def _operator(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """torch.compile sees one operator; elsewhere a plain call, which costs a third of one."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        operator = torch.library.custom_op(f"varcon_loss::{name}", function, mutates_args=())
        operator.register_fake(fake)

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            return (operator if torch.compiler.is_compiling() else function)(*arguments)

        return call

    return wrap


def _fake_norms(features: Tensor, valid: Tensor | None) -> Tensor:
    return features.new_empty(features.shape[0], dtype=torch.float32)


@_operator("row_norms", _fake_norms)
def row_norms(features: Tensor, valid: Tensor | None) -> Tensor:
    """As `varcon_loss.norms.row_norms`: ``[N, D]`` -> ``[N]`` float32; infinity if not valid."""
    from varcon_loss import kernels

    num_rows, dim = features.shape
    norms = features.new_empty(num_rows, dtype=torch.float32)
    block_d = _power_of_two(dim)
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


class Groups(NamedTuple):
    """Samples sorted by class, and in each class by their place in the batch."""

    order: Tensor  # [N] int64 sample numbers
    starts: Tensor  # [S] int32, where the samples of a slot start in `order`
    ends: Tensor  # [S] int32, and where they end


def _new_labels(labels: Tensor, ignored: int | None, num_classes: int | None) -> tuple[Tensor, ...]:
    num_rows = labels.shape[0]
    size = max(1, num_rows if num_classes is None else min(num_rows, num_classes))
    return (
        torch.empty_like(labels),
        torch.empty_like(labels, dtype=torch.bool),
        labels.new_empty(0 if num_classes is None else num_rows, dtype=torch.bool),
        torch.empty_like(labels),
        torch.empty_like(labels),
        labels.new_empty(size, dtype=torch.int32),
        labels.new_empty(size, dtype=torch.int32),
        labels.new_empty(size),
        labels.new_empty(()),
        labels.new_empty((), dtype=torch.float32),
    )


@_operator("sort_labels", _new_labels)
def _sort_labels(
    labels: Tensor, ignore_index: int | None, num_classes: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from varcon_loss import kernels

    ordered, order = labels.sort(stable=True)
    values, valid, broken, slots, _, *per_slot, num_present, divisor = _new_labels(
        labels, ignore_index, num_classes
    )
    constants = {
        "HAS_IGNORE": ignore_index is not None,
        "HAS_RANGE": num_classes is not None,
        "BLOCK": min(2048, max(16, _power_of_two(len(labels)))),
    }
    _launch(
        kernels.segments_kernel,
        (1,),
        labels.device,
        *(ordered, order, values, valid, broken, slots, *per_slot, num_present, divisor),
        *(len(labels), len(per_slot[0]), ignore_index or 0, num_classes or 0),
        constants,
    )
    starts, ends, classes = per_slot
    return values, valid, broken, slots, order, starts, ends, classes, num_present, divisor


def read(batch: Batch, options: Options, dtype: torch.dtype) -> Samples:
    """As `varcon_loss.samples.read`; the kernels divide by the lengths themselves."""
    labels, valid, broken = read_labels(batch, options)
    norms = row_norms(batch.features, valid) if options.normalize else None
    return Samples(features=batch.features, labels=labels, valid=valid, broken=broken, norms=norms)


def summarise(batch: Batch, options: Options, dtype: torch.dtype, *, count: bool) -> Classes:
    """As `varcon_loss.classes.summarise`, in one sort, and nothing waits for ``K``.

    Lengths, counts and centroids fall out of the sums.
    """
    num_classes, ignore_index = options.num_classes, options.ignore_index
    if values_may_be_read(batch.labels):
        read_labels(batch, options)  # raises
    labels, valid, broken, slots, order, starts, ends, ascending, num_present, num_valid = (
        _sort_labels(batch.labels.to(torch.int64), ignore_index, num_classes)
    )
    sums, counts, unit, norms = class_sums(batch.features, order, starts, ends, options.normalize)
    members = Samples(
        features=batch.features,
        labels=labels,
        valid=valid,
        broken=None if num_classes is None else broken,
        num_valid=num_valid,
        slots=slots,
        norms=norms if options.normalize else None,
    )
    return Classes(
        lookup=ClassIndex(
            size=len(ascending), gaps="last", ascending=ascending, num_present=num_present
        ),
        sums=sums,
        counts=counts,
        members=members,
        centroids=Centroids(unit=unit, present=None, num_present=num_present, packed=True),
    )


def group_slots(slots: Tensor, valid: Tensor | None, size: int) -> Groups:
    """Sort samples whose slots ``[N]`` are known already."""
    keys = slots if valid is None else slots.masked_fill(~valid, size)
    ordered, order = keys.to(torch.int32).sort(stable=True)
    borders = torch.arange(size + 1, dtype=torch.int32, device=slots.device)
    borders = torch.searchsorted(ordered, borders, out_int32=True)
    return Groups(order, borders[:-1].contiguous(), borders[1:].contiguous())


def sum_slots(rows: Tensor, slots: Tensor, valid: Tensor | None, size: int) -> Tensor:
    """As `varcon_loss.classes.sum_slots`, with no float atomics: the same bits every time."""
    return class_sums(rows, *group_slots(slots, valid, size), False)[0]


def _new_sums(
    features: Tensor, order: Tensor, starts: Tensor, ends: Tensor, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (num_rows, dim), size = features.shape, starts.shape[0]
    return (
        features.new_empty(size, dim, dtype=torch.float32),
        features.new_empty(size, dtype=torch.float32),
        features.new_empty(size, dim, dtype=torch.float32),
        features.new_empty(num_rows if normalize else 0, dtype=torch.float32),
    )


@_operator("class_sums", _new_sums)
def class_sums(
    features: Tensor, order: Tensor, starts: Tensor, ends: Tensor, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum the rows ``[N, D]`` of each class, divided by their lengths if ``normalize``.

    The members of a class are added in their order in the batch, so two runs give the same bits.

    Returns:
        sums ``[S, D]``, counts ``[S]``, centroids ``[S, D]``, and the lengths ``[N]`` of the rows
        that are in a class (others are not set), or ``[0]`` without ``normalize``; all float32.
    """
    from varcon_loss import kernels

    (num_rows, dim), size = features.shape, starts.shape[0]
    sums, counts, unit, norms = _new_sums(features, order, starts, ends, normalize)
    # Large classes are cut into pieces that run side by side.
    pieces = min(64, _power_of_two(num_rows // (32 * size)))
    partial = sums if pieces == 1 else sums.new_empty(size, pieces, dim)
    block_d = _power_of_two(dim)
    constants = {
        "PIECES": pieces,
        "BLOCK_N": max(1, 4096 // block_d),
        "BLOCK_D": block_d,
        "NORMALIZE": normalize,
    }
    _launch(
        kernels.class_sums_kernel,
        (size, pieces),
        features.device,
        *(features, order, starts, ends, partial, unit, counts, norms, dim, *features.stride()),
        constants,
    )
    if pieces > 1:
        _launch(
            kernels.join_pieces_kernel,
            (size,),
            features.device,
            *(partial, sums, unit, dim),
            {"PIECES": pieces, "BLOCK_D": block_d},
        )
    return sums, counts, unit, norms


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
    # One block fills a multiprocessor's registers, so its shared memory is free for prefetching.
    stages = 3 if itemsize == 2 and width <= 128 else 2
    return Tiles(rows, keys, 8 if rows >= 128 or rows * width >= 16384 else 4, stages)


def float32_precision() -> str:
    """What torch's own products of float32 matrices use on CUDA: ``"ieee"`` or ``"tf32"``."""
    # Asking for the older setting raises where somebody has used the newer one, of torch 2.9.
    newer = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if newer is None:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if newer == "tf32" else "ieee"


def sweep(
    rows: Rows, temperature: float, epsilon: float, need_grad: bool, need_terms: bool
) -> SweepResult:
    """See `operators`. The gradient has the dtype of the features, its scale is float32.

    A kernel that has the loss has the other terms: ``need_terms`` changes nothing.
    """
    from varcon_loss import kernels

    anchors, centroids = rows.anchors, rows.centroids
    features, norms, valid, broken = anchors.features, anchors.norms, anchors.valid, anchors.broken
    w, present, num_present = centroids.unit, centroids.present, centroids.num_present
    packed, slots, own = centroids.packed, rows.slots, rows.own
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
        "HAS_BROKEN": broken is not None,
        "PACKED": packed,
        # A small logit's exponential fits float32, but as an operand of a product not float16.
        "PLAIN_EXP": rows.have_small_logits(temperature) and features.dtype != torch.float16,
        "NEED_GRAD": need_grad,
        "PRECISION": float32_precision(),
        # Triton's interpreter multiplies bfloat16 as if its bits were integers.
        "UPCAST": features.device.type == "cpu",
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    _launch(
        kernels.sweep_kernel,
        (-(-num_rows // tiles.rows),),
        features.device,
        *(features, norms, valid, slots, w, w.to(features.dtype), w.sum(0), present, num_present),
        *(own, broken, loss, others, gradient, scale, num_rows, len(w), dim, *features.stride()),
        *(temperature, epsilon),
        constants,
    )
    return loss, others, gradient, scale


FUSED = Implementation(
    name="triton",
    read=read,
    summarise=summarise,
    sum_slots=sum_slots,
    sweep=make_operator("varcon_loss::fused_sweep", sweep, fused=True),
    why_not=why_not,
    by_default=runs_by_default,
)
