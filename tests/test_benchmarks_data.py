"""The images of the benchmark harness: where they come from and how they are split."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
from PIL import Image

from benchmarks.common import data


def test_pairs_share_no_digit_between_splits() -> None:
    pairs = data.load("mnist-pairs")
    assert pairs.num_classes == 100

    def halves(split: data.Split) -> set[bytes]:
        both = torch.cat(split.images.split(14, dim=3))
        return {image.numpy().tobytes() for image in both}

    assert not halves(pairs.train) & halves(pairs.test)
    assert not halves(pairs.train) & halves(pairs.validation)


def test_a_folder_of_ones_own_images(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for part, name, count in (
        ("train", "a", 9),
        ("train", "b", 9),
        ("test", "a", 2),
        ("test", "b", 3),
    ):
        folder = tmp_path / part / name
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    loaded = data.load("folder", tmp_path)
    assert loaded.num_classes == 2
    assert loaded.test.labels.tolist() == [0, 0, 1, 1, 1]
    assert loaded.train.images.shape[1:] == (3, 32, 32)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("imagenet", "data must be icons or one of digits"),
        ("folder", "folder needs --root with train/ and test/"),
    ],
)
def test_missing_data_says_what_to_do(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        data.load(name, tmp_path)
