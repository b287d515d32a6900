"""How embeddings and temperatures come to be: the paper's figures 4 and 5, in small."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.manifold import TSNE
from torch import Tensor, nn

from benchmarks.data import ImageData
from benchmarks.readouts import accuracy, knn_predictions
from benchmarks.training import Recipe, Run, encode, train

METHODS = ("VarCon", "SupCon")
SHOWN_IMAGES = 1000


def follow(
    data: ImageData,
    recipe: Recipe,
    seed: int,
    snapshots: Sequence[int],
    out: Path,
    on_epoch: Callable[[str, int], None] = lambda method, epoch: None,
) -> list[dict[str, Any]]:
    """Train by each of `METHODS`, look at held-out features after some epochs, draw.

    Args:
        data: the features shown are of its test split.
        recipe: the same for all methods.
        seed: of weights, order and augmentation.
        snapshots: epochs after which to look, counted from 1.
        out: folder of ``evolution-DATA.png``.
        on_epoch: told the method and the epoch just ended.

    Returns:
        a row for each method and epoch: what was logged, and kNN accuracy at snapshots.
    """
    features: dict[str, dict[int, Tensor]] = {}
    runs: dict[str, Run] = {}
    rows = []
    for method in METHODS:
        features[method] = {}

        def look(epoch: int, log: dict[str, float], encoder: nn.Module, method=method) -> None:
            row = {"data": data.name, "method": method, "epoch": epoch + 1, **log}
            if epoch + 1 in snapshots:
                held_out = encode(encoder, data.test)
                features[method][epoch + 1] = held_out
                known = encode(encoder, data.train)
                predictions = knn_predictions(known, data.train.labels, held_out)
                row["knn"] = accuracy(predictions, data.test.labels)
            rows.append(row)
            on_epoch(method, epoch)

        runs[method] = train(data, method, recipe, seed, on_epoch=look)
    out.mkdir(parents=True, exist_ok=True)
    _draw(data, features, runs["VarCon"], recipe, out / f"evolution-{data.name}.png")
    return rows


def _draw(
    data: ImageData,
    features: dict[str, dict[int, Tensor]],
    varcon: Run,
    recipe: Recipe,
    path: Path,
) -> None:
    snapshots = list(next(iter(features.values())))
    figure, axes = plt.subplots(
        len(features) + 1, len(snapshots), figsize=(3 * len(snapshots), 3 * (len(features) + 1)),
        squeeze=False,
    )  # fmt: skip
    labels = data.test.labels[:SHOWN_IMAGES]
    for line, (method, by_epoch) in zip(axes, features.items(), strict=False):
        for axis, (epoch, points) in zip(line, by_epoch.items(), strict=True):
            flat = TSNE(init="pca", random_state=0).fit_transform(points[:SHOWN_IMAGES].numpy())
            axis.scatter(*flat.T, c=labels, cmap="tab20", s=4)
            axis.set(title=f"{method}, epoch {epoch}", xticks=[], yticks=[])
    epsilon = 0.02 if recipe.epsilon is None else recipe.epsilon
    edges = np.linspace(recipe.temperature - epsilon, recipe.temperature + epsilon, 41)
    for axis, epoch in zip(axes[-1], snapshots, strict=True):
        tau2 = varcon.tau2[epoch - 1].flatten().numpy()
        axis.hist(tau2, edges, density=True, color="tab:orange")
        axis.axvline(tau2.mean(), color="black", lw=1)
        axis.set(title=f"VarCon, epoch {epoch}: mean {tau2.mean():.4f}", xlabel=r"$\tau_2$")
        axis.set(yticks=[])
    axes[-1][0].set_ylabel("density over a batch")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
