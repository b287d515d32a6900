"""VarCon: variational supervised contrastive learning (arXiv 2506.07413) as a PyTorch loss."""

from varcon_loss.heads import ProjectionHead
from varcon_loss.large_batch import LargeBatch, backward_in_chunks
from varcon_loss.loss import VarConTerms, varcon_loss, varcon_terms
from varcon_loss.module import VarConLoss

__version__ = "0.1.0"
__all__ = [
    "LargeBatch",
    "ProjectionHead",
    "VarConLoss",
    "VarConTerms",
    "__version__",
    "backward_in_chunks",
    "varcon_loss",
    "varcon_terms",
]
