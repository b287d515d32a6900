"""The proof of the kernels on a GPU, without one: what it measures runs, at tiny sizes."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu_proof
from benchmarks.gpu_proof import EAGER, OURS, Row
from varcon_loss.proven import Proof

if torch.cuda.is_available():
    pytest.skip("there is a GPU: run the proof itself", allow_module_level=True)


def test_contenders_are_measured_and_a_failure_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_proof, "ROUNDS", 1)
    monkeypatch.setattr(gpu_proof.measure, "TOLERANCE", {torch.float32: 1e-4})
    names = (OURS, "equations, lean", "cut-cross-entropy composition")
    rows = gpu_proof.measured(Row(64, 10, 16, "float32"), "cpu", names)
    rows += gpu_proof.measured(Row(64, 10, 16, "bfloat16"), "cpu", names)  # no tolerance is known
    assert [row["status"] for row in rows[:3]] == ["ok", "ok", "CUDA only"]
    assert all(row["status"] != "ok" and row["seconds"] is None for row in rows[3:])
    assert all(row["seconds"] > 0 and row["peak_bytes"] >= 0 for row in rows[:2])
    head, *lines = gpu_proof.table(rows)
    assert head[1:] == ["64 x 10, D 16, float32", "64 x 10, D 16, bfloat16"]
    assert [line[0] for line in lines] == list(names)
    assert re.fullmatch(r"[\d.e+]+ / [\d.]+", lines[0][1])
    assert (lines[0][2], lines[2][1]) == ("-", "-")


def test_a_check_tells_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def outcome(program: str) -> dict[str, Any]:
        return gpu_proof.check((sys.executable, "-c", program), tmp_path / "log")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    passed = outcome("import os; print('a'); assert 'TRITON_INTERPRET' not in os.environ")
    assert (passed["outcome"], passed["last_line"]) == ("passed", "a")
    assert outcome("raise SystemExit('no such luck')")["outcome"] == "failed (1): no such luck"
    absent = gpu_proof.check(("no-such-program",), tmp_path / "log")
    assert absent["outcome"] == "no-such-program is not installed"
    monkeypatch.setattr(gpu_proof, "LIMIT", 0.2)
    assert outcome("import time; time.sleep(60)")["outcome"] == "over 0.2 s"


def test_what_the_checks_run_is_there() -> None:
    """Their tests are collected with torch, Triton and pytest alone."""
    hidden = ("hypothesis", "numpy", "pandas", "rich", "sklearn", "typer", "xdist")
    for arguments in gpu_proof.CHECKS.values():
        tests = arguments[arguments.index("pytest") + 1 :]
        program = (
            f"import sys; sys.modules.update(dict.fromkeys({hidden})); import pytest\n"
            f"import benchmarks.gpu_proof; sys.exit(pytest.main([*{tests}, '--collect-only']))"
        )
        # Triton's interpreter wants numpy; on a GPU it is not used.
        variables = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TRITON_INTERPRET": "0"}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, env=variables)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "tests/test_triton.py::" in done.stdout


def content_of() -> dict[str, Any]:
    """A results file that proves bfloat16 with D from 128 to 768, and float32 with D = 128."""
    rows = [
        row._asdict() | {"contender": name, "seconds": seconds, "status": "ok", "peak_bytes": 2**20}
        for row in gpu_proof.ROWS
        for name, seconds in ((OURS, 1.0), (EAGER, 1.5), ("equations, lean", None))
    ]
    environment = {"capability": [9, 0], "versions": {"torch": "2.9.0", "triton": "3.6.0"}}
    checks = {name: {"outcome": "passed", "seconds": 9} for name in gpu_proof.CHECKS}
    content = {"environment": environment, "checks": checks, "rows": rows}
    return content | {"verdict": gpu_proof.verdict(content)}


PROOF = Proof((9, 0), torch.bfloat16, (128, 512), "3.6", "gpu-proof-h100")
FLOAT32_ALONE = "right, and not slower than eager: float32 with D from 128 to 128"


@pytest.mark.parametrize(
    ("flaw", "verdict"),
    [
        ("tests", "not proven: tests did not pass"),
        ("memcheck", "not proven: memcheck did not pass"),
        ("no rows", "right, but slower than eager in every dtype"), ("slower", FLOAT32_ALONE),
        ("not run", FLOAT32_ALONE),
    ],
)  # fmt: skip
def test_what_is_no_proof(flaw: str, verdict: str, tmp_path: Path) -> None:
    content = content_of()
    if flaw in content["checks"]:
        content["checks"].pop(flaw)
    elif flaw == "no rows":
        content["rows"].clear()
    else:
        content["rows"][0]["seconds"] = {"slower": 1.6, "not run": None}[flaw]
    assert gpu_proof.verdict(content) == verdict
    (tmp_path / "gpu-proof-h100.json").write_text(json.dumps(content))
    assert not gpu_proof.supports(PROOF, tmp_path)


def test_what_a_default_may_rest_on(tmp_path: Path) -> None:
    proven = "bfloat16 with D from 128 to 768, float32 with D from 128 to 128"
    assert content_of()["verdict"] == f"right, and not slower than eager: {proven}"
    (tmp_path / "gpu-proof-h100.json").write_text(json.dumps(content_of()))
    assert gpu_proof.supports(PROOF, tmp_path)
    for other in (
        {"capability": (8, 9)}, {"triton": "3.7"}, {"dtype": torch.float16}, {"widths": (128, 1024)}
    ):  # fmt: skip
        assert not gpu_proof.supports(PROOF._replace(**other), tmp_path)
    with pytest.raises(FileNotFoundError):
        gpu_proof.supports(PROOF._replace(results="gpu-proof-l4"), tmp_path)


def test_the_command_ends_with_a_table_and_a_verdict(tmp_path, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit, match="CUDA device"):
        gpu_proof.command(tmp_path)
    measured = functools.partial(gpu_proof.measured, device="cpu", names=(OURS, EAGER))
    checks = dict.fromkeys(gpu_proof.CHECKS, (sys.executable, "-c", ""))
    for thing, name, value in (
        (gpu_proof, "CHECKS", checks), (gpu_proof, "ROWS", (Row(64, 10, 16, "float32"),)),
        (gpu_proof, "ROUNDS", 1), (gpu_proof, "measured", measured),
        (torch.cuda, "is_available", lambda: True), (torch.cuda, "get_device_name", lambda: "H100"),
        (torch.cuda, "get_device_capability", lambda: (9, 0)),
    ):  # fmt: skip
        monkeypatch.setattr(thing, name, value)
    gpu_proof.command(tmp_path)
    printed, saved = capsys.readouterr().out, json.loads((tmp_path / "gpu-proof.json").read_text())
    assert [row["status"] for row in saved["rows"]] == ["ok", "ok"]
    assert saved["environment"]["capability"] == [9, 0]
    assert "tests: passed" in printed
    assert "64 x 10, D 16, float32" in printed
    assert f"Verdict: {saved['verdict']}" in printed
