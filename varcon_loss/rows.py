"""What every implementation of the row sweep takes and gives."""

from typing import NamedTuple

import torch
from torch import Tensor

from varcon_loss.centroids import Centroids, unit_rows

# Sums of 2^31 exponentials of this are finite in float32.
LARGEST_PLAIN_LOGIT = 40.0


class Samples(NamedTuple):
    """Features made ready. Everything but ``features`` is free of gradient.

    The fused kernels read the features themselves: there ``unit`` is None, and rows that take no
    part are told by ``valid``. Elsewhere such rows are zero vectors by now, and ``valid`` is None.
    """

    features: Tensor  # [N, D] as the caller gave them, any float dtype; the gradient's way out
    unit: Tensor | None  # [N, D] z: the features divided by `norms`, in float32 or wider
    norms: Tensor | None  # [N] lengths; None: z is the features as they are
    valid: Tensor | None  # [N] bool

    @property
    def dtype(self) -> torch.dtype:
        """In what is everything computed?"""
        return torch.float32 if self.unit is None else self.unit.dtype

    def unit_rows(self) -> Tensor:
        """``z`` ``[N, D]``, zero vectors where not valid."""
        if self.unit is not None:
            return self.unit
        features = self.features
        if self.valid is not None:
            features = features.masked_fill(~self.valid.unsqueeze(1), 0.0)
        return unit_rows(features, self.norms, self.dtype)


class Rows(NamedTuple):
    """Anchors and where they belong."""

    anchors: Samples
    slots: Tensor  # [N] int64, the own class
    centroids: Centroids
    own: Tensor | None  # [N, D] own centroid of each row, where it is not centroids.unit[slots]

    @property
    def features(self) -> Tensor:
        """``[N, D]``, where the gradient goes."""
        return self.anchors.features

    def have_small_logits(self, temperature: float) -> bool:
        """Is ``exp(u)`` safe with no maximum subtracted? ``|u| <= 1 / tau1`` between unit rows."""
        return self.anchors.norms is not None and 1 / temperature <= LARGEST_PLAIN_LOGIT


class RowTerms(NamedTuple):
    """Per-row results, each ``[N]`` in the dtype of the centroids; only ``loss`` has a gradient."""

    loss: Tensor
    kl: Tensor
    nll: Tensor
    confidence: Tensor
    tau2: Tensor
