"""`python -m benchmarks`: its help, its answers to slips, and the files that it leaves."""

import multiprocessing
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

pytest.importorskip("sklearn")
from benchmarks import distributed, quickstart
from benchmarks.__main__ import QUESTIONS, app


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
        ("speed --contenders lean,leen", "no contender's name contains 'leen'"),
        ("speed --labels cutmix", "labels must be among integer, mixup, smooth, got 'cutmix'"),
        ("speed --dtypes float31", "dtypes must be among"),
        ("speed --device gpu", "--device must be among cpu, cuda, got 'gpu'"),
        ("large-batch --sizes 16;64", "expected integers separated by commas"),
        ("paper --device cpu", "--root is needed"),
        ("paper --device cpu --root nowhere", "no complete cifar100 in nowhere"),
    ],
)
def test_a_slip_is_answered_before_any_process_starts(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("spawn", "forkserver"):
        monkeypatch.setattr(multiprocessing.get_context(kind).Process, "start", None)
    outcome = ask(*arguments.split())
    assert outcome.exit_code == 2
    assert message in " ".join(re.sub("[│╭╰─╮╯]", " ", outcome.output).split())
    assert "Traceback" not in outcome.output


def paths_written(output: str) -> list[Path]:
    return [Path(path) for path in re.findall("^written: (.*)$", output, re.M)]


def test_bytes_sent_follow_the_model(tmp_path: Path) -> None:
    for row in distributed.measure(2, 64, 500, 32, 3, tmp_path):
        # Packets have headers, and a barrier is among what is counted.
        assert row["bytes_per_rank"] == pytest.approx(row["bytes_by_model"], rel=0.15, abs=3000)
    small = ["--ranks", "2", "--rows", "16", "--classes", "10", "--steps", "1", "--out"]
    outcome = ask("distributed", *small, str(tmp_path))
    assert outcome.exit_code == 0, outcome.output
    assert re.search(r"all-reduce .* 2 .* 10 ", outcome.output)
    written = paths_written(outcome.output)
    assert [path.suffix for path in written] == [".json", ".csv", ".png"]
    assert all(path.exists() for path in written)


def test_what_a_newcomer_sees(tmp_path: Path) -> None:
    outcome = ask("quickstart", "--epochs", "1", "--out", str(tmp_path))
    assert outcome.exit_code == 0, outcome.output
    for method in quickstart.METHODS:
        assert re.search(rf"{method} .*\d\d?\.\d", outcome.output)
    assert "a memory of centroids" in outcome.output
    assert "Best here: " in outcome.output
    (picture,) = paths_written(outcome.output)
    assert picture.stat().st_size > 50_000
