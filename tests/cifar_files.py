"""Tiny archives as CIFAR's authors pack them: pickled rows of 3072 bytes."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets


def write_cifar(
    name: str, classes: int, root: Path, monkeypatch: pytest.MonkeyPatch, per_class: int = 8
) -> None:
    """Put them where torchvision looks, with the digests it expects."""
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    key = "labels" if name == "cifar10" else "fine_labels"

    def write(file: str, content: dict) -> tuple[str, str]:
        raw = pickle.dumps(content)
        (folder / file).write_bytes(raw)
        return file, hashlib.md5(raw).hexdigest()

    def batch(seed: int) -> dict:
        rng = np.random.default_rng(seed)
        labels = list(range(classes)) * per_class
        pixels = rng.integers(0, 255, (len(labels), 3072), dtype=np.uint8)
        return {"data": pixels, key: labels}

    train_list = [write(f, batch(i)) for i, (f, _) in enumerate(kind.train_list)]
    test_list = [write(f, batch(99)) for f, _ in kind.test_list]
    names = {kind.meta["key"]: [str(i) for i in range(classes)]}
    meta_file, digest = write(kind.meta["filename"], names)
    monkeypatch.setattr(kind, "train_list", train_list)
    monkeypatch.setattr(kind, "test_list", test_list)
    monkeypatch.setattr(kind, "meta", kind.meta | {"filename": meta_file, "md5": digest})
