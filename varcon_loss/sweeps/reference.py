"""The paper's equations, one line each, for reading and for checking the fast paths.

Builds the ``[N, K]`` matrices that the other implementations avoid, and leaves every derivative to
autograd (so it can also be differentiated twice, but for compiled graphs, which refuse).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from varcon_loss.classes import summarise
from varcon_loss.rows import Implementation, Rows, Swept
from varcon_loss.samples import Samples, read
from varcon_loss.soft_labels import SoftLabels
from varcon_loss.sums import sum_slots
from varcon_loss.sweeps.expectation_reference import expected_loss_by_equations
from varcon_loss.sweeps.once import differentiable_once


def reference_terms(rows: Rows, temperature: float, epsilon: float, need_terms: bool) -> Swept:
    """Eq. 7-13 of arXiv 2506.07413, on ``[N, K]`` matrices; all terms, needed or not."""
    anchors, w, absent = rows.anchors, rows.centroids.unit, rows.centroids.empty()
    features = anchors.features
    if torch.compiler.is_compiling():
        features = differentiable_once(features)
    z = features.to(w.dtype)
    if anchors.valid is not None:
        z = z.masked_fill(~anchors.valid[:, None], 0.0)
    if anchors.norms is not None:
        # Dividing by the (constant) largest entry first only keeps extreme features in range; it
        # is the normalisation after it that autograd differentiates.
        largest = torch.linalg.vector_norm(z.detach(), ord=float("inf"), dim=1, keepdim=True)
        z = F.normalize(z / largest.masked_fill(largest == 0, torch.inf), dim=1)
    if isinstance(rows.slots, SoftLabels):
        loss, terms = expected_loss_by_equations(
            z, rows.slots, w, absent, rows.weight, temperature, epsilon
        )
        return _masked(loss, terms, anchors)
    own = rows.slots[:, None]  # [N, 1]

    logits = z @ w.T / temperature  # [N, S]
    if rows.own is not None:
        logits = logits.scatter(1, own, (z * rows.own).sum(1, keepdim=True) / temperature)

    log_p = F.log_softmax(logits.masked_fill(absent, -torch.inf), dim=1)  # Eq. 8
    log_p_own = log_p.gather(1, own)  # [N, 1]
    tau2 = (temperature - epsilon) + 2 * epsilon * log_p_own.exp()  # Eq. 13
    log_q = torch.zeros_like(logits).masked_fill(absent, -torch.inf)
    log_q = F.log_softmax(log_q.scatter(1, own, 1 / tau2), dim=1)  # Eq. 10-12
    difference = (log_q - log_p).masked_fill(absent, 0.0)
    kl, nll = (log_q.exp() * difference).sum(1), -log_p_own.squeeze(1)
    loss = kl + nll  # Eq. 7

    terms = torch.stack((kl, nll, log_p_own.exp().squeeze(1), tau2.squeeze(1)))
    return _masked(loss, terms.detach(), anchors)


def _masked(loss: Tensor, terms: Tensor, anchors: Samples) -> Swept:
    """As `Swept.masked_`, for autograd to follow."""
    if anchors.valid is not None:
        loss = torch.where(anchors.valid, loss, 0.0)
        terms = torch.where(anchors.valid, terms, 0.0)
    if anchors.broken is not None:
        loss = torch.where(anchors.broken, torch.nan, loss)
    return Swept(loss=loss, terms=terms)


REFERENCE = Implementation(
    name="reference",
    read=read,
    summarise=summarise,
    sum_slots=sum_slots,
    sweep=reference_terms,
    rereads_centroids=True,
)
