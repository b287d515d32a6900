"""What a caller may pass, and what to give instead. Nothing here makes a device wait."""

import difflib
import math
import numbers
import sys
import warnings
from typing import Any, NoReturn

import torch
from torch import Tensor

from varcon_loss.readable import values_may_be_read

# Packages between a caller's line and ours: a warning is about the former.
_BETWEEN = ("varcon_loss", "torch", "pytorch_metric_learning", "timm")
_CHOICES = {
    "reduction": ("mean", "sum", "none"),
    "impl": ("auto", "reference", "eager", "triton"),
}
FEATURE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_UNSIGNED = (torch.uint8, torch.uint16, torch.uint32)
LABEL_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64, *_UNSIGNED)


def warn(message: str) -> None:
    """At the line of the caller's that led here, whatever lies between."""
    level, frame = 2, sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def real_number(name: str, value: Any, kind: str = "a number") -> float:
    """Any real number, of numpy too, as a float."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        hint = next((hint for given, hint in _NO_NUMBERS if isinstance(value, given)), "")
        raise TypeError(f"{name} must be {kind}, got {type(value).__name__}{hint}")
    return float(value)


_OF_TEXT = "for a sentence-transformers model use varcon_loss.integrations.text.VarConLoss"
_NO_NUMBERS = (
    (Tensor, ", which is not learned: give .item()"),
    (torch.device, ": the loss follows the features' device"),
    (torch.nn.Module, f": the loss takes embeddings; {_OF_TEXT}"),
)


def whole_number(name: str, value: Any, kind: str = "an int or None") -> int:
    """Any whole number, of numpy too, as an int."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be {kind}, got {type(value).__name__}")
    return int(value)


def option(name: str, value: Any) -> Any:
    """An option of the loss by its public name, checked, as it is kept.

    Numbers of any kind become Python's: compiled graphs know no others.
    """
    if name in ("temperature", "epsilon"):
        value = real_number(name, value)
        if name == "temperature" and not 0 < value < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {value}")
        if not value >= 0:
            raise ValueError(f"epsilon must be >= 0, got {value}")
    elif name in ("normalize", "leave_one_out"):
        if type(value).__name__ not in ("bool", "bool_"):  # the text "False" would count as true
            raise TypeError(f"{name} must be True or False, got {value!r}")
        value = bool(value)
    elif name in _CHOICES:
        if value not in _CHOICES[name]:
            raise ValueError(f"{name} must be one of {_CHOICES[name]}, got {value!r}")
    elif name == "weight":
        _check_weight(value)
    elif name == "process_group":
        _check_group(value)
    elif value is not None:
        value = whole_number(name, value)
        if name != "ignore_index" and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{name} must be a number that int64 labels can have, got {value}")
    return value


def check_temperatures(temperature: float, epsilon: float) -> None:
    """Eq. 13 needs ``epsilon < temperature``, else tau2 would reach 0."""
    if epsilon >= temperature:
        raise ValueError(
            f"epsilon must be smaller than temperature, got epsilon={epsilon} and "
            f"temperature={temperature}: tau2 = temperature - epsilon + 2 epsilon p would reach 0. "
            "Give epsilon too, as a fifth of the temperature"
        )


def _check_weight(weight: Any) -> None:
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"weight must be a tensor with one entry per class, got {type(weight).__name__}"
        )
    if weight.ndim != 1 or len(weight) == 0 or not weight.is_floating_point():
        got = f"{weight.dtype} {list(weight.shape)}"
        raise ValueError(f"weight must be a floating-point tensor [num_classes], got {got}")
    warn_of_no_gradient("weight", weight, "class weights are constants of the loss")


def check_weight_values(weight: Tensor | None) -> None:
    """Once, where a look waits for nothing: NaN would come out much later."""
    if weight is None or not values_may_be_read(weight):
        return
    bad = (~((weight >= 0) & (weight < math.inf))).nonzero().flatten().tolist()
    if bad:
        got = f"{float(weight[bad[0]])} for class {bad[0]}"
        raise ValueError(f"weight must be finite and at least 0, got {got}")


def num_classes_of(num_classes: int | None, weight: Tensor | None) -> int | None:
    """``num_classes``, or the length of ``weight`` where only that is given."""
    if weight is None or num_classes == len(weight):
        return num_classes
    if num_classes is not None:
        raise ValueError(
            f"weight has {len(weight)} entries but num_classes={num_classes}: "
            "give one weight per class"
        )
    return len(weight)


def _check_group(group: Any) -> None:
    kinds = "'world', a torch.distributed.ProcessGroup or None"
    if isinstance(group, str) and group != "world":
        raise ValueError(f"process_group must be {kinds}, got {group!r}")
    known = (str, type(None), torch.distributed.ProcessGroup)
    if not isinstance(group, known) and group != torch.distributed.GroupMember.NON_GROUP_MEMBER:
        raise TypeError(f"process_group must be {kinds}, got {type(group).__name__}")


def check_memory_options(
    num_classes: int | None, feature_dim: int | None, momentum: Any, leave_one_out: bool
) -> float | None:
    """``centroid_momentum`` as a float, beside what it needs and excludes."""
    if momentum is None:
        return None
    momentum = real_number("centroid_momentum", momentum, "a number or None")
    if not 0 <= momentum < 1:
        raise ValueError(
            f"centroid_momentum must lie in [0, 1), got {momentum}: "
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
    return momentum


_OF_PML = "that is pytorch-metric-learning's: varcon_loss.integrations.metric_learning.VarConLoss"
_MASK = "samples are compared with classes, not with each other: give labels="
_MASK_AS_LABELS = "labels=mask.int().argmax(1)"
_BASE_TEMPERATURE = (
    "the loss is not rescaled by temperature / base_temperature: leave it out, and multiply the "
    "loss (or the learning rate) yourself if you relied on it"
)
# What the arguments of other losses become here.
_FROM_ELSEWHERE = {
    "contrast_mode": "every view is an anchor, as with contrast_mode='all': leave it out, or give "
    "anchors of some classes as features and all samples as ref_features",
    "base_temperature": _BASE_TEMPERATURE,
    "mask": f"{_MASK} instead, class numbers, or {_MASK_AS_LABELS}",
    "label_smoothing": "give class probabilities [N, C] as labels",
    "tau": "give temperature",
    "temp": "give temperature",
    "targets": "give labels",
    "target": "give labels",
    "indexes": "give class numbers as labels",
    "target_labels": "give class numbers as labels",
    "device": "the loss follows the features' device: leave it out",
    "model": f"the loss takes embeddings; {_OF_TEXT}",
    "indices_tuple": _OF_PML,
    "ref_emb": f"give ref_features; {_OF_PML}",
    "embeddings": f"give features; {_OF_PML}",
    "reducer": f"give reduction; {_OF_PML}",
    "distance": f"give normalize; {_OF_PML}",
    "embedding_size": f"leave it out, only a centroid memory has a width; {_OF_PML}",
}


def refuse_unknown(
    where: str, unknown: dict[str, Any], known: tuple[str, ...], temperature: Any = None
) -> None:
    """Keywords that a call does not take, but for those that change nothing.

    Raises:
        TypeError: it says what the keyword becomes here, or what it looks like.
    """
    for name, value in unknown.items():
        changes_nothing = {
            "contrast_mode": isinstance(value, str) and value == "all",
            "base_temperature": temperature is not None and _same(value, temperature),
            "mask": value is None,
        }
        if changes_nothing.get(name, False):
            continue
        advice = _FROM_ELSEWHERE.get(name)
        if name == "reduction":
            advice = "give reduction when the loss is made"
        if advice is None:
            alike = difflib.get_close_matches(name, list(known), n=1)
            advice = f"did you mean {alike[0]}?" if alike else f"it takes {', '.join(known)}"
        raise TypeError(f"{where} has no argument {name!r}: {advice}")


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, numbers.Real) and isinstance(b, numbers.Real) and float(a) == float(b)


def refuse_positional_options(where: str, given: tuple[Any, ...]) -> NoReturn:
    """A second number would be SupCon's ``contrast_mode`` or ``base_temperature``."""
    raise TypeError(
        f"{where} takes temperature by position and all else by name, got {len(given)} more "
        f"({', '.join(map(repr, given))}): give epsilon=, the adaptive range. SupCon's positions "
        "mean something else: contrast_mode (every view is an anchor, leave it out) and "
        f"base_temperature ({_BASE_TEMPERATURE})"
    )


def refuse_arguments(where: str, positional: tuple[Any, ...], unknown: dict[str, Any]) -> None:
    """What a call of the loss does not take, but for what changes nothing."""
    refuse_unknown(where, unknown, ("features", "labels", "ref_features", "ref_labels"))
    if positional:
        refuse_positional_tensors(positional)


def refuse_positional_tensors(given: tuple[Any, ...]) -> None:
    """What stands behind ``features, labels``; a mask of None changes nothing.

    Raises:
        TypeError: it names what other losses have there.
    """
    if len(given) == 1 and given[0] is None:
        return
    ways = {
        "SupCon's mask": f"{_MASK} alone",
        "a miner's indices_tuple": _OF_PML,
        "a second tower": "give ref_features= and ref_labels=",
    }
    listed = "; ".join(f"{name}: {way}" for name, way in ways.items())
    kinds = ", ".join(type(x).__name__ for x in given)
    raise TypeError(
        f"the call takes features and labels by position, got {len(given)} more ({kinds}). {listed}"
    )


def warn_of_no_gradient(name: str, tensor: Tensor | None, why: str) -> None:
    """A tensor that asks for a gradient and gets none is rarely meant."""
    wanted = tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
    if wanted and not torch.compiler.is_compiling():
        warn(
            f"{name}.requires_grad is True, but no gradient goes there: {why}. Give {name}.detach()"
        )


def warn_of_odd_batch(num_samples: int, num_present: int) -> None:
    """For a batch in which no sample is drawn to another, and whose loss looks as if all were."""
    if num_samples < 2 or 1 < num_present < num_samples:
        return
    alone = (
        f"each of the {num_samples} samples is alone in its class, its own centroid: nothing "
        "draws it to others of its class, and the loss falls to near 0 by spreading samples. "
        "Sample several of each class, or use a centroid memory"
    )
    alike = f"all {num_samples} samples are of one class: with nothing to tell apart the loss is 0"
    warn(alike if num_present == 1 else alone)


def check_samples(features: Any, labels: Any, of: str = "") -> None:
    """``features`` ``[N, D]`` or ``[B, V, ...]``, ``labels`` ``[N]`` or ``[B]`` beside them.

    Args:
        features: of any kind.
        labels: of any kind; a column ``[N, 1]`` of integers is as good as ``[N]``.
        of: ``"ref_"`` for a reference set.
    """
    features_name, name = f"{of}features", f"{of}labels"
    check_features(features, features_name)
    if labels is None:
        raise ValueError(
            f"{name} is None: VarCon is a supervised loss and needs one class number a sample. "
            "Without labels (SimCLR's views) keep SupConLoss"
        )
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"{name} must be a tensor, got {type(labels).__name__}: give torch.as_tensor({name})"
        )
    _check_dense(name, labels)
    is_integer = labels.dtype in LABEL_DTYPES
    probabilities = labels.ndim == 2 and labels.dtype in FEATURE_DTYPES
    shapes = f"{name} {list(labels.shape)}"
    if labels.ndim == 2 and labels.shape[1] > 1:
        _refuse_mask(labels, name)
    if labels.ndim > 1 and not probabilities and labels.shape[1:].numel() != 1:
        raise TypeError(f"{shapes} of {labels.dtype} {_advice_for_shape(features, labels, of)}")
    if not is_integer and not probabilities:
        raise TypeError(
            f"{name} must be integers (any integer dtype but uint64), or class "
            f"probabilities [{features.shape[0]}, C] in floating point, got {labels.dtype} "
            f"{list(labels.shape)}: if they are class numbers give {name}.long()"
        )
    column = is_integer and labels.ndim == 2 and labels.shape[1] == 1
    if (labels.ndim != 1 and not probabilities and not column) or (
        labels.shape[0] != features.shape[0]
    ):
        raise ValueError(
            f"{name} must have shape [{features.shape[0]}], one label for each entry of "
            f"{features_name} {list(features.shape)}, got {list(labels.shape)}"
            + _way_to_fit(features, labels, features_name, name)
        )
    check_device(labels, f"{name} are", features, "them", features_name)


def _refuse_mask(labels: Tensor, name: str) -> None:
    """A matrix that tells which samples are of one class, as SupCon takes it.

    An identity matrix is a mask and one-hot labels at once: a warning.
    """
    if labels.shape[0] != labels.shape[1] or not values_may_be_read(labels):
        return
    if not bool((labels.diagonal() == 1).all()) or not torch.equal(labels, labels.T):
        return
    if not bool(((labels == 0) | (labels == 1)).all()):
        return
    is_mask = f"{name} {list(labels.shape)} look like SupCon's mask of samples of one class"
    if labels.is_floating_point() and int(labels.count_nonzero()) == len(labels):
        warn(f"{is_mask}, and are taken as class probabilities: give class numbers")
        return
    raise TypeError(f"{is_mask}: give class numbers, {name}=mask.int().argmax(1)")


def _advice_for_shape(features: Tensor, labels: Tensor, of: str) -> str:
    """What fits class numbers of several dimensions, or integer tables."""
    x, y = f"{of}features", f"{of}labels"
    if labels.shape == features.shape[: labels.ndim] and features.ndim == labels.ndim + 1:
        return (
            f"give each view of {x} {list(features.shape)} a label of its own: then each is a "
            f"sample, give {x}.flatten(0, {labels.ndim - 1}) and {y}.flatten()"
        )
    spatial = features.shape[:1] + features.shape[2:]
    if features.ndim > 2 and labels.shape == spatial:
        last = features.ndim - 1
        moved = f"{x}.transpose(1, 2)" if last == 2 else f"{x}.movedim(1, -1)"
        return (
            f"give each place of {x} {list(features.shape)} a class, with channels first: give "
            f"{moved}.flatten(0, {last - 1}) and {y}.flatten()"
        )
    if labels.ndim == 2 and labels.shape[0] == features.shape[0]:
        return (
            f"are neither class numbers, one a sample, nor class probabilities: for {y} of several "
            f"classes a sample give a table [N, C] of 0 and 1 in floating point (its .float()), "
            f"for one class a sample {y}[:, 0] or .argmax(1)"
        )
    return f"do not fit {x} {list(features.shape)}: give one class number a sample"


def _way_to_fit(features: Tensor, labels: Tensor, features_name: str, name: str) -> str:
    """What was perhaps meant by labels of another length."""
    num_rows, num_labels = features.shape[0], labels.shape[0] if labels.ndim > 0 else 0
    if labels.ndim != 1 or num_labels == 0:
        return ""
    if features.ndim > 2 and num_labels == num_rows * features.shape[1]:
        return f": views of an image share its label, or give {features_name}.flatten(0, 1)"
    if features.ndim > 2 and num_labels == features.shape[1]:
        return f": if they are [V, B, ...] give {features_name}.transpose(0, 1)"
    if features.ndim == 2 and num_rows > num_labels > 1 and num_rows % num_labels == 0:
        views = num_rows // num_labels
        return (
            f": for {views} views, one after the other, give {name}.repeat({views}); or "
            f"{features_name} as [B, V, D]"
        )
    return ""


def check_probabilities(
    labels: Tensor, ref_labels: Tensor | None, num_classes: int | None, leave_one_out: bool
) -> int | None:
    """``num_classes``, as given or as class probabilities ``[N, C]`` say; they must agree."""
    for name, given in (("labels", labels), ("ref_labels", ref_labels)):
        if given is None or not given.is_floating_point():
            continue
        if given.shape[1] == 0:
            raise ValueError(f"{name} {list(given.shape)} have no classes: give one column a class")
        if given.shape[1] == 1 and num_classes is None:
            raise ValueError(
                f"{name} {list(given.shape)} have one class, whose loss is always 0: give "
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
    return num_classes


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
    _check_dense(name, features)
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


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else tensor.layout
        way_out = f"torch.cat({name}.unbind())" if tensor.is_nested else f"{name}.to_dense()"
        raise TypeError(f"{name} must be dense, got {kind}: give {way_out}")


def check_reference_set(
    ref_features: Tensor | None, ref_labels: Tensor | None, leave_one_out: bool, memory: bool
) -> None:
    """Both or neither, and with no option that has no meaning beside them."""
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


def check_device(
    tensor: Tensor, name: str, features: Tensor, move: str, features_name: str = "features"
) -> None:
    """Both on one device."""
    if tensor.device != features.device:
        raise ValueError(
            f"{name} on {tensor.device} but {features_name} are on {features.device}: move {move} "
            "to one device"
        )


def check_memory_fits(width: int, features: Tensor, memory: Tensor) -> None:
    """Anchors of this ``width`` and the memory ``[C, D]``."""
    if width != memory.shape[1]:
        raise ValueError(
            f"features have width {width} but the centroid memory has feature_dim={memory.shape[1]}"
        )
    check_device(memory, "the centroid memory is", features, "the loss module and the features")


def check_reference_fits(width: int, features: Tensor, ref_features: Tensor) -> None:
    """Anchors of this ``width`` and a reference set, of one embedding space."""
    ref_width = ref_features.shape[1 if ref_features.ndim == 2 else 2 :].numel()
    if width != ref_width:
        raise ValueError(
            f"ref_features have width {ref_width} but features have width {width}: "
            "both must come from the same embedding space"
        )
    check_device(ref_features, "ref_features are", features, "them")
    why = (
        "centroids are constants of the loss (to train both sides add the loss the other way round)"
    )
    warn_of_no_gradient("ref_features", ref_features, why)
