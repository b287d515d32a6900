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
_CALL = ("features", "labels", "ref_features", "ref_labels")

_OF_TEXT = "for a sentence-transformers model use varcon_loss.integrations.text.VarConLoss"
_OF_PML = "that is pytorch-metric-learning's: varcon_loss.integrations.metric_learning.VarConLoss"
_NO_NUMBERS = (
    (Tensor, "a tensor is not learned: give .item()"),
    (torch.device, "the loss follows the features' device"),
    (torch.nn.Module, f"the loss takes embeddings; {_OF_TEXT}"),
)
_MASK = "samples are compared with classes, not with each other: give labels= alone"
_BASE_TEMPERATURE = (
    "the loss is not rescaled by temperature / base_temperature: leave it out, and multiply the "
    "loss (or the learning rate) yourself if you relied on it"
)
# What the arguments of other losses become here.
_FROM_ELSEWHERE = {
    "contrast_mode": "every view is an anchor, as with contrast_mode='all': leave it out, or give "
    "anchors of some classes as features and all samples as ref_features",
    "base_temperature": _BASE_TEMPERATURE,
    "mask": f"{_MASK}, class numbers, or labels=mask.int().argmax(1)",
    "label_smoothing": "give class probabilities [N, C] as labels",
    "reduction": "give it when the loss is made",
    "device": "the loss follows the features' device: leave it out",
    "model": f"the loss takes embeddings; {_OF_TEXT}",
    "indices_tuple": _OF_PML,
    "ref_emb": f"give ref_features; {_OF_PML}",
    "embeddings": f"give features; {_OF_PML}",
    "reducer": f"give reduction; {_OF_PML}",
    "distance": f"give normalize; {_OF_PML}",
    "embedding_size": f"leave it out, only a centroid memory has a width; {_OF_PML}",
}
_FROM_ELSEWHERE |= dict.fromkeys(("tau", "temp"), "give temperature")
_FROM_ELSEWHERE |= dict.fromkeys(
    ("target", "targets", "indexes", "target_labels"), "give labels, one class number a sample"
)


def refuse(what: str, got: object, do: str = "", error: type[Exception] = ValueError) -> NoReturn:
    """The three parts of every message: what was expected, what came, what to do."""
    raise error(f"{what}, got {got}" + (f": {do}" if do else ""))


def warn(message: str) -> None:
    """Warn at the line of the caller, past the frames of `_BETWEEN`."""
    level, frame = 2, sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def real_number(name: str, value: Any, kind: str = "a number") -> float:
    """Any real number, of numpy too, as a float."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        do = next((do for given, do in _NO_NUMBERS if isinstance(value, given)), "")
        refuse(f"{name} must be {kind}", type(value).__name__, do, TypeError)
    return float(value)


def whole_number(name: str, value: Any, kind: str = "an int or None") -> int:
    """Any whole number, of numpy too, as an int."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        refuse(f"{name} must be {kind}", type(value).__name__, error=TypeError)
    return int(value)


def option(name: str, value: Any) -> Any:
    """An option of the loss by its public name, checked, as it is kept.

    Numbers of any kind become Python's: compiled graphs know no others.
    """
    if name in ("temperature", "epsilon"):
        value = real_number(name, value)
        if name == "temperature" and not 0 < value < math.inf:
            refuse("temperature must be positive and finite", value)
        if not value >= 0:
            refuse("epsilon must be >= 0", value)
    elif name in ("normalize", "leave_one_out"):
        if type(value).__name__ not in ("bool", "bool_"):  # the text "False" would count as true
            refuse(f"{name} must be True or False", repr(value), error=TypeError)
        value = bool(value)
    elif name in _CHOICES:
        if value not in _CHOICES[name]:
            refuse(f"{name} must be one of {_CHOICES[name]}", repr(value))
    elif name == "weight":
        _check_weight(value)
    elif name == "process_group":
        _check_group(value)
    elif value is not None:
        value = whole_number(name, value)
        if name != "ignore_index" and value < 1:
            refuse(f"{name} must be at least 1", value)
        if not -(2**63) <= value < 2**63:
            refuse(f"{name} must be a number that int64 labels can have", value)
    return value


def check_temperatures(temperature: float, epsilon: float) -> None:
    """Eq. 13 needs ``epsilon < temperature``, else tau2 would reach 0."""
    if epsilon >= temperature:
        got = f"epsilon={epsilon} and temperature={temperature}"
        do = "else tau2 could reach 0. Give epsilon too, as a fifth of the temperature"
        refuse("epsilon must be smaller than temperature", got, do)


def _check_weight(weight: Any) -> None:
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        kind = type(weight).__name__
        refuse("weight must be a tensor with one entry per class", kind, error=TypeError)
    if weight.ndim != 1 or len(weight) == 0 or not weight.is_floating_point():
        got = f"{weight.dtype} {list(weight.shape)}"
        refuse("weight must be a floating-point tensor [num_classes]", got)
    warn_of_no_gradient("weight", weight, "class weights are constants of the loss")
    if not values_may_be_read(weight):
        return
    bad = (~((weight >= 0) & (weight < math.inf))).nonzero().flatten().tolist()
    if bad:
        got = f"{float(weight[bad[0]])} for class {bad[0]}"
        refuse("weight must be finite and at least 0", got)


def num_classes_of(num_classes: int | None, weight: Tensor | None) -> int | None:
    """``num_classes``, or the length of ``weight`` where only that is given."""
    if weight is None or num_classes == len(weight):
        return num_classes
    if num_classes is not None:
        refuse("weight needs one entry a class", f"{len(weight)} but num_classes={num_classes}")
    return len(weight)


def _check_group(group: Any) -> None:
    what = "process_group must be 'world', a torch.distributed.ProcessGroup or None"
    if isinstance(group, str) and group != "world":
        refuse(what, repr(group))
    known = (str, type(None), torch.distributed.ProcessGroup)
    if not isinstance(group, known) and group != torch.distributed.GroupMember.NON_GROUP_MEMBER:
        refuse(what, type(group).__name__, error=TypeError)


def check_memory_options(
    num_classes: int | None, feature_dim: int | None, momentum: Any, leave_one_out: bool
) -> float | None:
    """``centroid_momentum`` as a float, beside what it needs and excludes."""
    if momentum is None:
        return None
    momentum = real_number("centroid_momentum", momentum, "a number or None")
    if not 0 <= momentum < 1:
        do = "0 keeps the latest batch, values near 1 average over many"
        refuse("centroid_momentum must lie in [0, 1)", momentum, do)
    if num_classes is None or feature_dim is None:
        got = f"num_classes={num_classes}, feature_dim={feature_dim}"
        refuse("centroid_momentum needs num_classes and feature_dim, the memory's shape", got)
    if leave_one_out:
        why = "a remembered centroid is a mean over many batches. Give one of the two"
        raise ValueError(f"leave_one_out cannot be used with centroid_momentum: {why}")
    return momentum


def refuse_unknown(
    where: str, unknown: dict[str, Any], known: tuple[str, ...] = _CALL, temperature: Any = None
) -> None:
    """Keywords that a call does not take, but for those that change nothing.

    Raises:
        TypeError: it says what the keyword becomes here, or what it looks like.
    """
    for name, value in unknown.items():
        no_op = {"contrast_mode": isinstance(value, str) and value == "all", "mask": value is None}
        no_op["base_temperature"] = isinstance(value, (int, float)) and value == temperature
        if no_op.get(name, False):
            continue
        alike = difflib.get_close_matches(name, known, n=1)
        advice = f"did you mean {alike[0]}?" if alike else f"it takes {', '.join(known)}"
        advice = _FROM_ELSEWHERE.get(name, advice)
        raise TypeError(f"{where} has no argument {name!r}: {advice}")


def refuse_options(where: str, given: tuple[Any, ...]) -> NoReturn:
    """By position: a second number would be SupCon's ``contrast_mode`` or ``base_temperature``."""
    got = f"{where} takes temperature by position and all else by name, got more, {given!r}"
    supcon = "SupCon has contrast_mode (leave it out: every view is an anchor) there"
    base = f"base_temperature ({_BASE_TEMPERATURE})"
    raise TypeError(f"{got}: give epsilon=, the adaptive range. {supcon}, and {base}")


def refuse_arguments(where: str, positional: tuple[Any, ...], unknown: dict[str, Any]) -> None:
    """What stands behind ``features, labels`` in a call; a mask of None changes nothing.

    Raises:
        TypeError: it names what other losses have there.
    """
    refuse_unknown(where, unknown)
    if not positional or (len(positional) == 1 and positional[0] is None):
        return
    raise TypeError(
        f"the call takes features and labels by position, got {len(positional)} more "
        f"({', '.join(type(x).__name__ for x in positional)}). SupCon's mask: {_MASK}. A miner's "
        f"indices_tuple: {_OF_PML}. A second tower: give ref_features= and ref_labels="
    )


def warn_of_no_gradient(name: str, tensor: Tensor | None, why: str) -> None:
    """A warning if the tensor requires a gradient: it gets none."""
    asks = tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
    if asks and not torch.compiler.is_compiling():
        no_gradient = f"{name}.requires_grad is True, but no gradient goes there"
        warn(f"{no_gradient}: {why}. Give {name}.detach()")


def warn_of_odd_batch(num_samples: int, num_present: int) -> None:
    """A warning for a batch of one class, or with one sample of each: its loss is near 0."""
    if num_samples < 2 or 1 < num_present < num_samples:
        return
    if num_present == 1:
        warn(f"all {num_samples} samples are of one class: nothing to tell apart, the loss is 0")
    else:
        alone = f"each of the {num_samples} samples is alone in its class, its own centroid"
        why = "the loss falls to near 0 by spreading samples, and draws none to its class"
        warn(f"{alone}: {why}. Sample several of each class, or use a centroid memory")


def check_samples(features: Any, labels: Any, of: str = "") -> None:
    """``features`` ``[N, D]`` or ``[B, V, ...]``, ``labels`` ``[N]`` or ``[B]`` beside them.

    Args:
        features: of any kind.
        labels: of any kind; a column ``[N, 1]`` of integers is as good as ``[N]``.
        of: ``"ref_"`` for a reference set.
    """
    x, y = f"{of}features", f"{of}labels"
    check_features(features, x)
    if labels is None:
        why = "VarCon is a supervised loss and needs one class number a sample"
        raise ValueError(f"{y} is None: {why}. Without labels (SimCLR's views) keep SupConLoss")
    if not isinstance(labels, Tensor):
        do = f"give torch.as_tensor({y})"
        refuse(f"{y} must be a tensor", type(labels).__name__, do, TypeError)
    _check_dense(y, labels)
    num_rows, shape = features.shape[0], list(labels.shape)
    is_integer = labels.dtype in LABEL_DTYPES
    probabilities = labels.ndim == 2 and labels.dtype in FEATURE_DTYPES
    column = is_integer and labels.ndim == 2 and labels.shape[1] == 1
    if labels.ndim == 2 and labels.shape[1] > 1:
        _refuse_mask(labels, y)
    if labels.ndim > 1 and not probabilities and labels.shape[1:].numel() != 1:
        raise TypeError(f"{y} {shape} of {labels.dtype} {_advice(features, labels, x, y)}")
    if not is_integer and not probabilities:
        what = f"{y} must be integers (any integer dtype but uint64), or class probabilities"
        do = f"if they are class numbers give {y}.long()"
        got = f"{labels.dtype} {shape}"
        refuse(f"{what} [{num_rows}, C] in floating point", got, do, TypeError)
    if not (labels.ndim == 1 or probabilities or column) or labels.shape[0] != num_rows:
        what = f"{y} must have shape [{num_rows}], one label for each entry of {x}"
        refuse(f"{what} {list(features.shape)}", shape, _way_to_fit(features, labels, x, y))
    check_device(labels, f"{y} are", features, "them", x)


def _refuse_mask(labels: Tensor, name: str) -> None:
    """Refuse SupCon's mask, a matrix of the samples of one class.

    An identity matrix may also be one-hot labels: it gives a warning.
    """
    # In this order: an exported graph is for any number of rows.
    if not values_may_be_read(labels) or labels.shape[0] != labels.shape[1]:
        return
    on_diagonal = bool((labels.diagonal() == 1).all()) and torch.equal(labels, labels.T)
    if not on_diagonal or not bool(((labels == 0) | (labels == 1)).all()):
        return
    is_mask = f"{name} {list(labels.shape)} look like SupCon's mask of samples of one class"
    if not labels.is_floating_point() or int(labels.count_nonzero()) > len(labels):
        raise TypeError(f"{is_mask}: give class numbers, {name}=mask.int().argmax(1)")
    warn(f"{is_mask}, and are taken as class probabilities: give class numbers")


def _advice(features: Tensor, labels: Tensor, x: str, y: str) -> str:
    """What fits class numbers of several dimensions, or integer tables."""
    last, given = features.ndim - 1, list(features.shape)
    if labels.shape == features.shape[:-1] and last > 1:
        do = f"then each is a sample, give {x}.flatten(0, {last - 1}) and {y}.flatten()"
        return f"give each view of {x} {given} a label of its own: {do}"
    if last > 1 and labels.shape == features.shape[:1] + features.shape[2:]:
        moved = f"{x}.transpose(1, 2)" if last == 2 else f"{x}.movedim(1, -1)"
        do = f"give {moved}.flatten(0, {last - 1}) and {y}.flatten()"
        return f"give each place of {x} {given} a class, with channels first: {do}"
    neither = f"are neither class numbers, one a sample of {x} {given}, nor class probabilities"
    several = "several classes a sample give a table [N, C] of 0 and 1 in floating point (.float())"
    return f"{neither}: for {several}, for one class a sample {y}[:, 0] or .argmax(1)"


def _way_to_fit(features: Tensor, labels: Tensor, x: str, y: str) -> str:
    """What was perhaps meant by labels of another length."""
    num_rows, num_labels = features.shape[0], labels.shape[0] if labels.ndim > 0 else 0
    if labels.ndim != 1 or num_labels == 0:
        return ""
    if features.ndim > 2 and num_labels == num_rows * features.shape[1]:
        return f"views of an image share its label, or give {x}.flatten(0, 1)"
    if features.ndim > 2 and num_labels == features.shape[1]:
        return f"if they are [V, B, ...] give {x}.transpose(0, 1)"
    if features.ndim == 2 and num_rows > num_labels > 1 and num_rows % num_labels == 0:
        views = num_rows // num_labels
        one_by_one = f"for {views} views, one after the other, give {y}.repeat({views})"
        return f"{one_by_one}; or {x} as [B, V, D]"
    return ""


def check_probabilities(
    labels: Tensor, ref_labels: Tensor | None, num_classes: int | None, leave_one_out: bool
) -> int | None:
    """``num_classes``, as given or as class probabilities ``[N, C]`` say; they must agree."""
    for name, given in (("labels", labels), ("ref_labels", ref_labels)):
        if given is None or not given.is_floating_point():
            continue
        shapes, width = f"{name} {list(given.shape)}", given.shape[1]
        if width == 0:
            raise ValueError(f"{shapes} have no classes: give one column a class")
        if width == 1 and num_classes is None:
            do = f"class numbers ({name}.squeeze(1).long()), or num_classes=1 if one class is meant"
            raise ValueError(f"{shapes} have one class, whose loss is always 0: give {do}")
        if num_classes is not None and width != num_classes:
            do = "give one column a class"
            raise ValueError(f"{shapes} have {width} classes but num_classes={num_classes}: {do}")
        if leave_one_out:
            why = "a sample then belongs to several classes; use integer labels"
            raise ValueError(f"leave_one_out has no meaning with class probabilities: {why}")
        num_classes = width
    return num_classes


def check_features(features: Any, name: str = "features") -> None:
    """``[N, D]`` or ``[B, V, ...]``, a float dtype."""
    if not isinstance(features, Tensor):
        stacks = isinstance(features, (list, tuple)) and any(torch.is_tensor(x) for x in features)
        do = f"give torch.stack({name}, dim=1), if they are views" if stacks else ""
        refuse(f"{name} must be a tensor", type(features).__name__, do, TypeError)
    if features.dtype not in FEATURE_DTYPES:
        do = "" if features.dtype not in LABEL_DTYPES else "labels are the second argument"
        what = f"{name} must be float16, bfloat16, float32 or float64"
        refuse(what, features.dtype, do, TypeError)
    _check_dense(name, features)
    shape = list(features.shape)
    if features.ndim < 2:
        refuse(f"{name} must have shape [N, D] or [B, V, ...]", shape)
    if 0 in features.shape[1:]:
        do = "every sample needs at least one view and one channel"
        raise ValueError(f"{name} {shape} have an empty dimension: {do}")
    if features.ndim > 2 and features.shape[1] > 1 and features.shape[2:].numel() == 1:
        do = f"give {name}.flatten(1), if they are pooled maps"
        raise ValueError(f"{name} {shape} would be {shape[1]} views of width 1: {do}")


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else tensor.layout
        way_out = f"torch.cat({name}.unbind())" if tensor.is_nested else f"{name}.to_dense()"
        refuse(f"{name} must be dense", kind, f"give {way_out}", TypeError)


def check_reference_set(
    features: Tensor,
    ref_features: Tensor | None,
    ref_labels: Any,
    leave_one_out: bool,
    memory: bool,
) -> None:
    """Both or neither, of one embedding space, with no option that has no meaning beside them."""
    if (ref_features is None) != (ref_labels is None):
        given, missing = ("ref_features", "ref_labels")[:: 1 if ref_labels is None else -1]
        raise ValueError(f"{given} given without {missing}: a reference set needs both")
    if ref_features is None:
        return
    if leave_one_out:
        why = "anchors do not belong to the reference set. Give one of the two"
        raise ValueError(f"leave_one_out has no meaning with ref_features: {why}")
    if memory:
        do = "use a second VarConLoss without centroid_momentum"
        raise ValueError(f"ref_features cannot be used with a centroid memory: {do}")
    check_samples(ref_features, ref_labels, of="ref_")
    width, ref_width = width_of(features), width_of(ref_features)
    if width != ref_width:
        why = "both must come from the same embedding space"
        raise ValueError(f"ref_features have width {ref_width} but features have {width}: {why}")
    check_device(ref_features, "ref_features are", features, "them")
    why = "centroids are constants of the loss (to train both sides add the loss the other way)"
    warn_of_no_gradient("ref_features", ref_features, why)


def check_memory_fits(features: Tensor, memory: Tensor) -> None:
    """Anchors and the memory ``[C, D]``."""
    width, feature_dim = width_of(features), memory.shape[1]
    if width != feature_dim:
        got = f"width {width} but the centroid memory has feature_dim={feature_dim}"
        raise ValueError(f"features have {got}: make the loss with feature_dim={width}")
    check_device(memory, "the centroid memory is", features, "the loss module and the features")


def width_of(features: Tensor) -> int:
    """``D``, with views flattened."""
    return features.shape[1 if features.ndim == 2 else 2 :].numel()


def check_device(
    tensor: Tensor, name: str, features: Tensor, move: str, x: str = "features"
) -> None:
    """Both on one device."""
    if tensor.device != features.device:
        where = f"{name} on {tensor.device} but {x} are on {features.device}"
        raise ValueError(f"{where}: move {move} to one device")
