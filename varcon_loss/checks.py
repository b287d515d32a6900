"""What a caller may pass: every check that needs no look at a tensor's values."""

import difflib
import math
import numbers
import sys
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from varcon_loss.readable import values_may_be_read

# Packages between a caller's line and ours: a warning is about the former.
_BETWEEN = ("varcon_loss", "torch", "pytorch_metric_learning", "timm")
REDUCTIONS = ("mean", "sum", "none")
EXCHANGES = ("auto", "all-reduce", "all-gather")
IMPLEMENTATIONS = ("auto", "reference", "eager", "triton")
FEATURE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LABEL_DTYPES = (
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
)


def real_number(name: str, value: Any, kind: str = "a number") -> float:
    """Any real number, of numpy too, as a float."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        way_out = ", which is not learned: give .item()" if isinstance(value, Tensor) else ""
        raise TypeError(f"{name} must be {kind}, got {type(value).__name__}{way_out}")
    return float(value)


def whole_number(name: str, value: Any, kind: str = "an int or None") -> int:
    """Any whole number, of numpy too, as an int."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be {kind}, got {type(value).__name__}")
    return int(value)


def check_ignore_index(value: Any) -> int:
    """A number that a label may have."""
    value = whole_number("ignore_index", value)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"ignore_index must be a number that int64 labels can have, got {value}")
    return value


def switch(name: str, value: Any) -> bool:
    """True or False, of numpy too: the text "False" would count as true."""
    if type(value) is bool:
        return value
    if type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def warn(message: str) -> None:
    """At the line of the caller's that led here, whatever lies between."""
    level, frame = 2, sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def warn_of_no_gradient(name: str, tensor: Tensor | None, why: str) -> None:
    """A tensor that asks for a gradient and gets none is rarely meant."""
    if (
        tensor is not None
        and tensor.requires_grad
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    ):
        warn(
            f"{name}.requires_grad is True, but no gradient goes there: {why}. Give {name}.detach()"
        )


def check_temperatures(temperature: Any, epsilon: Any) -> tuple[float, float]:
    """Eq. 13 needs ``0 <= epsilon < temperature``, else tau2 would reach 0."""
    temperature = real_number("temperature", temperature)
    epsilon = real_number("epsilon", epsilon)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if not epsilon >= 0:
        raise ValueError(f"epsilon must be >= 0, got {epsilon}")
    if epsilon >= temperature:
        raise ValueError(
            f"epsilon must be smaller than temperature, got epsilon={epsilon} and "
            f"temperature={temperature}: tau2 = temperature - epsilon + 2 epsilon p would reach 0. "
            "Give epsilon too, as a fifth of the temperature"
        )
    return temperature, epsilon


def check_choices(reduction: str, impl: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {IMPLEMENTATIONS}, got {impl!r}")


def resolve_num_classes(num_classes: Any, weight: Tensor | None) -> int | None:
    """``num_classes``, or the length of ``weight`` where only that is given."""
    if num_classes is not None:
        num_classes = whole_number("num_classes", num_classes)
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if weight is None:
        return num_classes
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"weight must be a tensor with one entry per class, got {type(weight).__name__}"
        )
    if weight.ndim != 1 or len(weight) == 0 or not weight.is_floating_point():
        raise ValueError(
            "weight must be a floating-point tensor [num_classes], got "
            f"{weight.dtype} {list(weight.shape)}"
        )
    if num_classes is not None and len(weight) != num_classes:
        raise ValueError(
            f"weight has {len(weight)} entries but num_classes={num_classes}: "
            "give one weight per class"
        )
    return len(weight)


def check_weight_values(weight: Tensor | None) -> None:
    """Once, where looking at them waits for nothing: NaN would come out much later."""
    if weight is None or weight.ndim != 1 or not values_may_be_read(weight):
        return
    bad = (~((weight >= 0) & (weight < math.inf))).nonzero()
    if len(bad) > 0:
        label = int(bad[0])
        raise ValueError(
            f"weight must be finite and at least 0, got {float(weight[label])} for class {label}"
        )


def warn_of_odd_batch(num_samples: int, num_present: int) -> None:
    """Of a batch of which no sample is drawn to another, and whose loss looks as if all were."""
    if num_samples < 2 or 1 < num_present < num_samples:
        return
    if num_present == 1:
        warn(
            f"all {num_samples} samples are of one class: with nothing to tell apart the loss is 0"
        )
    else:
        warn(
            f"each of the {num_samples} samples is alone in its class, its own centroid: nothing "
            "draws it to others of its class, and the loss falls to near 0 by spreading samples. "
            "Sample several of each class, or use a centroid memory"
        )


def warn_of_mask(name: str, values: Tensor) -> None:
    """Is it the matrix of pairs that SupCon takes?"""
    square = values.shape[0] == values.shape[1] > 1 and bool((values.diagonal() == 1).all())
    if square and torch.equal(values, values.T) and bool(((values == 0) | (values == 1)).all()):
        warn(
            f"{name} {list(values.shape)} look like SupCon's mask of pairs, and are taken as class "
            "probabilities: give class numbers"
        )


def check_exchange(process_group: object | None, exchange: str, num_classes: int | None) -> None:
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange must be one of {EXCHANGES}, got {exchange!r}")
    if exchange == "all-reduce" and num_classes is None:
        raise ValueError("exchange='all-reduce' sums a table of all classes: give num_classes")
    if process_group is None or isinstance(process_group, torch.distributed.ProcessGroup):
        return
    if isinstance(process_group, str):
        if process_group != "world":
            raise ValueError(
                f"process_group must be 'world', a ProcessGroup or None, got {process_group!r}"
            )
    elif process_group != torch.distributed.GroupMember.NON_GROUP_MEMBER:
        raise TypeError(
            "process_group must be 'world', a torch.distributed.ProcessGroup or None, got "
            f"{type(process_group).__name__}"
        )


_OF_PML = "that is pytorch-metric-learning's: varcon_loss.integrations.metric_learning.VarConLoss"
# What the arguments of other losses become here.
_FROM_ELSEWHERE = {
    "contrast_mode": "every view is an anchor, as with contrast_mode='all': leave it out",
    "base_temperature": "the loss is not rescaled by temperature / base_temperature: leave it out, "
    "and multiply the loss (or the learning rate) yourself if you relied on it",
    "mask": "samples are compared with classes, not with each other: give labels= instead",
    "label_smoothing": "give class probabilities [N, C] as labels",
    "indices_tuple": _OF_PML,
    "ref_emb": f"give ref_features; {_OF_PML}",
    "embeddings": f"give features; {_OF_PML}",
    "reducer": f"give reduction; {_OF_PML}",
    "distance": f"give normalize; {_OF_PML}",
    "embedding_size": f"leave it out, only a centroid memory has a width; {_OF_PML}",
}


def refuse_unknown(where: str, unknown: dict[str, Any], known: Iterable[str]) -> None:
    """Keywords that a call does not take, with what they become or what they look like."""
    for name in unknown:
        advice = _FROM_ELSEWHERE.get(name)
        if advice is None:
            alike = difflib.get_close_matches(name, list(known), n=1)
            advice = f"did you mean {alike[0]}?" if alike else f"it takes {', '.join(known)}"
        raise TypeError(f"{where} has no argument {name!r}: {advice}")


def check_samples(
    features: Tensor,
    labels: Tensor | None,
    *,
    features_name: str = "features",
    labels_name: str = "labels",
) -> None:
    """``features`` ``[N, D]`` or ``[B, V, ...]``, ``labels`` ``[N]`` or ``[B]`` beside them."""
    check_features(features, features_name)
    if labels is None:
        raise ValueError(
            f"{labels_name} is None: VarCon is a supervised loss and needs one integer label a "
            "sample (for self-supervised pairs use labels=torch.arange(batch) and two views)"
        )
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"{labels_name} must be a tensor, got {type(labels).__name__}: give "
            f"torch.as_tensor({labels_name})"
        )
    if labels.layout != torch.strided:
        raise TypeError(
            f"{labels_name} must be dense, got {labels.layout}: give {labels_name}.to_dense()"
        )
    probabilities = labels.ndim == 2 and labels.dtype in FEATURE_DTYPES
    of_views = features.ndim > 2 and labels.ndim == 2 and labels.shape == features.shape[:2]
    if of_views and labels.dtype in LABEL_DTYPES:
        raise ValueError(
            f"{labels_name} {list(labels.shape)} give each view of {features_name} "
            f"{list(features.shape)} a label of its own: then each is a sample, give "
            f"{features_name}.flatten(0, 1) and {labels_name}.flatten()"
        )
    of_samples = labels.ndim == 2 and labels.shape[0] == features.shape[0] and labels.shape[1] > 1
    if of_samples and labels.dtype in LABEL_DTYPES:
        raise TypeError(
            f"{labels_name} are integers of shape {list(labels.shape)}: cast class probabilities "
            f"to float ({labels_name}.float()), or give one class number a sample"
        )
    if labels.dtype not in LABEL_DTYPES and not probabilities:
        raise TypeError(
            f"{labels_name} must be integers (any integer dtype but uint64), or class "
            f"probabilities [{features.shape[0]}, C] in floating point, got {labels.dtype} "
            f"{list(labels.shape)}: if they are class numbers give {labels_name}.long()"
        )
    if (labels.ndim != 1 and not probabilities) or labels.shape[0] != features.shape[0]:
        raise ValueError(
            f"{labels_name} must have shape [{features.shape[0]}], one label for each entry of "
            f"{features_name} {list(features.shape)}, got {list(labels.shape)}"
            + _way_to_fit(features, labels, features_name, labels_name)
        )
    if labels.device != features.device:
        raise ValueError(
            f"{labels_name} are on {labels.device} but {features_name} are on {features.device}: "
            "move them to one device"
        )


def _way_to_fit(features: Tensor, labels: Tensor, features_name: str, labels_name: str) -> str:
    """What was perhaps meant by labels of another length."""
    num_rows, num_labels = features.shape[0], labels.shape[0] if labels.ndim > 0 else 0
    if labels.ndim == 2 and labels.shape[1] == 1:
        return f": give {labels_name}.squeeze(1)"
    if labels.ndim != 1 or num_labels == 0:
        return ""
    if features.ndim > 2 and num_labels == num_rows * features.shape[1]:
        return f": views of an image share its label, or give {features_name}.flatten(0, 1)"
    if features.ndim > 2 and num_labels == features.shape[1]:
        return f": if they are [V, B, ...] give {features_name}.transpose(0, 1)"
    if features.ndim == 2 and num_rows > num_labels > 1 and num_rows % num_labels == 0:
        views = num_rows // num_labels
        return (
            f": for {views} views, one after the other, give {labels_name}.repeat({views}); or "
            f"{features_name} as [B, V, D]"
        )
    return ""


def check_probabilities(
    labels: Tensor, ref_labels: Tensor | None, num_classes: int | None, leave_one_out: bool
) -> None:
    """Labels ``[N, C]`` beside the options, and beside those of a reference set."""
    for name, given in (("labels", labels), ("ref_labels", ref_labels)):
        if given is None or given.ndim != 2 or not given.is_floating_point():
            continue
        if given.shape[1] == 0:
            raise ValueError(f"{name} {list(given.shape)} have no classes: give one column a class")
        if given.shape[1] == 1 and num_classes is None:
            raise ValueError(
                f"{name} {list(given.shape)} have one class, of which the loss is always 0: give "
                f"class numbers as integers ({name}.squeeze(1).long()), or num_classes=1 if one "
                "class is meant"
            )
        if num_classes is not None and given.shape[1] != num_classes:
            raise ValueError(
                f"{name} {list(given.shape)} have {given.shape[1]} classes but "
                f"num_classes={num_classes}: give one column a class"
            )
        num_classes = given.shape[1]
        if leave_one_out:
            raise ValueError(
                "leave_one_out has no meaning with class probabilities: a sample of several "
                "classes has no class to be left out of; use integer labels"
            )


def check_features(features: Any, name: str = "features") -> None:
    """``[N, D]`` or ``[B, V, ...]``, a float dtype."""
    if not isinstance(features, Tensor):
        stacks = isinstance(features, (list, tuple)) and any(torch.is_tensor(x) for x in features)
        way_out = f": give torch.stack({name}, dim=1), if they are views" if stacks else ""
        raise TypeError(f"{name} must be a tensor, got {type(features).__name__}{way_out}")
    if features.dtype not in FEATURE_DTYPES:
        swapped = "" if features.dtype not in LABEL_DTYPES else ": labels are the second argument"
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {features.dtype}{swapped}"
        )
    if type(features).__name__ == "DTensor":
        raise TypeError(
            f"{name} must be one rank's own samples, got a DTensor: give {name}.to_local() where "
            "it is sharded by samples, and process_group for centroids over ranks"
        )
    if features.layout != torch.strided or features.is_nested:
        kind = "nested" if features.is_nested else features.layout
        way_out = f"torch.cat({name}.unbind())" if features.is_nested else f"{name}.to_dense()"
        raise TypeError(f"{name} must be dense, got {kind}: give {way_out}")
    if features.ndim < 2:
        raise ValueError(
            f"{name} must have shape [N, D] or [B, V, ...], got {list(features.shape)}"
        )
    if 0 in features.shape[1:]:
        raise ValueError(
            f"{name} {list(features.shape)} have an empty dimension: every sample needs "
            "at least one view and one channel"
        )
    if features.ndim > 2 and features.shape[1] > 1 and features.shape[2:].numel() == 1:
        raise ValueError(
            f"{name} {list(features.shape)} would be {features.shape[1]} views of width 1: give "
            f"{name}.flatten(1), if they are pooled maps"
        )


def check_not_mapped(*tensors: object) -> None:
    """`torch.func.vmap` cannot see which classes a batch holds."""
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return
    for tensor in tensors:
        while isinstance(tensor, Tensor) and functorch.is_functorch_wrapped_tensor(tensor):
            if functorch.is_batchedtensor(tensor):
                raise NotImplementedError(
                    "VarCon's loss cannot be mapped by torch.func.vmap, since the classes present "
                    "differ from batch to batch: call it once for each batch"
                )
            tensor = functorch.get_unwrapped(tensor)


def check_reference_set(
    ref_features: Tensor | None, ref_labels: Tensor | None, leave_one_out: bool, memory: bool
) -> None:
    if (ref_features is None) != (ref_labels is None):
        given, missing = (
            ("ref_features", "ref_labels") if ref_labels is None else ("ref_labels", "ref_features")
        )
        raise ValueError(f"{given} given without {missing}: a reference set needs both")
    if ref_features is None:
        return
    if leave_one_out:
        raise ValueError(
            "leave_one_out has no meaning with ref_features: the anchors are not members of the "
            "reference centroids"
        )
    if memory:
        raise ValueError(
            "ref_features cannot be used with a centroid memory: both say where the centroids "
            "come from; use a second VarConLoss without centroid_momentum"
        )


def check_weight_device(weight: Tensor | None, features: Tensor) -> None:
    if weight is not None and weight.device != features.device:
        raise ValueError(
            f"weight is on {weight.device} but features are on {features.device}: "
            "move the loss module (or the weight) to the features' device"
        )


def check_memory_options(
    num_classes: int | None, feature_dim: Any, centroid_momentum: Any, leave_one_out: bool
) -> tuple[int | None, float | None]:
    """``feature_dim`` and ``centroid_momentum`` as plain numbers."""
    if feature_dim is not None:
        feature_dim = whole_number("feature_dim", feature_dim)
        if feature_dim < 1:
            raise ValueError(f"feature_dim must be a positive int or None, got {feature_dim}")
    if centroid_momentum is None:
        return feature_dim, None
    centroid_momentum = real_number("centroid_momentum", centroid_momentum, "a number or None")
    if not 0 <= centroid_momentum < 1:
        raise ValueError(
            f"centroid_momentum must lie in [0, 1), got {centroid_momentum}: "
            "0 keeps the latest batch, values near 1 average over many"
        )
    if num_classes is None or feature_dim is None:
        raise ValueError(
            "centroid_momentum needs num_classes and feature_dim, the shape of the memory, got "
            f"num_classes={num_classes}, feature_dim={feature_dim}"
        )
    if leave_one_out:
        raise ValueError(
            "leave_one_out cannot be used with centroid_momentum: a remembered centroid is made "
            "of many batches, from which a sample cannot be taken out"
        )
    return feature_dim, centroid_momentum


def check_memory_size(num_classes: Any, memory: Tensor | None) -> None:
    """A memory ``[C, D]`` has a centroid for each class from the start on."""
    if memory is not None and num_classes != len(memory):
        raise ValueError(
            f"num_classes cannot become {num_classes}: the centroid memory has {len(memory)} "
            "classes. Make a new loss"
        )


def check_memory(features: Tensor, memory: Tensor) -> None:
    """Anchors ``[N, D]`` and the memory's centroids ``[C, D]``."""
    if features.shape[1] != memory.shape[1]:
        raise ValueError(
            f"features have width {features.shape[1]} but the centroid memory has "
            f"feature_dim={memory.shape[1]}"
        )
    if features.device != memory.device:
        raise ValueError(
            f"the centroid memory is on {memory.device} but features are on {features.device}: "
            "move the loss module to the features' device"
        )


def check_width(rows: Tensor, ref_rows: Tensor) -> None:
    """Anchors ``[N, D]`` and reference ``[M, D]``, both already flattened."""
    if rows.shape[1] != ref_rows.shape[1]:
        raise ValueError(
            f"ref_features have width {ref_rows.shape[1]} but features have width {rows.shape[1]}: "
            "both must come from the same embedding space"
        )
    if rows.device != ref_rows.device:
        raise ValueError(
            f"ref_features are on {ref_rows.device} but features are on {rows.device}: "
            "move them to one device"
        )
