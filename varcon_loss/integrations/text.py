"""VarCon as a loss of sentence-transformers and SetFit.

    from varcon_loss.integrations.text import VarConLoss

Nothing of either is imported: any model that returns a dictionary with ``sentence_embedding``
works.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import varcon_loss

__all__ = ["VarConLoss"]


class VarConLoss(nn.Module):
    """VarCon (arXiv 2506.07413, Eq. 7) on the embeddings of a text model.

    Args:
        model: a ``SentenceTransformer``, or any module that maps a dictionary of tensors to a
            dictionary with ``sentence_embedding`` ``[B, D]``.
        **options: what `varcon_loss.VarConLoss` takes, by name: ``temperature``, ``epsilon``,
            ``process_group="world"`` for several GPUs, ...

    Called as ``loss(sentence_features, labels)``, as the trainers call it:

    - ``sentence_features``: one dictionary of tokens for each text column of the data set. Several
      columns are views of one sample, such as a text and its paraphrase.
    - ``labels`` ``[B]``: integers, from the column ``label``.

    The loss is computed in float32 or wider, also under autocast. A memory
    (``centroid_momentum``) learns while ``model`` is in training mode. The trainers' checkpoints
    hold only the model, so a memory starts empty where a run is resumed.

    Raises:
        TypeError, ValueError: as `varcon_loss.VarConLoss`; a ``model`` that is no module.

    Example:
        >>> import torch
        >>> from varcon_loss.integrations.text import VarConLoss
        >>> class Bag(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.words = torch.nn.EmbeddingBag(100, 16)
        ...
        ...     def forward(self, features):
        ...         return {"sentence_embedding": self.words(features["input_ids"])}
        >>> loss = VarConLoss(Bag(), temperature=0.1)
        >>> texts = {"input_ids": torch.randint(100, (8, 5))}
        >>> loss([texts], torch.arange(8) % 3).backward()
    """

    citation = """@inproceedings{wang2025varcon,
    title = {Variational Supervised Contrastive Learning},
    author = {Wang, Ziwen and Fan, Jiajun and Nguyen, Thao and Ji, Heng and Liu, Ge},
    booktitle = {Advances in Neural Information Processing Systems},
    year = {2025},
    url = {https://arxiv.org/abs/2506.07413},
}"""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be a torch.nn.Module, such as a SentenceTransformer, got {model!r}: "
                "the first argument here is the model, and temperature=0.1 is given by name"
            )
        self.model = model  # under this name a trainer puts its wrapped model in its place
        self.criterion = varcon_loss.VarConLoss(**options)
        self.options = options

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The loss of a batch, a 0-d tensor (or per sample with ``reduction="none"``)."""
        embeddings = [self.model(features)["sentence_embedding"] for features in sentence_features]
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """As `forward`, for losses that wrap others: one ``[B, D]`` for each text column."""
        self.criterion.train(self.model.training)  # evaluation must not move a memory
        views = embeddings[0] if len(embeddings) == 1 else torch.stack(embeddings, dim=1)
        return self.criterion(views, labels)

    def get_config_dict(self) -> dict[str, Any]:
        """What a model card says about the loss."""
        return self.options
