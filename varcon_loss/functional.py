"""The loss as functions, and the flow of every call: labels -> centroids -> rows -> reduction."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from varcon_loss import checks
from varcon_loss.classes import Classes
from varcon_loss.distributed import (
    PLANS_OF_FUNCTIONS,
    Plan,
    Plans,
    announce_failure,
    exchange_classes,
    make_plan,
    resolve_group,
)
from varcon_loss.implementations import choose
from varcon_loss.matching import match_batch, match_memory, match_reference
from varcon_loss.memory import CentroidMemory
from varcon_loss.options import Options, check_options
from varcon_loss.readable import values_may_be_read, without_autocast
from varcon_loss.records import changed
from varcon_loss.reduction import (
    VarConTerms,
    alone,
    denominator,
    denominator_of_kept,
    reduce_loss,
    weigh_rows,
)
from varcon_loss.rows import Implementation, Rows, Swept
from varcon_loss.samples import Batch, Samples, are_soft, flatten, shape_of_samples
from varcon_loss.soft_labels import SoftLabels

P = ParamSpec("P")
R = TypeVar("R")


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
    options: dict[str, Any] = {
        "temperature": temperature,
        "epsilon": epsilon,
        "num_classes": num_classes,
        "normalize": normalize,
        "reduction": reduction,
        "ignore_index": ignore_index,
        "weight": weight,
        "leave_one_out": leave_one_out,
        "process_group": process_group,
        "exchange": exchange,
        "impl": impl,
    }
    call = checked_call(
        options,
        features=features,
        labels=labels,
        ref_features=ref_features,
        ref_labels=ref_labels,
        plans=PLANS_OF_FUNCTIONS,
    )
    return evaluate(call, need_terms=False)[0]


def _takes_what(model: Callable[P, Any]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Signature and defaults of ``model``, for readers, editors and type checkers."""

    def borrow(function: Callable[..., R]) -> Callable[P, R]:
        returns = inspect.signature(function).return_annotation
        signature = inspect.signature(model).replace(return_annotation=returns)
        function.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return borrow


@_takes_what(varcon_loss)
def varcon_terms(
    features: Tensor,
    labels: Tensor | None = None,
    temperature: float = Options().temperature,
    epsilon: float = Options().epsilon,
    *,
    ref_features: Tensor | None = None,
    ref_labels: Tensor | None = None,
    **options: Any,
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
    unknown = {name: value for name, value in options.items() if name not in Options._fields}
    if unknown:
        checks.refuse_unknown("varcon_terms", unknown, Options._fields)
    options |= {"temperature": temperature, "epsilon": epsilon}
    call = checked_call(
        options,
        features=features,
        labels=labels,
        ref_features=ref_features,
        ref_labels=ref_labels,
        plans=PLANS_OF_FUNCTIONS,
    )
    _, terms = evaluate(call, need_terms=True)
    assert terms is not None
    return terms


class Call(NamedTuple):
    """What function and module hand on."""

    features: Tensor
    labels: Tensor | None
    ref_features: Tensor | None
    ref_labels: Tensor | None
    options: Options
    plans: Plans  # of exchanges between ranks
    memory: CentroidMemory | None = None


def checked_call(
    options: dict[str, Any],
    *,
    find_memory: Callable[[], CentroidMemory | None] = lambda: None,
    **given: Any,
) -> Call:
    """A call with its ``options`` by name, checked; an error is told to the other ranks."""
    try:
        return Call(**given, options=check_options(**options), memory=find_memory())
    except Exception:
        announce(Call(**given, options=Options(**options)))
        raise


def evaluate(call: Call, *, need_terms: bool) -> tuple[Tensor, VarConTerms | None]:
    """The flow of every call, to the loss as it is reduced and its terms.

    Only the sweep and the reduction have a gradient.
    """
    options, group = call.options, resolve_group(call.options.process_group)
    with without_autocast(call.features):
        try:
            batch, reference = _check(call)
            call, dtype = _with_num_classes(call), _computing_dtype(call)
            soft = any(are_soft(x.labels) for x in (batch, reference) if x is not None)
            impl = choose(options.impl, batch.features, dtype, soft=soft)
            with torch.no_grad():
                anchors, members, classes = _read(call, impl, dtype, batch, reference)
        except Exception:
            announce(call)
            raise
        with torch.no_grad():
            total = None
            if group is not None and members is not None and classes is not None:
                classes, total = _over_ranks(call, impl, group, anchors, members, classes)
            rows = _match(call, impl, dtype, anchors, members, classes, group)
            row_weights = weigh_rows(rows.anchors, options.weight, dtype)
            if total is not None and classes is not None and rows.kept is not None:
                total = denominator_of_kept(classes, rows.kept, options.weight)
        if classes is not None and torch.is_grad_enabled():
            _warn_of_odd_batch(call, rows, classes)
        swept, loss = _sweep(call, impl, rows, row_weights, need_terms=need_terms)
        num_ranks = 1 if total is None else torch.distributed.get_world_size(group)
        reduced = reduce_loss(loss, rows.anchors, row_weights, options.reduction, total, num_ranks)
        if options.reduction == "none":
            reduced = reduced.view(shape_of_samples(call.features))
        return reduced, _terms(call, impl, rows, swept, reduced) if need_terms else None


def announce(call: Call) -> None:
    """Tell other ranks, which wait in this step's collective, that this one cannot take part."""
    asked = call.options.process_group
    if asked is None or not isinstance(asked, (str, torch.distributed.ProcessGroup)):
        return  # there are none, or that is what failed
    group = resolve_group(asked)
    if group is not None:
        has_reference = call.ref_features is not None
        announce_failure(group, call.plans, _wanted(call), has_reference=has_reference)


def _check(call: Call) -> tuple[Batch, Batch | None]:
    """The call's samples and its reference set, if they can be, without views."""
    features, labels = call.features, call.labels
    ref_features, ref_labels = call.ref_features, call.ref_labels
    options, memory = call.options, call.memory
    checks.check_not_mapped(features, labels, ref_features, ref_labels)
    checks.check_samples(features, labels)
    checks.check_reference_set(ref_features, ref_labels, options.leave_one_out, memory is not None)
    assert labels is not None
    if ref_features is not None:
        names = {"features_name": "ref_features", "labels_name": "ref_labels"}
        checks.check_samples(ref_features, ref_labels, **names)
    checks.check_weight_device(options.weight, features)
    checks.warn_of_no_gradient("labels", labels, "class probabilities are constants of the loss")
    checks.warn_of_no_gradient("weight", options.weight, "class weights are constants of the loss")
    checks.check_probabilities(labels, ref_labels, options.num_classes, options.leave_one_out)
    columns_of_ref = ref_labels is not None and are_soft(ref_labels)
    batch = flatten(features, labels, "labels", "ref_labels" if columns_of_ref else None)
    if memory is not None:
        checks.check_memory(batch.features, memory.unit)
    if ref_features is None or ref_labels is None:
        return batch, None
    columns_of = "labels" if are_soft(labels) else None
    reference = flatten(ref_features, ref_labels, "ref_labels", columns_of)
    why = (
        "centroids are constants of the loss (to train both sides add the loss the other way round)"
    )
    checks.warn_of_no_gradient("ref_features", ref_features, why)
    checks.check_width(batch.features, reference.features)
    return batch, reference


def _computing_dtype(call: Call) -> torch.dtype:
    """float32, or wider where features are."""
    dtype = torch.float32
    for features in (call.features, call.ref_features):
        if isinstance(features, Tensor) and features.dtype != dtype:
            dtype = torch.promote_types(dtype, features.dtype)
    return dtype


def _wanted(call: Call) -> Plan:
    """What the other ranks must have too; of features that are wrong, whatever can be said."""
    given = [x for x in (call.features, call.ref_features) if isinstance(x, Tensor)]
    first = given[0] if given else torch.empty(0, 0, device="cpu")
    return Plan(
        num_classes=_num_classes(call),
        exchange=call.options.exchange,
        dim=first.shape[1 if first.ndim == 2 else 2 :].numel(),
        dtype=_computing_dtype(call),
        device=first.device,
    )


def _settings(call: Call) -> dict[str, Any]:
    """What ranks whose losses are averaged surely mean to have alike."""
    options, memory = call.options, call.memory
    return {
        "temperature": options.temperature,
        "epsilon": options.epsilon,
        "normalize": options.normalize,
        "reduction": options.reduction,
        "ignore_index": options.ignore_index,
        "leave_one_out": options.leave_one_out,
        "ref_features, given or not": call.ref_features is not None,
        "weight": options.weight,
        "centroid_momentum": None if memory is None else memory.momentum,
        "centroid memory": None if memory is None else memory.unit,
        "classes seen": None if memory is None else memory.seen,
    }


def _read(
    call: Call,
    impl: Implementation,
    dtype: torch.dtype,
    batch: Batch,
    reference: Batch | None,
) -> tuple[Samples, Samples | None, Classes | None]:
    """The anchors, and the samples that make classes, with those: themselves or a reference set.

    None: nobody makes any, a memory is read.
    """
    options, memory = call.options, call.memory
    count = options.leave_one_out or memory is not None or options.process_group is not None
    if reference is None and (memory is None or memory.update):
        anchors, classes = impl.summarise(batch, options, dtype, count=count)
        return anchors, anchors, classes
    anchors = impl.read(batch, options, dtype)
    if reference is None:
        return anchors, None, None
    return anchors, *impl.summarise(reference, options, dtype, count=count)


def _over_ranks(
    call: Call,
    impl: Implementation,
    group: Any,
    anchors: Samples,
    members: Samples,
    classes: Classes,
) -> tuple[Classes, Tensor]:
    """The classes of all ranks, and the denominator of their mean."""
    num_held = len(members.features)
    # Each row may be of any class; and where nobody may look each class has a slot.
    if isinstance(members.labels, SoftLabels) and (
        num_held > 0 or not values_may_be_read(classes.sums)
    ):
        assert call.options.num_classes is not None
        num_held = call.options.num_classes
    plan = make_plan(group, call.plans, _wanted(call), num_held, lambda: _settings(call))
    row_weights = weigh_rows(anchors, call.options.weight, classes.sums.dtype)
    mine = denominator(anchors, row_weights)
    broken = None if anchors.broken is None else anchors.broken.any()
    if call.ref_features is not None and members.broken is not None:
        here = members.broken.any()
        broken = here if broken is None else broken | here
    return exchange_classes(group, plan, classes, mine, sum_slots=impl.sum_slots, broken=broken)


def _match(
    call: Call,
    impl: Implementation,
    dtype: torch.dtype,
    anchors: Samples,
    members: Samples | None,
    classes: Classes | None,
    group: Any,
) -> Rows:
    if call.memory is not None:
        copy = impl.rereads_centroids
        return match_memory(anchors, classes, call.memory, call.options, dtype, copy=copy)
    assert members is not None
    assert classes is not None
    if call.ref_features is not None:
        return match_reference(anchors, members, classes, call.options, group)
    return match_batch(anchors, classes, call.options)


def _warn_of_odd_batch(call: Call, rows: Rows, classes: Classes) -> None:
    """Where the batch makes its own centroids, and how many is known without a look."""
    if call.memory is not None or call.ref_features is not None or call.options.leave_one_out:
        return
    if torch.compiler.is_compiling() or classes.slots is None or rows.anchors.valid is not None:
        return
    if classes.lookup.gaps == "none":
        checks.warn_of_odd_batch(len(classes.slots), classes.lookup.size)


def _sweep(
    call: Call, impl: Implementation, rows: Rows, row_weights: Tensor | None, *, need_terms: bool
) -> tuple[Swept, Tensor]:
    """What there is to say of each row, and its loss ``[N]`` with class weights."""
    temperatures = (call.options.temperature, call.options.epsilon)
    if rows.weight is None:
        swept = impl.sweep(rows, *temperatures, need_terms)
        return swept, swept.loss if row_weights is None else swept.loss * row_weights
    # Each class of a row has its own weight: the terms, which have none, need a sweep of their own.
    swept = impl.sweep(rows, *temperatures, False)
    loss = swept.loss
    if need_terms:
        swept = impl.sweep(changed(rows, weight=None), *temperatures, True)
    return swept, loss


def _terms(
    call: Call, impl: Implementation, rows: Rows, swept: Swept, reduced: Tensor
) -> VarConTerms:
    """The public record, in the shape of the features, which may have views."""
    valid, terms = rows.anchors.valid, swept.terms
    assert terms is not None
    if valid is None:
        valid = torch.ones_like(swept.loss, dtype=torch.bool)
    shape = shape_of_samples(call.features)
    loss = alone(swept.loss, rows.anchors)
    if call.options.reduction == "none":  # callers may change one and keep the other
        loss = loss.clone()
    kl, nll, confidence, tau2 = terms.view(4, *shape).unbind()
    return VarConTerms(
        loss=loss.view(shape),
        kl=kl,
        nll=nll,
        confidence=confidence,
        tau2=tau2,
        valid=valid.view(shape),
        num_classes=rows.centroids.num_present,
        reduced=reduced,
        impl=impl.name,
    )


def _num_classes(call: Call) -> int | None:
    """As given, else as labels that are class probabilities tell."""
    if call.options.num_classes is not None:
        return call.options.num_classes
    for labels in (call.labels, call.ref_labels):
        if isinstance(labels, Tensor) and are_soft(labels) and labels.ndim == 2:
            return labels.shape[1]
    return None


def _with_num_classes(call: Call) -> Call:
    num_classes = _num_classes(call)
    if num_classes == call.options.num_classes:
        return call
    return changed(call, options=changed(call.options, num_classes=num_classes))
