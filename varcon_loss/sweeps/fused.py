"""Labels, row lengths, class sums and the sweep as Triton kernels: ``impl="triton"``.

Importing this does not import Triton; the first launch does. Each step is a custom operator that
torch.compile does not look into, so one path serves eager mode, compiled graphs, and Triton's
interpreter, under which the kernels run on CPU tensors (``TRITON_INTERPRET=1``).
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varcon_loss.classes import Centroids, Classes, ClassIndex
from varcon_loss.options import Options
from varcon_loss.readable import values_may_be_read
from varcon_loss.records import changed
from varcon_loss.rows import Implementation, Rows, Swept
from varcon_loss.samples import Batch, Samples, read_labels
from varcon_loss.sweeps.operators import make_operator
from varcon_loss.sweeps.proven import is_proven

HAS_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# A block of rows and its gradient stay in registers and shared memory up to this width.
LARGEST_DIM = 1024
OLDEST_CAPABILITY = (8, 0)  # bfloat16 in the matrix units
SMALLEST_SHARED = 99 * 1024  # bytes of shared memory on every device from there on
SORTED_AT_ONCE = 4096  # up to here torch sorts in one launch, whatever the width of the keys
LABELS_A_BLOCK = 1024
LONG_CLASS = 512  # members; the sum of a larger class is shared between programs
# From this many multiplications of one product on, sorting the rows by class pays: see `sweep`.
SORTED_FROM = 2**34


def runs_by_default(features: Tensor, dtype: torch.dtype) -> bool:
    """Does ``impl="auto"`` run the kernels? Only where `varcon_loss.sweeps.proven` has an entry."""
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
    needed = _largest_tiles(dim, features.itemsize, capability).shared_bytes(
        dim, features.itemsize, capability, float32_precision()
    )
    if needed > shared_bytes:
        dtype_name = str(features.dtype).removeprefix("torch.")
        return (
            f"{dtype_name} features of width {dim} need {needed // 1024} KiB of shared memory, and "
            f"{device} has {shared_bytes // 1024} KiB"
        )
    return None


def _capability(device: torch.device) -> tuple[int, int]:
    if device.type == "cpu":  # Triton's interpreter
        return 9, 0
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


def _launch(kernel: Any, programs: int, device: torch.device, **arguments: Any) -> None:
    if programs == 0:
        return
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[(programs,)](**arguments)
    else:
        with torch.cuda.device(device):
            kernel[(programs,)](**arguments)


def _strides(features: Tensor) -> dict[str, int]:
    return {"stride_row": features.stride(0), "stride_dim": features.stride(1)}


def _operator(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """torch.compile sees one operator; elsewhere a plain call, which costs a third of one."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        operator = torch.library.custom_op(f"varcon_loss::{name}", function, mutates_args=())
        operator.register_fake(fake)

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            return (operator if torch.compiler.is_compiling() else function)(*arguments, **named)

        return call

    return wrap


def _fake_norms(features: Tensor, valid: Tensor | None) -> Tensor:
    return features.new_empty(features.shape[0], dtype=torch.float32)


@_operator("row_norms", _fake_norms)
def row_norms(features: Tensor, valid: Tensor | None) -> Tensor:
    """The lengths of `varcon_loss.norms.normalized`, float32 ``[N]``; infinity if not valid."""
    from varcon_loss.sweeps import kernels

    num_rows, dim = features.shape
    norms = features.new_empty(num_rows, dtype=torch.float32)
    block_d = _power_of_two(dim)
    block_n = 4096 // block_d
    _launch(
        kernels.row_norms_kernel,
        -(-num_rows // block_n),
        features.device,
        x_ptr=features,
        valid_ptr=valid,
        norms_ptr=norms,
        num_rows=num_rows,
        dim=dim,
        **_strides(features),
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        HAS_VALID=valid is not None,
    )
    return norms


class Groups(NamedTuple):
    """Samples sorted by class, and in each class by their place in the batch."""

    order: Tensor  # [N] int64 sample numbers
    runs: Tensor  # [N] int32 slots in that order, -1 where a sample is in no class
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
        torch.empty_like(labels, dtype=torch.int32),
        labels.new_empty(size, dtype=torch.int32),
        labels.new_empty(size, dtype=torch.int32),
        labels.new_empty(size),
        labels.new_empty(()),
        labels.new_empty((), dtype=torch.float32),
    )


def _fake_labels(
    labels: Tensor, ignored: int | None, num_classes: int | None
) -> tuple[Tensor, ...]:
    values, valid, broken, slots, *others = _new_labels(labels, ignored, num_classes)
    return values, valid, broken, slots, torch.empty_like(labels), *others


def _sort(labels: Tensor, num_classes: int | None) -> tuple[Tensor, Tensor]:
    """Stable sort. Known classes by narrow keys, if there are many: a radix sort reads each byte.

    Keys of labels out of range are out of range.
    """
    if num_classes is not None and len(labels) > SORTED_AT_ONCE and num_classes < 2**31:
        labels = labels.clamp(-1, num_classes).to(_smallest_integer(num_classes))
    return labels.sort(stable=True)


def _smallest_integer(largest: int) -> torch.dtype:
    return torch.int16 if largest < 2**15 else torch.int32


@_operator("sort_labels", _fake_labels)
def _sort_labels(
    labels: Tensor, ignore_index: int | None, num_classes: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from varcon_loss.sweeps import kernels

    ordered, order = _sort(labels, num_classes)
    values, valid, broken, slots, runs, starts, ends, classes, num_present, divisor = _new_labels(
        labels, ignore_index, num_classes
    )
    num_rows, num_blocks = len(labels), max(1, -(-len(labels) // LABELS_A_BLOCK))
    shared = {
        "labels_ptr": labels,
        "sorted_ptr": ordered,
        "order_ptr": order,
        "num_rows": num_rows,
        "ignore_index": ignore_index or 0,
        "num_classes": num_classes or 0,
        "HAS_IGNORE": ignore_index is not None,
        "HAS_RANGE": num_classes is not None,
        "BLOCK": LABELS_A_BLOCK,
    }
    counts = divisor
    if num_blocks > 1:
        counts = labels.new_empty(num_blocks, 3)
        kernel = kernels.count_segments_kernel
        _launch(kernel, num_blocks, labels.device, counts_ptr=counts, **shared)
    _launch(
        kernels.segments_kernel,
        num_blocks,
        labels.device,
        counts_ptr=counts,
        values_ptr=values,
        valid_ptr=valid,
        broken_ptr=broken,
        slots_ptr=slots,
        runs_ptr=runs,
        starts_ptr=starts,
        ends_ptr=ends,
        classes_ptr=classes,
        num_present_ptr=num_present,
        divisor_ptr=divisor,
        num_slots=len(starts),
        num_blocks=num_blocks,
        HAS_COUNTS=num_blocks > 1,
        **shared,
    )
    found = (runs, starts, ends, classes, num_present, divisor)
    return values, valid, broken, slots, order, *found


def read(batch: Batch, options: Options, dtype: torch.dtype) -> Samples:
    """As `varcon_loss.samples.read`; the kernels divide by the lengths themselves."""
    labels, valid, broken = read_labels(batch, options)
    norms = row_norms(batch.features, valid) if options.normalize else None
    return Samples(features=batch.features, labels=labels, valid=valid, broken=broken, norms=norms)


def sort_labels(batch: Batch, options: Options) -> tuple[Samples, ClassIndex, Tensor, Groups]:
    """The labels read, their classes indexed, slots ``[N]``, and members grouped, in one sort.

    Nothing waits for ``K``, and lengths are not measured yet.
    """
    num_classes, ignore_index = options.num_classes, options.ignore_index
    if values_may_be_read(batch.labels):
        read_labels(batch, options)  # raises
    labels, valid, broken, slots, order, runs, starts, ends, ascending, num_present, num_valid = (
        _sort_labels(batch.labels, ignore_index, num_classes)
    )
    samples = Samples(
        features=batch.features,
        labels=labels,
        valid=valid,
        broken=None if num_classes is None else broken,
        num_valid=num_valid,
    )
    lookup = ClassIndex(
        size=len(ascending), gaps="last", ascending=ascending, num_present=num_present
    )
    return samples, lookup, slots, Groups(order=order, runs=runs, starts=starts, ends=ends)


def summarise(
    batch: Batch, options: Options, dtype: torch.dtype, *, count: bool
) -> tuple[Samples, Classes]:
    """As `varcon_loss.classes.summarise`; lengths, counts and centroids fall out of the sums.

    The sums themselves, as large as the centroids, are kept only where ``count``.
    """
    samples, lookup, slots, groups = sort_labels(batch, options)
    sums, counts, unit, norms = class_sums(
        batch.features,
        order=groups.order,
        runs=groups.runs,
        starts=groups.starts,
        ends=groups.ends,
        normalize=options.normalize,
        keep_sums=count,
    )
    assert lookup.num_present is not None
    classes = Classes(
        lookup=lookup,
        sums=sums,
        counts=counts,
        slots=slots,
        centroids=Centroids(unit=unit, present=None, num_present=lookup.num_present, packed=True),
    )
    return (changed(samples, norms=norms) if options.normalize else samples), classes


def group_slots(slots: Tensor, valid: Tensor | None, size: int) -> Groups:
    """Sort samples whose slots ``[N]`` are known already."""
    keys = slots if valid is None else slots.masked_fill(~valid, size)
    ordered, order = keys.to(torch.int32).sort(stable=True)
    borders = torch.arange(size + 1, dtype=torch.int32, device=slots.device)
    borders = torch.searchsorted(ordered, borders, out_int32=True)
    runs = ordered if valid is None else ordered.masked_fill(ordered == size, -1)
    starts, ends = borders[:-1].contiguous(), borders[1:].contiguous()
    return Groups(order=order, runs=runs, starts=starts, ends=ends)


def sum_slots(rows: Tensor, slots: Tensor, valid: Tensor | None, size: int) -> Tensor:
    """As `varcon_loss.sums.sum_slots`, with no float atomics: the same bits every time."""
    groups = group_slots(slots, valid, size)
    return class_sums(
        rows,
        order=groups.order,
        runs=groups.runs,
        starts=groups.starts,
        ends=groups.ends,
        normalize=False,
        keep_sums=True,
    )[0]


def _new_sums(
    features: Tensor,
    order: Tensor,
    runs: Tensor,
    starts: Tensor,
    ends: Tensor,
    normalize: bool,
    keep_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (num_rows, dim), size = features.shape, starts.shape[0]
    return (
        features.new_empty(size if keep_sums else 0, dim, dtype=torch.float32),
        features.new_empty(size, dtype=torch.float32),
        features.new_empty(size, dim, dtype=torch.float32),
        features.new_empty(num_rows if normalize else 0, dtype=torch.float32),
    )


@_operator("class_sums", _new_sums)
def class_sums(
    features: Tensor,
    order: Tensor,
    runs: Tensor,
    starts: Tensor,
    ends: Tensor,
    normalize: bool,
    keep_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum the rows ``[N, D]`` of each class, divided by their lengths if ``normalize``.

    The members of a class are added in their order in the batch, so two runs give the same bits.

    Returns:
        sums ``[S, D]`` (``[0, D]`` without ``keep_sums``), counts ``[S]``, centroids ``[S, D]``,
        and the lengths ``[N]`` of the rows that are in a class (others are not set), or ``[0]``
        without ``normalize``; all float32.
    """
    from varcon_loss.sweeps import kernels

    num_rows, dim = features.shape
    sums, counts, unit, norms = _new_sums(features, order, runs, starts, ends, normalize, keep_sums)
    block_d = _power_of_two(dim)
    shared = {
        "x_ptr": features,
        "order_ptr": order,
        "starts_ptr": starts,
        "ends_ptr": ends,
        "norms_ptr": norms,
        "dim": dim,
        "LONG": LONG_CLASS,
        "BLOCK_N": max(1, 4096 // block_d),
        "BLOCK_D": block_d,
        "NORMALIZE": normalize,
    } | _strides(features)
    pieces = unit
    if num_rows > LONG_CLASS:
        # Large classes are cut into pieces that run side by side.
        stretches = -(-num_rows // LONG_CLASS)
        pieces = unit.new_empty(stretches, 2, dim)
        _launch(
            kernels.class_pieces_kernel,
            stretches,
            features.device,
            runs_ptr=runs,
            pieces_ptr=pieces,
            num_rows=num_rows,
            **shared,
        )
    _launch(
        kernels.class_sums_kernel,
        len(starts),
        features.device,
        pieces_ptr=pieces,
        sums_ptr=sums,
        unit_ptr=unit,
        counts_ptr=counts,
        KEEP_SUMS=keep_sums,
        **shared,
    )
    return sums, counts, unit, norms


class Tiles(NamedTuple):
    """How the sweep is cut up."""

    rows: int
    keys: int
    warps: int
    stages: int

    def shared_bytes(
        self, dim: int, itemsize: int, capability: tuple[int, int], precision: str
    ) -> int:
        """What a block of threads needs at most: its rows, the prefetched keys, barriers."""
        width = max(16, _power_of_two(dim))
        numbers = (self.rows + self.stages * self.keys) * width
        if itemsize == 4 and width > 512 and precision == "tf32":
            numbers *= 2  # as compiled, for every target
        if capability[0] == 10:  # products read both operands, and weights, from there
            numbers += self.rows * (width + self.keys)
        return numbers * itemsize + 1024


# By bytes of a number, and width up to which. Two blocks of 4 warps share the registers of
# a multiprocessor: while one waits for its products, the other computes exponentials.
# `benchmarks/kernel_code.py` shows what the compiler makes of them: no loop spills registers.
TILES = {
    2: {
        64: Tiles(rows=64, keys=128, warps=4, stages=3),
        128: Tiles(rows=64, keys=128, warps=4, stages=2),
        256: Tiles(rows=64, keys=64, warps=8, stages=2),
        512: Tiles(rows=32, keys=32, warps=8, stages=2),
        1024: Tiles(rows=16, keys=16, warps=8, stages=2),
    },
    4: {
        64: Tiles(rows=64, keys=32, warps=8, stages=2),
        128: Tiles(rows=64, keys=16, warps=8, stages=2),
        256: Tiles(rows=32, keys=16, warps=8, stages=2),
        512: Tiles(rows=16, keys=16, warps=8, stages=2),
        1024: Tiles(rows=16, keys=16, warps=8, stages=1),
    },
}
# The same by the major number of the compute capability, where those would spill.
OTHER_TILES = {
    (8, 2, 64): Tiles(rows=64, keys=64, warps=4, stages=3),
    (8, 2, 128): Tiles(rows=64, keys=64, warps=4, stages=2),
    (12, 2, 64): Tiles(rows=64, keys=64, warps=4, stages=3),
    (12, 2, 128): Tiles(rows=64, keys=64, warps=4, stages=2),
    (10, 2, 128): Tiles(rows=64, keys=64, warps=4, stages=2),
    (10, 4, 128): Tiles(rows=32, keys=16, warps=8, stages=2),
    (12, 4, 128): Tiles(rows=32, keys=16, warps=8, stages=2),
}


def _largest_tiles(dim: int, itemsize: int, capability: tuple[int, int]) -> Tiles:
    width = max(64, _power_of_two(dim))
    return OTHER_TILES.get((capability[0], itemsize, width), TILES[itemsize][width])


def choose_tiles(num_rows: int, dim: int, itemsize: int, capability: tuple[int, int]) -> Tiles:
    """Rows as many as registers allow, fewer where a small batch would leave the GPU idle."""
    tiles = _largest_tiles(dim, itemsize, capability)
    if num_rows < 64 * tiles.rows and tiles.rows > 16:
        tiles = changed(tiles, rows=tiles.rows // 2)
    return tiles


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


def sweep(
    rows: Rows, temperature: float, epsilon: float, need_grad: bool, need_terms: bool
) -> Swept:
    """See `operators`. The gradient has the dtype of the features, its scale is float32.

    A kernel that has the loss has the other terms: ``need_terms`` changes nothing.
    """
    from varcon_loss.sweeps import kernels

    anchors, centroids = rows.anchors, rows.centroids
    features, norms, valid, broken = anchors.features, anchors.norms, anchors.valid, anchors.broken
    w, present, slots, own = centroids.unit, centroids.present, rows.slots, rows.own
    assert isinstance(slots, Tensor)
    (num_rows, dim), num_slots = features.shape, len(w)
    loss = w.new_empty(num_rows)
    terms = w.new_empty(4, num_rows)
    gradient = features.new_empty((num_rows, dim) if need_grad else 0)
    scale = w.new_empty(num_rows if need_grad else 0)
    w, slots = w.contiguous(), slots.contiguous()
    own = None if own is None else own.contiguous()
    order = None
    if num_rows * num_slots * dim >= SORTED_FROM:
        # Rows in order of class: then few keys need a mask, which costs as much as all the rest.
        slots, order = slots.to(_smallest_integer(num_slots)).sort(stable=True)
    tiles = choose_tiles(num_rows, dim, features.itemsize, _capability(features.device))
    _launch(
        kernels.sweep_kernel,
        -(-num_rows // tiles.rows),
        features.device,
        x_ptr=features,
        order_ptr=order,
        norms_ptr=norms,
        valid_ptr=valid,
        slots_ptr=slots,
        w_ptr=w,
        keys_ptr=w.to(features.dtype),
        key_sum_ptr=w.sum(0),
        present_ptr=present,
        num_present_ptr=centroids.num_present,
        own_ptr=own,
        broken_ptr=broken,
        loss_ptr=loss,
        terms_ptr=terms,
        gradient_ptr=gradient,
        scale_ptr=scale,
        num_rows=num_rows,
        num_slots=num_slots,
        dim=dim,
        **_strides(features),
        temperature=temperature,
        epsilon=epsilon,
        BLOCK_N=tiles.rows,
        BLOCK_K=tiles.keys,
        BLOCK_D=max(16, _power_of_two(dim)),
        HAS_ORDER=order is not None,
        HAS_NORMS=norms is not None,
        HAS_VALID=valid is not None,
        HAS_PRESENT=present is not None and not centroids.packed,
        HAS_OWN=own is not None,
        HAS_BROKEN=broken is not None,
        PACKED=centroids.packed,
        # A small logit's exponential fits float32, but as an operand of a product not float16.
        PLAIN_EXP=rows.have_small_logits(temperature) and features.dtype != torch.float16,
        NEED_GRAD=need_grad,
        PRECISION=float32_precision(),
        # Triton's interpreter multiplies bfloat16 as if its bits were integers.
        UPCAST=features.device.type == "cpu",
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return Swept(loss=loss, terms=terms, gradient=gradient, scale=scale)


FUSED = Implementation(
    name="triton",
    read=read,
    summarise=summarise,
    sum_slots=sum_slots,
    sweep=make_operator("varcon_loss::fused_sweep", sweep, fused=True),
    why_not=why_not,
    by_default=runs_by_default,
    takes_soft_labels=False,
)
