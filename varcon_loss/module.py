"""The loss as a module."""

import weakref
from collections.abc import Callable
from typing import Any, Never

import torch
from torch import Tensor, nn

from varcon_loss import checks
from varcon_loss import loss as flow
from varcon_loss.centroids import unit
from varcon_loss.memory import Prediction, predict
from varcon_loss.ranks import group_of, size_of
from varcon_loss.readable import values_may_be_read, without_autocast

OF_MEMORY = ("feature_dim", "centroid_momentum")


class VarConLoss(nn.Module):
    """Variational supervised contrastive loss (Wang et al., NeurIPS 2025, arXiv 2506.07413).

    Each embedding ``z_i`` is compared with one unit centroid ``w_k`` per class present in the
    batch. No gradient flows through centroids. The loss of a sample is ``KL(q || p) - log p(y_i)``
    (Eq. 7), where

    - ``p`` is the softmax of ``z_i . w_k / temperature`` (Eq. 8);
    - ``tau2 = temperature - epsilon + 2 epsilon p(y_i)`` is the adaptive temperature (Eq. 13);
    - ``q`` is the target, proportional to ``exp(1 / tau2)`` for the own class and to 1 for every
      other (Eq. 10-12).

    Args:
        temperature: ``tau1 > 0``.
        epsilon: how far the confidence moves ``tau2``; ``0 <= epsilon < temperature``.
        num_classes: labels are then ``0 ... num_classes - 1``. Needed by ``centroid_momentum``,
            implied by ``weight``. Without it any integers serve as labels, but a GPU is
            synchronised once per call and ``torch.compile`` breaks the graph. The cost follows
            the classes present in the batch.
        normalize: divide features by their length first. ``False`` takes them as they are;
            centroids have unit length either way.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: samples with this label take part in nothing. ``None``: none are ignored.
        weight: ``[num_classes]``, scales the loss of each class as in `torch.nn.CrossEntropyLoss`
            (the mean is ``sum(w l) / sum(w)``, 0 if no weight is left); centroids are unaffected.
            Implies ``num_classes``.
        leave_one_out: an extension of the paper, for integer labels: compare each sample with the
            centroid of the *other* members of its class. A sample alone in its class has none: it
            is left out of the mean (``terms.valid`` is False), as SupCon leaves out an anchor
            without positives. Its class still counts for the other samples.
        process_group: ``"world"`` or a `torch.distributed.ProcessGroup`: centroids over all its
            ranks. Ranks exchange class sums and counts, never embeddings, in one collective per
            step (two without ``num_classes``) and none in backward. At their first step they
            compare their options. With ``W`` ranks the call returns
            ``W * local sum / global weight`` (``"sum"``: ``W * local sum``). Its mean over ranks
            is the loss of the concatenated batch, and DDP's or FSDP's averaging makes the gradient
            exact. ``"none"`` and the per-sample terms are local and unscaled. Ranks exchange in
            training steps only. In eval mode, or without gradients, each rank evaluates its own
            batch, with its own centroids (or the memory) and a local mean, so one rank may
            validate by itself; the backward of such a loss is an error. Every rank must take the
            same number of training steps: if one stops early, the others wait until their group's
            timeout. ``"world"`` is looked up at each call, so the module can be pickled; without
            initialised processes it means this process.
        impl: ``"eager"`` (one pass, any device), ``"triton"`` (fused kernels for CUDA devices; not
            for float64, nor rows wider than 1,024), ``"auto"`` (``"triton"`` where a proof on such
            a device is in the repository, none yet; else ``"eager"``) or ``"reference"`` (the
            paper's equations line by line, ``[N, K]`` memory). Second derivatives go by these
            equations whichever is chosen.
        feature_dim: width ``D`` of the embeddings; ``centroid_momentum`` needs it, nothing else.
        centroid_momentum: an extension of the paper, for many classes in small batches: remember
            one centroid per class, in ``centroid_memory``, a float32 buffer ``[num_classes, D]``. A
            row of zeros is a class not seen, and rows are made unit when they are read. In
            training mode with gradients enabled each call first moves the centroids of the classes
            present, ``w <- unit(m w + (1 - m) mean)``. A class seen first takes its mean. The
            softmax then runs over every class seen so far. In eval mode or without gradients the
            memory is only read, and samples of classes never seen take no part; if it is empty, a
            warning says so. A class whose sum holds NaN keeps its centroid. Each training call
            updates once: keep the loss outside regions that activation checkpointing recomputes,
            and call `eval` for the second forward of optimisers like SAM. Over several ranks give
            ``process_group`` too, so that all remember the same. ``None`` is the paper.

    Shape:
        features: ``[N, D]``, or ``[B, V, ...]`` for ``V`` views of each sample (trailing dimensions
            are flattened), float16, bfloat16, float32 or float64, with or without autocast.
        labels: ``[N]`` or ``[B]``, any integer dtype but uint64, on the same device; or class
            probabilities ``[N, C]`` or ``[B, C]``, any float dtype, 0 to 1 (an extension of the
            paper: the loss is its expectation under them, and each sample counts for the centroids
            by its shares). A row of zeros takes no part; the mean divides by the rows that do, or
            by the weights of their shares.
        Output: a scalar, float32 or wider; ``[N]`` or ``[B, V]`` for ``reduction="none"``.

    Raises:
        TypeError, ValueError: bad arguments; on a CPU in eager mode also a label out of range or
            missing in the reference set. On an accelerator, or under ``torch.compile``, reading
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

    def __init__(
        self,
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
        feature_dim: int | None = None,
        centroid_momentum: float | None = None,
        **unknown: Never,
    ) -> None:
        super().__init__()
        if positional:
            checks.refuse_options("VarConLoss", positional)
        known = (*flow.FUNCTION_OPTIONS, *OF_MEMORY)
        checks.refuse_unknown("VarConLoss", unknown, known, temperature)
        self.temperature, self.epsilon = temperature, epsilon
        checks.check_temperatures(self.temperature, self.epsilon)
        checks.option("weight", weight)
        if weight is not None and weight.is_meta:
            do = "load some, or set criterion.weight, before the first call"
            checks.warn(f"weight was made on the meta device and has no values: {do}")
        self.register_buffer("weight", None if weight is None else weight.detach().clone())
        self.num_classes = checks.num_classes_of(checks.option("num_classes", num_classes), weight)
        self.normalize, self.reduction, self.ignore_index = normalize, reduction, ignore_index
        self.leave_one_out, self.process_group, self.impl = leave_one_out, process_group, impl
        self.feature_dim = feature_dim
        momentum = checks.check_memory_options(
            self.num_classes, self.feature_dim, centroid_momentum, self.leave_one_out
        )
        memory = None
        if momentum is not None:
            # Small steps towards each batch are lost in half precision: float32 always.
            memory = torch.zeros(self.num_classes or 0, feature_dim or 0, dtype=torch.float32)
        self.register_buffer("centroid_memory", memory)
        self.centroid_momentum = momentum
        self._exchanges = weakref.WeakKeyDictionary()  # agreed on with other ranks, by group
        self._warned = False  # of ranks that remember by themselves

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        *positional: Never,
        ref_features: Tensor | None = None,
        ref_labels: Tensor | None = None,
        **unknown: Never,
    ) -> Tensor:
        """The reduced loss; see the class for shapes.

        Args:
            features: ``[N, D]`` or ``[B, V, ...]``.
            labels: ``[N]`` or ``[B]`` integers, or class probabilities ``[N, C]`` or ``[B, C]``;
                required.
            *positional: nothing, or a mask of None; what other losses take there is an error that
                says what it becomes here.
            ref_features: ``[M, D]`` or with views; centroids come from these instead of
                ``features``, and ``K`` counts their classes. No gradient flows to them: to train
                two towers call the loss both ways.
            ref_labels: ``[M]`` integers or ``[M, C]``; must contain every label of ``labels``.
            **unknown: nothing, or ``mask=None``; else an error that says what it becomes here.
        """
        if positional or unknown:
            checks.refuse_arguments("the call", positional, unknown)
        scored = self._evaluate(features, labels, ref_features, ref_labels, need_terms=False)
        return flow.loss_of(features, scored)

    def terms(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        *positional: Never,
        ref_features: Tensor | None = None,
        ref_labels: Tensor | None = None,
        **unknown: Never,
    ) -> flow.VarConTerms:
        """As the call, with the per-sample terms that one logs; the loss is ``.reduced``."""
        if positional or unknown:
            checks.refuse_arguments("terms", positional, unknown)
        scored = self._evaluate(features, labels, ref_features, ref_labels, need_terms=True)
        return flow.terms_of(features, scored)

    def _evaluate(
        self,
        features: Tensor,
        labels: Tensor | None,
        ref_features: Tensor | None,
        ref_labels: Tensor | None,
        *,
        need_terms: bool,
    ) -> flow.Scored:
        learns, memory = self.training and torch.is_grad_enabled(), None
        if self.centroid_momentum is not None:
            memory = self._memory()
            self._warn_of_memory(memory, learns)
        options = self._options(learns)
        sets = (features, labels, ref_features, ref_labels)
        scored = flow.evaluate(*sets, options, memory, self._exchanges, need_terms=need_terms)
        if not self.training:
            self._watch_eval_mode(scored[0], None if memory is None else scored[3])
        return scored

    def _options(self, learns: bool) -> flow.Options:
        """Of a call; one that does not learn neither moves the memory nor exchanges."""
        given = {name: getattr(self, name) for name in flow.Options._fields}
        if not learns:
            given = {**given, "process_group": None, "centroid_momentum": None}
        return flow.Options(**given)

    @property
    def centroids(self) -> Tensor:
        """Remembered centroids ``[C, D]``, float32, unit length; zero rows for classes not seen.

        What is read is a copy: a write into it changes nothing. Assign to set them,
        ``criterion.centroids = means``, rows of any length; zero rows forget their class.

        Raises:
            AttributeError: the loss was made without ``centroid_momentum``.
            ValueError: what is assigned has another shape.
        """
        if self.centroid_momentum is None:
            raise AttributeError(_NO_MEMORY)
        memory = self._memory()
        return unit(memory, memory.dtype)[0]

    @centroids.setter
    @torch.no_grad()
    def centroids(self, means: Tensor) -> None:
        if self.centroid_momentum is None:
            raise AttributeError(_NO_MEMORY)
        memory, got = self._memory(), getattr(means, "shape", type(means).__name__)
        if not isinstance(means, Tensor) or means.shape != memory.shape:
            what = f"a tensor {list(memory.shape)}, [num_classes, feature_dim], got {got}"
            do = "give a row for each class, zeros for a class not known"
            raise ValueError(f"centroids must be {what}: {do}")
        memory.copy_(unit(means.detach(), torch.promote_types(means.dtype, memory.dtype))[0])

    @torch.no_grad()
    def predict(self, features: Tensor) -> Prediction:
        """Classify by the remembered centroids: the most probable class by Eq. 8.

        Args:
            features: ``[N, D]`` or ``[B, V, ...]``, embeddings as the loss takes them.

        Returns:
            ``label`` int64 and ``confidence``, ``p(label | z)`` over the classes seen so far, both
            ``[N]`` or ``[B, V]``. They are -1 and NaN where features are NaN, or the memory is
            empty (a warning says so).

        Raises:
            RuntimeError: the loss was made without ``centroid_momentum``.
        """
        memory = self._require_memory()
        checks.check_features(features)
        rows, shape = flow.flatten_views(features), features.shape[: 1 if features.ndim == 2 else 2]
        checks.check_memory_fits(features, memory)
        self._warn_of_memory(memory, learns=False)
        with without_autocast(features.device.type):
            dtype = torch.promote_types(features.dtype, memory.dtype)
            z = unit(rows, dtype)[0] if self.normalize else rows.to(dtype)
            found = predict(z, memory, self.temperature)
        return Prediction(label=found.label.view(shape), confidence=found.confidence.view(shape))

    @torch.no_grad()
    def reset_memory(self) -> None:
        """Forget every centroid.

        Raises:
            RuntimeError: the loss was made without ``centroid_momentum``.
        """
        self._require_memory().zero_()

    def reset_parameters(self) -> None:
        """As in modules with weights, after `to_empty`: an empty memory, if there is one.

        ``weight`` has no initial value to go back to: load or set it.
        """
        if self.centroid_momentum is not None:
            self.reset_memory()

    def _require_memory(self) -> Tensor:
        if self.centroid_momentum is None:
            raise RuntimeError(_NO_MEMORY)
        return self._memory()

    def _memory(self) -> Tensor:
        """The buffer, in float32 whatever cast it was given."""
        memory = self.centroid_memory
        assert memory is not None
        if memory.dtype != torch.float32:
            memory = self._buffers["centroid_memory"] = memory.float()
        return memory

    def _warn_of_memory(self, memory: Tensor, learns: bool) -> None:
        if torch.compiler.is_compiling():
            return
        if (
            learns
            and self.process_group is None
            and not self._warned
            and size_of(group_of("world")) > 1
        ):
            self._warned = True
            own = "each rank remembers only the centroids of its own samples"
            lost = "DDP and Lightning overwrite them by rank 0's where the loss is in their model"
            do = "give process_group='world', and all ranks remember the same"
            checks.warn(f"{own}, and {lost}: {do}")
        if (
            not learns
            and values_may_be_read(memory)
            and float(torch.linalg.vector_norm(memory)) == 0
        ):
            mode = "" if self.training else " In eval mode it is only read: call train() to learn."
            what = "the loss is 0, no sample takes part, and predict knows no class"
            checks.warn(
                f"the centroid memory is empty, no training step has filled it: {what}.{mode}"
            )

    def _watch_eval_mode(self, reduced: Tensor, known: Tensor | None) -> None:
        """An error or a warning for training in eval mode, which neither exchanges nor learns."""
        if not reduced.requires_grad or torch.compiler.is_compiling():
            return
        if self.process_group is not None and size_of(group_of(self.process_group)) > 1:
            reduced.register_hook(_refuse_eval_mode)
        if known is not None and values_may_be_read(known) and not bool(known.all()):
            lost = "samples of classes that the centroid memory has not seen take no part"
            do = "call train() for training steps, and torch.no_grad() for validation"
            checks.warn(f"{lost}, and in eval mode it does not learn them: {do}")

    def _replicate_for_data_parallel(self) -> "VarConLoss":
        what = "nn.DataParallel makes centroids of each replica's part of the batch, and keeps"
        do = "use nn.parallel.DistributedDataParallel with process_group='world'"
        checks.warn(f"{what} only the first's memory: {do}, or the loss outside the wrapped model")
        return super()._replicate_for_data_parallel()

    def __getattr__(self, name: str) -> Any:
        if name == "centroids":  # the property has raised
            raise AttributeError(_NO_MEMORY)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "centroids":  # before Module takes a Parameter for one of its own
            return object.__setattr__(self, name, value)
        if name in flow.Options._fields or name in OF_MEMORY:
            value = self._checked(name, value)
        super().__setattr__(name, value)

    def _checked(self, name: str, value: Any) -> Any:
        """An option as it is kept, beside the ones that are there."""
        if name != "centroid_momentum":
            value = checks.option(name, value)
        momentum = value if name == "centroid_momentum" else self.__dict__.get("centroid_momentum")
        if momentum is None or name not in ("centroid_momentum", "leave_one_out", "num_classes"):
            return value
        if self.centroid_memory is None:
            raise AttributeError(_NO_MEMORY)
        num_classes = self.centroid_memory.shape[0]
        if name == "num_classes" and value != num_classes:
            has = f"the centroid memory has {num_classes} classes"
            raise ValueError(f"num_classes cannot become {value}: {has}. Make a new loss")
        alone = value if name == "leave_one_out" else self.leave_one_out
        momentum = checks.check_memory_options(num_classes, self.feature_dim, momentum, alone)
        return momentum if name == "centroid_momentum" else value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "VarConLoss":
        """As in `torch.nn.Module`, but the memory stays float32, and weights lose no digits.

        What `to_empty` leaves in the memory is emptied.
        """
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            assert after is not None
            narrower = after.dtype.itemsize < before.dtype.itemsize
            if narrower or (name == "centroid_memory" and after.dtype != before.dtype):
                self._buffers[name] = before.to(after.device)
        if self.centroid_memory is not None and _makes_values(fn):
            self.reset_memory()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """A memory on the meta device takes only what training leaves: rows of length 0 to 1.

        Some loaders allocate what a checkpoint lacks, and load that.
        """
        before = self.centroid_memory
        super()._load_from_state_dict(*args, **kwargs)
        after = self.centroid_memory
        if before is None or after is None or not before.is_meta or after.is_meta:
            return
        lengths = torch.linalg.vector_norm(after.float(), dim=1)
        if not bool((lengths <= 1 + 1e-3).all()):
            self.reset_memory()
            what = "the centroid memory that was loaded has rows longer than 1, as no training does"
            do = "call reset_parameters() (with transformers in _init_weights)"
            checks.warn(f"{what}, and is emptied: if the checkpoint lacks it, {do}")

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which agree anew with the ranks of the same group."""
        group = _SameGroup(self.process_group)
        return super().__getstate__() | {"process_group": group, "_exchanges": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        group, exchanges = state["process_group"].group, weakref.WeakKeyDictionary()
        super().__setstate__(state | {"process_group": group, "_exchanges": exchanges})

    def extra_repr(self) -> str:
        """What was chosen, where it differs from the defaults."""
        shown = []
        for name in (*flow.FUNCTION_OPTIONS, *OF_MEMORY):
            value, default = getattr(self, name), flow.Options._field_defaults.get(name)
            if name == "weight":
                shown += [] if value is None else [f"weight=[{len(value)}]"]
            elif value != default or name in ("temperature", "epsilon"):
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)


class _SameGroup:
    """A process group, which a copy shares."""

    def __init__(self, group: object) -> None:
        self.group = group

    def __deepcopy__(self, _: object) -> "_SameGroup":
        return self


def _makes_values(fn: Callable[[Tensor], Tensor]) -> bool:
    """True for `to_empty`: nothing else gives storage to a tensor without one."""
    try:
        return not fn(torch.empty(1, device="meta")).is_meta
    except (NotImplementedError, RuntimeError):
        return False


def _refuse_eval_mode(gradient: Tensor) -> None:
    what = "this loss was computed in eval mode, where ranks do not exchange their centroids"
    do = "Call train() on the loss (or the model that holds it), and no_grad() for validation"
    raise RuntimeError(f"{what}: its gradient is of each rank's own batch alone. {do}")


_NO_MEMORY = "this loss remembers no centroids: give num_classes, feature_dim, centroid_momentum"
