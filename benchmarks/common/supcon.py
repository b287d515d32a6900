"""SupCon (Khosla et al., NeurIPS 2020, Eq. 2) on one ``[N, N]`` matrix."""

import torch
import torch.nn.functional as F
from torch import Tensor


def supcon_loss(features: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """The loss as most training scripts carry it.

    Args:
        features: ``[N, D]``.
        labels: ``[N]``.
        temperature: of the softmax over all other samples.

    Anchors without a positive are left out of the mean, as in pytorch-metric-learning.
    """
    z = F.normalize(features, dim=1)
    logits = z @ z.T / temperature
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positives = (labels[:, None] == labels[None, :]) & ~itself
    log_p = logits - torch.logsumexp(logits.masked_fill(itself, -torch.inf), dim=1, keepdim=True)
    counts = positives.sum(1)
    per_anchor = -(log_p * positives).sum(1) / counts.clamp_min(1)
    return per_anchor.sum() / (counts > 0).sum().clamp_min(1)
