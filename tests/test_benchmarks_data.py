"""The images of the benchmark harness: where they come from and how they are split."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
from benchmarks.common import data
from tests.cifar_files import write_cifar


class TestData:
    def test_pairs_share_no_digit_between_splits(self) -> None:
        pairs = data.load("mnist-pairs")
        assert pairs.num_classes == 100

        def halves(split: data.Split) -> set[bytes]:
            both = torch.cat(split.images.split(14, dim=3))
            return {image.numpy().tobytes() for image in both}

        assert not halves(pairs.train) & halves(pairs.test)
        assert not halves(pairs.train) & halves(pairs.validation)

    @pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
    def test_cifar_from_files_in_the_true_format(
        self, name: str, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_cifar(name, classes, tmp_path, monkeypatch)
        loaded = data.load(name, tmp_path)
        assert loaded.num_classes == classes
        assert loaded.train.images.shape[1:] == (3, 32, 32)
        assert loaded.flips

    def test_image_folder(self, tmp_path: Path) -> None:
        from PIL import Image

        for part in ("train", "test"):
            for label in ("cat", "dog"):
                folder = tmp_path / part / label
                folder.mkdir(parents=True)
                for i in range(8):
                    pixels = np.random.default_rng(i).integers(0, 255, (40, 50, 3), np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i}.png")
        loaded = data.load("folder", tmp_path)
        assert loaded.num_classes == 2
        assert loaded.test.images.shape == (16, 3, 32, 32)

    def test_errors(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="data must be one of digits"):
            data.load("imagenet")
        with pytest.raises(ValueError, match="cifar10 needs --root"):
            data.load("cifar10")
        with pytest.raises(ValueError, match="folder needs --root with train/ and test/"):
            data.load("folder", tmp_path)
