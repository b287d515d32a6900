"""The training objectives compared: encoder features in, loss out.

Labels are classes ``[N]``; those of `MIXABLE` also take class probabilities ``[N, C]``.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import (
    CrossBatchMemory,
    NormalizedSoftmaxLoss,
    SupConLoss,
)
from torch import Tensor, nn

from benchmarks.common.supcon import sincere_loss
from varcon_loss import ProjectionHead, VarConLoss

QUEUE = 2048  # embeddings that "SupCon queue" keeps


@dataclass(frozen=True)
class Step:
    """One loss, and what is worth watching: means over the batch."""

    loss: Tensor
    log: dict[str, float]
    collapsed: bool  # the loss reads what it would if all embeddings coincided
    tau2: Tensor | None = None  # per sample


class CrossEntropy(nn.Module):
    def __init__(self, in_dim: int, num_classes: int, **_: float) -> None:
        super().__init__()
        self.classifier = nn.Linear(in_dim, num_classes)

    def forward(self, features: Tensor, labels: Tensor) -> Step:
        logits = self.classifier(features)
        loss = F.cross_entropy(logits, labels)
        p = logits.detach().softmax(1)
        own = p * labels if labels.is_floating_point() else p.gather(1, labels.unsqueeze(1))
        confidence = own.sum(1).mean()
        value = float(loss.detach())
        collapsed = math.isclose(value, math.log(logits.shape[1]), rel_tol=0.005)
        return Step(loss, {"loss": value, "confidence": float(confidence)}, collapsed)


class BinaryCrossEntropy(nn.Module):
    """A sigmoid a class, for labels ``[N, C]`` that are positive where the sample has the class."""

    def __init__(self, in_dim: int, num_classes: int, **_: float) -> None:
        super().__init__()
        self.classifier = nn.Linear(in_dim, num_classes)

    def forward(self, features: Tensor, labels: Tensor) -> Step:
        has = (labels > 0).to(features.dtype)
        loss = F.binary_cross_entropy_with_logits(self.classifier(features), has)
        value, share = float(loss.detach()), has.mean()
        alike = -float(torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share))
        return Step(loss, {"loss": value}, math.isclose(value, alike, rel_tol=0.005))


class SupCon(nn.Module):
    def __init__(
        self, in_dim: int, num_classes: int, *, dim: int, head: str, temperature: float = 0.1, **_
    ) -> None:
        super().__init__()
        self.head = ProjectionHead(in_dim, dim, head)
        self.criterion = SupConLoss(temperature=temperature)

    def forward(self, features: Tensor, labels: Tensor) -> Step:
        loss = self.criterion(self.head(features), labels)
        value = float(loss.detach())
        collapsed = math.isclose(value, math.log(len(labels) - 1), rel_tol=0.005)
        return Step(loss, {"loss": value}, collapsed)


class SupConMemory(SupCon):
    """SupCon with a queue of past embeddings."""

    def __init__(self, in_dim: int, num_classes: int, *, dim: int, head: str, **options) -> None:
        super().__init__(in_dim, num_classes, dim=dim, head=head, **options)
        self.criterion = CrossBatchMemory(self.criterion, dim, memory_size=QUEUE)


class Sincere(nn.Module):
    def __init__(
        self, in_dim: int, num_classes: int, *, dim: int, head: str, temperature: float = 0.1, **_
    ) -> None:
        super().__init__()
        self.head = ProjectionHead(in_dim, dim, head)
        self.temperature = temperature

    def forward(self, features: Tensor, labels: Tensor) -> Step:
        loss = sincere_loss(self.head(features), labels, self.temperature)
        value = float(loss.detach())
        counts = labels.bincount()[labels]
        alike = (len(labels) - counts + 1.0).log()[counts > 1]  # of an anchor, all coinciding
        collapsed = len(alike) > 0 and math.isclose(value, float(alike.mean()), rel_tol=0.005)
        return Step(loss, {"loss": value}, collapsed)


class NormFace(nn.Module):
    """Cosine softmax over a learned prototype a class (Wang et al., ACM MM 2017).

    The nearest relative of VarCon with memory, whose prototypes are remembered, not learned.
    """

    def __init__(
        self, in_dim: int, num_classes: int, *, dim: int, head: str, temperature: float = 0.1, **_
    ) -> None:
        super().__init__()
        self.head = ProjectionHead(in_dim, dim, head)
        self.criterion = NormalizedSoftmaxLoss(num_classes, dim, temperature=temperature)

    def forward(self, features: Tensor, labels: Tensor) -> Step:
        embeddings = self.head(features)
        loss = self.criterion(embeddings, labels)
        with torch.no_grad():
            logits = self.criterion.get_logits(embeddings)
            confidence = float(logits.softmax(1).gather(1, labels.unsqueeze(1)).mean())
        value = float(loss.detach())
        collapsed = math.isclose(value, math.log(logits.shape[1]), rel_tol=0.005)
        return Step(loss, {"loss": value, "confidence": confidence}, collapsed)


class VarCon(nn.Module):
    def __init__(self, in_dim: int, num_classes: int, *, dim: int, head: str, **options) -> None:
        super().__init__()
        self.head = ProjectionHead(in_dim, dim, head)
        self.criterion = VarConLoss(num_classes=num_classes, feature_dim=dim, **options)

    def forward(self, features: Tensor, labels: Tensor) -> Step:
        terms = self.criterion.terms(self.head(features), labels)
        log = {"loss": float(terms.reduced.detach())}
        if not terms.valid.any():
            return Step(terms.reduced, log, collapsed=False)
        for name in ("kl", "nll", "confidence", "tau2"):
            log[name] = float(getattr(terms, name)[terms.valid].mean())
        collapsed = math.isclose(log["nll"], math.log(int(terms.num_classes)), rel_tol=0.01)
        return Step(terms.reduced, log, collapsed, terms.tau2[terms.valid])


METHODS: dict[str, Callable[..., nn.Module]] = {
    "cross-entropy": CrossEntropy,
    "SupCon": SupCon,
    "VarCon": VarCon,
    "VarCon leave-one-out": lambda *a, **k: VarCon(*a, **k, leave_one_out=True),
    "VarCon epsilon=0": lambda *a, **k: VarCon(*a, **k | {"epsilon": 0.0}),
    "VarCon memory": lambda *a, **k: VarCon(*a, **{"centroid_momentum": 0.99} | k),
    "SupCon queue": SupConMemory,
    "NormFace": NormFace,
    "SINCERE": Sincere,
}

# What can be trained on mixed images, whose labels are class probabilities.
MIXABLE = ("cross-entropy", "VarCon", "VarCon epsilon=0", "VarCon memory")

# Those that take several labels a sample, as shares of classes ``[N, C]``.
SEVERAL: dict[str, Callable[..., nn.Module]] = {
    "binary cross-entropy": BinaryCrossEntropy,
    "VarCon": METHODS["VarCon"],
    "VarCon memory": METHODS["VarCon memory"],
}

# The same with other settings, to see what a difference between methods hangs on.
VARIANTS: dict[str, Callable[..., nn.Module]] = {
    "VarCon tau1=0.05": lambda *a, **k: VarCon(*a, **k | {"temperature": 0.05, "epsilon": 0.01}),
    "VarCon tau1=0.2": lambda *a, **k: VarCon(*a, **k | {"temperature": 0.2}),
    "VarCon tau1=0.5": lambda *a, **k: VarCon(*a, **k | {"temperature": 0.5}),
    "VarCon linear head": lambda *a, **k: VarCon(*a, **k | {"head": "linear"}),
    "VarCon mlp head": lambda *a, **k: VarCon(*a, **k | {"head": "mlp"}),
    "SupCon tau=0.05": lambda *a, **k: SupCon(*a, **k | {"temperature": 0.05}),
    "SupCon tau=0.2": lambda *a, **k: SupCon(*a, **k | {"temperature": 0.2}),
    "SupCon tau=0.5": lambda *a, **k: SupCon(*a, **k | {"temperature": 0.5}),
}


def make_objective(
    method: str, in_dim: int, num_classes: int, *, dim: int, head: str, **options: float
) -> nn.Module:
    """The objective on encoder features ``[N, in_dim]``; its forward gives a `Step`."""
    known = METHODS | VARIANTS | SEVERAL
    check_methods([method], known)
    return known[method](in_dim, num_classes, dim=dim, head=head, **options)


def check_methods(names: Iterable[str], known: Iterable[str] = (*METHODS, *VARIANTS)) -> None:
    """Raise a ValueError that names what is unknown, and what there is."""
    for name in names:
        if name not in known:
            raise ValueError(f"method must be one of {', '.join(known)}, got {name!r}")


def embeddings(objective: nn.Module, features: Tensor) -> Tensor:
    """What the loss compares: the head's output, or the features where there is no head."""
    head = getattr(objective, "head", None)
    with torch.no_grad():
        return features if head is None else head(features)
