"""What every implementation of the row sweep takes and gives."""

from typing import NamedTuple

import torch
from torch import Tensor

from varcon_loss.centroids import Centroids, unit_rows

# Sums of 2^31 exponentials of this are finite in float32.
LARGEST_PLAIN_LOGIT = 40.0


class Samples(NamedTuple):
    """Features made ready. Everything but ``features`` is free of gradient.

    Rows that take no part are zero vectors in ``unit``, and hold what they held in ``features``.
    The fused kernels read the features themselves: there ``unit`` is None.
    """

    features: Tensor  # [N, D] as the caller gave them, any float dtype; the gradient's way out
    unit: Tensor | None  # [N, D] z: the features divided by `norms`, in float32 or wider
    norms: Tensor | None  # [N] lengths; None: z is the features as they are

    @property
    def dtype(self) -> torch.dtype:
        """In what is everything computed?"""
        return torch.float32 if self.unit is None else self.unit.dtype

    def unit_rows(self, valid: Tensor | None) -> Tensor:
        """``z`` ``[N, D]``, zero vectors where not valid ``[N]``."""
        if self.unit is not None:
            return self.unit
        unit = unit_rows(self.features, self.norms, self.dtype)
        return unit if valid is None else unit.masked_fill(~valid.unsqueeze(1), 0.0)


class Rows(NamedTuple):
    """Anchors and where they belong."""

    anchors: Samples
    slots: Tensor  # [N] int64, the own class
    centroids: Centroids
    own: Tensor | None  # [N, D] own centroid of each row, where it is not centroids.unit[slots]
    valid: Tensor | None  # [N] bool; the terms of the others are 0
    broken: Tensor | None  # [N] bool; their loss is NaN

    def have_small_logits(self, temperature: float) -> bool:
        """Is ``exp(u)`` safe with no maximum subtracted? ``|u| <= 1 / tau1`` between unit rows."""
        return self.anchors.norms is not None and 1 / temperature <= LARGEST_PLAIN_LOGIT


class RowTerms(NamedTuple):
    """Per-row results in the dtype of the centroids; only ``loss`` has a gradient."""

    loss: Tensor  # [N]
    others: Tensor | None  # [4, N] KL, NLL, confidence and tau2, where asked for

    def masked(self, rows: Rows) -> "RowTerms":
        """Zero the rows that take no part; make the rows with an unusable label NaN."""
        loss, others = self
        if rows.valid is not None:
            loss = torch.where(rows.valid, loss, 0.0)
            if others is not None and others.shape[1] > 0:
                others = torch.where(rows.valid, others, 0.0)
        if rows.broken is not None:
            loss = torch.where(rows.broken, torch.nan, loss)
        return RowTerms(loss, others)
