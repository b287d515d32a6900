# pyright: reportIncompatibleMethodOverride=false
"""VarCon as a pytorch-metric-learning (PML) loss.

    from varcon_loss.integrations.metric_learning import CrossBatchMemory, VarConLoss

`VarConLoss` takes PML's reducers, regularisers, miners and wrappers like a built-in loss.
`CrossBatchMemory` and `SelfSupervisedLoss` are PML's own, which accept losses by name, with this
one's name added.
"""

import importlib.metadata
import re
import sys
from typing import Any

import torch
from torch import Tensor

import varcon_loss
from varcon_loss import checks

try:
    import pytorch_metric_learning  # noqa: F401

    _version = importlib.metadata.version("pytorch-metric-learning")
except ImportError:  # also where nothing records what is installed
    _version = getattr(sys.modules.get("pytorch_metric_learning"), "__version__", "none")
if not re.match(r"2\.([2-9]|\d\d)", _version):
    raise ImportError(
        "varcon_loss.integrations.metric_learning supports pytorch-metric-learning >=2.2,<3, found "
        f"{_version}: pip install 'pytorch-metric-learning>=2.2,<3'"
    )

from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
from pytorch_metric_learning.reducers import MeanReducer
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

__all__ = ["CrossBatchMemory", "SelfSupervisedLoss", "VarConLoss"]

_MEANS = ("tau2", "confidence", "kl", "nll")

# What `varcon_loss.VarConLoss` and other losses take and PML has another place for.
_ELSEWHERE = {
    "num_classes": "leave it out, any integers serve as labels",
    "embedding_size": "leave it out, VarCon has no weights of its own",
    "weight_regularizer": "leave it out, VarCon has no weights of its own",
    "contrast_mode": "leave it out, every embedding is an anchor",
    "base_temperature": "leave it out, VarCon does not rescale the loss",
    "normalize": "use distance=DotProductSimilarity(normalize_embeddings=False) for raw embeddings",
    "reduction": "use reducer=MeanReducer() (the default), SumReducer() or DoNothingReducer()",
    "ignore_index": "leave such samples out of the call",
    "weight": "use reducer=ClassWeightedReducer(weights), which divides by the number of anchors",
    "process_group": "use pytorch_metric_learning.utils.distributed.DistributedLossWrapper(loss)",
    "feature_dim": "use CrossBatchMemory(loss, embedding_size) of this module",
    "centroid_momentum": "use CrossBatchMemory(loss, embedding_size) of this module",
}


def _names(kind: type) -> list[str]:
    """PML's wrappers compare bare class names: of ``kind`` and of every class derived from it."""
    return [kind.__name__, *(name for heir in kind.__subclasses__() for name in _names(heir))]


class VarConLoss(pml_losses.BaseMetricLossFunction):
    """VarCon (arXiv 2506.07413, Eq. 7) for pytorch-metric-learning.

    PML's own ``CrossBatchMemory`` and ``SelfSupervisedLoss`` accept a fixed list of class names and
    say "not supported for VarConLoss". Import both from here::

        from varcon_loss.integrations.metric_learning import CrossBatchMemory
        from varcon_loss.integrations.metric_learning import SelfSupervisedLoss

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
      ``embeddings`` are only the anchors then. Anchors whose label the reference lacks are
      dropped. No gradient flows through centroids, so ``ref_emb`` gets none. If it requires one,
      as a second tower does, a ``UserWarning`` says so.
    - ``indices_tuple``: weighs anchors by how often a miner chose them; those never chosen count 0,
      and the loss is 0 if none was. Centroids are of all samples.

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
        self, temperature: float = 0.1, *, epsilon: float = 0.02, leave_one_out: bool = False,
        impl: str = "auto", **kwargs: Any,
    ) -> None:  # fmt: skip
        misplaced = [f"{name}: {_ELSEWHERE[name]}" for name in kwargs if name in _ELSEWHERE]
        if misplaced:
            raise TypeError(f"VarConLoss for PML does not take {'; '.join(misplaced)}")
        super().__init__(**kwargs)
        options = {"epsilon": epsilon, "leave_one_out": leave_one_out, "impl": impl}
        varcon_loss.VarConLoss(temperature, **options)  # which checks them
        _check_distance(self.distance)
        self.temperature, self.epsilon = temperature, epsilon
        self.leave_one_out, self.impl = leave_one_out, impl
        self.add_to_recordable_attributes(list_of_names=["temperature", "epsilon"], is_stat=False)
        statistics = [*_MEANS, "num_classes", "num_anchors"]
        self.add_to_recordable_attributes(list_of_names=statistics, is_stat=True)

    def compute_loss(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Tensor, ref_labels: Any
    ) -> dict[str, Any]:
        """PML's hook: per-anchor losses, for its reducer to weigh and reduce."""
        if labels is None or ref_labels is None:
            raise ValueError("VarConLoss needs labels, and ref_labels beside ref_emb")
        _check_distance(self.distance)
        _check_inputs(embeddings=embeddings, labels=labels, ref_emb=ref_emb, ref_labels=ref_labels)
        using_ref = ref_emb is not embeddings or (
            ref_labels is not labels and not torch.equal(ref_labels, labels)
        )
        if using_ref and self.leave_one_out:
            raise ValueError("leave_one_out has no meaning with ref_emb, which is no anchor's own")
        rows = torch.arange(len(labels), device=labels.device)
        reference = {}
        if using_ref:
            reference = {"ref_features": ref_emb.detach(), "ref_labels": ref_labels}
            rows = rows[torch.isin(labels.long(), ref_labels.long())]  # takes no uint16
        chosen = indices_tuple is None or any(len(indices) for indices in indices_tuple)
        if len(rows) == 0 or not chosen:
            return self.zero_losses()
        if using_ref:
            _warn_of_lost_gradient(embeddings, ref_emb)
        self._record_norms(embeddings, ref_emb)
        everyone = len(rows) == len(labels)
        terms = varcon_loss.varcon_terms(
            embeddings if everyone else embeddings[rows], labels if everyone else labels[rows],
            self.temperature, epsilon=self.epsilon, leave_one_out=self.leave_one_out,
            impl=self.impl, normalize=self.distance.normalize_embeddings, ignore_index=None,
            **reference,
        )  # fmt: skip
        losses = terms.loss
        if self.leave_one_out:  # without whom their class has nobody left
            rows, losses = rows[terms.valid], losses[terms.valid]
            if len(rows) == 0:
                return self.zero_losses()
        if indices_tuple is not None:
            kind = {"dtype": losses.dtype, "using_ref": using_ref}
            losses = losses * lmu.convert_to_weights(indices_tuple, labels, **kind)[rows]
        if self.collect_stats:
            for name in _MEANS:
                setattr(self, name, float(getattr(terms, name)[terms.valid].mean()))
            self.num_classes, self.num_anchors = int(terms.num_classes), len(rows)
        return {"loss": {"losses": losses, "indices": rows, "reduction_type": "element"}}

    def _record_norms(self, query: Tensor, ref: Tensor) -> None:
        """What the distance would record if it were called; VarCon needs no matrix of it."""
        if self.distance.collect_stats:
            with torch.no_grad():
                norms = [self.distance.maybe_normalize(rows) for rows in (query, ref)]
            self.distance.set_default_stats(query, ref, *norms)

    def get_default_distance(self) -> Any:
        """The core's own normalisation."""
        return CosineSimilarity()

    def get_default_reducer(self) -> MeanReducer:
        """The paper's mean; anchors that a miner gave no weight count as 0."""
        return MeanReducer()

    def extra_repr(self) -> str:
        """What was chosen."""
        return (f"temperature={self.temperature}, epsilon={self.epsilon}, "
                f"leave_one_out={self.leave_one_out}, impl={self.impl!r}")  # fmt: skip


def _check_distance(distance: Any) -> None:
    """It is read anew in each call, as it may be set after the loss was made."""
    plain = type(distance) in (CosineSimilarity, DotProductSimilarity) and distance.power == 1
    if not plain or (distance.normalize_embeddings and distance.p != 2):
        raise ValueError(
            "VarConLoss compares embeddings with centroids by cosine or dot product: distance "
            "must be CosineSimilarity() or DotProductSimilarity() with power=1, and p=2 where it "
            f"normalizes, got {distance} with power={distance.power}, p={distance.p}"
        )


def _check_inputs(**given: Tensor) -> None:
    """What `varcon_loss.VarConLoss` takes and PML does not."""
    for name, rows in given.items():
        if "labels" in name and (rows.is_floating_point() or rows.dtype == torch.bool):
            raise TypeError(
                f"{name} must be integers, got {rows.dtype} {list(rows.shape)}: class "
                "probabilities are for varcon_loss.VarConLoss"
            )
        if "emb" in name and rows.ndim != 2:
            raise ValueError(
                f"{name} must have shape [N, D], got {list(rows.shape)}: for V views of each "
                "sample use embeddings.flatten(0, 1) and labels.repeat_interleave(V)"
            )


def _warn_of_lost_gradient(embeddings: Tensor, ref_emb: Tensor) -> None:
    if not (ref_emb.requires_grad and torch.is_grad_enabled()):
        return
    # A reference that begins with the batch, as in DistributedLossWrapper(efficient=True), is no
    # second tower: its samples learn as anchors.
    if not torch.equal(ref_emb[: len(embeddings)], embeddings.to(ref_emb.dtype)):
        checks.warn(
            "VarConLoss gives ref_emb no gradient, so that a second tower does not learn (it does "
            "with SupConLoss). To train both use SelfSupervisedLoss(loss, symmetric=True), or "
            "loss(torch.cat([emb, ref_emb]), torch.cat([labels, ref_labels])). If the reference "
            "is meant to stay fixed, pass ref_emb.detach()"
        )


class _TakesVarCon:
    """What a wrapper of PML's needs to accept `VarConLoss`: PML compares bare class names."""

    def __init__(self, loss: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        if isinstance(loss, varcon_loss.VarConLoss):
            need = f"from {__name__} import VarConLoss"
            raise TypeError(f"{type(self).__name__} got varcon_loss.VarConLoss: {need}")
        super().__init__(loss, *args, **kwargs)  # type: ignore[call-arg]

    @classmethod
    def supported_losses(cls) -> list[str]:
        """Names of the losses that may be wrapped."""
        return [*super().supported_losses(), *_names(VarConLoss)]  # type: ignore[misc]


class CrossBatchMemory(_TakesVarCon, pml_losses.CrossBatchMemory):
    """PML's ``CrossBatchMemory``, which accepts `VarConLoss` and what derives from it, too.

    With `VarConLoss`, and neither miner nor ``indices_tuple``, the list of all pairs of batch and
    memory is not made: VarCon needs none. Every other loss is treated exactly as by PML.

    Over several processes choose a ``memory_size`` that is a multiple of the global batch: the
    ranks' queues drift apart otherwise (PML issue 639).
    """

    def __init__(self, loss: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(loss, *args, **kwargs)
        if isinstance(loss, VarConLoss) and loss.leave_one_out:
            raise ValueError("leave_one_out has no meaning with a memory, which holds the anchors")

    def create_indices_tuple(self, *args: Any) -> Any:
        """As PML's; None where VarCon has no use for pairs."""
        given = args[4]  # embeddings, labels, memory, its labels, indices_tuple, ...
        if isinstance(self.loss, VarConLoss) and self.miner is None and given is None:
            return None
        return super().create_indices_tuple(*args)


class SelfSupervisedLoss(_TakesVarCon, pml_losses.SelfSupervisedLoss):
    """PML's ``SelfSupervisedLoss``, which accepts `VarConLoss` and what derives from it, too.

    With ``symmetric=True``, the default, both towers are anchors and learn. With
    ``symmetric=False`` only the first does: the second makes the centroids, which have no gradient.
    """
