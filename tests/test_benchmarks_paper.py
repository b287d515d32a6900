"""The authors' recipe, on tiny files."""

from pathlib import Path

import pytest

pytest.importorskip("sklearn")
from benchmarks.common import cells, data
from benchmarks.paper import reproduce
from tests.cifar_files import write_cifar


def test_the_papers_recipe_runs_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar("cifar100", 100, tmp_path, monkeypatch)
    tiny = cells.first_classes(data.load("cifar100", tmp_path), 3)
    row = reproduce(tiny, seed=0, device="cpu", epochs=1, batch_size=8, probe_epochs=2)
    assert row["loss_scale"] == 1 / 8
    assert 0 <= row["top1"] <= 1
