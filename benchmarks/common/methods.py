"""The training objectives compared: embeddings ``[N, D]`` and labels ``[N]`` in, loss out."""

import torch.nn.functional as F
from pytorch_metric_learning.losses import NormalizedSoftmaxLoss, SupConLoss
from torch import Tensor, nn

from varcon_loss import VarConLoss

EPSILON_SHARE = 0.2  # of the temperature, as in the paper
MOMENTUM = 0.9


class Method(nn.Module):
    """A loss, and the class logits ``[N, C]`` that an embedding has after training with it."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError

    def logits(self, embeddings: Tensor, means: Tensor) -> Tensor:
        """Cosine similarity to class ``means`` ``[C, D]``, by the temperature of training."""
        return F.normalize(embeddings, dim=1) @ F.normalize(means, dim=1).T / self.temperature


class CrossEntropy(Method):
    def __init__(self, dim: int, num_classes: int, temperature: float) -> None:
        super().__init__(temperature)
        self.classifier = nn.Linear(dim, num_classes)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.classifier(embeddings), labels)

    def logits(self, embeddings: Tensor, means: Tensor) -> Tensor:
        return self.classifier(embeddings)


class NormFace(Method):
    """Cosine softmax over a learned prototype a class (Wang et al., ACM MM 2017).

    The nearest relative of VarCon with memory, whose prototypes are remembered, not learned.
    """

    def __init__(self, dim: int, num_classes: int, temperature: float) -> None:
        super().__init__(temperature)
        self.criterion = NormalizedSoftmaxLoss(num_classes, dim, temperature=temperature)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self.criterion(embeddings, labels)

    def logits(self, embeddings: Tensor, means: Tensor) -> Tensor:
        return self.criterion.get_logits(embeddings)


class SupCon(Method):
    def __init__(self, dim: int, num_classes: int, temperature: float) -> None:
        super().__init__(temperature)
        self.criterion = SupConLoss(temperature=temperature)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self.criterion(embeddings, labels)


class VarCon(Method):
    def __init__(
        self,
        dim: int,
        num_classes: int,
        temperature: float,
        momentum: float | None = None,
        epsilon: float | None = None,
    ) -> None:
        super().__init__(temperature)
        self.criterion = VarConLoss(
            temperature,
            epsilon=EPSILON_SHARE * temperature if epsilon is None else epsilon,
            num_classes=num_classes,
            feature_dim=dim,
            centroid_momentum=momentum,
        )

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self.criterion(embeddings, labels)

    def logits(self, embeddings: Tensor, means: Tensor) -> Tensor:
        """A memory's own centroids where there is one."""
        remembered = self.criterion.centroid_momentum is not None
        return super().logits(embeddings, self.criterion.centroids if remembered else means)


class Joint(Method):
    """Cross-entropy plus ``weight`` times a contrastive loss of the same embeddings."""

    def __init__(self, contrastive: Method, classifier: CrossEntropy, weight: float) -> None:
        super().__init__(contrastive.temperature)
        self.contrastive, self.classifier, self.weight = contrastive, classifier, weight

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self.classifier(embeddings, labels) + self.weight * self.contrastive(
            embeddings, labels
        )

    def logits(self, embeddings: Tensor, means: Tensor) -> Tensor:
        return self.classifier.logits(embeddings, means)


METHODS = (
    "cross-entropy", "NormFace", "SupCon", "VarCon", "VarCon memory",
    "cross-entropy + SupCon", "cross-entropy + VarCon",
)  # fmt: skip


def has_temperature(method: str) -> bool:
    return method != "cross-entropy"


def make_method(
    name: str,
    dim: int,
    num_classes: int,
    *,
    temperature: float = 0.1,
    weight: float = 1.0,
    momentum: float | None = None,
    epsilon: float | None = None,
) -> Method:
    """One of `METHODS`.

    Args:
        name: of the method.
        dim: width of embeddings.
        num_classes: labels are 0 ... C-1.
        temperature: of what compares cosines.
        weight: of the contrastive part beside cross-entropy.
        momentum: of the centroid memory; `MOMENTUM` if None.
        epsilon: of VarCon; `EPSILON_SHARE` of the temperature if None.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    if " + " in name:
        contrastive = make_method(
            name.partition(" + ")[2], dim, num_classes, temperature=temperature
        )
        return Joint(contrastive, CrossEntropy(dim, num_classes, temperature), weight)
    if name.startswith("VarCon"):
        momentum = MOMENTUM if momentum is None else momentum
        remembered = momentum if name == "VarCon memory" else None
        return VarCon(dim, num_classes, temperature, remembered, epsilon)
    kinds = {
        "cross-entropy": CrossEntropy,
        "NormFace": NormFace,
        "SupCon": SupCon,
    }
    return kinds[name](dim, num_classes, temperature)
