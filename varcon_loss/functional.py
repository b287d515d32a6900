"""The loss as functions: validate -> slots -> centroids -> rows -> reduction."""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from varcon_loss import checks
from varcon_loss.centroids import (
    centroids_without_self,
    class_counts,
    class_sums,
    unit_centroids,
    unit_rows,
)
from varcon_loss.eager import eager_terms
from varcon_loss.labels import (
    Labels,
    find_slots,
    index_classes,
    read_labels,
    require_reference,
)
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
    checks.check_temperatures(temperature, epsilon)
    checks.check_choices(reduction, impl, ignore_index)
    num_classes = checks.resolve_num_classes(num_classes, weight)
    checks.check_available(process_group, impl)
    checks.check_samples(features, labels)
    if (ref_features is None) != (ref_labels is None):
        given, missing = (
            ("ref_features", "ref_labels") if ref_labels is None else ("ref_labels", "ref_features")
        )
        raise ValueError(f"{given} given without {missing}: a reference set needs both")
    if ref_features is not None and leave_one_out:
        raise ValueError(
            "leave_one_out has no meaning with ref_features: the anchors are not members of the "
            "reference centroids"
        )
    if weight is not None and weight.device != features.device:
        raise ValueError(
            f"weight is on {weight.device} but features are on {features.device}: "
            "move the loss module (or the weight) to the features' device"
        )

    batch = _flatten_views(features, labels)
    reference = None
    if ref_features is not None and ref_labels is not None:
        checks.check_samples(
            ref_features, ref_labels, features_name="ref_features", labels_name="ref_labels"
        )
        reference = _flatten_views(ref_features, ref_labels)
        checks.check_width(batch.features, reference.features)

    with _without_autocast(features.device.type):
        return _compute(
            batch,
            reference,
            temperature=temperature,
            epsilon=epsilon,
            num_classes=num_classes,
            normalize=normalize,
            reduction=reduction,
            ignore_index=ignore_index,
            weight=weight,
            leave_one_out=leave_one_out,
            impl="eager" if impl == "auto" else impl,
        )


class _Samples(NamedTuple):
    features: Tensor  # [N, D]
    labels: Tensor  # [N]
    shape: torch.Size  # [N], or [B, V] with views: the shape of per-sample results


class _Prepared(NamedTuple):
    features: Tensor  # [N, D], zero vectors where not valid
    labels: Labels
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


def _prepare(
    samples: _Samples, labels: Labels, *, normalize: bool, dtype: torch.dtype
) -> _Prepared:
    features = samples.features
    if labels.valid is not None:
        # From here on a row that takes no part is a zero vector, whatever it held: it adds
        # nothing to any sum, and its gradient is exactly 0.
        features = features.masked_fill(~labels.valid[:, None], 0.0)
    with torch.no_grad():
        norms = row_norms(features, dtype) if normalize else None
        unit = unit_rows(features, norms, dtype)
    return _Prepared(features, labels, unit, norms)


def _compute(
    batch: _Samples,
    reference: _Samples | None,
    *,
    temperature: float,
    epsilon: float,
    num_classes: int | None,
    normalize: bool,
    reduction: str,
    ignore_index: int | None,
    weight: Tensor | None,
    leave_one_out: bool,
    impl: str,
) -> VarConTerms:
    dtype = torch.promote_types(batch.features.dtype, torch.float32)
    if reference is not None:
        dtype = torch.promote_types(dtype, reference.features.dtype)

    labels = read_labels(batch.labels, num_classes, ignore_index)
    anchors = _prepare(batch, labels, normalize=normalize, dtype=dtype)
    pool = anchors
    if reference is not None:
        ref_labels = read_labels(reference.labels, num_classes, ignore_index, name="ref_labels")
        pool = _prepare(reference, ref_labels, normalize=normalize, dtype=dtype)

    with torch.no_grad():
        index, slots = index_classes(pool.labels, num_classes)
        sums = class_sums(pool.unit, slots, index.size)
        counts = None
        if leave_one_out or index.may_be_sparse:
            counts = class_counts(slots, pool.labels.valid, index.size, dtype)
        centroids = unit_centroids(sums, counts if index.may_be_sparse else None)
        own = centroids_without_self(pool.unit, sums, slots) if leave_one_out else None
        if reference is not None:
            slots, found = find_slots(labels, index)
            labels = require_reference(labels, found)

    rows = Rows(anchors.features, anchors.unit, anchors.norms, slots, centroids, own)
    terms = _IMPLEMENTATIONS[impl](rows, temperature, epsilon)

    valid = labels.valid
    if leave_one_out and counts is not None:
        has_others = counts.index_select(0, slots) > 1
        valid = has_others if valid is None else valid & has_others
    terms = mask_terms(terms, valid, labels.out_of_range)
    row_weights = None
    if weight is not None:
        row_weights = weight.detach().to(dtype).index_select(0, labels.values)
        row_weights = row_weights if valid is None else row_weights.masked_fill(~valid, 0.0)
    reduced = reduce_loss(terms.loss, row_weights, valid, reduction)

    if valid is None:
        valid = torch.ones_like(slots, dtype=torch.bool)
    result = VarConTerms(*terms, valid, centroids.num_classes, reduced, impl)
    return result if len(batch.shape) == 1 else with_views(result, batch.shape)
