"""`python -m benchmarks speed` and what it measures with, on sizes that take seconds."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("sklearn")
from benchmarks import report
from benchmarks.__main__ import app
from benchmarks.common import measure, results
from benchmarks.common.contenders import BY_HAND, CONTENDERS, INTEGERS, LABELS, OURS, Problem
from benchmarks.common.supcon import supcon_loss
from benchmarks.common.transcriptions import (
    authors_operations,
    authors_operations_on_soft_labels,
    lean_log_space,
)  # fmt: skip
from varcon_loss import varcon_loss


def same_step(transcription, x: torch.Tensor, y: torch.Tensor) -> None:
    got, want = transcription(x, y), varcon_loss(x, y, impl="reference")
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    gradients = (torch.autograd.grad(loss, x)[0] for loss in (got, want))
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("num_classes", [1, 2, 9])
@pytest.mark.parametrize("transcription", [authors_operations, lean_log_space])
def test_the_yardsticks_compute_the_same_loss(transcription, num_classes: int) -> None:
    x = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    same_step(transcription, x, torch.arange(30) % num_classes)


@pytest.mark.parametrize("labels", ["mixup", "smooth", "one-hot", "a class absent"])
def test_the_yardstick_of_class_probabilities_computes_the_same_loss(labels: str) -> None:
    kind = labels if labels in LABELS else "integer"
    x, y = Problem(30, 9, 8, "float64", "cpu", kind).inputs()
    if kind == "integer":
        y = torch.nn.functional.one_hot(y % 7, 9 if labels == "a class absent" else 7).double()
    same_step(authors_operations_on_soft_labels, x, y)


def test_supcon_is_pytorch_metric_learnings() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    x, y = torch.randn(40, 8, dtype=torch.float64), torch.arange(40) % 6
    y[0] = 99  # an anchor without a positive
    expected = losses.SupConLoss(temperature=0.1)(x, y)
    # Its AvgNonZeroReducer also leaves out anchors without positives.
    torch.testing.assert_close(supcon_loss(x, y), expected)


PROBLEM = Problem(3000, 500, 8, "float32", "cpu")


def weighed(name: str, problem: Problem = PROBLEM, memory: int | None = None) -> dict:
    limits = {"timeout": 100, "memory_limit": memory}
    return measure.in_child(measure.check_and_weigh, name, problem, **limits)


def test_a_wrong_contender_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dataclasses.replace(
        CONTENDERS[OURS], make=lambda _: lambda x, y: 1.001 * varcon_loss(x, y)
    )
    monkeypatch.setitem(CONTENDERS, "wrong", wrong)
    with pytest.raises(ValueError, match="not timed"):
        measure.check_and_weigh("wrong", PROBLEM)


def test_memory_sees_what_a_loss_holds_and_running_out_of_it_is_a_result() -> None:
    rows = {name: weighed(name) for name in (OURS, BY_HAND, "SupCon (one matrix)")}
    assert all(row["status"] == "ok" and row["error"] < 1e-4 for row in rows.values())
    ours, by_hand, supcon = (row["peak_bytes"] for row in rows.values())
    assert supcon > 3000 * 3000 * 4
    assert by_hand > 2 * 3000 * 500 * 4
    assert ours < by_hand / 2
    big = dataclasses.replace(PROBLEM, num_rows=20_000)
    assert weighed("SupCon (one matrix)", big, 2**29)["status"] == "out of memory"


@pytest.mark.parametrize("name", ["varcon-loss, centroid memory", "SupCon, CrossBatchMemory"])
def test_what_remembers_is_weighed_with_a_full_memory(name: str) -> None:
    few, many = (weighed(name, Problem(64, k, 64, "float32", "cpu")) for k in (64, 20_000))
    assert few["status"] == many["status"] == "ok"
    assert many["peak_bytes"] > few["peak_bytes"] + 64 * 20_000 * 4


def test_results_come_back(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": None}, {"a": 2, "b": 0.5}]
    results.save("x", rows, results.environment(), tmp_path)
    frame, env = results.read("x", tmp_path)
    assert frame["a"].tolist() == [1, 2]
    assert {"date", "commit", "device", "versions"} <= set(env)


def test_a_sweep_goes_on_where_it_stopped_and_says_what_it_kept(tmp_path: Path) -> None:
    small = ["speed", "--classes", "5", "--dims", "8", "--contenders", "reference,eager",
             "--budget", "0.2", "--out", str(tmp_path), "--rows"]  # fmt: skip
    first = CliRunner().invoke(app, [*small, "64"])
    assert first.exit_code == 0, first.output
    assert re.search(r"\d \(1x\)", first.output)
    assert "the same as varcon-loss on a CPU" in " ".join(re.sub("[│┃]", " ", first.output).split())
    assert "kept" not in first.output
    frame, before = results.read("speed-cpu", tmp_path)
    assert all(frame["q1"].dropna() <= frame["q3"].dropna())
    again = CliRunner().invoke(app, [*small, "64,32"])
    assert "kept 1 of 2 sizes" in again.output
    both, env = results.read("speed-cpu", tmp_path)
    assert env["kept_from"]["date"] == before["date"]
    medians = [f[f["num_rows"] == 64]["median"].dropna().tolist() for f in (frame, both)]
    assert medians[0] == medians[1]
    assert set(both["num_rows"]) == {32, 64}
    anew = CliRunner().invoke(app, [*small, "64", "--no-resume"])
    assert "kept" not in anew.output


@pytest.mark.parametrize("labels", ["mixup", "smooth"])
def test_class_probabilities_are_held_against_integers(labels: str, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    small = ["speed", "--labels", labels, "--rows", "600", "--classes", "40", "--dims", "8",
             "--budget", "0.2", "--out", str(folder)]  # fmt: skip
    outcome = CliRunner().invoke(app, small)
    assert outcome.exit_code == 0, outcome.output
    frame, _ = results.read(f"speed-cpu-{labels}", folder)
    assert set(frame["contender"]) == {OURS, INTEGERS, BY_HAND}
    assert set(frame["status"]) == {"ok"}
    assert all(error < 1e-4 for error in frame["error"])
    text = report.write(folder).read_text()
    assert re.search(rf"{INTEGERS} \| [\d.]+ \([\d.]+x\); \d", text)
