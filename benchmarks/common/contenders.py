"""What the ``speed`` benchmark compares: losses as functions of features and labels."""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common.supcon import supcon_loss
from benchmarks.common.transcriptions import (
    authors_operations,
    authors_operations_on_soft_labels,
    lean_log_space,
    nll_alone,
)
from varcon_loss import varcon_loss

Loss = Callable[[Tensor, Tensor], Tensor]
OURS = "varcon-loss"  # with the implementation that "auto" chooses
INTEGERS = "varcon-loss, integer labels"  # what class probabilities are held against
BY_HAND = "equations, authors' operations"


@dataclass(frozen=True)
class Contender:
    """One way to compute one of two losses.

    Attributes:
        family: all contenders of a family must give the value of its oracle.
        make: builds the loss; called in the process that measures it.
        missing: why it cannot run on a device, or None.
        soft: does it take class probabilities as labels too?
    """

    family: str
    make: Callable[[], Loss]
    missing: Callable[[str], str | None] = lambda device: None
    soft: bool = False


def _needs(module: str) -> Callable[[str], str | None]:
    found = importlib.util.find_spec(module) is not None
    return lambda device: None if found else f"{module} is not installed"


def _cuda(device: str) -> str | None:
    return None if device == "cuda" else "CUDA only"


def _cuda_with(module: str) -> Callable[[str], str | None]:
    return lambda device: _cuda(device) or _needs(module)(device)


def _is_ours_on_cpu(device: str) -> str | None:
    return None if device == "cuda" else "the same as varcon-loss on a CPU"


def _ours(impl: str) -> Callable[[], Loss]:
    return lambda: lambda features, labels: varcon_loss(features, labels, impl=impl)


def _compiled(loss: Loss) -> Callable[[], Loss]:
    return lambda: torch.compile(loss, dynamic=False)


def _pml(name: str) -> Callable[[], Loss]:
    def make() -> Loss:
        from pytorch_metric_learning import losses

        return getattr(losses, name)(temperature=0.1)

    return make


def _around_cut_cross_entropy() -> Loss:
    """The per-row logsumexp from cut-cross-entropy, everything else on ``[N]`` vectors."""
    from cut_cross_entropy import linear_cross_entropy

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        return lean_log_space(
            features,
            labels,
            nll_of=lambda z, w, slots: linear_cross_entropy(z, w, slots, reduction="none"),
        )

    return loss


def _linear_cross_entropy() -> Loss:
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


CONTENDERS: dict[str, Contender] = {
    OURS: Contender("varcon", _ours("auto"), soft=True),
    INTEGERS: Contender("varcon", _ours("auto")),
    "varcon-loss eager": Contender("varcon", _ours("eager"), _is_ours_on_cpu),
    "varcon-loss triton": Contender("varcon", _ours("triton"), _cuda_with("triton")),
    "varcon-loss reference": Contender("varcon", _ours("reference")),
    BY_HAND: Contender("varcon", lambda: _by_hand, soft=True),
    "equations, lean": Contender("varcon", lambda: lean_log_space),
    "equations, authors' operations, compiled": Contender("varcon", _compiled(authors_operations)),
    "equations, lean, compiled": Contender("varcon", _compiled(lean_log_space)),
    "cut-cross-entropy composition": Contender(
        "varcon", _around_cut_cross_entropy, _cuda_with("cut_cross_entropy")
    ),
    "NLL alone (linear_cross_entropy)": Contender(
        "nll", _linear_cross_entropy, _no_linear_cross_entropy
    ),
    "SupCon (pytorch-metric-learning)": Contender(
        "supcon", _pml("SupConLoss"), _needs("pytorch_metric_learning")
    ),
    "SupCon (one matrix)": Contender("supcon", lambda: supcon_loss),
    "NT-Xent (pytorch-metric-learning)": Contender(
        "ntxent", _pml("NTXentLoss"), _needs("pytorch_metric_learning")
    ),
}
