"""`python -m benchmarks quality`: methods, read-outs, statistics, and going on after a stop."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("sklearn")
from benchmarks import quality
from benchmarks.__main__ import app
from benchmarks.common import cells, data, paired
from benchmarks.common.methods import METHODS, Step, make_objective
from benchmarks.common.readouts import class_mean_predictions
from benchmarks.common.supcon import sincere_loss
from benchmarks.common.training import Recipe, train


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_digits_in_a_few_epochs(method: str) -> None:
    digits = data.load("digits")
    run = train(digits, method, Recipe(epochs=3, batch_size=128, learning_rate=0.2), seed=0)
    scores = cells.read_out(run, digits, digits.validation, digits.train.labels, "cpu")
    assert not run.collapsed
    assert (scores["linear"] or 0.0) > 0.8


def _loop(x: torch.Tensor, y: torch.Tensor, temperature: float) -> list[list[float]]:
    """``z_i z_j / temperature`` in plain Python."""
    rows = x.tolist()
    unit = [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in rows]
    return [[sum(a * b for a, b in zip(u, v, strict=True)) / temperature for v in unit]
            for u in unit]  # fmt: skip


def test_sincere_has_the_values_of_its_equation() -> None:
    x, y = torch.randn(12, 5, dtype=torch.float64), torch.arange(12) % 4
    y[0] = 9  # an anchor without a positive
    scores, labels = _loop(x, y, 0.3), y.tolist()
    anchors = []
    for i, label in enumerate(labels):
        positives = [j for j, other in enumerate(labels) if other == label and j != i]
        others = sum(math.exp(scores[i][j]) for j, other in enumerate(labels) if other != label)
        terms = [-math.log(math.exp(scores[i][j]) / (math.exp(scores[i][j]) + others))
                 for j in positives]  # fmt: skip
        anchors += [sum(terms) / len(terms)] if terms else []
    want = sum(anchors) / len(anchors)
    assert float(sincere_loss(x, y, 0.3)) == pytest.approx(want, rel=1e-12)


def test_nearest_class_mean_by_hand() -> None:
    train = torch.tensor([[1.0, 0.0], [9.0, 1.0], [0.0, 2.0]])  # lengths do not count
    test = torch.tensor([[5.0, 1.0], [1.0, 3.0]])
    assert class_mean_predictions(train, torch.tensor([0, 0, 1]), test).tolist() == [0, 1]


def test_collapse_is_noticed() -> None:
    for method in ("SupCon", "VarCon", "SINCERE"):
        objective = make_objective(method, 8, 5, dim=4, head="linear")
        assert objective(torch.ones(40, 8), torch.arange(40) % 5).collapsed
        assert not objective(torch.randn(40, 8), torch.arange(40) % 5).collapsed

    # Samples that take no part hide none.
    objective = make_objective("VarCon leave-one-out", 8, 20, dim=4, head="linear")
    labels = torch.tensor([0, 0, 1, 1, *range(2, 18)])  # sixteen of twenty are alone
    step = objective(torch.ones(20, 8), labels)
    assert step.collapsed
    assert step.log["kl"] + step.log["nll"] == pytest.approx(step.log["loss"], rel=1e-5)
    assert step.tau2.shape == (4,)
    step = objective(torch.ones(20, 8), torch.arange(20))
    assert step == Step(step.loss, {"loss": 0.0}, collapsed=False)


def test_what_cannot_be_mixed_is_run_without(tmp_path: Path) -> None:
    arguments = ["quality", "--data", "digits", "--methods", "SupCon,VarCon", "--mixup", "0.2",
                 "--learning-rates", "0.2", "--batch-sizes", "256", "--epochs", "1", "--seeds",
                 "1", "--workers", "1", "--out", str(tmp_path)]  # fmt: skip
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert "VarCon, mixup 0.2" in outcome.output
    rows = [json.loads(line) for line in (tmp_path / "digits.jsonl").read_text().splitlines()]
    assert {row["method"]: row["mixup"] for row in rows} == {"SupCon": None, "VarCon": 0.2}
    assert (tmp_path / "quality-digits.png").exists()
    with pytest.raises(ValueError, match=r"mixup needs one of .*, got 'SupCon'"):
        train(data.load("digits"), "SupCon", Recipe(epochs=1, mixup=0.2), seed=0)


class TestQuality:
    def test_a_sweep_resumes_and_reports_pairs(self, tmp_path: Path) -> None:
        path = tmp_path / "digits.jsonl"
        methods = ["SupCon", "VarCon"]
        grid = {"batch_sizes": [256], "learning_rates": [0.1, 0.2], "seeds": 2, "epochs": 1}
        rows = quality.sweep("digits", methods, **grid, store=cells.Store(path))
        lines = path.read_text().splitlines()
        assert len(rows) == 4
        assert len(lines) == 8
        path.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40])  # cut short by a crash
        again = quality.sweep("digits", methods, **grid, store=cells.Store(path))
        for a, b in zip(rows, again, strict=True):
            assert a["linear"] == b["linear"]  # the same seed gives the same run
        assert len(path.read_text().splitlines()) == 9
        assert rows[0]["environment"]["versions"]["torch"] in torch.__version__
        quality.save(again, tmp_path / "digits.csv")
        saved = pd.read_csv(tmp_path / "digits.csv").set_index(["readout", "method"])
        console = Console(record=True, width=120)
        quality.show(again, console)
        for value in ("linear", "knn"):
            mean = saved.loc[(value, "VarCon"), "mean"]
            ours = [r[value] for r in again if r["method"] == "VarCon"]
            assert mean == pytest.approx(sum(ours) / 2)
            assert f"{100 * mean:.1f} ±" in console.export_text(clear=False)
        table = paired.summary(again, "linear").set_index("method")
        assert math.isnan(table.loc["SupCon", "gain"])
        expected = table.loc["VarCon", "mean"] - table.loc["SupCon", "mean"]
        assert table.loc["VarCon", "gain"] == pytest.approx(expected)

    def test_collapsed_runs_are_counted_and_not_averaged(self) -> None:
        base = {"data": "d", "noise": 0.0, "batch_size": 8, "split": "test", "learning_rate": 0.1}
        rows = [
            base | {"method": m, "seed": s, "linear": v, "collapsed": c}
            for m, s, v, c in [
                ("SupCon", 0, 0.8, False), ("SupCon", 1, 0.9, False), ("SupCon", 2, 0.1, True),
                ("VarCon", 0, 0.9, False), ("VarCon", 1, 1.0, False), ("VarCon", 2, 0.9, False),
            ]
        ]  # fmt: skip
        table = paired.summary(rows, "linear").set_index("method")
        assert table.loc["SupCon", "collapsed"] == 1
        assert table.loc["SupCon", "mean"] == pytest.approx(0.85)
        assert table.loc["VarCon", "gain"] == pytest.approx(0.1)

    def test_interval(self) -> None:
        mean, half = paired.interval([1.0, 2.0, 3.0])
        assert mean == 2
        assert half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
        json.dumps(half)
