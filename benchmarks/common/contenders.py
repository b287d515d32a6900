"""What the ``speed`` benchmark compares: losses as functions of features and labels."""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.supcon import supcon_loss
from benchmarks.common.transcriptions import (
    authors_operations,
    authors_operations_on_soft_labels,
    lean_log_space,
    nll_alone,
)
from varcon_loss import VarConLoss, varcon_loss

Loss = Callable[[Tensor, Tensor], Tensor]
OURS = "varcon-loss"  # with the implementation that "auto" chooses
INTEGERS = "varcon-loss, integer labels"  # what class probabilities are held against
BY_HAND = "equations, authors' operations"
LABELS = ("integer", "mixup", "smooth")
SMOOTHING = 0.1


@dataclass(frozen=True)
class Problem:
    """One size at which losses are compared."""

    num_rows: int
    num_classes: int
    dim: int
    dtype: str
    device: str
    labels: str = "integer"  # or class probabilities: "mixup", two a row; "smooth", all of a row

    def inputs(self, contender: str = "") -> tuple[Tensor, Tensor]:
        """Features and labels, for `INTEGERS` the classes that the others' labels come from."""
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, self.dtype)
        features = torch.randn(self.num_rows, self.dim, generator=generator).to(dtype)
        labels = torch.randint(self.num_classes, (self.num_rows,), generator=generator)
        if self.labels != "integer" and contender != INTEGERS:
            soft = F.one_hot(labels, self.num_classes).to(dtype)
            if self.labels == "mixup":
                share = torch.rand(self.num_rows, 1, generator=generator).to(dtype)
                labels = share * soft + (1 - share) * soft.roll(1, 0)
            else:
                labels = (1 - SMOOTHING) * soft + SMOOTHING / self.num_classes
        return features.to(self.device).requires_grad_(), labels.to(self.device)


@dataclass(frozen=True)
class Contender:
    """One way to compute a loss.

    Attributes:
        oracle: what its value and gradient must be, given float64; None where nothing says.
        make: builds the loss; called in the process that measures it.
        missing: why it cannot run on a device, or None.
        soft: does it take class probabilities as labels too?
    """

    oracle: Loss | None
    make: Callable[[Problem], Loss]
    missing: Callable[[str], str | None] = lambda device: None
    soft: bool = False


def _needs(module: str) -> Callable[[str], str | None]:
    found = importlib.util.find_spec(module) is not None
    return lambda device: None if found else f"{module} is not installed"


def _cuda_with(module: str) -> Callable[[str], str | None]:
    return lambda device: _needs(module)(device) if device == "cuda" else "CUDA only"


def _is_ours_on_cpu(device: str) -> str | None:
    return None if device == "cuda" else "the same as varcon-loss on a CPU"


def _ours(impl: str) -> Callable[[Problem], Loss]:
    return lambda _: functools.partial(varcon_loss, impl=impl)


def _compiled(loss: Loss) -> Callable[[Problem], Loss]:
    return lambda _: torch.compile(loss, dynamic=False)


def _pml(name: str) -> Callable[[Problem], Loss]:
    def make(_: Problem) -> Loss:
        from pytorch_metric_learning import losses

        return getattr(losses, name)(temperature=0.1)

    return make


def _with_memory(problem: Problem) -> Loss:
    """A centroid of every class remembered."""
    loss = VarConLoss(
        num_classes=problem.num_classes, feature_dim=problem.dim, centroid_momentum=0.99
    ).to(problem.device)
    loss.centroids = torch.randn(problem.num_classes, problem.dim)
    return loss


def _with_queue(problem: Problem) -> Loss:
    """SupCon with a full queue, of as many embeddings as there are classes or rows."""
    from pytorch_metric_learning.losses import CrossBatchMemory, SupConLoss

    size = max(problem.num_classes, problem.num_rows)
    queue = CrossBatchMemory(SupConLoss(temperature=0.1), problem.dim, size)
    queue.embedding_memory.normal_()  # type: ignore[operator]
    queue.label_memory.random_(problem.num_classes)  # type: ignore[operator]
    queue.has_been_filled = True
    return queue.to(problem.device)


def _around_cut_cross_entropy(_: Problem) -> Loss:
    """The per-row logsumexp from cut-cross-entropy, everything else on ``[N]`` vectors."""
    from cut_cross_entropy import linear_cross_entropy

    return functools.partial(
        lean_log_space, nll_of=functools.partial(linear_cross_entropy, reduction="none")
    )


def _linear_cross_entropy(_: Problem) -> Loss:
    """In chunks, as torch has it from 2.13 on."""
    chunked = functools.partial(
        torch.nn.functional.linear_cross_entropy,
        options=torch.nn.LinearCrossEntropyOptions(),
    )
    return functools.partial(nll_alone, cross_entropy=chunked)


def _no_linear_cross_entropy(device: str) -> str | None:
    found = hasattr(torch.nn, "LinearCrossEntropyOptions")
    return None if found else "torch has no linear_cross_entropy"


def _by_hand(features: Tensor, labels: Tensor) -> Tensor:
    loss = authors_operations_on_soft_labels if labels.is_floating_point() else authors_operations
    return loss(features, labels)


_exact = functools.partial(varcon_loss, impl="reference")
_has_pml = _needs("pytorch_metric_learning")

CONTENDERS: dict[str, Contender] = {
    OURS: Contender(_exact, _ours("auto"), soft=True),
    INTEGERS: Contender(_exact, _ours("auto")),
    "varcon-loss eager": Contender(_exact, _ours("eager"), _is_ours_on_cpu),
    "varcon-loss triton": Contender(_exact, _ours("triton"), _cuda_with("triton")),
    "varcon-loss reference": Contender(_exact, _ours("reference")),
    BY_HAND: Contender(_exact, lambda _: _by_hand, soft=True),
    "equations, lean": Contender(_exact, lambda _: lean_log_space),
    "equations, authors' operations, compiled": Contender(_exact, _compiled(authors_operations)),
    "equations, lean, compiled": Contender(_exact, _compiled(lean_log_space)),
    "cut-cross-entropy composition": Contender(
        _exact, _around_cut_cross_entropy, _cuda_with("cut_cross_entropy")
    ),
    "NLL alone (linear_cross_entropy)": Contender(
        nll_alone, _linear_cross_entropy, _no_linear_cross_entropy
    ),
    "SupCon (pytorch-metric-learning)": Contender(supcon_loss, _pml("SupConLoss"), _has_pml),
    "SupCon (one matrix)": Contender(supcon_loss, lambda _: supcon_loss),
    "NT-Xent (pytorch-metric-learning)": Contender(None, _pml("NTXentLoss"), _has_pml),
    "varcon-loss, centroid memory": Contender(None, _with_memory),
    "SupCon, CrossBatchMemory": Contender(None, _with_queue, _has_pml),
}
