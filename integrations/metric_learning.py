"""VarCon as a pytorch-metric-learning (PML) loss.

    from varcon_loss.integrations.metric_learning import CrossBatchMemory, VarConLoss

`VarConLoss` takes PML's reducers, regularisers, miners and wrappers like a built-in loss.
`CrossBatchMemory` and `SelfSupervisedLoss` are PML's own, which accept losses by name, with this
one's name added.
"""

try:
    import pytorch_metric_learning
except ImportError as error:
    raise ImportError(
        "varcon_loss.integrations.metric_learning needs pytorch-metric-learning: "
        "pip install 'varcon-loss[metric-learning]'"
    ) from error
if int(pytorch_metric_learning.__version__.split(".")[0]) != 2:
    raise ImportError(
        "varcon_loss.integrations.metric_learning supports pytorch-metric-learning >=2.2,<3, found "
        f"{pytorch_metric_learning.__version__}: pip install 'pytorch-metric-learning>=2.2,<3'"
    )

from typing import Any

import torch
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
from pytorch_metric_learning.reducers import MeanReducer
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor

import varcon_loss

__all__ = ["CrossBatchMemory", "SelfSupervisedLoss", "VarConLoss"]

_STATISTICS = ("tau2", "confidence", "kl", "nll", "num_classes", "num_anchors")


class VarConLoss(pml_losses.BaseMetricLossFunction):
    """VarCon (arXiv 2506.07413, Eq. 7) for pytorch-metric-learning.

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

    - ``ref_emb``, ``ref_labels``: what the centroids are made of; ``embeddings`` are the anchors
      alone then. Anchors whose label the reference lacks are dropped.
    - ``indices_tuple``: weighs anchors by how often a miner chose them. Centroids are of all
      samples whatever a miner says.

    Half-precision embeddings are computed in float32. With ``collect_stats`` the means of ``tau2``,
    ``confidence``, ``kl`` and ``nll``, and ``num_classes`` and ``num_anchors``, are attributes.

    There is no centroid memory here: PML's losses keep no state and its wrappers copy and re-run
    them freely. `CrossBatchMemory` serves the same purpose.

    Raises:
        ValueError: another distance; ``leave_one_out`` with a reference set; no labels.

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
        leave_one_out: bool = False,
        impl: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        varcon_loss.VarConLoss(temperature, epsilon, leave_one_out=leave_one_out, impl=impl)
        if type(self.distance) not in (CosineSimilarity, DotProductSimilarity) or (
            self.distance.power != 1
        ):
            raise ValueError(
                "VarConLoss compares embeddings with centroids by cosine or dot product: distance "
                f"must be CosineSimilarity() or DotProductSimilarity(), got {self.distance}"
            )
        self.temperature = temperature
        self.epsilon = epsilon
        self.leave_one_out = leave_one_out
        self.impl = impl
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
        using_ref = ref_emb is not embeddings
        if using_ref and self.leave_one_out:
            raise ValueError(
                "leave_one_out has no meaning with ref_emb or a memory, which hold more than the "
                "anchors: use leave_one_out=False"
            )
        if len(embeddings) == 0 or len(ref_emb) == 0:
            return self.zero_losses()
        rows = torch.arange(len(labels), device=labels.device)
        options: dict[str, Tensor] = {}
        if using_ref:
            found = torch.isin(labels, ref_labels)
            if not bool(found.all()):
                rows = rows[found]
            options = {"ref_features": ref_emb, "ref_labels": ref_labels}
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

    def _record(self, terms: varcon_loss.VarConTerms, num_anchors: int) -> None:
        for name in ("tau2", "confidence", "kl", "nll"):
            setattr(self, name, float(getattr(terms, name)[terms.valid].mean()))
        self.num_classes, self.num_anchors = int(terms.num_classes), num_anchors

    def get_default_distance(self) -> CosineSimilarity:
        """The core's own normalisation."""
        return CosineSimilarity()

    def get_default_reducer(self) -> MeanReducer:
        """The paper's mean; anchors that a miner gave no weight count as 0."""
        return MeanReducer()


class CrossBatchMemory(pml_losses.CrossBatchMemory):
    """PML's ``CrossBatchMemory``, which accepts `VarConLoss` too.

    With `VarConLoss`, and neither miner nor ``indices_tuple``, the list of all pairs of batch and
    memory is not made: VarCon needs none. Every other loss is treated exactly as by PML.

    Over several processes choose a ``memory_size`` that is a multiple of the global batch: the
    ranks' queues drift apart otherwise (PML issue 639).
    """

    def __init__(self, loss: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(loss, *args, **kwargs)
        if isinstance(loss, VarConLoss) and loss.leave_one_out:
            raise ValueError(
                "leave_one_out has no meaning with a memory, which holds the anchors themselves: "
                "use leave_one_out=False"
            )

    @staticmethod
    def supported_losses() -> list[str]:
        """Names of the losses that may be wrapped."""
        return [*pml_losses.CrossBatchMemory.supported_losses(), VarConLoss.__name__]

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
    """PML's ``SelfSupervisedLoss``, which accepts `VarConLoss` too."""

    @staticmethod
    def supported_losses() -> list[str]:
        """Names of the losses that may be wrapped."""
        return [*pml_losses.SelfSupervisedLoss.supported_losses(), VarConLoss.__name__]
