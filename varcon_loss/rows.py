"""What every implementation of the row sweep takes and gives."""

from typing import NamedTuple

from torch import Tensor

from varcon_loss.centroids import Centroids


class Rows(NamedTuple):
    """Anchors and where they belong. Everything but ``features`` is free of gradient."""

    features: Tensor  # [N, D] as the caller gave them, any float dtype; the gradient's way out
    unit: Tensor  # [N, D] z: the features divided by `norms`, in the dtype of the centroids
    norms: Tensor | None  # [N] lengths; None: z is the features as they are
    slots: Tensor  # [N] int64, the own class
    centroids: Centroids
    own: Tensor | None  # [N, D] own centroid of each row, where it is not centroids.unit[slots]


class RowTerms(NamedTuple):
    """Per-row results, each ``[N]`` in the dtype of the centroids; only ``loss`` has a gradient."""

    loss: Tensor
    kl: Tensor
    nll: Tensor
    confidence: Tensor
    tau2: Tensor
