"""The loss as functions: validate -> slots -> centroids -> rows -> reduction."""

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varcon_loss import checks, fused
from varcon_loss.centroids import sum_by_slot, unit_rows
from varcon_loss.distributed import (
    PLANS_OF_FUNCTIONS,
    Exchanged,
    Plans,
    announce_failure,
    exchange_classes,
    make_plan,
    resolve_group,
)
from varcon_loss.eager import eager_terms
from varcon_loss.labels import Labels, find_slots, read_labels
from varcon_loss.matching import (
    ClassSummary,
    Match,
    match_batch,
    match_learning_memory,
    match_memory,
    match_reference,
    summarise,
    summarise_fused,
)
from varcon_loss.memory import CentroidMemory
from varcon_loss.norms import row_norms
from varcon_loss.reduction import (
    RanksTotal,
    VarConTerms,
    reduce_loss,
)
from varcon_loss.reference import reference_terms
from varcon_loss.rows import Rows, RowTerms, Samples

_IMPLEMENTATIONS: dict[str, Callable[[Rows, float, float, bool], RowTerms]] = {
    "reference": reference_terms,
    "eager": eager_terms,
    "triton": fused.fused_terms,
}


def varcon_loss(
    features: Tensor,
    labels: Tensor | None = None,
    temperature: float = 0.1,
    epsilon: float = 0.02,
    *,
    num_classes: int | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    weight: Tensor | None = None,
    leave_one_out: bool = False,
    process_group: object | None = None,
    exchange: str = "auto",
    impl: str = "auto",
    ref_features: Tensor | None = None,
    ref_labels: Tensor | None = None,
) -> Tensor:
    """VarCon loss (arXiv 2506.07413, Eq. 7) as a function; see `VarConLoss` for the arguments.

    Example:
        >>> import torch
        >>> from varcon_loss import varcon_loss
        >>> features = torch.randn(8, 16, requires_grad=True)
        >>> loss = varcon_loss(features, torch.arange(8) % 3)
        >>> loss.backward()
    """
    options = check_options(
        temperature,
        epsilon,
        num_classes,
        normalize,
        reduction,
        ignore_index,
        weight,
        leave_one_out,
        process_group,
        exchange,
        impl,
    )
    return compute_loss(
        features, labels, ref_features, ref_labels, options, None, PLANS_OF_FUNCTIONS
    )


def varcon_terms(
    features: Tensor,
    labels: Tensor | None = None,
    temperature: float = 0.1,
    epsilon: float = 0.02,
    *,
    num_classes: int | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    weight: Tensor | None = None,
    leave_one_out: bool = False,
    process_group: object | None = None,
    exchange: str = "auto",
    impl: str = "auto",
    ref_features: Tensor | None = None,
    ref_labels: Tensor | None = None,
) -> VarConTerms:
    """`varcon_loss` with everything one logs; the loss is ``.reduced``. See `VarConTerms`.

    Example:
        >>> import torch
        >>> from varcon_loss import varcon_terms
        >>> features = torch.randn(8, 16, requires_grad=True)
        >>> terms = varcon_terms(features, torch.arange(8) % 3)
        >>> terms.reduced.backward()
        >>> terms.tau2.shape
        torch.Size([8])
    """
    options = check_options(
        temperature,
        epsilon,
        num_classes,
        normalize,
        reduction,
        ignore_index,
        weight,
        leave_one_out,
        process_group,
        exchange,
        impl,
    )
    return compute_terms(
        features, labels, ref_features, ref_labels, options, None, PLANS_OF_FUNCTIONS
    )


class Options(NamedTuple):
    """The arguments of `VarConLoss` that every call needs, under their public names."""

    temperature: float
    epsilon: float
    num_classes: int | None
    normalize: bool
    reduction: str
    ignore_index: int | None
    weight: Tensor | None
    leave_one_out: bool
    process_group: object | None
    exchange: str
    impl: str


def check_options(
    temperature: float,
    epsilon: float,
    num_classes: int | None,
    normalize: bool,
    reduction: str,
    ignore_index: int | None,
    *others: Any,
) -> Options:
    """The arguments in the order of `Options`; ``num_classes`` filled in from ``weight``.

    Numbers of any kind, of numpy too, become Python's: compiled graphs know no others.

    Raises:
        TypeError, ValueError: they say what cannot be.
    """
    temperature, epsilon = checks.check_temperatures(temperature, epsilon)
    if ignore_index is not None:
        ignore_index = checks.whole_number("ignore_index", ignore_index)
    given = Options(temperature, epsilon, num_classes, normalize, reduction, ignore_index, *others)
    checks.check_choices(reduction, given.impl)
    num_classes = checks.resolve_num_classes(num_classes, given.weight)
    checks.check_exchange(given.process_group, given.exchange, num_classes)
    # Not by `_replace`, which the compiler of torch 2.6 does not trace.
    return Options(temperature, epsilon, num_classes, normalize, reduction, ignore_index, *others)


class _Batch(NamedTuple):
    """What the caller gave, without views."""

    features: Tensor  # [N, D]
    labels: Tensor  # [N]
    shape: torch.Size  # [N], or [B, V] with views: the shape of per-sample results


class _Read(NamedTuple):
    """One set of samples made ready."""

    labels: Labels
    samples: Samples
    summary: ClassSummary | None  # None: it makes no centroids


class _Local(NamedTuple):
    """All that a rank knows by itself."""

    anchors: Samples
    labels: Labels  # of the anchors
    row_weights: Tensor | None  # [N] class weights, 0 where not valid
    summary: ClassSummary | None  # of what makes the centroids; None: a memory that is only read
    reference_labels: Labels | None  # what `summary` was made of; None: of `labels`
    impl: str  # what runs

    @property
    def summary_labels(self) -> Labels:
        return self.labels if self.reference_labels is None else self.reference_labels

    def weight(self) -> Tensor:
        """What this rank adds to the denominator of the mean, 0-d."""
        if self.row_weights is not None:
            return self.row_weights.sum()
        if self.labels.valid is not None:
            return self.labels.valid.sum()
        return torch.tensor(len(self.labels.values))


class _Evaluated(NamedTuple):
    terms: RowTerms
    valid: Tensor | None  # [N] bool; None: all are
    num_classes: Tensor  # 0-d int64
    reduced: Tensor  # [], or [N] or [B, V] for "none"
    impl: str


def compute_loss(
    features: Tensor,
    labels: Tensor | None,
    ref_features: Tensor | None,
    ref_labels: Tensor | None,
    options: Options,
    memory: CentroidMemory | None,
    plans: Plans,
) -> Tensor:
    """What function and module share. `compute_terms` without what a loss alone can spare."""
    evaluated = _compute(
        features, labels, ref_features, ref_labels, options, memory, plans, need_terms=False
    )
    return evaluated.reduced


def compute_terms(
    features: Tensor,
    labels: Tensor | None,
    ref_features: Tensor | None,
    ref_labels: Tensor | None,
    options: Options,
    memory: CentroidMemory | None,
    plans: Plans,
) -> VarConTerms:
    """What function and module share."""
    (loss, others), valid, num_classes, reduced, impl = _compute(
        features, labels, ref_features, ref_labels, options, memory, plans, need_terms=True
    )
    assert others is not None
    if valid is None:
        valid = torch.ones_like(loss, dtype=torch.bool)
    shape = features.shape[:1] if features.ndim == 2 else features.shape[:2]
    kl, nll, confidence, tau2 = others.view(4, *shape).unbind()
    return VarConTerms(
        *(loss.view(shape), kl, nll, confidence, tau2, valid.view(shape)),
        *(num_classes, reduced, impl),
    )


def _compute(
    features: Tensor,
    labels: Tensor | None,
    ref_features: Tensor | None,
    ref_labels: Tensor | None,
    options: Options,
    memory: CentroidMemory | None,
    plans: Plans,
    *,
    need_terms: bool,
) -> _Evaluated:
    """The part of this rank, the exchange, then the rows."""
    device = features.device if isinstance(features, Tensor) else torch.device("cpu")
    group = resolve_group(options.process_group)
    with _without_autocast(device.type):
        try:
            batch, reference = _check(features, labels, ref_features, ref_labels, options, memory)
            local = _summarise_locally(batch, reference, options, memory)
        except (TypeError, ValueError):
            if group is not None:
                # The other ranks wait in this step's collective.
                announce_failure(
                    group,
                    plans,
                    num_classes=options.num_classes,
                    exchange=options.exchange,
                    features=features,
                    ref_features=ref_features,
                )
            raise
        exchanged = None if group is None else _exchange(group, plans, local, options)
        return _evaluate(local, exchanged, batch.shape, options, memory, need_terms=need_terms)


def _exchange(group: object, plans: Plans, local: _Local, options: Options) -> Exchanged:
    anchors = local.anchors
    plan = make_plan(
        group,
        plans,
        num_classes=options.num_classes,
        dim=anchors.features.shape[1],
        dtype=anchors.dtype,
        device=anchors.features.device,
        num_rows=len(local.summary_labels.values),
        exchange=options.exchange,
    )
    sum_slots = fused.sum_by_slot if local.impl == "triton" else sum_by_slot
    return exchange_classes(
        plan, local.summary, local.summary_labels, local.weight(), sum_slots=sum_slots
    )


def _check(
    features: Tensor,
    labels: Tensor | None,
    ref_features: Tensor | None,
    ref_labels: Tensor | None,
    options: Options,
    memory: CentroidMemory | None,
) -> tuple[_Batch, _Batch | None]:
    checks.check_not_mapped(features, labels, ref_features, ref_labels)
    checks.check_samples(features, labels)
    checks.check_reference_set(ref_features, ref_labels, options.leave_one_out, memory is not None)
    assert labels is not None
    checks.check_weight_device(options.weight, features)
    batch = _flatten(features, labels)
    if memory is not None:
        checks.check_memory(batch.features, memory.unit)
    if ref_features is None or ref_labels is None:
        return batch, None
    checks.check_samples(
        ref_features, ref_labels, features_name="ref_features", labels_name="ref_labels"
    )
    reference = _flatten(ref_features, ref_labels)
    if ref_features.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        warnings.warn(
            "ref_features require a gradient and get none: centroids are constants of the loss. "
            "Give ref_features.detach(), or, to train both sides, add the loss of the other way "
            "round",
            stacklevel=6,
        )
    checks.check_width(batch.features, reference.features)
    return batch, reference


def flatten_views(features: Tensor) -> tuple[Tensor, torch.Size]:
    """``[B, V, ...]`` -> ``[B * V, D]``, and ``[B, V]`` (``[N]``), the shape of the samples."""
    if features.ndim == 2:
        return features, features.shape[:1]
    shape = features.shape[:2]
    return features.reshape(shape.numel(), features.shape[2:].numel()), shape


def _flatten(features: Tensor, labels: Tensor) -> _Batch:
    """Each view is a sample with the same label."""
    rows, shape = flatten_views(features)
    return _Batch(rows, labels if len(shape) == 1 else labels.repeat_interleave(shape[1]), shape)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _prepare(
    features: Tensor, labels: Labels, dtype: torch.dtype, impl: str, *, normalize: bool
) -> Samples:
    if impl == "triton":
        norms = fused.row_norms(features, labels.valid) if normalize else None
        return Samples(features, None, norms)
    taking_part = features
    if labels.valid is not None:
        # From here on a row that takes no part is a zero vector, whatever it held: it adds
        # nothing to any sum, and its gradient is exactly 0.
        taking_part = features.masked_fill(~labels.valid.unsqueeze(1), 0.0)
    norms = row_norms(taking_part, dtype) if normalize else None
    return Samples(features, unit_rows(taking_part, norms, dtype), norms)


@torch.no_grad()
def _summarise_locally(
    batch: _Batch, reference: _Batch | None, options: Options, memory: CentroidMemory | None
) -> _Local:
    dtype = torch.promote_types(batch.features.dtype, torch.float32)
    if reference is not None:
        dtype = torch.promote_types(dtype, reference.features.dtype)
    impl = _choose_impl(options.impl, batch, dtype)
    count = options.leave_one_out or memory is not None or options.process_group is not None
    read = functools.partial(_read, options=options, dtype=dtype, impl=impl, count=count)

    alone = reference is None and (memory is None or memory.update)
    labels, anchors, summary = read(batch, makes_centroids=alone)
    reference_labels = None
    if reference is not None:
        reference_labels, _, summary = read(reference, makes_centroids=True, name="ref_labels")
    row_weights = None
    if options.weight is not None:
        row_weights = options.weight.to(dtype).index_select(0, labels.values)
        if labels.valid is not None:
            row_weights = row_weights.masked_fill(~labels.valid, 0.0)
    return _Local(anchors, labels, row_weights, summary, reference_labels, impl)


def _read(
    batch: _Batch,
    *,
    options: Options,
    dtype: torch.dtype,
    impl: str,
    count: bool,
    makes_centroids: bool,
    name: str = "labels",
) -> _Read:
    num_classes, ignore_index, normalize = (
        options.num_classes,
        options.ignore_index,
        options.normalize,
    )
    if makes_centroids and impl == "triton":
        found = fused.sort_labels(batch.labels, num_classes, ignore_index, name=name)
        return _Read(found.labels, *summarise_fused(batch.features, found, normalize=normalize))
    labels = read_labels(batch.labels, num_classes, ignore_index, name=name)
    samples = _prepare(batch.features, labels, dtype, impl, normalize=normalize)
    summary = None
    if makes_centroids:
        summary = summarise(samples, labels, num_classes, count=count)
    return _Read(labels, samples, summary)


def _choose_impl(impl: str, batch: _Batch, dtype: torch.dtype) -> str:
    """What ``"auto"`` stands for here; an error where ``"triton"`` cannot run."""
    if impl == "auto":
        return "triton" if fused.runs_by_default(batch.features, dtype) else "eager"
    if impl == "triton":
        obstacle = fused.why_not(batch.features, dtype)
        if obstacle is not None:
            raise ValueError(f"impl='triton' cannot run here: {obstacle}; use impl='auto'")
    return impl


def _evaluate(
    local: _Local,
    exchanged: Exchanged | None,
    shape: torch.Size,
    options: Options,
    memory: CentroidMemory | None,
    *,
    need_terms: bool,
) -> _Evaluated:
    impl = local.impl
    with torch.no_grad():
        match = _match(local, exchanged, options, memory, copy=impl == "reference")
    _, valid, out_of_range, divisor = match.labels
    rows = Rows(local.anchors, match.slots, match.centroids, match.own, valid, out_of_range)
    terms = _IMPLEMENTATIONS[impl](rows, options.temperature, options.epsilon, need_terms)

    row_weights = local.row_weights
    if row_weights is not None and valid is not None:
        row_weights = row_weights.masked_fill(~valid, 0.0)
    total = None
    if exchanged is not None:
        total = _total_weight(exchanged, match, options.weight)
    reduced = reduce_loss(terms.loss, row_weights, valid, divisor, options.reduction, total)
    if options.reduction == "none":
        reduced = reduced.view(shape)
    return _Evaluated(terms, valid, match.centroids.num_classes, reduced, impl)


def _match(
    local: _Local,
    exchanged: Exchanged | None,
    options: Options,
    memory: CentroidMemory | None,
    *,
    copy: bool,  # the reference's backward reads the centroids, which the next call may change
) -> Match:
    anchors, labels, summary, classes = local.anchors, local.labels, local.summary, None
    if exchanged is not None and summary is not None:
        index = exchanged.summary.classes
        summary = exchanged.summary._replace(slots=find_slots(labels, index)[0])
        classes = exchanged.classes
    if memory is not None:
        if summary is None:
            return match_memory(memory, labels, anchors.dtype, copy=copy)
        return match_learning_memory(
            memory, summary, labels, anchors.dtype, classes=classes, copy=copy
        )
    assert summary is not None
    if local.reference_labels is not None:
        return match_reference(summary, labels)
    return match_batch(summary, anchors, labels, leave_one_out=options.leave_one_out)


def _total_weight(exchanged: Exchanged, match: Match, weight: Tensor | None) -> RanksTotal:
    """The denominator of the mean over all ranks.

    Where classes drop out as a whole (a class of one under ``leave_one_out``), it follows from
    what every rank knows of all classes by now.
    """
    total = exchanged.weight
    if match.kept is not None:
        assert exchanged.summary.counts is not None
        counts = exchanged.summary.counts * match.kept
        if weight is not None:
            counts = counts * weight.to(counts.dtype).index_select(0, exchanged.classes)
        total = counts.sum()
    return RanksTotal(total, exchanged.world_size)
