"""The projection head between an encoder and the loss."""

from torch import Tensor, nn

from varcon_loss.checks import refuse, whole_number

HEAD_KINDS = ("mlp-bn", "mlp", "linear")


class ProjectionHead(nn.Module):
    """Maps encoder features to the embeddings that the loss sees; thrown away after training.

    ``"mlp-bn"`` (default) is Linear, BatchNorm, ReLU, Linear. A plain ``"mlp"`` starts with nearly
    parallel embeddings, and at a large learning rate VarCon and SupCon can both collapse.
    BatchNorm spreads them. With several processes convert it by
    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` as any other BatchNorm.

    Args:
        in_dim: width of the encoder's features.
        dim: width of the embeddings (128 in the paper).
        kind: ``"mlp-bn"``, ``"mlp"`` or ``"linear"``.
        hidden_dim: width of the hidden layer; ``in_dim`` if None. Unused by ``"linear"``.

    Shape:
        features: ``[N, in_dim]`` or ``[B, V, in_dim]``.
        Output: ``[N, dim]`` or ``[B, V, dim]``, not normalised: `VarConLoss` normalises.

    Raises:
        ValueError: an unknown ``kind``, or a width below 1.

    Example:
        >>> import torch
        >>> from varcon_loss import ProjectionHead
        >>> ProjectionHead(512)(torch.randn(4, 512)).shape
        torch.Size([4, 128])
    """

    def __init__(
        self, in_dim: int, dim: int = 128, kind: str = "mlp-bn", hidden_dim: int | None = None
    ) -> None:
        super().__init__()
        if kind not in HEAD_KINDS:
            refuse(f"kind must be one of {HEAD_KINDS}", repr(kind))
        hidden_dim = in_dim if hidden_dim is None else hidden_dim
        for name, width in (("in_dim", in_dim), ("dim", dim), ("hidden_dim", hidden_dim)):
            whole_number(name, width, "an int")
        if min(in_dim, dim, hidden_dim) < 1:
            refuse("widths must be at least 1", f"{in_dim=}, {dim=}, {hidden_dim=}")
        if kind == "linear":
            self.layers = nn.Sequential(nn.Linear(in_dim, dim))
        elif kind == "mlp":
            self.layers = nn.Sequential(
                nn.Linear(in_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, dim)
            )
        else:
            self.layers = nn.Sequential(
                nn.Linear(in_dim, hidden_dim, bias=False),
                nn.BatchNorm1d(hidden_dim),
                nn.ReLU(),
                nn.Linear(hidden_dim, dim),
            )

    def forward(self, features: Tensor) -> Tensor:
        in_dim = self.layers[0].in_features
        if features.ndim < 2 or features.shape[-1] != in_dim:
            what = f"features must have shape [..., {in_dim}], the head's in_dim"
            refuse(what, list(features.shape))
        rows = self.layers(features.flatten(0, -2))
        return rows.unflatten(0, features.shape[:-1])
