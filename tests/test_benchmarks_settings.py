"""`settings`, `robustness` and `hierarchy`: further questions about the features, in small."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

pytest.importorskip("sklearn")
from benchmarks import report
from benchmarks.__main__ import app
from benchmarks.common import data, probes
from benchmarks.common.data import ImageData, Split
from tests import shown

SMALL = ["--data", "digits", "--methods", "SupCon,VarCon", "--learning-rates", "0.2", "--epochs",
         "1", "--workers", "1"]  # fmt: skip


def ask(*arguments: str) -> Result:
    outcome = CliRunner().invoke(app, list(arguments))
    assert "Traceback" not in outcome.output
    return outcome


def reported(files: list[Path], tmp_path: Path) -> str:
    """What the report says of result files."""
    folder = tmp_path / "results"
    folder.mkdir()
    for file in files:
        shutil.copy(file, folder)
    text = report.write(folder).read_text()
    for words in shown.inline(text):
        shown.check_benchmarks(words)
    return text


def test_accuracy_over_a_setting(tmp_path: Path) -> None:
    command = ["settings", "temperature", "--values", "0.1,0.3", "--batch-sizes", "256",
               "--seeds", "2", "--out", str(tmp_path), *SMALL]  # fmt: skip
    outcome = ask(*command)
    assert outcome.exit_code == 0, outcome.output
    assert "temperature 0.3" in outcome.output
    path = tmp_path / "temperature-digits.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 2 * 2 * 2  # values, methods, seeds
    losses = {row["temperature"]: row["history"][0]["loss"] for row in rows
              if row["method"] == "VarCon" and row["seed"] == 0}  # fmt: skip
    assert losses[0.1] != losses[0.3]
    assert (tmp_path / "temperature-digits.png").exists()
    assert ask(*command).exit_code == 0
    assert len(path.read_text().splitlines()) == len(rows)  # nothing was run again
    page = reported([path], tmp_path)
    assert "## Which temperature? digits" in page
    assert "| method | temperature 0.1 | temperature 0.3 |" in page


class TestCorruption:
    digits = data.load("digits")

    @pytest.mark.parametrize("name", probes.CORRUPTIONS)
    def test_each_severity_changes_more(self, name: str) -> None:
        clean = self.digits.test.images
        changes = []
        for severity in probes.SEVERITIES:
            images = probes.corrupted(self.digits, name, severity).images
            torch.testing.assert_close(
                images, probes.corrupted(self.digits, name, severity).images, rtol=0, atol=0
            )
            assert images.shape == clean.shape
            assert images.min() >= self.digits.train.images.min() - 1e-4
            assert images.max() <= self.digits.train.images.max() + 1e-4
            changes.append(float((images - clean).square().mean()))
        assert changes == sorted(changes)
        assert changes[0] > 0


class TestFewShot:
    def test_what_few_images_tell(self) -> None:
        """All where classes are far apart; by chance where features say nothing."""
        labels = torch.arange(10).repeat(30)
        clear = torch.nn.functional.one_hot(labels, 10)[:, None, None].float()
        noise = torch.randn(300, 1, 1, 10, generator=torch.Generator().manual_seed(0))
        for images, low, high in ((clear, 1.0, 1.0), (noise, 0.02, 0.2)):
            split = Split(images, labels)
            known = ImageData("digits", split, split, split, 10)
            scores = probes.few_shot_scores(nn.Flatten(), known, "cpu")
            assert scores == probes.few_shot_scores(nn.Flatten(), known, "cpu")
            names = ("linear on 1", "linear on 5", "class mean on 1", "class mean on 5")
            assert list(scores) == [f"{name} a class" for name in names]
            assert low - 1e-9 <= scores["linear on 1 a class"] <= high + 1e-9
            assert low - 1e-9 <= scores["class mean on 1 a class"] <= high + 1e-9


class TestHierarchy:
    def test_known_groups_are_found(self) -> None:
        """Pairs whose left digit decides where a class lies, and whose right digit hardly does."""
        labels = torch.arange(100).repeat(3)
        images = torch.zeros(300, 1, 1, 12)
        images[torch.arange(300), 0, 0, labels // 10] = 1.0
        images[..., 10] = (labels % 10)[:, None, None] * 0.01
        split = Split(images, labels)
        pairs = ImageData("mnist-pairs", split, split, split, 100)
        scores = probes.hierarchy_scores(nn.Flatten(), pairs, "cpu")
        assert scores["groups found"] == pytest.approx(1.0)
        assert scores["cophenetic"] > 0.99
        assert np.array(scores["tree"]).shape == (99, 4)


@pytest.mark.parametrize(
    ("command", "output", "title", "row"),
    [
        ("robustness corruption", "occlusion, mean", "Do features survive corrupted images?",
         r"\| noise, 5 \| \d+\.\d \| \d+\.\d \("),
        ("robustness few-shot", "5 a class", "Do features serve few labels?",
         r"\| class mean on 5 a class \| \d+\.\d \| \d+\.\d \("),
        ("hierarchy", "cophenetic correlation", "Do similar classes lie near one another?",
         r"\| VarCon \| \d+\.\d \("),
    ],
)  # fmt: skip
def test_a_question_is_answered_and_reported(
    command: str, output: str, title: str, row: str, tmp_path: Path
) -> None:
    given = ("--batch-size", "256", "--seeds", "1", "--out", str(tmp_path), *SMALL)
    outcome = ask(*command.split(), *given)
    assert outcome.exit_code == 0, outcome.output
    assert output in outcome.output
    assert "nan" not in outcome.output
    name = f"{command.split()[-1]}-digits"
    assert command.endswith("few-shot") or (tmp_path / f"{name}.png").stat().st_size > 10_000
    page = reported([tmp_path / f"{name}.jsonl"], tmp_path)
    assert f"## {title} digits" in page
    assert re.search(row, page)


def test_momentum_stops_by_its_budget_and_goes_on(tmp_path: Path) -> None:
    command = ["momentum", "--momenta", "0.5,0.9", "--batch-sizes", "128", "--classes", "20",
               "--seeds", "1", "--epochs", "1", "--workers", "1",
               "--out", str(tmp_path)]  # fmt: skip
    stopped = ask(*command, "--budget", "0.00001")
    assert stopped.exit_code == 1
    path = tmp_path / "momentum.jsonl"
    assert len(path.read_text().splitlines()) == 1
    outcome = ask(*command)
    assert outcome.exit_code == 0, outcome.output
    assert {json.loads(line)["momentum"] for line in path.read_text().splitlines()} == {0.5, 0.9}
    assert "momentum 0.9" in outcome.output
    assert "## Which momentum of the centroid memory?" in reported([path], tmp_path)
