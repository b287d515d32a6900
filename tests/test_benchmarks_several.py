"""`python -m benchmarks several-labels`: the two digits of a pair as two labels out of twenty."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("sklearn")
from benchmarks import report
from benchmarks.__main__ import app
from benchmarks.common import data
from benchmarks.common.methods import BinaryCrossEntropy
from benchmarks.common.several import multi_hot, several_scores


def test_each_digit_of_a_pair_is_a_label() -> None:
    pairs = data.load("mnist-pairs")
    hot = multi_hot(pairs, torch.tensor([0, 7, 42]))
    assert [row.nonzero().flatten().tolist() for row in hot] == [[0, 10], [0, 17], [4, 12]]


def test_scores_of_features_that_say_all_and_that_say_nothing() -> None:
    labels = torch.arange(100).repeat(6)
    hot = multi_hot(data.load("mnist-pairs"), labels)
    told = several_scores(hot, hot, hot[:200], hot[:200])
    assert told["linear"] == told["all labels"] == told["average precision"] == 1.0
    noise = torch.randn(600, 3, generator=torch.Generator().manual_seed(0))
    blind = several_scores(noise, hot, noise[:200], hot[:200])
    assert blind["linear"] == pytest.approx(0.9, abs=0.01)
    assert blind["all labels"] == pytest.approx(0.0, abs=0.05)
    broken = several_scores(noise, hot, noise[:200] * math.nan, hot[:200])
    assert set(broken.values()) == {None}


def test_binary_cross_entropy_has_the_values_of_its_equation() -> None:
    objective = BinaryCrossEntropy(5, 4).double()
    features = torch.randn(6, 5, dtype=torch.float64)
    soft = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 1, 0]], dtype=torch.float64).repeat(3, 1)
    terms = [
        -math.log(p if share else 1 - p)
        for row, own in zip(
            objective.classifier(features).sigmoid().tolist(), soft.tolist(), strict=True
        )
        for p, share in zip(row, own, strict=True)
    ]
    step = objective(features, soft)
    assert float(step.loss.detach()) == pytest.approx(sum(terms) / len(terms), rel=1e-12)
    assert not step.collapsed
    with torch.no_grad():
        objective.classifier.weight.zero_()
        objective.classifier.bias.fill_(math.log(0.375 / 0.625))  # the share of labels that are on
    assert objective(features, soft).collapsed


def test_the_command(tmp_path: Path) -> None:
    command = ["several-labels", "--methods", "binary cross-entropy,VarCon", "--batch-size", "256",
               "--learning-rates", "0.2", "--epochs", "1", "--seeds", "1", "--workers", "2",
               "--out", str(tmp_path)]  # fmt: skip
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 0, outcome.output
    assert "has 90 % of them right" in " ".join(outcome.output.split())
    path = tmp_path / "several-labels-mnist-pairs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["method"] for row in rows} == {"binary cross-entropy", "VarCon"}
    (tmp_path / "results").mkdir()
    shutil.copy(path, tmp_path / "results")
    page = report.write(tmp_path / "results").read_text()
    assert re.search(r"\| VarCon \| \d+\.\d \([+-]", page)
    assert all(row["linear"] > 0.92 for row in rows)  # told apart from saying no to all
    assert CliRunner().invoke(app, command).exit_code == 0
    assert len(path.read_text().splitlines()) == 2  # nothing was run again
