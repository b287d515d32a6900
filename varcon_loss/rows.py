"""What an implementation is, and what its sweep over the rows takes and gives."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from varcon_loss.classes import Centroids, Classes
from varcon_loss.options import Options
from varcon_loss.samples import Batch, Samples
from varcon_loss.soft_labels import SoftLabels
from varcon_loss.sums import SumSlots

# Sums of 2^31 exponentials of this are finite in float32.
LARGEST_PLAIN_LOGIT = 40.0


class Rows(NamedTuple):
    """Anchors and where they belong."""

    anchors: Samples  # those that are not valid have terms of 0, broken ones a loss of NaN
    slots: Tensor | SoftLabels  # [N] int64, the own class among the centroids; or shares of them
    centroids: Centroids
    own: Tensor | None = None  # [N, D] own centroids, where they are not centroids.unit[slots]
    kept: Tensor | None = None  # [S] bool, the classes whose members take part; None: all
    weight: Tensor | None = None  # [S] what the loss multiplies shares by; None: all are 1

    def have_small_logits(self, temperature: float) -> bool:
        """Is ``exp(u)`` safe with no maximum subtracted? ``|u| <= 1 / tau1`` between unit rows."""
        return self.anchors.norms is not None and 1 / temperature <= LARGEST_PLAIN_LOGIT

    def tensors(self) -> dict[str, Tensor | None]:
        """What the equations need beside the features, by the names of `TENSORS`: see `rows_of`."""
        anchors, centroids, slots = self.anchors, self.centroids, self.slots
        soft = slots if isinstance(slots, SoftLabels) else None
        return {
            "w": centroids.unit,
            "present": centroids.present,
            "num_present": centroids.num_present,
            "slots": None if isinstance(slots, SoftLabels) else slots,
            "soft": None if soft is None else soft.values,
            "entries": None if soft is None else soft.slots,
            "columns": None if soft is None else soft.columns,
            "background": None if soft is None else soft.background,
            "own": self.own,
            "norms": anchors.norms,
            "valid": anchors.valid,
            "broken": anchors.broken,
            "class_weight": self.weight,
        }


TENSORS = (
    "w", "present", "num_present", "slots", "soft", "entries", "columns", "background", "own",
    "norms", "valid", "broken", "class_weight",
)  # fmt: skip


def rows_of(
    features: Tensor,
    tensors: Mapping[str, Tensor | None],
    *,
    unit: Tensor | None = None,
    packed: bool = True,
) -> Rows:
    """Rows from features ``[N, D]`` and `Rows.tensors`, and what else there is."""
    w, num_present, places = tensors["w"], tensors["num_present"], tensors["slots"]
    assert w is not None
    assert num_present is not None
    slots: Tensor | SoftLabels | None = places
    if (values := tensors["soft"]) is not None:
        slots = SoftLabels(
            values=values,
            slots=tensors["entries"],
            columns=tensors["columns"],
            background=tensors["background"],
            views=max(1, features.shape[0] // max(1, values.shape[0])),
        )
    assert slots is not None
    anchors = Samples(
        features=features,
        labels=slots,
        valid=tensors["valid"],
        broken=tensors["broken"],
        unit=unit,
        norms=tensors["norms"],
    )
    centroids = Centroids(
        unit=w, present=tensors["present"], num_present=num_present, packed=packed
    )
    return Rows(
        anchors=anchors,
        slots=slots,
        centroids=centroids,
        own=tensors["own"],
        weight=tensors["class_weight"],
    )


class Swept(NamedTuple):
    """What a sweep says of each row, in the dtype of the centroids."""

    loss: Tensor  # [N], of which autograd knows the gradient once the sweep is an operator
    terms: Tensor | None  # [4, N] KL, NLL, confidence and tau2, where asked for
    gradient: Tensor | None = None  # [N, D] of the loss, where asked for
    scale: Tensor | None = None  # [N] what each row of it is still to be multiplied by; None: 1

    def masked_(self, anchors: Samples) -> "Swept":
        """Zero the rows that take no part; make the loss of those with an unusable label NaN."""
        if anchors.valid is not None:
            left_out = ~anchors.valid
            self.loss.masked_fill_(left_out, 0.0)
            if self.terms is not None:
                self.terms.masked_fill_(left_out, 0.0)
            if self.gradient is not None:  # exactly 0, even where centroids are NaN
                self.gradient.masked_fill_(left_out.unsqueeze(1), 0.0)
        if anchors.broken is not None:
            self.loss.masked_fill_(anchors.broken, torch.nan)
        return self


class Summarise(Protocol):
    """Batch ``[N]`` to samples and their classes; ``count``: see `classes.summarise`."""

    def __call__(
        self, batch: Batch, options: Options, dtype: torch.dtype, *, count: bool
    ) -> tuple[Samples, Classes]: ...


def nothing_prevents(features: Tensor, dtype: torch.dtype) -> str | None:
    """`Implementation.why_not` of what runs everywhere."""
    return None


def never(features: Tensor, dtype: torch.dtype) -> bool:
    """`Implementation.by_default` of what is chosen by name, or where nothing else is."""
    return False


@dataclass(frozen=True)
class Implementation:
    """One way to compute the loss: all that the rest of the package knows of it."""

    name: str  # the value of ``impl``
    read: Callable[[Batch, Options, torch.dtype], Samples]  # of what makes no centroids
    summarise: Summarise  # of what does
    sum_slots: SumSlots  # of the rows of all ranks
    sweep: Callable[[Rows, float, float, bool], Swept]  # rows, tau1, epsilon, need terms
    # What keeps it from features [N, D] computed in a dtype; None: nothing does.
    why_not: Callable[[Tensor, torch.dtype], str | None] = nothing_prevents
    by_default: Callable[[Tensor, torch.dtype], bool] = never  # does ``"auto"`` choose it?
    rereads_centroids: bool = False  # in backward: what may change must be copied
    takes_soft_labels: bool = True  # labels as class probabilities
