"""VarCon as a pytorch-metric-learning (PML) loss.

    from varcon_loss.integrations.metric_learning import CrossBatchMemory, VarConLoss

`VarConLoss` takes PML's reducers, regularisers, miners and wrappers like a built-in loss.
`CrossBatchMemory` and `SelfSupervisedLoss` are PML's own, which accept losses by name, with this
one's name added.
"""

import importlib.metadata
import re

try:
    import pytorch_metric_learning
except ImportError as error:
    raise ImportError(
        "varcon_loss.integrations.metric_learning needs pytorch-metric-learning: "
        "pip install 'pytorch-metric-learning>=2.2,<3'"
    ) from error
try:
    _version = importlib.metadata.version("pytorch-metric-learning")
except importlib.metadata.PackageNotFoundError:  # a folder on the path
    _version = getattr(pytorch_metric_learning, "__version__", "one that names no version")
if not re.match(r"2\.([2-9]|\d\d)", _version):
    raise ImportError(
        "varcon_loss.integrations.metric_learning supports pytorch-metric-learning >=2.2,<3, found "
        f"{_version}: pip install 'pytorch-metric-learning>=2.2,<3'"
    )

from typing import Any

import torch
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
from pytorch_metric_learning.reducers import MeanReducer
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor

import varcon_loss
from varcon_loss import checks

__all__ = ["CrossBatchMemory", "SelfSupervisedLoss", "VarConLoss"]

_STATISTICS = ("tau2", "confidence", "kl", "nll", "num_classes", "num_anchors")

# What `varcon_loss.VarConLoss` and other losses take and PML has another place for.
_ELSEWHERE = {
    "num_classes": "leave it out, any integers serve as labels",
    "embedding_size": "leave it out, VarCon has no weights of its own",
    "normalize": "use distance=DotProductSimilarity(normalize_embeddings=False) for raw embeddings",
    "reduction": "use reducer=MeanReducer() (the default), SumReducer() or DoNothingReducer()",
    "ignore_index": "leave such samples out of the call",
    "weight": "use reducer=ClassWeightedReducer(weights), which divides by the number of anchors",
    "process_group": "use pytorch_metric_learning.utils.distributed.DistributedLossWrapper(loss)",
    "exchange": "use pytorch_metric_learning.utils.distributed.DistributedLossWrapper(loss)",
    "feature_dim": "use CrossBatchMemory(loss, embedding_size) of this module",
    "centroid_momentum": "use CrossBatchMemory(loss, embedding_size) of this module, or "
    "varcon_loss.VarConLoss outside PML",
    "contrast_mode": "leave it out, every embedding is an anchor",
    "weight_regularizer": "leave it out, VarCon has no weights of its own",
    "base_temperature": "leave it out, VarCon does not rescale the loss",
}


def _names(kind: type) -> list[str]:
    """PML's wrappers compare bare class names: of ``kind`` and of every class derived from it."""
    return [kind.__name__, *(name for heir in kind.__subclasses__() for name in _names(heir))]


def _refuse_core_loss(wrapper: str, loss: object) -> None:
    if isinstance(loss, varcon_loss.VarConLoss):
        raise TypeError(
            f"{wrapper} wraps PML's kind of loss, got varcon_loss.VarConLoss: "
            "from varcon_loss.integrations.metric_learning import VarConLoss"
        )


class VarConLoss(pml_losses.BaseMetricLossFunction):
    """VarCon (arXiv 2506.07413, Eq. 7) for pytorch-metric-learning.

    PML's own ``CrossBatchMemory`` and ``SelfSupervisedLoss`` accept a fixed list of class names and
    say "not supported for VarConLoss". Import both from here::

        from varcon_loss.integrations.metric_learning import CrossBatchMemory, SelfSupervisedLoss

    Args:
        temperature: ``tau1 > 0``.
        epsilon: how far the confidence moves ``tau2`` (Eq. 13); ``0 <= epsilon < temperature``.
        leave_one_out: compare each sample with its class's centroid without itself (an extension);
            samples alone in their class are left out.
        impl: as in `varcon_loss.VarConLoss`.
        **kwargs: ``reducer`` (default ``MeanReducer``), ``distance`` (``CosineSimilarity``, the
            default, or ``DotProductSimilarity``), ``embedding_regularizer``, ``collect_stats`` and
            the rest of what PML's losses take.

    Called as ``loss(embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None)``:

    - ``embeddings`` ``[N, D]``, ``labels`` ``[N]``, integers.
    - ``ref_emb`` ``[M, D]``, ``ref_labels`` ``[M]``: what the centroids are made of;
      ``embeddings`` are the anchors alone then. Anchors whose label the reference lacks are
      dropped. No gradient flows through centroids, so ``ref_emb`` gets none: where it requires
      one, as a second tower does, a ``UserWarning`` says so.
    - ``indices_tuple``: weighs anchors by how often a miner chose them; those never chosen count 0,
      so that the loss is 0 if none was. Centroids are of all samples whatever a miner says.

    Half-precision embeddings are computed in float32. With ``collect_stats`` the means of ``tau2``,
    ``confidence``, ``kl`` and ``nll``, and ``num_classes`` and ``num_anchors``, are attributes.
    The distance records its norms if it was made with ``collect_stats``, though it is never called.

    There is no centroid memory here: PML's losses keep no state and its wrappers copy and re-run
    them freely. `CrossBatchMemory` serves the same purpose.

    Raises:
        TypeError: an option of `varcon_loss.VarConLoss` that PML has another place for; embeddings
            or labels of another dtype.
        ValueError: another distance, or one with other settings than
            ``normalize_embeddings``; ``leave_one_out`` with a reference set; no labels; other
            shapes.

    Example:
        >>> import torch
        >>> from varcon_loss.integrations.metric_learning import VarConLoss
        >>> loss_func = VarConLoss(temperature=0.1)
        >>> embeddings = torch.randn(8, 16, requires_grad=True)
        >>> loss_func(embeddings, torch.arange(8) % 3).backward()
    """

    def __init__(
        self,
        temperature: float = 0.1,
        epsilon: float = 0.02,
        *,
        leave_one_out: bool = False,
        impl: str = "auto",
        **kwargs: Any,
    ) -> None:
        misplaced = [f"{name}: {_ELSEWHERE[name]}" for name in kwargs if name in _ELSEWHERE]
        if misplaced:
            raise TypeError(
                "pytorch-metric-learning's VarConLoss does not take " + "; ".join(misplaced)
            )
        super().__init__(**kwargs)
        core = varcon_loss.VarConLoss(temperature, epsilon, leave_one_out=leave_one_out, impl=impl)
        _check_distance(self.distance)
        self.temperature = core.temperature
        self.epsilon = core.epsilon
        self.leave_one_out = core.leave_one_out
        self.impl = core.impl
        self.add_to_recordable_attributes(list_of_names=["temperature", "epsilon"], is_stat=False)
        self.add_to_recordable_attributes(list_of_names=list(_STATISTICS), is_stat=True)

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: tuple[Tensor, ...] | None,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> dict[str, Any]:
        """PML's hook: per-anchor losses, for its reducer to weigh and reduce."""
        if labels is None or ref_labels is None:
            raise ValueError("VarConLoss needs labels, and ref_labels beside ref_emb")
        _check_distance(self.distance)
        using_ref = ref_emb is not embeddings or (
            ref_labels is not labels and not torch.equal(ref_labels, labels)
        )
        if using_ref and self.leave_one_out:
            raise ValueError(
                "leave_one_out has no meaning with ref_emb or a memory, which hold more than the "
                "anchors: use leave_one_out=False"
            )
        _check_inputs(embeddings, labels, ref_emb, ref_labels)
        if len(embeddings) == 0 or len(ref_emb) == 0:
            return self.zero_losses()
        if indices_tuple is not None and all(len(indices) == 0 for indices in indices_tuple):
            return self.zero_losses()
        self._record_norms(embeddings, ref_emb)
        rows = torch.arange(len(labels), device=labels.device)
        options: dict[str, Any] = {}
        if using_ref:
            found = torch.isin(labels.long(), ref_labels.long())  # torch.isin takes no uint16
            if not bool(found.all()):
                rows = rows[found]
            _warn_of_lost_gradient(embeddings, ref_emb)
            options = {"ref_features": ref_emb.detach(), "ref_labels": ref_labels}
        if len(rows) == 0:
            return self.zero_losses()
        everyone = len(rows) == len(labels)
        terms = varcon_loss.varcon_terms(
            embeddings if everyone else embeddings[rows],
            labels if everyone else labels[rows],
            self.temperature,
            self.epsilon,
            normalize=self.distance.normalize_embeddings,
            ignore_index=None,
            leave_one_out=self.leave_one_out,
            impl=self.impl,
            **options,
        )
        losses = terms.loss
        if self.leave_one_out:
            rows, losses = rows[terms.valid], losses[terms.valid]
            if len(rows) == 0:
                return self.zero_losses()
        if indices_tuple is not None:
            weights = lmu.convert_to_weights(
                indices_tuple, labels, dtype=losses.dtype, using_ref=using_ref
            )
            losses = losses * weights[rows]
        if self.collect_stats:
            self._record(terms, len(rows))
        return {"loss": {"losses": losses, "indices": rows, "reduction_type": "element"}}

    def _record_norms(self, query: Tensor, ref: Tensor) -> None:
        """What the distance would record if it were called; VarCon needs no matrix of it."""
        distance = self.distance
        if distance.collect_stats:
            with torch.no_grad():
                norms = distance.maybe_normalize(query), distance.maybe_normalize(ref)
            distance.set_default_stats(query, ref, *norms)

    def _record(self, terms: varcon_loss.VarConTerms, num_anchors: int) -> None:
        for name in ("tau2", "confidence", "kl", "nll"):
            setattr(self, name, float(getattr(terms, name)[terms.valid].mean()))
        self.num_classes, self.num_anchors = int(terms.num_classes), num_anchors

    def get_default_distance(self) -> Any:
        """The core's own normalisation."""
        return CosineSimilarity()

    def get_default_reducer(self) -> MeanReducer:
        """The paper's mean; anchors that a miner gave no weight count as 0."""
        return MeanReducer()

    def extra_repr(self) -> str:
        """What was chosen, where it differs from the defaults."""
        shown = f"temperature={self.temperature}, epsilon={self.epsilon}"
        if self.leave_one_out:
            shown += ", leave_one_out=True"
        return shown if self.impl == "auto" else f"{shown}, impl={self.impl!r}"


def _check_distance(distance: Any) -> None:
    """It is read anew in each call, as it may be set after the loss was made."""
    if type(distance) not in (CosineSimilarity, DotProductSimilarity) or distance.power != 1:
        raise ValueError(
            "VarConLoss compares embeddings with centroids by cosine or dot product: distance "
            f"must be CosineSimilarity() or DotProductSimilarity(), got {distance}"
        )
    if distance.normalize_embeddings and distance.p != 2:
        raise ValueError(
            "VarConLoss divides embeddings by their Euclidean length: distance must have p=2, "
            f"or normalize_embeddings=False, got {distance} with p={distance.p}"
        )


def _check_inputs(embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> None:
    """Under the names that PML gives them."""
    for name, given in (("labels", labels), ("ref_labels", ref_labels)):
        if given.is_floating_point():
            raise TypeError(
                f"{name} must be integers, as everywhere in pytorch-metric-learning, got "
                f"{given.dtype} {list(given.shape)}: for class probabilities use "
                "varcon_loss.VarConLoss"
            )
    checks.check_samples(embeddings, labels, features_name="embeddings")
    checks.check_samples(ref_emb, ref_labels, features_name="ref_emb", labels_name="ref_labels")
    for name, rows in (("embeddings", embeddings), ("ref_emb", ref_emb)):
        if rows.ndim != 2:
            raise ValueError(
                f"{name} must have shape [N, D], got {list(rows.shape)}: for V views of each "
                "sample use embeddings.flatten(0, 1) and labels.repeat_interleave(V)"
            )
    if embeddings.shape[1] != ref_emb.shape[1] or embeddings.device != ref_emb.device:
        raise ValueError(
            f"ref_emb must have the width and device of embeddings, {embeddings.shape[1]} on "
            f"{embeddings.device}, got {ref_emb.shape[1]} on {ref_emb.device}"
        )


def _warn_of_lost_gradient(embeddings: Tensor, ref_emb: Tensor) -> None:
    if not (ref_emb.requires_grad and torch.is_grad_enabled()):
        return
    # A reference that begins with the batch, as in DistributedLossWrapper(efficient=True), is no
    # second tower: its samples learn as anchors.
    if ref_emb.dtype == embeddings.dtype and torch.equal(ref_emb[: len(embeddings)], embeddings):
        return
    checks.warn(
        "VarConLoss gives ref_emb no gradient: it makes the centroids, through which none flows, "
        "so that a second tower does not learn here (it does with SupConLoss). To train both "
        "towers use SelfSupervisedLoss(loss, symmetric=True), or one batch of both, "
        "loss(torch.cat([emb, ref_emb]), torch.cat([labels, ref_labels])). If the reference is "
        "meant to stay fixed, pass ref_emb.detach()"
    )


class CrossBatchMemory(pml_losses.CrossBatchMemory):
    """PML's ``CrossBatchMemory``, which accepts `VarConLoss` and what derives from it, too.

    With `VarConLoss`, and neither miner nor ``indices_tuple``, the list of all pairs of batch and
    memory is not made: VarCon needs none. Every other loss is treated exactly as by PML.

    Over several processes choose a ``memory_size`` that is a multiple of the global batch: the
    ranks' queues drift apart otherwise (PML issue 639).
    """

    def __init__(self, loss: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        _refuse_core_loss("CrossBatchMemory", loss)
        super().__init__(loss, *args, **kwargs)
        if isinstance(loss, VarConLoss) and loss.leave_one_out:
            raise ValueError(
                "leave_one_out has no meaning with a memory, which holds the anchors themselves: "
                "use leave_one_out=False"
            )

    @staticmethod
    def supported_losses() -> list[str]:
        """Names of the losses that may be wrapped."""
        return [*pml_losses.CrossBatchMemory.supported_losses(), *_names(VarConLoss)]

    def create_indices_tuple(
        self,
        embeddings: Tensor,
        labels: Tensor,
        E_mem: Tensor,  # noqa: N803
        L_mem: Tensor,  # noqa: N803
        input_indices_tuple: tuple[Tensor, ...] | None,
        do_remove_self_comparisons: bool,
    ) -> tuple[Tensor, ...] | None:
        """As PML's; None where VarCon has no use for pairs."""
        if isinstance(self.loss, VarConLoss) and self.miner is None and input_indices_tuple is None:
            return None
        return super().create_indices_tuple(
            embeddings, labels, E_mem, L_mem, input_indices_tuple, do_remove_self_comparisons
        )


class SelfSupervisedLoss(pml_losses.SelfSupervisedLoss):
    """PML's ``SelfSupervisedLoss``, which accepts `VarConLoss` and what derives from it, too.

    With ``symmetric=True``, the default, both towers are anchors and learn. With
    ``symmetric=False`` only the first does: the second makes the centroids, which have no gradient.
    """

    def __init__(self, loss: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        _refuse_core_loss("SelfSupervisedLoss", loss)
        super().__init__(loss, *args, **kwargs)

    @staticmethod
    def supported_losses() -> list[str]:
        """Names of the losses that may be wrapped."""
        return [*pml_losses.SelfSupervisedLoss.supported_losses(), *_names(VarConLoss)]
