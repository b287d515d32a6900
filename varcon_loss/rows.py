"""What an implementation is, and what its sweep over the rows takes and gives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from varcon_loss.classes import Centroids, Classes
from varcon_loss.options import Options
from varcon_loss.samples import Batch, Samples
from varcon_loss.shares import Shares
from varcon_loss.sums import SumSlots

# Sums of 2^31 exponentials of this are finite in float32.
LARGEST_PLAIN_LOGIT = 40.0


class Rows(NamedTuple):
    """Anchors and where they belong."""

    anchors: Samples  # those that are not valid have terms of 0, broken ones a loss of NaN
    slots: Tensor | Shares  # [N] int64, the own class among the centroids; or shares of them
    centroids: Centroids
    own: Tensor | None = None  # [N, D] own centroids, where they are not centroids.unit[slots]
    kept: Tensor | None = None  # [S] bool, the classes whose members take part; None: all
    weight: Tensor | None = None  # [S] what the loss multiplies shares by; None: all are 1

    def have_small_logits(self, temperature: float) -> bool:
        """Is ``exp(u)`` safe with no maximum subtracted? ``|u| <= 1 / tau1`` between unit rows."""
        return self.anchors.norms is not None and 1 / temperature <= LARGEST_PLAIN_LOGIT

    def without_weight(self) -> "Rows":
        """The same, classes having no weights."""
        return Rows(
            anchors=self.anchors,
            slots=self.slots,
            centroids=self.centroids,
            own=self.own,
            kept=self.kept,
        )

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What the equations need beside the features, for autograd to keep: see `rows_of`."""
        anchors, centroids = self.anchors, self.centroids
        which = (anchors.norms, anchors.valid, anchors.broken, self.weight)
        slots: tuple[Tensor | None, ...]
        if isinstance(self.slots, Shares):
            shares = self.slots
            slots = (None, shares.values, shares.slots, shares.columns, shares.background)
        else:
            slots = (self.slots, None, None, None, None)
        w = (centroids.unit, centroids.present, centroids.num_present)
        return *w, *slots, self.own, *which


def rows_of(features: Tensor, tensors: tuple[Tensor | None, ...]) -> Rows:
    """Rows from features ``[N, D]`` and `Rows.tensors`, as far as the equations need them."""
    unit, present, num_present, slots, values, entries, columns, background, *others = tensors
    own, norms, valid, broken, weight = others
    assert unit is not None
    assert num_present is not None
    if present is None:
        present = torch.arange(unit.shape[0], device=unit.device) < num_present  # empty ones last
    places: Tensor | Shares | None = slots
    if values is not None:
        views = features.shape[0] // max(1, values.shape[0])
        places = Shares(
            values=values, slots=entries, columns=columns, background=background, views=views
        )
    assert places is not None
    anchors = Samples(features, labels=places, valid=valid, broken=broken, norms=norms)
    centroids = Centroids(unit=unit, present=present, num_present=num_present, packed=False)
    return Rows(anchors=anchors, slots=places, centroids=centroids, own=own, weight=weight)


class Swept(NamedTuple):
    """What a sweep says of each row, in the dtype of the centroids."""

    loss: Tensor  # [N], of which autograd knows the gradient once the sweep is an operator
    others: Tensor | None  # [4, N] KL, NLL, confidence and tau2, where asked for
    gradient: Tensor | None = None  # [N, D] of the loss, where asked for
    scale: Tensor | None = None  # [N] what each row of it is still to be multiplied by; None: 1

    def masked(self, anchors: Samples) -> "Swept":
        """Zero the rows that take no part; make the rows with an unusable label NaN."""
        loss, others = self.loss, self.others
        if anchors.valid is not None:
            loss = torch.where(anchors.valid, loss, 0.0)
            if others is not None and others.shape[1] > 0:
                others = torch.where(anchors.valid, others, 0.0)
        if anchors.broken is not None:
            loss = torch.where(anchors.broken, torch.nan, loss)
        return Swept(loss=loss, others=others)


class Summarise(Protocol):
    """Batch ``[N]`` to classes, its own samples among them; ``count``: see `classes.summarise`."""

    def __call__(
        self, batch: Batch, options: Options, dtype: torch.dtype, *, count: bool
    ) -> Classes: ...


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
    takes_shares: bool = True  # labels as class probabilities
