"""The other questions of the benchmark harness, and what its user sees."""

import multiprocessing
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner, Result

pytest.importorskip("sklearn")
from benchmarks import quickstart
from benchmarks.__main__ import QUESTIONS, app
from benchmarks.common import data
from benchmarks.common.training import Recipe


def test_bytes_sent_follow_the_model(tmp_path: Path) -> None:
    from benchmarks import distributed

    rows = distributed.measure(2, 64, 500, 32, 3, tmp_path)
    for row in rows:
        # Packets have headers, and a barrier is among what is counted.
        assert row["bytes_per_rank"] == pytest.approx(row["bytes_by_model"], rel=0.15, abs=3000)
    expected = pd.DataFrame(distributed.extrapolate())
    assert set(expected["ranks"]) == {8, 64, 256, 1024}


def test_evolution_follows_both_methods(tmp_path: Path) -> None:
    from benchmarks.evolution import METHODS, follow

    recipe = Recipe(epochs=2, batch_size=256)
    rows, picture = follow(data.load("digits"), recipe, 0, [1, 2], tmp_path)
    assert [(row["method"], row["epoch"]) for row in rows] == [*product(METHODS, (1, 2))]
    assert all(row["knn"] > 0.5 for row in rows)
    assert picture == tmp_path / "evolution-digits.png"
    assert picture.stat().st_size > 10_000


def ask(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_the_list_of_commands_needs_no_heavy_import() -> None:
    code = (
        "import sys; from benchmarks.__main__ import app; app(['--help'], standalone_mode=False); "
        "print({'torch', 'sklearn', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in QUESTIONS)
    assert done.stdout.rstrip().endswith("set()")


@pytest.mark.parametrize(
    ("package", "question"), [("typer", "--help"), ("pandas", "report"), ("matplotlib", "report")]
)
def test_a_missing_package_is_one_line(package: str, question: str) -> None:
    code = f"""
import runpy, sys
sys.modules[{package!r}] = None
sys.argv = ["benchmarks", {question!r}]
runpy.run_module("benchmarks", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    needs = f"python -m benchmarks needs {package}: pip install '.[bench]', in the checkout"
    assert done.stderr.splitlines() == [needs]


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_command_explains_itself(question: str) -> None:
    outcome = ask(question, "--help")
    assert outcome.exit_code == 0
    assert f"python -m benchmarks {question}" in outcome.output


def test_a_missing_gpu_is_a_clear_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    outcome = ask("speed", "--device", "cuda")
    assert outcome.exit_code == 2
    assert "CUDA device" in outcome.output
    proof = [sys.executable, "-m", "benchmarks.gpu_proof"]
    done = subprocess.run(proof, capture_output=True, text=True)
    assert done.returncode == 1
    assert "CUDA device" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quality", "--methods", "SupCon,Varcn"], "got 'Varcn'"),
        (["quality", "--data", "minst5k"], "got 'minst5k'"),
        (["quality", "--batch-sizes", "16;64"], "expected integers separated by commas"),
        (["quality", "--data", "cifar10"], "cifar10 needs --root"),
        (["evolution", "--data", "minst5k"], "got 'minst5k'"),
        (["evolution", "--snapshots", "99"], "snapshots must lie in"),
        (["speed", "--contenders", "lean,leen"], "no contender's name contains 'leen'"),
        (["speed", "--labels", "cutmix"], "labels must be one of integer, mixup, smooth"),
        (["speed", "--dtypes", "float31"], "dtypes must be among"),
        (["paper", "--device", "cpu", "--root", "nowhere"], "no complete cifar100 in nowhere"),
        (["settings", "temprature"], "got 'temprature'"),
        (["several-labels", "--methods", "SupCon"], "must be among binary cross-entropy, VarCon"),
        (["several-labels", "--data", "digits"], "need images in pairs, got 'digits'"),
    ],
)
def test_a_slip_is_answered_before_any_process_starts(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("spawn", "forkserver"):
        monkeypatch.setattr(multiprocessing.get_context(kind).Process, "start", None)
    outcome = ask(*arguments)
    assert outcome.exit_code == 2
    assert message in " ".join(re.sub("[│╭╰─╮╯]", " ", outcome.output).split())
    assert "Traceback" not in outcome.output


def paths_written(output: str) -> list[Path]:
    return [Path(line.removeprefix("written: ")) for line in output.splitlines()
            if line.startswith("written: ")]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "files"),
    [
        (["memory-cost", "--rows", "64", "--classes", "10", "--dim", "8"], 2),
        (["distributed", "--ranks", "2", "--rows", "16", "--classes", "10", "--steps", "1"], 5),
        (["evolution", "--data", "digits", "--epochs", "1", "--snapshots", "1"], 3),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_tables_have_units_and_every_file_is_named(arguments, files: int, tmp_path: Path) -> None:
    outcome = ask(*arguments, "--out", str(tmp_path))
    assert outcome.exit_code == 0, outcome.output
    assert re.search(r"ms|MB|%", outcome.output)
    assert "nan" not in outcome.output.lower()
    assert "{" not in outcome.output
    written = paths_written(outcome.output)
    assert len(written) == files
    assert all(path.exists() for path in written)


class TestQuickstart:
    def test_what_a_newcomer_sees(self, tmp_path: Path) -> None:
        outcome = ask("quickstart", "--epochs", "1", "--out", str(tmp_path))
        assert outcome.exit_code == 0, outcome.output
        for method in quickstart.METHODS:
            assert re.search(rf"{method} .*\d\d?\.\d", outcome.output)
        assert "a memory of centroids" in outcome.output
        assert "Best here: " in outcome.output
        (picture,) = paths_written(outcome.output)
        assert picture.stat().st_size > 50_000
