"""The proof of the kernels on a GPU, without one: what it measures runs, at tiny sizes."""

import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
typer = pytest.importorskip("typer")
pytest.importorskip("sklearn")
from typer.main import get_command

from benchmarks import gpu_proof
from benchmarks.common.contenders import CONTENDERS

if torch.cuda.is_available():
    pytest.skip("there is a GPU: run the proof itself", allow_module_level=True)


def test_stages_run_here_at_tiny_sizes(tmp_path: Path) -> None:
    """A dry run: commands are right, measurements give rows, the sanitizers' tests are found.

    What the other stages run has tests of its own: here only their commands are looked at.
    """
    commands = gpu_proof.stages("cuda", tmp_path)
    assert {*gpu_proof.PROOF, "suite"} <= set(commands)
    for tool in ("memcheck", "racecheck", "initcheck"):
        ran = commands[tool]
        assert ran[:3] == ["compute-sanitizer", "--tool", tool]
        assert ("--kernel-regex" in ran) == (tool != "initcheck")
        assert (
            ran[ran.index(sys.executable) :]
            == (commands["memcheck"][commands["memcheck"].index(sys.executable) :])
        )
    for stage in ("kernels", "device"):
        files = [word for word in commands[stage] if word.startswith("tests/")]
        assert files
        assert all((Path(__file__).parents[1] / file).exists() for file in files)
    speed = typer.Typer(add_completion=False)
    speed.command()(importlib.import_module("benchmarks.speed").command)
    for size in gpu_proof.SIZES:
        _, _, _, _, *options = commands[f"speed-{size[0]}-{size[1]}"]
        get_command(speed).make_context("speed", options)  # raises where one is unknown
    names = ["launches", "targets", "large", "memcheck", "tiles"]
    rows = gpu_proof.run(tmp_path, "cpu", names, tiny=True)
    assert [row["stage"] for row in rows] == names
    assert {row["stage"]: row["status"] for row in rows if row["status"] != "passed"} == {}
    listed = (tmp_path / "memcheck.log").read_text()
    assert [word for word in gpu_proof.SANITIZED if word not in listed] == []
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
    check_report(gpu_proof.save(tmp_path, "cpu", tiny=True), names)


def check_report(saved: Path, names: list[str]) -> None:
    """What `report` makes of the file: a line a stage, and tables that can be read."""
    cost = pytest.importorskip("benchmarks.report.cost")
    assert {"commit", "threads"} <= set(json.loads(saved.read_text())["environment"])
    lines = "\n".join(cost.gpu_section(saved.parent)).splitlines()
    stages = [line.split(" | ") for line in lines if line.startswith("| ")]
    assert [line[0] for line in stages if line[1] == "passed"] == [f"| {name}" for name in names]
    assert max(len(line) for line in lines) < 300
    assert not {"nan", "None"} & set(re.findall(r"\w+", "\n".join(lines)))


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
        assert passed["last_line"] == "1 rows"
        assert (failed["status"], failed["last_line"]) == ("failed: 1", "no such luck")
        assert absent["status"] == "failed: no-such-program is not installed"
    assert (good.read_text(), bad.read_text()) == ("x", "xx")
    with pytest.raises(ValueError, match="no stage"):
        gpu_proof.run(tmp_path, "cpu", ["nonsense"])
    # A later loan may run a few stages only, or be of another device.
    gpu_proof.run(tmp_path, "cpu", ["good"])
    elsewhere = json.loads((tmp_path / "absent.json").read_text())
    elsewhere["environment"]["device"] = "another"
    (tmp_path / "absent.json").write_text(json.dumps(elsewhere))
    saved = json.loads(gpu_proof.save(tmp_path, "cpu").read_text())
    assert [row["stage"] for row in saved["rows"]] == ["good", "bad"]


def test_a_stage_over_its_time_leaves_nothing_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grandchild = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    monkeypatch.setattr(gpu_proof, "LIMIT", 3)
    monkeypatch.setattr(
        gpu_proof, "stages", lambda *_, **__: {"slow": [sys.executable, "-c", child]}
    )
    (row,) = gpu_proof.run(tmp_path, "cpu")
    assert row["status"] == "failed: over 3 s"
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


# Of what the tests and benchmarks use, all that a machine with a GPU may not have.
ABSENT = (
    *("accelerate", "hypothesis", "lightning", "matplotlib", "myst_nb", "numpy", "pandas", "PIL"),
    *("pytorch_metric_learning", "rich", "scipy", "sklearn", "timm", "torchvision", "typer"),
    *("xdist", "yaml"),
)
WITHOUT = f"""
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, *arguments):
        if name.partition(".")[0] not in {ABSENT}:
            return PathFinder.find_spec(name, *arguments)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
import pytest
from benchmarks import gpu_proof
gpu_proof.environment("cpu")
_, _, _, *arguments = gpu_proof.suite_command(tiny=True)
sys.exit(pytest.main(arguments))
"""


def test_packages_that_are_missing_cost_their_tests_only() -> None:
    """With torch, Triton and pytest alone the suite's stage still finds tests, and no errors."""
    # Triton's interpreter wants numpy; on a GPU it is not used.
    variables = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", WITHOUT]
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stdout
    for name in ("test_edges.py", "test_proven.py", "test_distributed.py", "test_no_sync.py"):
        assert f"tests/{name}::" in done.stdout
    for name in gpu_proof.NEEDS:
        assert f"tests/{name}::" not in done.stdout


def test_targets_name_contenders() -> None:
    for num_rows, num_classes, name, _ in (*gpu_proof.TARGETS, *gpu_proof.TINY_TARGETS):
        assert name in CONTENDERS, (num_rows, num_classes)
