"""`python -m benchmarks gpu-proof`, as far as a CPU can try it."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
from benchmarks import gpu_proof
from benchmarks.common.contenders import CONTENDERS


class TestGpuProof:
    """The stages' measurements at sizes for a CPU, and how stages are run; no GPU is needed."""

    def test_floors_and_targets(self) -> None:
        (floor,) = gpu_proof.floors("cpu", [(64, 10)], dim=128)
        assert floor["operations"] == 4 * 64 * 10 * 128
        assert floor["products_s"] > 0
        lean, missing = gpu_proof.targets(
            "cpu",
            ((64, 10, "equations, lean", 1.0), (64, 10, "cut-cross-entropy composition", 1.5)),
            rounds=1,
        )
        assert lean["times_ours"] == pytest.approx(lean["theirs_s"] / lean["ours_s"])
        assert lean["reached"] == (lean["times_ours"] >= 1.0)
        assert missing["status"] == "CUDA only"
        assert missing["reached"] is None

    def test_a_stage_leaves_a_file_and_is_not_run_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        count = tmp_path / "count"
        code = f"open({str(count)!r}, 'a').write('x'); import json; print(json.dumps([{{'a': 1}}]))"
        commands = {
            "good": [sys.executable, "-c", code],
            "bad": [sys.executable, "-c", "raise SystemExit('no such luck')"],
            "absent": ["no-such-program"],
        }
        monkeypatch.setattr(gpu_proof, "stages", lambda device: commands)
        for _ in range(2):
            good, bad, absent = gpu_proof.run(tmp_path, "cpu")
            assert good["status"] == "passed"
            assert good["rows"] == [{"a": 1}]
            assert (bad["status"], bad["last_line"]) == ("failed: 1", "no such luck")
            assert absent["status"] == "failed: no-such-program is not installed"
        assert count.read_text() == "x"

    def test_the_measuring_stages_exist(self) -> None:
        commands = gpu_proof.stages("cuda")
        assert {"kernels", "targets", "memcheck", "racecheck", "suite", "speed"} <= set(commands)
        for n, k, name, _ in gpu_proof.TARGETS:
            assert name in CONTENDERS, (n, k)
