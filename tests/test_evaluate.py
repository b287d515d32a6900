"""``python -m benchmarks evaluate``: what it reads, holds out, scores and reports."""

import io
import json
import shutil
import tarfile
from typing import Any

import pandas as pd
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("resvg_py")
from typer.testing import CliRunner

from benchmarks.__main__ import question
from benchmarks.common import scores, tasks
from benchmarks.common.icons import class_of, load_icons
from benchmarks.report.evidence import Line, table, values

NAMES = ("anchor", "bell", "cat", "door", "egg", "fish", "gear", "heart")
SHAPES = "M2 2h12v4z", "M2 8l6-6 6 6z", "M4 4h8v8h-8z", "M8 1v14h2V1z"


def body(name: str, designer: int) -> str:
    """A drawing that depends on what it shows and, a little, on who drew it."""
    k = NAMES.index(name)
    parts = [SHAPES[(k >> bit) % 4] for bit in (0, 1)]
    bend = f"rotate({53 * designer} 8 8) scale({1 - 0.01 * designer})"
    return f'<path transform="{bend}" d="{"".join(parts)}M{k} 9h3v3z"/>'


def a_set(prefix: str, designer: int, **info: object) -> dict[str, Any]:
    style = ("", "-outline", "-fill-24")[designer % 3]
    known = {"name": prefix, "author": {"name": prefix}, "license": {"spdx": "MIT"}}
    icons = {name + style: {"body": body(name, designer)} for name in NAMES}
    return {"prefix": prefix, "info": known | info, "icons": icons, "width": 16, "height": 16}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """As npm packs it: 34 sets that may be read, one under another licence, one of logos."""
    sets = [a_set(f"set{i:02}", i) for i in range(34)]
    sets[1]["info"]["author"] = sets[0]["info"]["author"]
    sets[3]["icons"] = {f"{name}-o": {"body": body(name, 2)} for name in NAMES}  # copies set02
    sets.append(a_set("not-free", 40, license={"spdx": "GPL-3.0"}))
    sets.append(a_set("brands", 41, category="Logos"))
    path = tmp_path_factory.mktemp("npm") / "iconify-json-1.0.0.tgz"
    with tarfile.open(path, "w:gz") as file:
        for content in sets:
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/json/{content['prefix']}.json")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def icons(package, tmp_path_factory):
    return load_icons(package, tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("home", "home"),
        ("home-outline-24", "home"),
        ("baseline-home", "home"),
        ("arrow-left-bold-duotone", "arrow-left"),
        ("fill", "fill"),
        ("round", "round"),
        ("line-chart", "line-chart"),
    ],
)
def test_a_class_is_a_name_without_its_style(name, shown):
    assert class_of(name) == shown


def test_what_is_read_of_the_package(icons):
    assert icons.classes == list(NAMES)
    assert icons.images.shape == (34 * 8, 3, 64, 64)
    assert icons.images.dtype == torch.uint8
    assert set(icons.licences["licence"]) == {"MIT"}
    assert len(icons.licences) == 34
    families = icons.licences.set_index("prefix")["family"]
    assert families["set00"] == families["set01"]  # one author
    assert families["set02"] == families["set03"]  # copies
    assert families.nunique() == 32


def test_what_was_rendered_of_one_package_is_not_taken_for_another(package, tmp_path):
    newer = tmp_path / "iconify-json-2.0.0.tgz"
    shutil.copy(package, newer)
    cache = tmp_path / "cache"
    assert [load_icons(p, cache).package for p in (package, newer)] == [package.stem, newer.stem]
    newer.unlink()
    assert load_icons(None, cache).package == newer.stem  # rendered before


def test_held_out_styles_and_classes_were_never_trained(package, icons, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "load_icons", lambda *_, **__: icons)
    task = tasks.make_task("icons", cache=tmp_path)
    pictures = {
        key: {image.numpy().tobytes() for image in part.inputs}
        for key, part in [("train", task.train), *task.held_out.items()]
    }
    unlike = {image.numpy().tobytes() for image in icons.images}
    assert len(unlike) > 250  # but for what is copied on purpose
    known = set(task.train.labels.tolist())
    assert known == set(range(task.num_classes)) == set(range(4))
    for (protocol, split), part in task.held_out.items():
        assert not pictures["train"] & pictures[protocol, split]
        assert (set(part.labels.tolist()) <= known) == (protocol == "styles")
    assert not pictures["styles", "validation"] & pictures["styles", "test"]


def test_long_tails_keep_every_class(icons, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "load_icons", lambda *_, **__: icons)
    task = tasks.make_task("icons", cache=tmp_path)
    counts = tasks.long_tailed(task, 10.0).train.labels.bincount().tolist()
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == pytest.approx(10 * counts[-1], rel=0.3)
    assert tasks.long_tailed(task, 1e4).train.labels.bincount().min() == 1


def ask(*arguments: str):
    return CliRunner().invoke(question("evaluate"), list(arguments), catch_exceptions=False)


def test_missing_icons_say_what_to_type(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = ask()
    assert result.exit_code == 2
    assert "npm pack @iconify/json" in result.output
    assert "--fetch" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "VarCan"], "VarCon"),
        (["--regime", "thawed"], "frozen"),
        (["--data", "digits"], "--regime whole"),
        (["--data", "digits", "--regime", "whole", "--question", "styles"], "images"),
    ],
)
def test_what_is_unknown_is_named_beside_what_there_is(arguments, words):
    result = ask(*arguments)
    assert result.exit_code == 2
    assert words in result.output


def test_a_command_trains_chooses_scores_and_goes_on(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--icons", str(package), "--methods", "SupCon,VarCon memory,cross-entropy + VarCon",
        "--question", "styles,classes,confidence,tail", "--imbalance", "10", "--epochs", "2",
        "--batch-sizes", "32", "--learning-rates", "1e-3,1e-2", "--temperatures", "0.1",
        "--weights", "1", "--seeds", "2", "--out", str(tmp_path),
    ]  # fmt: skip
    result = ask(*arguments)
    assert result.exit_code == 0, result.output
    stored = (tmp_path / "icons.jsonl").read_text()
    rows = pd.DataFrame(json.loads(line) for line in stored.splitlines())
    test = rows[rows["split"] == "test"]
    assert set(test.groupby(["protocol", "method"])["seed"].nunique()) == {2}
    assert set(test["protocol"]) == {"styles", "classes", "confidence", "tail"}
    found = test[["recall_at_1", "map_at_r", "top1_probe", "ece", "auroc", "head", "tail"]]
    assert found.notna().any().all()
    assert found.min().min() >= 0
    assert found.max().max() <= 1
    for _, mine in rows.groupby(["method", "imbalance"]):
        tried = mine[mine["split"] == "validation"]
        by = (
            tried.groupby("learning_rate")[["top1_mean", "recall_at_1", "top1"]].mean().mean(axis=1)
        )
        assert set(mine[mine["split"] == "test"]["learning_rate"]) == {by.idxmax()}
    assert ask(*arguments).exit_code == 0
    assert (tmp_path / "icons.jsonl").read_text() == stored  # nothing is run twice


def test_settings_that_nothing_chose_are_asked_for(tmp_path):
    result = ask(
        "--data", "digits", "--regime", "whole", "--settings-of-batch", "64", "--out", str(tmp_path)
    )  # fmt: skip
    assert result.exit_code == 2
    assert "no validation run is stored of" in result.output


def test_a_run_that_diverges_scores_as_chance(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = ask(
        "--data", "digits", "--regime", "whole", "--methods", "cross-entropy,VarCon",
        "--seeds", "1", "--epochs", "2", "--learning-rates", "1e6,1e9", "--temperatures", "0.1",
        "--out", str(tmp_path),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "digits.jsonl").read_text().splitlines()]
    assert all(0 <= row["top1_mean"] < 0.5 for row in rows)


def test_chunks_and_the_whole_encoder_train_as_well(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = [
        "--icons", str(package), "--methods", "VarCon", "--batch-sizes", "32", "--seeds", "1",
        "--learning-rates", "1e-3", "--temperatures", "0.1", "--epochs", "1",
        "--out", str(tmp_path),
    ]  # fmt: skip
    assert ask(*common).exit_code == 0
    assert ask(*common, "--regime", "whole").exit_code == 0
    assert ask(*common, "--chunk-size", "8", "--settings-of-batch", "32").exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "icons.jsonl").read_text().splitlines()]
    assert {(row["regime"], row["chunk_size"]) for row in rows} == {
        ("frozen", None), ("whole", None), ("frozen", 8),
    }  # fmt: skip


def test_scores_of_cases_that_are_known():
    unit = torch.eye(4).repeat(3, 1)
    labels = torch.arange(4).repeat(3)
    assert scores.retrieval(unit, labels) == {"recall_at_1": 1.0, "map_at_r": 1.0}
    means = scores.class_means(unit, labels, 4)
    torch.testing.assert_close(means, torch.eye(4))
    few = scores.few_labels(unit, labels, unit, labels, 4)
    assert few == pytest.approx({"top1_5_shot": 1.0, "top1_1_shot": 1.0})
    third = scores.by_frequency(torch.tensor([0, 1, 0]), torch.tensor([0, 1, 2]), 3)
    assert third == pytest.approx({"top1": 2 / 3, "head": 1.0, "middle": 1.0, "tail": 0.0})


def test_confidence_is_calibrated_by_one_temperature():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    found = scores.confidence(5 * logits, labels, torch.zeros(100, 5), 5 * logits, labels)
    assert found["fitted_temperature"] == pytest.approx(5, rel=0.1)
    assert found["ece"] > 0.2 > 0.03 > found["ece_fitted"]
    assert found["auroc"] == 1.0
    assert found["fpr_at_95"] == 0.0


def test_bold_is_the_best_and_what_is_not_told_apart_from_it():
    of = {"SupCon": (0.5, 0.6, 0.55), "VarCon": (0.7, 0.8, 0.75), "NormFace": (0.69, 0.81, 0.74)}
    rows = pd.DataFrame(
        {
            "data": "icons", "split": "test", "protocol": "styles", "regime": "frozen",
            "imbalance": 0.0, "batch_size": 256, "epochs": 15, "method": method, "seed": seed,
            "top1_mean": value,
        }
        for method, seeds in of.items()
        for seed, value in enumerate(seeds)
    )  # fmt: skip
    cells = next(iter(table(rows, list(of))))
    assert ["**" in cell for cell in cells[1:]] == [False, True, True]
    line = Line("Unseen styles", "nearest mean", "styles", "top1_mean")
    assert values(rows, line, "SupCon").tolist() == [0.5, 0.6, 0.55]
