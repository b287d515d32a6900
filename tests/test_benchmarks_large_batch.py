"""`python -m benchmarks large-batch`, on sizes that take seconds."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("sklearn")
from benchmarks import large_batch, report
from benchmarks.__main__ import app
from benchmarks.common import results
from benchmarks.large_batch import AT_ONCE, CHUNKED, CONTENDERS


def test_a_step_in_chunks_is_weighed_and_timed_beside_one_batch(tmp_path: Path) -> None:
    small = ["large-batch", "--chunk-size", "32", "--budget", "0.1", "--out", str(tmp_path)]
    first = CliRunner().invoke(app, [*small, "--sizes", "256"])
    assert first.exit_code == 0, first.output
    frame, env = results.read("large-batch", tmp_path)
    rows = {row["contender"]: row for row in frame.to_dict("records")}
    assert list(rows) == list(CONTENDERS)
    for row in rows.values():
        assert row["status"] == "ok"
        assert row["error"] < 1e-9
        assert row["q1"] <= row["median"] <= row["q3"]
    assert {"device", "versions", "load"} <= set(env)
    assert rows[CHUNKED]["peak_bytes"] < rows[AT_ONCE]["peak_bytes"] / 2
    again = CliRunner().invoke(app, [*small, "--sizes", "256,512", "--memory-gib", "0.001"])
    assert "kept 1 of 2 sizes" in again.output
    both, _ = results.read("large-batch", tmp_path)
    assert both["median"][:4].tolist() == frame["median"].tolist()
    assert all(status.startswith("would take 0.") for status in both["status"][4:])
    (tmp_path / "results").mkdir()
    shutil.copy(tmp_path / "large-batch.json", tmp_path / "results")
    text = report.write(tmp_path / "results").read_text()
    assert "results/large-batch.png" in text
    assert "would take 0." in text


def test_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def accumulated(model, images, labels, chunk_size):
        for x, y in zip(images.split(chunk_size), labels.split(chunk_size), strict=True):
            large_batch.varcon(model, x, y, 0)

    monkeypatch.setitem(CONTENDERS, "accumulated", (accumulated, large_batch.varcon))
    with pytest.raises(ValueError, match="not timed"):
        large_batch.error_of("accumulated", 400, "cpu")
