"""Further read-outs of a trained encoder: corrupted images, other data, the tree of classes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import kornia
import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.hierarchy import cophenet, fcluster, linkage
from scipy.spatial.distance import pdist
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor, nn

from benchmarks.common.data import ImageData, Split, load
from benchmarks.common.readouts import (
    accuracy,
    class_mean_predictions,
    few_of_each,
    knn_predictions,
    linear_model,
    linear_predictions,
)
from benchmarks.common.training import encode

SEVERITIES = (1, 2, 3, 4, 5)
SHOTS, DRAWS = (1, 5), 20  # labelled images of a class, and how often they are drawn
FROM_FEW = {"linear": linear_predictions, "class mean": class_mean_predictions}
ELSEWHERE = ("digits", "mnist5k", "fashion")


def _noise(images: Tensor, severity: int) -> Tensor:
    return (images + 0.08 * severity * torch.randn_like(images)).clamp(0, 1)


def _blur(images: Tensor, severity: int) -> Tensor:
    return kornia.filters.gaussian_blur2d(images, (7, 7), (0.3 * severity, 0.3 * severity))


def _contrast(images: Tensor, severity: int) -> Tensor:
    return kornia.enhance.adjust_contrast(images, 1 - 0.17 * severity)


def _brightness(images: Tensor, severity: int) -> Tensor:
    return kornia.enhance.adjust_brightness(images, 0.12 * severity)


def _shift(images: Tensor, severity: int) -> Tensor:
    height, width = images.shape[-2:]
    side = torch.randint(0, 2, (len(images), 2)) * 2.0 - 1.0
    return kornia.geometry.translate(images, side * 0.04 * severity * torch.tensor([width, height]))


def _occlusion(images: Tensor, severity: int) -> Tensor:
    area = 0.06 * severity
    erase = kornia.augmentation.RandomErasing((area, area), (1.0, 1.0), value=0.0, p=1.0)
    return erase(images)


CORRUPTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "noise": _noise, "blur": _blur, "contrast": _contrast, "brightness": _brightness,
    "shift": _shift, "occlusion": _occlusion,
}  # fmt: skip


def corrupted(data: ImageData, name: str, severity: int) -> Split:
    """The test images under a corruption of strength 1 to 5; drawn anew, always the same."""
    low, high = data.train.images.min(), data.train.images.max()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Corruptions are made for pixels in 0 ... 1.
        pixels = ((data.test.images - low) / (high - low)).clamp(0, 1)
        changed = CORRUPTIONS[name](pixels, severity)
    return Split(changed * (high - low) + low, data.test.labels)


def corruption_scores(encoder: nn.Module, data: ImageData, device: str) -> dict[str, float]:
    """Accuracy of a linear probe on clean images, by corruption and severity."""
    probe = linear_model(encode(encoder, data.train, device), data.train.labels)
    scores = {}
    for name in CORRUPTIONS:
        for severity in SEVERITIES:
            test = corrupted(data, name, severity)
            predicted = probe.predict(encode(encoder, test, device).numpy())
            scores[f"{name}, {severity}"] = accuracy(predicted, test.labels)
    return scores


def transfer_scores(
    encoder: nn.Module, data: ImageData, device: str, root: Path | None
) -> dict[str, float]:
    """Linear probe and kNN of the frozen encoder on the other sets whose files are here."""
    scores = {}
    for name in ELSEWHERE:
        try:
            other = load(name, root if name == "fashion" else None)
        except ValueError:
            continue
        if name == data.name or other.train.images.shape[1] != data.train.images.shape[1]:
            continue
        known, test = (encode(encoder, part, device) for part in (other.train, other.test))
        labels = other.train.labels
        scores[f"linear on {name}"] = accuracy(
            linear_predictions(known, labels, test), other.test.labels
        )
        scores[f"kNN on {name}"] = accuracy(knn_predictions(known, labels, test), other.test.labels)
    return scores


def few_shot_scores(encoder: nn.Module, data: ImageData, device: str) -> dict[str, float]:
    """Read-outs learned on few labelled images of each class, means over draws of them.

    The same draws for every encoder. With few images the choice of them decides as much as the
    features do, so one draw tells little.
    """
    features, test = (encode(encoder, part, device) for part in (data.train, data.test))
    labels = data.train.labels
    generator = torch.Generator().manual_seed(0)
    scores = {f"{name} on {n} a class": 0.0 for name in FROM_FEW for n in SHOTS}
    for _ in range(DRAWS):
        order = torch.randperm(len(labels), generator=generator)
        for n in SHOTS:
            few = few_of_each(labels, order, n, data.num_classes)
            for name, predictions in FROM_FEW.items():
                predicted = predictions(features[few], labels[few], test)
                key = f"{name} on {n} a class"
                scores[key] += accuracy(predicted, data.test.labels) / DRAWS
    return scores


def hierarchy_scores(encoder: nn.Module, data: ImageData, device: str) -> dict[str, Any]:
    """The tree of class means of test features, and how well it keeps distances and groups."""
    features = F.normalize(encode(encoder, data.test, device), dim=1)
    means = torch.stack([features[data.test.labels == k].mean(0) for k in range(data.num_classes)])
    distances = pdist(means.double().numpy(), "cosine")
    tree = linkage(distances, "average")
    scores: dict[str, Any] = {"cophenetic": float(cophenet(tree, distances)[0])}
    if data.groups is not None:
        found = fcluster(tree, len(set(data.groups)), "maxclust")
        scores["groups found"] = float(normalized_mutual_info_score(data.groups, found))
    return scores | {"tree": np.round(tree, 5).tolist()}


def further_scores(
    extra: str, encoder: nn.Module, data: ImageData, device: str, root: Path | None
) -> dict[str, Any]:
    """The read-outs that a cell asks for by name."""
    if extra == "corruption":
        return corruption_scores(encoder, data, device)
    if extra == "transfer":
        return transfer_scores(encoder, data, device, root)
    if extra == "hierarchy":
        return hierarchy_scores(encoder, data, device)
    if extra == "few-shot":
        return few_shot_scores(encoder, data, device)
    raise ValueError(f"extra must be corruption, transfer, few-shot or hierarchy, got {extra!r}")
