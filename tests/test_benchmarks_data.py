"""The images of the benchmark harness: where they come from and how they are split."""

import gzip
from collections.abc import Iterable
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

    @pytest.mark.parametrize("packed", [True, False])
    def test_idx_files_of_any_origin(self, packed: bool, tmp_path: Path) -> None:
        images = write_idx(tmp_path, classes=(1, 2, 5), packed=packed)
        loaded = data.load("idx", tmp_path)
        assert loaded.num_classes == 3
        assert loaded.test.labels.tolist() == [0, 1, 2] * 10
        # Halved by means of four pixels, then standardised: only offset and scale are free.
        want = torch.tensor(images, dtype=torch.float32).view(30, 1, 3, 2, 4, 2).mean((3, 5))
        got = loaded.test.images
        scale = (got[0].max() - got[0].min()) / (want[0].max() - want[0].min())
        torch.testing.assert_close(got - got[0].min(), (want - want[0].min()) * scale)

    def test_missing_and_broken_files_say_what_to_do(self, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr(data, "FASHION", tmp_path / "absent")
        for given, message in (
            (["fashion"], "apt install dataset-fashion-mnist, or --root"),
            (["idx"], "idx needs --root"), (["imagenet"], "data must be one of digits"),
            (["cifar10"], "cifar10 needs --root"),
            (["cifar10", tmp_path], r"no complete cifar10 in .* unpack cifar-10-python"),
            (["folder", tmp_path], "folder needs --root with train/ and test/"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=message):
                data.load(*given)
        write_idx(tmp_path, classes=(0, 1), packed=False)
        path = tmp_path / "t10k-labels-idx1-ubyte"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ValueError, match=r"cut short: 19 bytes for a shape of \(20,\)"):
            data.load("idx", tmp_path)
        path.write_bytes(b"<htm")
        with pytest.raises(ValueError, match="no IDX file"):
            data.load("idx", tmp_path)


def write_idx(root: Path, classes: Iterable[int], *, packed: bool = True) -> np.ndarray:
    """Random images of 6 x 8 pixels in the four files of MNIST; returns the test images."""
    labels = np.array(list(classes) * 10, np.uint8)
    for part in ("train", "t10k"):
        images = np.random.default_rng(len(part)).integers(0, 255, (len(labels), 6, 8), np.uint8)
        for kind, array in (("images", images), ("labels", labels)):
            sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
            raw = bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()
            path = root / f"{part}-{kind}-idx{array.ndim}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(raw) if packed else raw)
    return images
