"""The loss as a module."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from varcon_loss import checks
from varcon_loss.functional import Options, check_options, compute_loss, compute_terms
from varcon_loss.memory import CentroidMemory, Prediction, predict
from varcon_loss.norms import row_norms
from varcon_loss.reduction import VarConTerms


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
        num_classes: labels are then ``0 ... num_classes - 1``. Needed by ``weight``; without it
            any integers serve as labels, but a GPU is synchronised once a call and
            ``torch.compile`` breaks the graph. The cost follows the classes present in the batch.
        normalize: divide features by their length first. ``False`` takes them as they are;
            centroids have unit length either way.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: samples with this label take part in nothing. ``None``: none are ignored.
        weight: ``[num_classes]``, scales the loss of each class as in `torch.nn.CrossEntropyLoss`
            (the mean is ``sum(w l) / sum(w)``, 0 if no weight is left); centroids are unaffected.
            Implies ``num_classes``.
        leave_one_out: an extension of the paper: compare each sample with the centroid of the
            *other* members of its class. A sample alone in its class has none: like a SupCon
            anchor without positives it is left out of the mean (``terms.valid`` is False), while
            its class still counts among the others.
        process_group: ``"world"`` or a `torch.distributed.ProcessGroup`: centroids over all its
            ranks. Ranks exchange class sums and counts, never embeddings, in one collective a step
            (two without ``num_classes``) and none in backward. The call returns
            ``W * local sum / global weight`` (``"sum"``: ``W * local sum``), ``W`` the number of
            ranks, so that its mean over ranks is the loss of the concatenated batch, and DDP's or
            FSDP's averaging makes the gradient exact. ``"none"`` and the per-sample terms are
            local and unscaled. ``"world"`` is looked up at each call (without initialised
            processes it means this one alone), so the module can be pickled.
        exchange: ``"all-reduce"`` (a table of all classes), ``"all-gather"`` (rows of the classes
            each rank holds) or ``"auto"``: the smaller, chosen by all ranks at their first step.
        impl: ``"eager"`` (one pass, any device), ``"triton"`` (fused kernels for CUDA devices; not
            for float64, nor rows wider than 1,024), ``"auto"`` (``"triton"`` where it can run,
            else ``"eager"``) or ``"reference"`` (the paper's equations line by line, ``[N, K]``
            memory, twice differentiable).
        feature_dim: width ``D`` of the embeddings; only ``centroid_momentum`` needs it.
        centroid_momentum: an extension of the paper, for many classes in small batches: remember
            one centroid a class (``centroid_memory``, a float32 buffer ``[num_classes, D]``).
            In training mode with gradients enabled each call first moves the centroids of the
            classes present, ``w <- unit(m w + (1 - m) mean)``, a class seen first takes its mean;
            the softmax then runs over every class seen so far. In eval mode or without gradients
            the memory is only read, and samples of classes never seen take no part. A batch with
            NaN leaves the memory as it was. Keep the loss outside regions that activation
            checkpointing recomputes: they would update it twice. ``None`` is the paper.

    Shape:
        features: ``[N, D]``, or ``[B, V, ...]`` for ``V`` views of each sample (trailing dimensions
        are flattened), float16, bfloat16, float32 or float64, with or without autocast.
        labels: ``[N]`` or ``[B]``, any integer dtype but uint64, on the same device.
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
    ) -> None:
        super().__init__()
        options = check_options(
            temperature,
            epsilon,
            num_classes,
            bool(normalize),
            reduction,
            ignore_index,
            weight,
            bool(leave_one_out),
            process_group,
            exchange,
            impl,
        )
        self.temperature = options.temperature
        self.epsilon = options.epsilon
        self.num_classes = options.num_classes
        self.normalize = options.normalize
        self.reduction = options.reduction
        self.ignore_index = options.ignore_index
        self.register_buffer("weight", None if weight is None else weight.detach().clone())
        self.leave_one_out = options.leave_one_out
        self.process_group = options.process_group
        self.exchange = options.exchange
        self.impl = options.impl

        checks.check_memory_options(
            self.num_classes, feature_dim, centroid_momentum, self.leave_one_out
        )
        self.feature_dim = feature_dim
        self.centroid_momentum = centroid_momentum
        remembers = centroid_momentum is not None
        shape = (self.num_classes or 0, feature_dim or 0)
        self.register_buffer("centroid_memory", torch.zeros(shape) if remembers else None)
        self.register_buffer("centroid_seen", torch.zeros(shape[0]) if remembers else None)

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        ref_features: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The reduced loss; see the class for shapes.

        Args:
            features: ``[N, D]`` or ``[B, V, ...]``.
            labels: ``[N]`` or ``[B]``.
            ref_features: ``[M, D]`` or with views; centroids come from these instead of
                ``features``, detached, and ``K`` counts their classes.
            ref_labels: ``[M]``; must contain every label of ``labels``.
        """
        memory = self._memory(update=self._learns())
        return compute_loss(features, labels, ref_features, ref_labels, self._options(), memory)

    def terms(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        ref_features: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> VarConTerms:
        """As the call, with the per-sample terms that one logs; the loss is ``.reduced``."""
        memory = self._memory(update=self._learns())
        return compute_terms(features, labels, ref_features, ref_labels, self._options(), memory)

    @property
    def centroids(self) -> Tensor:
        """Remembered centroids ``[C, D]``, float32, unit length; zero rows for classes not seen.

        Raises:
            RuntimeError: the loss was made without ``centroid_momentum``.
        """
        memory = self._require_memory()
        return memory.unit / row_norms(memory.unit, memory.unit.dtype).unsqueeze(1)

    @torch.no_grad()
    def predict(self, features: Tensor) -> Prediction:
        """Classify by the remembered centroids: the most probable class by Eq. 8.

        Args:
            features: ``[N, D]``, embeddings as the loss takes them.

        Returns:
            ``label`` ``[N]`` int64 and ``confidence`` ``[N]``: ``p(label | z)`` over the classes
            seen so far. NaN features, or a memory that has seen no class, give confidence NaN.

        Raises:
            RuntimeError: the loss was made without ``centroid_momentum``.
        """
        memory = self._require_memory()
        checks.check_memory(features, memory.unit)
        return predict(
            features, self.centroids, memory.seen > 0, self.temperature, normalize=self.normalize
        )

    @torch.no_grad()
    def reset_memory(self) -> None:
        """Forget every centroid.

        Raises:
            RuntimeError: the loss was made without ``centroid_momentum``.
        """
        memory = self._require_memory()
        memory.unit.zero_()
        memory.seen.zero_()

    def _options(self) -> Options:
        return check_options(
            self.temperature,
            self.epsilon,
            self.num_classes,
            self.normalize,
            self.reduction,
            self.ignore_index,
            self.weight,
            self.leave_one_out,
            self.process_group,
            self.exchange,
            self.impl,
        )

    def _memory(self, *, update: bool) -> CentroidMemory | None:
        if self.centroid_momentum is None:
            return None
        assert self.centroid_memory is not None
        assert self.centroid_seen is not None
        return CentroidMemory(
            self.centroid_memory, self.centroid_seen, self.centroid_momentum, update
        )

    def _learns(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _require_memory(self) -> CentroidMemory:
        memory = self._memory(update=False)
        if memory is None:
            raise RuntimeError(
                "this loss remembers no centroids: make it with num_classes, feature_dim and "
                "centroid_momentum"
            )
        return memory

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None and not isinstance(self.process_group, str):
            raise TypeError(
                "a VarConLoss with a ProcessGroup handle cannot be pickled: make it with "
                "process_group='world', or set criterion.process_group after loading"
            )
        return self.__dict__.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> "VarConLoss":
        """A copy with its own buffers in the same process group."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        if self.process_group is not None:
            memo[id(self.process_group)] = self.process_group
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "VarConLoss":
        """As in `torch.nn.Module`, but the memory stays float32: it moves by small steps."""
        kept = {name: getattr(self, name) for name in ("centroid_memory", "centroid_seen")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if before is not None and after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def extra_repr(self) -> str:
        """What was chosen, where it differs from the defaults."""
        shown = [f"temperature={self.temperature}", f"epsilon={self.epsilon}"]
        for name, default in _DEFAULTS.items():
            value = getattr(self, name)
            if value != default:
                shown.append(f"{name}={value!r}")
        if self.weight is not None:
            shown.append(f"weight=[{len(self.weight)}]")
        return ", ".join(shown)


_DEFAULTS = {
    "num_classes": None,
    "normalize": True,
    "reduction": "mean",
    "ignore_index": -100,
    "leave_one_out": False,
    "process_group": None,
    "exchange": "auto",
    "impl": "auto",
    "feature_dim": None,
    "centroid_momentum": None,
}
