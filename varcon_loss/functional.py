"""The loss as functions: validate -> slots -> centroids -> rows -> reduction."""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from varcon_loss import checks
from varcon_loss.centroids import unit_rows
from varcon_loss.eager import eager_terms
from varcon_loss.labels import Labels, read_labels
from varcon_loss.matching import match_batch, match_memory, match_reference, summarise
from varcon_loss.memory import CentroidMemory
from varcon_loss.norms import row_norms
from varcon_loss.reduction import VarConTerms, mask_terms, reduce_loss, with_views
from varcon_loss.reference import reference_terms
from varcon_loss.rows import Rows

_IMPLEMENTATIONS = {"reference": reference_terms, "eager": eager_terms}


def varcon_loss(
    features: Tensor,
    labels: Tensor,
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
    return varcon_terms(
        features,
        labels,
        temperature,
        epsilon,
        num_classes=num_classes,
        normalize=normalize,
        reduction=reduction,
        ignore_index=ignore_index,
        weight=weight,
        leave_one_out=leave_one_out,
        process_group=process_group,
        impl=impl,
        ref_features=ref_features,
        ref_labels=ref_labels,
    ).reduced


def varcon_terms(
    features: Tensor,
    labels: Tensor,
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
    options = Options(
        temperature,
        epsilon,
        num_classes,
        normalize,
        reduction,
        ignore_index,
        weight,
        leave_one_out,
        process_group,
        impl,
    )
    return compute_terms(features, labels, ref_features, ref_labels, options.checked(), None)


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
    impl: str

    def checked(self) -> "Options":
        """Raise on what cannot be; fill in ``num_classes`` from ``weight``."""
        checks.check_temperatures(self.temperature, self.epsilon)
        checks.check_choices(self.reduction, self.impl, self.ignore_index)
        checks.check_available(self.process_group, self.impl)
        num_classes = checks.resolve_num_classes(self.num_classes, self.weight)
        return self._replace(num_classes=num_classes)


def compute_terms(
    features: Tensor,
    labels: Tensor,
    ref_features: Tensor | None,
    ref_labels: Tensor | None,
    options: Options,
    memory: CentroidMemory | None,
) -> VarConTerms:
    """What function and module share: check the tensors, then compute without autocast."""
    checks.check_samples(features, labels)
    checks.check_reference_set(ref_features, ref_labels, options.leave_one_out, memory is not None)
    checks.check_weight_device(options.weight, features)
    batch = _flatten_views(features, labels)
    reference = None
    if ref_features is not None and ref_labels is not None:
        checks.check_samples(
            ref_features, ref_labels, features_name="ref_features", labels_name="ref_labels"
        )
        reference = _flatten_views(ref_features, ref_labels)
        checks.check_width(batch.features, reference.features)
    if memory is not None:
        checks.check_memory(batch.features, memory.unit)
    with _without_autocast(features.device.type):
        return _compute(batch, reference, options, memory)


class _Samples(NamedTuple):
    features: Tensor  # [N, D]
    labels: Tensor  # [N]
    shape: torch.Size  # [N], or [B, V] with views: the shape of per-sample results


class _Prepared(NamedTuple):
    features: Tensor  # [N, D], zero vectors where not valid
    unit: Tensor  # [N, D] z
    norms: Tensor | None  # [N]; None: z is the features as they are


def _flatten_views(features: Tensor, labels: Tensor) -> _Samples:
    """``[B, V, ...]`` -> ``[B * V, D]``: each view is a sample with the same label."""
    if features.ndim == 2:
        return _Samples(features, labels, labels.shape)
    shape = features.shape[:2]
    dim = features.shape[2:].numel()
    return _Samples(features.reshape(shape.numel(), dim), labels.repeat_interleave(shape[1]), shape)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _prepare(features: Tensor, labels: Labels, dtype: torch.dtype, *, normalize: bool) -> _Prepared:
    if labels.valid is not None:
        # From here on a row that takes no part is a zero vector, whatever it held: it adds
        # nothing to any sum, and its gradient is exactly 0.
        features = features.masked_fill(~labels.valid[:, None], 0.0)
    with torch.no_grad():
        norms = row_norms(features, dtype) if normalize else None
        return _Prepared(features, unit_rows(features, norms, dtype), norms)


def _compute(
    batch: _Samples, reference: _Samples | None, options: Options, memory: CentroidMemory | None
) -> VarConTerms:
    impl = "eager" if options.impl == "auto" else options.impl
    num_classes, ignore_index = options.num_classes, options.ignore_index
    dtype = torch.promote_types(batch.features.dtype, torch.float32)
    if reference is not None:
        dtype = torch.promote_types(dtype, reference.features.dtype)

    labels = read_labels(batch.labels, num_classes, ignore_index)
    anchors = _prepare(batch.features, labels, dtype, normalize=options.normalize)
    with torch.no_grad():
        if memory is not None:
            summary = summarise(anchors.unit, labels, num_classes) if memory.update else None
            # The reference's backward reads the centroids, which the next call changes.
            match = match_memory(memory, summary, labels, dtype, copy=impl == "reference")
        elif reference is not None:
            ref_labels = read_labels(reference.labels, num_classes, ignore_index, name="ref_labels")
            pool = _prepare(reference.features, ref_labels, dtype, normalize=options.normalize)
            match = match_reference(summarise(pool.unit, ref_labels, num_classes), labels)
        else:
            summary = summarise(anchors.unit, labels, num_classes)
            match = match_batch(summary, anchors.unit, labels, leave_one_out=options.leave_one_out)

    rows = Rows(*anchors, match.slots, match.centroids, match.own)
    terms = _IMPLEMENTATIONS[impl](rows, options.temperature, options.epsilon)

    valid = match.labels.valid
    terms = mask_terms(terms, valid, match.labels.out_of_range)
    row_weights = None
    if options.weight is not None:
        row_weights = options.weight.detach().to(dtype).index_select(0, labels.values)
        row_weights = row_weights if valid is None else row_weights.masked_fill(~valid, 0.0)
    reduced = reduce_loss(terms.loss, row_weights, valid, options.reduction)

    if valid is None:
        valid = torch.ones_like(match.slots, dtype=torch.bool)
    result = VarConTerms(*terms, valid, match.centroids.num_classes, reduced, impl)
    return result if len(batch.shape) == 1 else with_views(result, batch.shape)
