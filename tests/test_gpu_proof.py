"""The proof of the kernels on a GPU, without one: every stage runs, at tiny sizes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu_proof
from benchmarks.common.contenders import CONTENDERS

if torch.cuda.is_available():
    pytest.skip("there is a GPU: run the proof itself", allow_module_level=True)


def test_every_stage_runs_here_at_tiny_sizes(tmp_path: Path) -> None:
    """The whole dry run: commands are right, measurements give rows, tests are found."""
    rows = gpu_proof.run(tmp_path, "cpu", tiny=True)
    assert [row["stage"] for row in rows] == list(gpu_proof.stages("cpu", tmp_path, tiny=True))
    assert {row["stage"]: row["status"] for row in rows if row["status"] != "passed"} == {}
    found = {row["stage"]: row["rows"] for row in rows}
    (launched,) = found["launches"]
    assert launched["wall_s"] > 0
    assert launched["microseconds"]
    lean, composition = found["targets"]
    assert lean["times_ours"] == pytest.approx(lean["theirs_s"] / lean["ours_s"])
    assert lean["reached"] == (lean["times_ours"] >= 1.0)
    assert (composition["status"], composition["reached"]) == ("CUDA only", None)
    floor, memory = found["large"]
    assert floor["floor"]["operations"] == 4 * 64 * 10 * 128
    assert floor["floor"]["products_s"] > 0
    assert floor["times_floor"] > 1
    assert memory["times_features"] >= 0
    (tried,) = found["tiles"]
    assert tried["error"] < 0.05
    assert tried["wall_s"] > 0


def test_the_sanitizers_run_tests_that_exist() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "tests/test_triton.py"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [word for word in gpu_proof.SANITIZED if word not in listed] == []


def test_a_stage_that_passed_is_not_run_again_and_one_that_failed_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = tmp_path / "count-good", tmp_path / "count-bad"
    code = "open({!r}, 'a').write('x'); import json; print(json.dumps([{{'a': 1}}])); {}"
    commands = {
        "good": [sys.executable, "-c", code.format(str(good), "")],
        "bad": [sys.executable, "-c", code.format(str(bad), "raise SystemExit('no such luck')")],
        "absent": ["no-such-program"],
    }
    monkeypatch.setattr(gpu_proof, "stages", lambda *_, **__: commands)
    for _ in range(2):
        passed, failed, absent = gpu_proof.run(tmp_path, "cpu")
        assert (passed["status"], passed["rows"]) == ("passed", [{"a": 1}])
        assert (failed["status"], failed["last_line"]) == ("failed: 1", "no such luck")
        assert absent["status"] == "failed: no-such-program is not installed"
    assert (good.read_text(), bad.read_text()) == ("x", "xx")
    with pytest.raises(ValueError, match="no stage"):
        gpu_proof.run(tmp_path, "cpu", ["nonsense"])


def test_a_stage_over_its_time_leaves_nothing_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grandchild = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    monkeypatch.setattr(gpu_proof, "LIMIT", 5)
    monkeypatch.setattr(
        gpu_proof, "stages", lambda *_, **__: {"slow": [sys.executable, "-c", child]}
    )
    (row,) = gpu_proof.run(tmp_path, "cpu")
    assert row["status"] == "failed: over 5 s"
    pid = int(row["last_line"])
    for _ in range(50):
        if not _runs(pid):
            return
        time.sleep(0.1)
    raise AssertionError(f"{pid} still runs")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_packages_that_are_missing_cost_their_tests_only(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu_proof.importlib.util.find_spec
    monkeypatch.setattr(
        gpu_proof.importlib.util,
        "find_spec",
        lambda name: None if name in ("hypothesis", "xdist") else found(name),
    )
    command = gpu_proof.suite_command(tiny=False)
    assert "--ignore=tests/test_values.py" in command
    assert "--ignore=tests/test_edges.py" not in command
    assert "-n" not in command


def test_it_starts_with_torch_and_triton_alone() -> None:
    """A machine with a GPU may have nothing else of what the benchmarks use."""
    absent = ("pandas", "typer", "rich", "matplotlib", "sklearn", "pytorch_metric_learning")
    code = (
        f"import sys\nfor name in {absent}: sys.modules[name] = None\n"
        "from benchmarks import gpu_proof\n"
        "gpu_proof.suite_command(tiny=True)\n"
        "gpu_proof.environment('cpu')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))


def test_the_stages_that_count_exist_and_targets_name_contenders(tmp_path: Path) -> None:
    assert {*gpu_proof.PROOF, "racecheck", "suite"} <= set(gpu_proof.stages("cuda", tmp_path))
    for num_rows, num_classes, name, _ in (*gpu_proof.TARGETS, *gpu_proof.TINY_TARGETS):
        assert name in CONTENDERS, (num_rows, num_classes)
