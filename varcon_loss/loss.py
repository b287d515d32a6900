"""The loss as functions, and the flow of every call: labels, centroids, sweep, reduction."""

import inspect
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Never, ParamSpec, TypeVar

import torch
from torch import Tensor

from varcon_loss import checks, fused
from varcon_loss.centroids import Classes, Table, own_without_self, sum_classes, table_of, unit
from varcon_loss.compiled import losses
from varcon_loss.labels import Labels, read_labels
from varcon_loss.memory import table_of_memory, update
from varcon_loss.ranks import group_of, over_ranks, room_of, size_of
from varcon_loss.readable import values_may_be_read, without_autocast

P = ParamSpec("P")
R = TypeVar("R")


class VarConTerms(NamedTuple):
    """The loss with everything one logs, from one sweep.

    Per-sample tensors have shape ``[N]``, or ``[B, V]`` for features with views, and are float32
    or wider. Samples that take no part (see ``valid``) are 0 in all of them.

    Attributes:
        loss: per-sample loss ``L_i`` (Eq. 7), without class weights; differentiable.
        kl: ``KL(q || p)``, detached.
        nll: ``-log p(y | z)``, detached.
        confidence: ``p(y | z)`` (Eq. 8), detached.
        tau2: adaptive temperature (Eq. 13), detached.
        valid: bool; False for samples that are ignored, or that ``leave_one_out`` leaves without
            another member of their class.
        num_classes: 0-d int64, the number ``K`` of classes that the softmax ran over. A mean
            ``nll`` that stays near ``log K`` means that the embeddings have collapsed.
        reduced: what `VarConLoss.forward` returns: class weights and ``reduction`` applied.
        impl: the implementation that ran.
    """

    loss: Tensor
    kl: Tensor
    nll: Tensor
    confidence: Tensor
    tau2: Tensor
    valid: Tensor
    num_classes: Tensor
    reduced: Tensor
    impl: str


class Options(NamedTuple):
    """The options of the loss, under their public names."""

    temperature: float = 0.1
    epsilon: float = 0.02
    num_classes: int | None = None  # C
    normalize: bool = True
    reduction: str = "mean"
    ignore_index: int | None = -100
    weight: Tensor | None = None  # [C]
    leave_one_out: bool = False
    process_group: object | None = None
    impl: str = "auto"
    centroid_momentum: float | None = None  # None: a memory, if there is one, is only read


FUNCTION_OPTIONS = Options._fields[:-1]
_EXCHANGES: Any = weakref.WeakKeyDictionary()  # of the functions, by process group


def varcon_loss(
    features: Tensor,
    labels: Tensor | None = None,
    temperature: float = 0.1,
    *positional: Never,
    epsilon: float = 0.02,
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
    **unknown: Never,
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
        "temperature": temperature, "epsilon": epsilon, "num_classes": num_classes,
        "normalize": normalize, "reduction": reduction, "ignore_index": ignore_index,
        "weight": weight, "leave_one_out": leave_one_out, "process_group": process_group,
        "impl": impl,
    }  # fmt: skip
    checked = _checked("varcon_loss", positional, options | unknown)
    sets = (features, labels, ref_features, ref_labels)
    return loss_of(features, evaluate(*sets, checked, None, _EXCHANGES, need_terms=False))


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
    temperature: float = 0.1,
    *positional: Any,
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
    checked = _checked("varcon_terms", positional, {"temperature": temperature} | options)
    sets = (features, labels, ref_features, ref_labels)
    return terms_of(features, evaluate(*sets, checked, None, _EXCHANGES, need_terms=True))


def _checked(where: str, positional: tuple[Any, ...], options: dict[str, Any]) -> Options:
    if positional:
        checks.refuse_options(where, positional)
    unknown = {name: value for name, value in options.items() if name not in FUNCTION_OPTIONS}
    if unknown:
        known = ("features", "labels", *FUNCTION_OPTIONS, "ref_features", "ref_labels")
        checks.refuse_unknown(where, unknown, known, options["temperature"])
    given = {name: options[name] for name in FUNCTION_OPTIONS if name in options}
    return Options(**{name: checks.option(name, value) for name, value in given.items()})


def evaluate(
    features: Tensor, labels: Any, ref_features: Tensor | None, ref_labels: Any,
    options: Options, memory: Tensor | None, exchanges: Any, *, need_terms: bool,
) -> "Scored":  # fmt: skip
    """The flow of every call: labels, class sums, centroids, sweep, reduction.

    Args:
        features: of the anchors; this and the next three as callers give them.
        labels: of the anchors.
        ref_features: of a reference set, if centroids come from one.
        ref_labels: of the reference set.
        options: of the loss.
        memory: ``[C, D]``, if centroids come from one.
        exchanges: what this loss has agreed on with other ranks.
        need_terms: else the terms are empty.
    """
    options, dtype = check_call(features, labels, ref_features, ref_labels, options, memory)
    group = group_of(options.process_group)
    with without_autocast(features.device.type):
        impl = choose(options.impl, features, labels, dtype)
        anchors = members = read(features, labels, options, dtype, ref_labels)
        if ref_features is not None:
            members = read(ref_features, ref_labels, options, dtype, labels, of="ref_")
        classes = total = slots = None
        if memory is None or options.centroid_momentum is not None:
            classes, slots = add_up(members, options, impl)
        if group is not None and classes is not None:
            total = count(anchors, options.weight, members)
            same = alike(options, memory, members[1], reference=ref_features is not None)
            room = room_of(group, exchanges, members[1].shape[0], members[3], same)
            classes, total = over_ranks(group, room, classes, total, options.num_classes)
        table = table_for(classes, memory, options, dtype)
        if ref_features is not None:
            anchors = with_classes(anchors, table, "ref_labels lack", members[3])
            classes = None
        elif memory is not None:
            anchors = known_to_memory(anchors, table)
        elif group is None:
            warn_of_odd_batch(anchors, table, options)
        own_table = ref_features is None and memory is None and group is None
        return score(
            anchors, table, classes, slots if own_table else None, total, options, impl,
            size_of(group), need_terms=need_terms,
        )  # fmt: skip


# Features without views, z, their lengths, and labels.
Embedded = tuple[Tensor, Tensor, Tensor | None, Labels]
# The reduced loss, the loss and terms of each row, which take part, in which table, and who swept.
Scored = tuple[Tensor, Tensor, Tensor, Tensor | None, Table, str]


def read(
    features: Tensor, labels: Tensor, options: Options, dtype: torch.dtype,
    other_labels: Tensor | None = None, of: str = "",
) -> Embedded:  # fmt: skip
    """Features without views ``[N, D]``, ``z`` ``[N, D]``, lengths ``[N]``, and labels read.

    Rows that take no part are zero vectors in ``z``, whatever they held: they add nothing to any
    sum. ``other_labels`` are those that may say how many classes there are.
    """
    views = 1 if features.ndim == 2 else features.shape[1]
    rows, columns_of = flatten_views(features), None
    if other_labels is not None and other_labels.is_floating_point():
        columns_of = "labels" if of else "ref_labels"
    with torch.no_grad():
        given = (options.num_classes, options.ignore_index, dtype, f"{of}labels", columns_of)
        read = read_labels(labels, views, *given)
        taking_part = rows.detach()  # `no_grad` stops no derivative of the forward mode
        if read.valid is not None:
            taking_part = torch.where(read.valid.unsqueeze(1), taking_part, 0.0)
        if options.normalize:
            return rows, *unit(taking_part, dtype), read
        return rows, taking_part.to(dtype), None, read


@torch.no_grad()
def add_up(members: Embedded, options: Options, impl: str) -> tuple[Classes, Tensor | None]:
    """The classes of the ``members``, and their rows: see `sum_classes`."""
    _, z, _, labels = members
    return sum_classes(z, labels, options.num_classes, impl=impl)


@torch.no_grad()
def count(anchors: Embedded, weight: Tensor | None, members: Embedded) -> Tensor:
    """What these anchors add to the denominator of a mean, 0-d; NaN where labels are broken."""
    _, z, _, labels = anchors
    weights = labels.weights(weight, z.dtype)
    if weights is None:
        weights = z.new_full((1,), z.shape[0]) if labels.valid is None else labels.valid.to(z.dtype)
    total = weights.sum()
    for broken in (labels.broken, members[3].broken):
        if broken is not None:
            total = total.masked_fill(broken.any(), torch.nan)
    return total


@torch.no_grad()
def table_for(classes: Any, memory: Tensor | None, options: Options, dtype: torch.dtype) -> Table:
    """The centroids of the batch, or of a memory after it has learned from ``classes``."""
    if memory is not None:
        if classes is not None and options.centroid_momentum is not None:
            update(memory, classes, options.centroid_momentum)
        return table_of_memory(memory, dtype)
    return table_of(classes, dtype)


def alike(options: Options, memory: Tensor | None, z: Tensor, *, reference: bool) -> dict[str, Any]:
    """What ranks whose losses are averaged must have alike."""
    same = {n: getattr(options, n) for n in Options._fields if n not in ("process_group", "impl")}
    widths = {"feature width": z.shape[1], "dtype": z.dtype}
    return same | widths | {"ref_features, given or not": reference, "centroid memory": memory}


@torch.no_grad()
def with_classes(
    anchors: Embedded, table: Table, lack: str, reference: Labels | None = None
) -> Embedded:
    """The anchors, if the table has the class of each. ``reference``: the labels behind the table.

    Raises:
        ValueError: it lacks one, where values may be read. Elsewhere the loss of the anchor is NaN.
    """
    rows, z, lengths, labels = anchors
    lacking = table.lacks(labels)
    if not values_may_be_read(lacking):
        labels = labels.valid_where(~lacking).broken_where(lacking)
        if reference is not None and reference.broken is not None:  # it is in every loss
            labels = labels.broken_where(reference.broken.any())
    elif bool(lacking.any()):
        absent, soft = table.missing(labels), labels.shares is not None
        way_out = "give {} a row of zeros" if soft else "mark {} with ignore_index"
        listed = ", ".join(map(str, absent[:5])) + (", ..." if len(absent) > 5 else "")
        do = (
            f"every anchor needs a reference of its class ({way_out.format('anchors without one')})"
        )
        raise ValueError(f"{lack} label {listed}, which labels contain: {do}")
    return rows, z, lengths, labels


@torch.no_grad()
def known_to_memory(anchors: Embedded, table: Table) -> Embedded:
    """The anchors. Those of classes never seen take no part."""
    rows, z, lengths, labels = anchors
    known = table.knows(labels)
    if not (values_may_be_read(known) and bool(known.all())):
        # A row that is not finite takes part, so that it shows.
        row_sums = z.sum(1)
        labels = labels.valid_where(known | (row_sums - row_sums != 0))
    return rows, z, lengths, labels


def score(
    anchors: Embedded, table: Table, classes: Classes | None, slots: Tensor | None,
    total: Tensor | None, options: Options, impl: str, num_ranks: int, *, need_terms: bool,
) -> Scored:  # fmt: skip
    """Loss and terms ``[N]`` of the anchors against the table, and the reduced loss.

    Args:
        anchors: as `read` gives them.
        table: the centroids.
        classes: of all samples that count for the loss; None: of others, or not known.
        slots: of integer labels in the table, ``[N, 1]``, if they are known.
        total: the denominator of the mean, where more than these anchors count; None: only they do.
        options: of the loss.
        impl: who sweeps.
        num_ranks: whose losses are averaged.
        need_terms: else the terms are empty.
    """
    rows, z, lengths, labels = anchors
    weight, soft, own, kept = options.weight, labels.shares is not None, None, None
    with torch.no_grad():
        if options.leave_one_out and classes is not None:
            slots = table.find(labels.class_of().unsqueeze(1)) if slots is None else slots
            own, kept = own_without_self(z, slots.squeeze(1), classes), classes.counts > 1
            labels = labels.valid_where(kept.index_select(0, slots.squeeze(1)))
        if total is not None and classes is not None and not soft:
            # Some classes may take no part. A total of NaN stays.
            kept = table.holds(classes) if kept is None else kept
            total = classes.total(kept, weight) + 0 * total
        if total is not None and not values_may_be_read(total):
            labels = labels.broken_where(total.isnan())
        row_weights = labels.weights(weight, z.dtype)

    def swept(labels, need_terms):  # annotations would not be traced by torch 2.6
        given: Any = (*table.place(labels, slots), own, options.temperature, options.epsilon)
        return losses(rows, z, lengths, labels.valid, *given, need_terms=need_terms, impl=impl)

    if weight is None or not soft:
        loss, terms = swept(labels, need_terms)
        weighted = loss if row_weights is None else loss * row_weights
    else:  # each class of a row has its own weight, which the terms do not have
        weighted, terms = swept(labels.weighted(weight), False)
        loss, terms = swept(labels, True) if need_terms else (weighted, terms)
    if labels.broken is not None:
        alike = weighted is loss
        loss = loss.masked_fill(labels.broken, torch.nan)
        weighted = loss if alike else weighted.masked_fill(labels.broken, torch.nan)
    counted_by = labels.valid if row_weights is None else row_weights
    if total is None and counted_by is not None:
        total = counted_by.sum()
    reduced = reduce(weighted, total, options.reduction, num_ranks, counted=weight is None)
    return reduced, loss, terms, labels.valid, table, impl


def reduce(
    loss: Tensor, total: Tensor | None, reduction: str, num_ranks: int, *, counted: bool
) -> Tensor:
    """``[N]`` -> ``[]``, or ``[N]`` for ``"none"``.

    The mean is ``sum(weight * loss) / sum(weight)``, and 0 where nothing has weight. Over several
    ranks the denominator is what they have together, and mean and sum are multiplied by their
    number, so that what DDP and FSDP average is the loss, and the gradient, of the whole batch.

    Args:
        loss: ``[N]``, weighted, 0 where not valid.
        total: 0-d, the sum of the weights; None: of ``N`` ones.
        reduction: of the public arguments.
        num_ranks: how many there are.
        counted: the weights are all 1.
    """
    if reduction == "none":
        return loss
    if num_ranks > 1:
        loss = loss * num_ranks
    if reduction == "sum":
        return loss.sum()
    if total is None:
        return loss.mean() if loss.numel() > 0 else loss.sum()
    return loss.sum() / (total.clamp_min(1) if counted else torch.where(total == 0, 1, total))


def loss_of(features: Tensor, scored: Scored) -> Tensor:
    """What a call returns: ``"none"`` has the shape of the samples, which may have views."""
    return scored[0] if scored[0].ndim == 0 else scored[0].view(_shape(features))


def terms_of(features: Tensor, scored: Scored) -> VarConTerms:
    """The public record, in the shape of the samples."""
    _, loss, terms, valid, table, impl = scored
    shape = _shape(features)
    reduced = loss_of(features, scored)
    if reduced.ndim > 0:  # callers may change one and keep the other
        loss = loss.clone()
    valid = torch.ones_like(loss, dtype=torch.bool) if valid is None else valid
    kl, nll, confidence, tau2 = terms.view(4, *shape).unbind()
    each = (loss.view(shape), kl, nll, confidence, tau2, valid.view(shape))
    return VarConTerms(*each, table.num_present(), reduced, impl)


def _shape(features: Tensor) -> torch.Size:
    return features.shape[: 1 if features.ndim == 2 else 2]


def flatten_views(features: Tensor) -> Tensor:
    """``[B, V, ...]`` -> ``[B * V, D]``; ``[N, D]`` as it is."""
    if features.ndim == 2:
        return features
    # `numel` of a symbolic number is a constant for torch.export.
    return features.reshape(features.shape[0] * features.shape[1], features.shape[2:].numel())


def choose(impl: str, features: Tensor, labels: Tensor, dtype: torch.dtype) -> str:
    """What ``impl`` means for these samples, computed in ``dtype``.

    Raises:
        ValueError: the one that was named cannot run here.
    """
    if impl in ("eager", "reference"):
        return impl
    soft = labels.is_floating_point()
    if impl == "auto":
        on_cuda = features.device.type == "cuda" and not soft
        return "triton" if on_cuda and fused.runs_by_default(features, dtype) else "eager"
    of_labels = "it takes integer labels, and these are class probabilities"
    obstacle = of_labels if soft else fused.why_not(features, dtype)
    if obstacle is not None:
        raise ValueError(f"impl={impl!r} cannot run here: {obstacle}; use impl='auto'")
    return impl


def check_call(
    features: Tensor, labels: Any, ref_features: Tensor | None, ref_labels: Any,
    options: Options, memory: Tensor | None,
) -> tuple[Options, torch.dtype]:  # fmt: skip
    """The options with ``num_classes`` where it is known, and the dtype of the computation.

    Raises:
        TypeError, ValueError: of what was given, by name.
    """
    checks.check_samples(features, labels)
    checks.check_temperatures(options.temperature, options.epsilon)
    checks.warn_of_no_gradient("labels", labels, "class probabilities are constants of the loss")
    leave_one_out, remembers = options.leave_one_out, memory is not None
    checks.check_reference_set(features, ref_features, ref_labels, leave_one_out, remembers)
    if memory is not None:
        checks.check_memory_fits(features, memory)
    num_classes = checks.num_classes_of(options.num_classes, options.weight)
    if options.weight is not None:
        checks.check_device(options.weight, "weight is", features, "the loss module or the weight")
    if labels.ndim == 2 or (ref_labels is not None and ref_labels.ndim == 2):
        num_classes = checks.check_probabilities(labels, ref_labels, num_classes, leave_one_out)
    wide = (features.dtype, None if ref_features is None else ref_features.dtype)
    dtype = torch.float64 if torch.float64 in wide else torch.float32
    if num_classes != options.num_classes:  # `_replace` is not traced by torch 2.6
        kept = {name: getattr(options, name) for name in Options._fields}
        options = Options(**{**kept, "num_classes": num_classes})
    return options, dtype


def warn_of_odd_batch(anchors: Embedded, table: Table, options: Options) -> None:
    """A warning of `checks`, where the number of classes is known without reading values."""
    _, z, _, labels = anchors
    looks = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    known = labels.valid is labels.shares is table.present is None
    if looks and known and not options.leave_one_out:
        checks.warn_of_odd_batch(z.shape[0], table.w.shape[0])
