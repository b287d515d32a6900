"""The loss as a module."""

from collections.abc import Callable
from typing import Any, Never

import torch
from torch import Tensor, nn

from varcon_loss import checks
from varcon_loss.distributed import Plans, several_ranks
from varcon_loss.functional import checked_call, evaluate
from varcon_loss.memory import (
    CentroidMemory,
    Prediction,
    can_be_remembered,
    lengthened,
    predict,
)
from varcon_loss.norms import directions
from varcon_loss.options import Options, check_options
from varcon_loss.readable import values_may_be_read, without_autocast
from varcon_loss.reduction import VarConTerms
from varcon_loss.samples import are_soft, flatten_views, shape_of_samples


class VarConLoss(nn.Module):
    """Variational supervised contrastive loss (Wang et al., NeurIPS 2025, arXiv 2506.07413).

    Each embedding ``z_i`` is compared with one unit centroid ``w_k`` per class present in the
    batch, through which no gradient flows. With ``p`` the softmax of ``z_i . w_k / temperature``
    (Eq. 8), the adaptive temperature ``tau2 = temperature - epsilon + 2 epsilon p(y_i)`` (Eq. 13)
    and the target ``q``, proportional to ``exp(1 / tau2)`` for the own class and to 1 for every
    other (Eq. 10-12), the loss of a sample is ``KL(q || p) - log p(y_i)`` (Eq. 7).

    Args:
        temperature: ``tau1 > 0``.
        epsilon: how far the confidence moves ``tau2``; ``0 <= epsilon < temperature``.
        num_classes: labels are then ``0 ... num_classes - 1``. Needed by ``centroid_momentum``,
            implied by ``weight``; without it any integers serve as labels, but a GPU is
            synchronised once a call and ``torch.compile`` breaks the graph. The cost follows the
            classes present in the batch.
        normalize: divide features by their length first. ``False`` takes them as they are;
            centroids have unit length either way.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: samples with this label take part in nothing. ``None``: none are ignored.
        weight: ``[num_classes]``, scales the loss of each class as in `torch.nn.CrossEntropyLoss`
            (the mean is ``sum(w l) / sum(w)``, 0 if no weight is left); centroids are unaffected.
            Implies ``num_classes``.
        leave_one_out: an extension of the paper, for integer labels: compare each sample with the
            centroid of the *other* members of its class. A sample alone in its class has none: like
            a SupCon anchor without positives it is left out of the mean (``terms.valid`` is False),
            while its class still counts among the others.
        process_group: ``"world"`` or a `torch.distributed.ProcessGroup`: centroids over all its
            ranks. Ranks exchange class sums and counts, never embeddings, in one collective a step
            (two without ``num_classes``) and none in backward. The call returns
            ``W * local sum / global weight`` (``"sum"``: ``W * local sum``), ``W`` the number of
            ranks, so that its mean over ranks is the loss of the concatenated batch, and DDP's or
            FSDP's averaging makes the gradient exact. ``"none"`` and the per-sample terms are
            local and unscaled. Ranks exchange in training steps only: in eval mode, or without
            gradients, each rank evaluates its own batch by itself, with its own centroids (or the
            memory) and a plain local mean, so that one rank alone may validate. Every rank must
            take the same number of training steps: one that stops early leaves the others waiting
            until their group's timeout. ``"world"`` is looked up at each call (without
            initialised processes it means this one alone), so the module can be pickled.
        exchange: ``"all-reduce"`` (a table of all classes), ``"all-gather"`` (rows of the classes
            each rank holds) or ``"auto"``: the smaller, chosen by all ranks at their first step.
        impl: ``"eager"`` (one pass, any device), ``"triton"`` (fused kernels for CUDA devices; not
            for float64, nor rows wider than 1,024), ``"auto"`` (``"triton"`` where a proof on such
            a device is in the repository, none yet; else ``"eager"``) or ``"reference"`` (the
            paper's equations line by line, ``[N, K]`` memory). Second derivatives go by these
            equations whichever is chosen.
        feature_dim: width ``D`` of the embeddings; ``centroid_momentum`` needs it, nothing else.
        centroid_momentum: an extension of the paper, for many classes in small batches: remember
            one centroid a class (``centroid_memory``, a float32 buffer ``[num_classes, D]``).
            In training mode with gradients enabled each call first moves the centroids of the
            classes present, ``w <- unit(m w + (1 - m) mean)``, a class seen first takes its mean;
            the softmax then runs over every class seen so far. In eval mode or without gradients
            the memory is only read, and samples of classes never seen take no part; with an empty
            memory that is all of them, and a warning says so. A class whose sum holds NaN keeps
            its centroid. Each training call updates once: keep the loss outside regions that
            activation checkpointing recomputes, and call `eval` for the second forward of
            optimisers like SAM. Over several ranks give ``process_group`` too, so that all
            remember the same. ``None`` is the paper.

    Shape:
        features: ``[N, D]``, or ``[B, V, ...]`` for ``V`` views of each sample (trailing dimensions
        are flattened), float16, bfloat16, float32 or float64, with or without autocast.
        labels: ``[N]`` or ``[B]``, any integer dtype but uint64, on the same device; or class
            probabilities ``[N, C]`` or ``[B, C]``, any float dtype, at least 0 (an extension of the
            paper: the loss is its expectation under them, and each sample counts for the centroids
            by its shares). A row of zeros takes no part; the mean divides by the rows that do, or
            by the weights of their shares.
        Output: a scalar, float32 or wider; ``[N]`` or ``[B, V]`` for ``reduction="none"``.

    Raises:
        TypeError, ValueError: bad arguments; on a CPU in eager mode also a label out of range or
            missing in the reference set. On an accelerator, or under ``torch.compile``, looking at
            values would synchronise or break the graph: the loss of such a row is NaN there.

    Example:
        >>> import torch
        >>> from varcon_loss import VarConLoss
        >>> criterion = VarConLoss(temperature=0.1, epsilon=0.02)
        >>> features = torch.randn(8, 2, 128, requires_grad=True)  # two views of 8 samples
        >>> labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
        >>> criterion(features, labels).backward()
    """

    weight: Tensor | None
    centroid_memory: Tensor | None
    centroid_seen: Tensor | None

    def __init__(
        self,
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
        feature_dim: int | None = None,
        centroid_momentum: float | None = None,
        **unknown: Never,
    ) -> None:
        super().__init__()
        if unknown:
            checks.refuse_unknown("VarConLoss", unknown, (*Options._fields, *_OF_MEMORY))
        options = check_options(
            temperature=temperature,
            epsilon=epsilon,
            num_classes=num_classes,
            normalize=normalize,
            reduction=reduction,
            ignore_index=ignore_index,
            weight=weight,
            leave_one_out=leave_one_out,
            process_group=process_group,
            exchange=exchange,
            impl=impl,
        )
        checks.warn_of_no_gradient("weight", weight, "class weights are constants of the loss")
        checks.check_weight_values(weight)
        if weight is not None and weight.is_meta:
            checks.warn(
                "weight was made on the meta device and has no values: load some, or set "
                "criterion.weight, before the first call",
            )
        self.register_buffer("weight", None if weight is None else weight.detach().clone())
        for name, value in options._asdict().items():
            if name != "weight":
                setattr(self, name, value)

        self.feature_dim, self.centroid_momentum = checks.check_memory_options(
            self.num_classes, feature_dim, centroid_momentum, self.leave_one_out
        )
        remembers = centroid_momentum is not None
        shape = (self.num_classes or 0, feature_dim or 0)
        # Small steps towards each batch are lost in half precision: float32 whatever the default.
        self.register_buffer(
            "centroid_memory", torch.zeros(shape, dtype=torch.float32) if remembers else None
        )
        self.register_buffer(
            "centroid_seen", torch.zeros(shape[0], dtype=torch.float32) if remembers else None
        )
        self._awaited: str | None = None  # of the two buffers, if a checkpoint had only the other
        self._unfilled = False  # do buffers hold what an allocator left there?
        self._plans = Plans()
        self._surely_empty = True  # nothing can have filled the memory yet
        # A few classes and their centroids, as the last training step left them.
        self._memory_left: tuple[Tensor, Tensor] | None = None
        # Of the memory's buffer, as made or as a training step left it.
        self._version_left = _version(self.centroid_memory)
        self._memory_checked = self._warned_of_ranks = False

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        *,
        ref_features: Tensor | None = None,
        ref_labels: Tensor | None = None,
        **unknown: Never,
    ) -> Tensor:
        """The reduced loss; see the class for shapes.

        Args:
            features: ``[N, D]`` or ``[B, V, ...]``.
            labels: ``[N]`` or ``[B]`` integers, or class probabilities ``[N, C]`` or ``[B, C]``;
                required.
            ref_features: ``[M, D]`` or with views; centroids come from these instead of
                ``features``, and ``K`` counts their classes. No gradient flows to them: to train
                two towers call the loss both ways.
            ref_labels: ``[M]`` integers or ``[M, C]``; must contain every label of ``labels``.
            **unknown: nothing; what SupCon's call takes is refused with what it becomes here.
        """
        if unknown:
            checks.refuse_unknown("the call", unknown, ("ref_features", "ref_labels"))
        return self._evaluate(features, labels, ref_features, ref_labels, need_terms=False)[0]

    def terms(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        *,
        ref_features: Tensor | None = None,
        ref_labels: Tensor | None = None,
        **unknown: Never,
    ) -> VarConTerms:
        """As the call, with the per-sample terms that one logs; the loss is ``.reduced``."""
        if unknown:
            checks.refuse_unknown("terms", unknown, ("ref_features", "ref_labels"))
        _, terms = self._evaluate(features, labels, ref_features, ref_labels, need_terms=True)
        assert terms is not None
        return terms

    def _evaluate(
        self,
        features: Tensor,
        labels: Tensor | None,
        ref_features: Tensor | None,
        ref_labels: Tensor | None,
        *,
        need_terms: bool,
    ) -> tuple[Tensor, VarConTerms | None]:
        call = checked_call(
            self._options(),
            find_memory=self._memory_of_this_call,
            features=features,
            labels=labels,
            ref_features=ref_features,
            ref_labels=ref_labels,
            plans=self._plans,
        )
        result = evaluate(call, need_terms=need_terms)
        self._remember_step(call.memory, labels)
        return result

    @property
    def centroids(self) -> Tensor:
        """Remembered centroids ``[C, D]``, float32, unit length; zero rows for classes not seen.

        Raises:
            AttributeError: the loss was made without ``centroid_momentum``.
        """
        if self.centroid_momentum is None:
            raise AttributeError(_NO_MEMORY)
        memory = self._require_memory()
        return directions(memory.unit)

    @torch.no_grad()
    def predict(self, features: Tensor) -> Prediction:
        """Classify by the remembered centroids: the most probable class by Eq. 8.

        Args:
            features: ``[N, D]`` or ``[B, V, ...]``, embeddings as the loss takes them.

        Returns:
            ``label`` int64 and ``confidence``, ``p(label | z)`` over the classes seen so far, both
            ``[N]`` or ``[B, V]``. Where nothing can be said, because features are NaN or the
            memory has seen no class (a warning says so), they are -1 and NaN.

        Raises:
            RuntimeError: the loss was made without ``centroid_momentum``.
        """
        memory = self._require_memory()
        checks.check_features(features)
        rows, shape = flatten_views(features), shape_of_samples(features)
        checks.check_memory(rows, memory.unit)
        self._warn_if_empty(memory)
        with without_autocast(features):
            found = predict(rows, memory, self.temperature, normalize=self.normalize)
        return Prediction(label=found.label.view(shape), confidence=found.confidence.view(shape))

    @torch.no_grad()
    def reset_memory(self) -> None:
        """Forget every centroid.

        Raises:
            RuntimeError: the loss was made without ``centroid_momentum``.
        """
        self._unfilled, self._awaited = False, None
        memory = self._require_memory()
        memory.unit.zero_()
        memory.seen.zero_()
        self._surely_empty, self._memory_left = True, None
        self._version_left = _version(memory.unit)

    def reset_parameters(self) -> None:
        """As in modules with weights, after `to_empty`: an empty memory, if there is one.

        ``weight`` has no initial value to go back to: load or set it.
        """
        if self.centroid_momentum is not None:
            self.reset_memory()

    def _options(self) -> dict[str, Any]:
        """Of this call, by name, not checked."""
        options = {name: getattr(self, name) for name in Options._fields}
        if not self._learns():
            options["process_group"] = None
        return options

    def _memory(self, *, update: bool) -> CentroidMemory | None:
        if self.centroid_momentum is None:
            return None
        if self._awaited is not None:
            raise RuntimeError(
                f"the centroid memory was loaded in part, without {self._awaited}: load that too, "
                "or call reset_memory()"
            )
        if self._unfilled and self._was_written():
            self._look_at_memory()
        if self._unfilled:
            raise RuntimeError(
                "the centroid memory was never filled, and holds what no training leaves there: "
                "it was made on the meta device or by `empty`. Call reset_parameters() once the "
                "model has its device (with transformers in _init_weights), or load a checkpoint "
                "that has the memory"
            )
        self._keep_memory_wide()
        assert self.centroid_memory is not None
        assert self.centroid_seen is not None
        return CentroidMemory(
            unit=self.centroid_memory,
            seen=self.centroid_seen,
            momentum=self.centroid_momentum,
            update=update,
        )

    def _keep_memory_wide(self) -> None:
        """Back to float32, which it moves in by small steps, from whatever cast it was given."""
        for name in _MEMORY:
            buffer = getattr(self, name)
            if buffer is not None and buffer.dtype != torch.float32:
                self._buffers[name] = buffer.float()

    def _learns(self) -> bool:
        """Does a call now move the memory, and take part in the exchange between ranks?"""
        return self.training and torch.is_grad_enabled()

    def _memory_of_this_call(self) -> CentroidMemory | None:
        memory = self._memory(update=self._learns())
        if memory is not None and not torch.compiler.is_compiling():
            if not memory.update:
                self._warn_if_empty(memory)
            else:
                if self.process_group is None and several_ranks():
                    self._check_nobody_wrote(memory)
                if self._was_written():  # averages of copies are shorter than 1
                    with torch.no_grad():
                        memory.unit.copy_(lengthened(memory.unit))
        return memory

    def _was_written(self) -> bool:
        """Has anybody else written to the memory since it was made or a training step left it?"""
        return not torch.compiler.is_compiling() and (
            self._version_left is None or _version(self.centroid_memory) != self._version_left
        )

    def _remember_step(self, memory: CentroidMemory | None, labels: Tensor | None) -> None:
        if memory is None or not memory.update:
            return
        self._surely_empty = False
        if torch.compiler.is_compiling():
            return
        self._version_left = _version(memory.unit)
        if self.process_group is None and several_ranks():
            assert labels is not None
            labels = labels[:CLASSES_WATCHED]
            labels = labels.argmax(1) if are_soft(labels) else labels
            classes = labels.to(torch.int64).clamp(0, len(memory.seen) - 1)
            self._memory_left = (classes, memory.unit.index_select(0, classes))

    def _warn_if_empty(self, memory: CentroidMemory) -> None:
        """Looks at the memory where that synchronises nothing."""
        empty = self._surely_empty and not self._was_written()
        if values_may_be_read(memory.seen):
            empty = not bool(memory.seen.any())
        if empty:
            checks.warn(
                "the centroid memory is empty, since no training step has filled it yet: the loss "
                "is 0, no sample takes part, and predict knows no class",
            )

    def _check_nobody_wrote(self, memory: CentroidMemory) -> None:
        """Is the memory as the last training step left it? On a GPU asked once: it synchronises."""
        if not self._warned_of_ranks:
            self._warned_of_ranks = True
            checks.warn(
                "each rank remembers only the centroids of its own samples: give "
                "process_group='world', and all ranks remember the same",
            )
        if self._memory_left is None or (self._memory_checked and memory.unit.is_cuda):
            return
        if memory.unit.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        self._memory_checked = True
        classes, left = self._memory_left
        if classes.device == memory.unit.device and not torch.equal(memory.unit[classes], left):
            raise RuntimeError(
                "the centroid memory was written to between two training steps, and what this "
                "rank had learned is gone: DDP and Lightning overwrite it by rank 0's where the "
                "loss is part of the wrapped model. Give process_group='world', so that all ranks "
                "remember the same, or keep the loss outside the wrapped model"
            )

    def _require_memory(self) -> CentroidMemory:
        memory = self._memory(update=False)
        if memory is None:
            raise RuntimeError(_NO_MEMORY)
        return memory

    def join_hook(self, **_: Any) -> None:
        """Refuse `torch.distributed.algorithms.Join`, which calls this."""
        raise NotImplementedError(
            "VarConLoss cannot be shadowed by torch.distributed.algorithms.Join: its exchange "
            "stands between the forward and the backward of DDP, which Join shadows in one. Give "
            "every rank the same number of training steps: DistributedSampler pads, and "
            "drop_last=True drops"
        )

    def __getattr__(self, name: str) -> Any:
        if name == "centroids":  # the property has raised
            raise AttributeError(_NO_MEMORY)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, Tensor):
            checks.check_weight_values(value)
        elif name in ("temperature", "epsilon"):  # a schedule may count with numpy
            value = checks.real_number(name, value)
        elif name in ("normalize", "leave_one_out"):
            value = checks.switch(name, value)
        elif name == "num_classes" and self.__dict__.get("centroid_momentum") is not None:
            checks.check_memory_size(value, self.centroid_memory)
        if name in ("leave_one_out", "centroid_momentum") and "centroid_momentum" in self.__dict__:
            now = {key: getattr(self, key) for key in ("leave_one_out", "centroid_momentum")}
            now[name] = value
            if now["centroid_momentum"] is not None and self.centroid_memory is None:
                raise AttributeError(_NO_MEMORY)
            checks.check_memory_options(self.num_classes, self.feature_dim, **now)
        super().__setattr__(name, value)
        if name in _MEMORY and isinstance(value, Tensor):  # some loaders assign
            self._look_at_memory()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        self._keep_memory_wide()  # with assign=True it is what was saved
        missing = [name for name in _MEMORY if prefix + name not in state_dict]
        if self.centroid_memory is None or len(missing) == len(_MEMORY):
            return
        if missing:
            # Shards of a checkpoint come one by one: has the other one come before?
            self._awaited = missing[0] if self._awaited in (None, missing[0]) else None
            self._look_at_memory()
            return
        self._awaited = None
        self._look_at_memory()
        if self._unfilled:
            return
        unit = lengthened(self.centroid_memory)  # an average of copies is shorter than 1
        if local_metadata.get("assign_to_params_buffers", False):
            self._buffers["centroid_memory"] = unit  # what was assigned is the caller's
        else:
            with torch.no_grad():
                self.centroid_memory.copy_(unit)

    def _look_at_memory(self) -> None:
        """Has somebody else filled it, or nobody? Looks where that synchronises nothing."""
        self._surely_empty, self._memory_left, self._version_left = False, None, None
        unit, seen = self.centroid_memory, self.centroid_seen
        assert unit is not None
        assert seen is not None
        readable = values_may_be_read(unit) and values_may_be_read(seen)
        self._unfilled = readable and not can_be_remembered(unit, seen)

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which keep the process group, and whose memory averaging may fill."""
        unknown: dict[str, Any] = {"_surely_empty": False, "_memory_left": None}
        if not self._unfilled:
            unknown["_version_left"] = None
        state = super().__getstate__() | unknown
        return state | {"process_group": _SameGroup(self.process_group)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"process_group": state["process_group"].group})
        if self._unfilled:  # versions of the copy's buffer count from its own start
            self._version_left = _version(self.centroid_memory)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "VarConLoss":
        """As in `torch.nn.Module`, but the memory stays float32, and weights lose no digits."""
        kept = {name: getattr(self, name) for name in (*_MEMORY, "weight")}
        as_left, empty = not self._was_written(), self._surely_empty
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if before is None:
                continue
            narrower = after.dtype.itemsize < before.dtype.itemsize
            if narrower or (name in _MEMORY and after.dtype != before.dtype):
                self._buffers[name] = before.to(after.device)
        before, after = kept["centroid_memory"], self.centroid_memory
        if before is None or after is None:
            return self
        unfilled = self._unfilled
        self._look_at_memory()
        came_from_meta = before.is_meta and not after.is_meta  # by `to_empty`
        if came_from_meta or (unfilled and not values_may_be_read(after)):
            self._unfilled = True
        self._surely_empty = empty
        if as_left or self._unfilled:
            self._version_left = _version(self.centroid_memory)
        return self

    def extra_repr(self) -> str:
        """What was chosen, where it differs from the defaults."""
        shown = []
        for name, default in (Options._field_defaults | _OF_MEMORY).items():
            value = getattr(self, name)
            if name == "weight":
                shown += [] if value is None else [f"weight=[{len(value)}]"]
            elif value != default or name in ("temperature", "epsilon"):
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)


class _SameGroup:
    """A copy has the same group; a pickle only the name of one."""

    def __init__(self, group: object) -> None:
        self.group = group

    def __deepcopy__(self, _: Any) -> "_SameGroup":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.group is not None and not isinstance(self.group, str):
            raise TypeError(
                "a VarConLoss with a ProcessGroup handle cannot be pickled: make it with "
                "process_group='world', or set criterion.process_group after loading"
            )
        return _SameGroup, (self.group,)


def _version(tensor: Tensor | None) -> int | None:
    """How often it was written to; None where torch does not count."""
    return None if tensor is None or tensor.is_inference() else tensor._version


CLASSES_WATCHED = 16
_NO_MEMORY = (
    "this loss remembers no centroids: make it with num_classes, feature_dim and centroid_momentum"
)
_MEMORY = ("centroid_memory", "centroid_seen")
_OF_MEMORY = {"feature_dim": None, "centroid_momentum": None}  # arguments of the module alone
