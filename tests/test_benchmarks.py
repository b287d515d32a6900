"""The other questions of the benchmark harness, and what its user sees."""

from pathlib import Path

import pandas as pd
import pytest
import torch

pytest.importorskip("sklearn")
from benchmarks.common import data, results
from benchmarks.common.training import Recipe


def test_bytes_sent_follow_the_model(tmp_path: Path) -> None:
    from benchmarks import distributed

    rows = distributed.measure(2, 64, 500, 32, 3, tmp_path)
    for row in rows:
        # Packets have headers, and a barrier is among what is counted.
        assert row["bytes_per_rank"] == pytest.approx(row["bytes_by_model"], rel=0.15, abs=3000)
    expected = pd.DataFrame(distributed.extrapolate())
    assert set(expected["ranks"]) == {8, 64, 256, 1024}


def test_the_report_rebuilds_from_the_saved_results(tmp_path: Path) -> None:
    from benchmarks.report import write

    text = write(_copy_of_results(tmp_path)).read_text()
    assert text.startswith("# Results")
    assert "## What was found" in text


def _copy_of_results(tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(results.RESULTS, tmp_path / "results"))


def test_evolution_follows_both_methods(tmp_path: Path) -> None:
    from benchmarks.evolution import METHODS, follow

    recipe = Recipe(epochs=2, batch_size=256)
    rows, picture = follow(data.load("digits"), recipe, 0, [1, 2], tmp_path)
    assert [(row["method"], row["epoch"]) for row in rows] == [
        (m, e) for m in METHODS for e in (1, 2)
    ]
    assert all(row["knn"] > 0.5 for row in rows)
    assert picture == tmp_path / "evolution-digits.png"
    assert picture.stat().st_size > 10_000


def test_a_missing_gpu_is_a_clear_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    from typer.testing import CliRunner

    from benchmarks.__main__ import app

    for command in (["speed", "--device", "cuda"], ["gpu-proof"]):
        outcome = CliRunner().invoke(app, command)
        assert outcome.exit_code == 2
        assert "CUDA device" in outcome.output
