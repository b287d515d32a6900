"""The authors' recipe: its settings one by one, and the whole of it on tiny files."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("sklearn")
from benchmarks import paper
from benchmarks.__main__ import app
from benchmarks.common.data import cifar_arrays
from benchmarks.common.encoders import CifarResNet50
from benchmarks.common.ranks import run_ranks
from benchmarks.paper import AUTHORS, reproduce
from tests.cifar_files import write_cifar

TINY = replace(
    AUTHORS, encoder="small-cnn", hidden_dim=32, epochs=2, batch_size=8, probe_epochs=2,
    probe_batch_size=8, learning_rate=0.1,
)  # fmt: skip

# Read from main_varcon.py, main_linear.py and README.md of github.com/ziwenwang28/VarContrast.
THEIRS = {
    "head": "mlp", "hidden_dim": 2048, "dim": 128, "temperature": 0.1, "epsilon": 0.02, "views": 2,
    "crop_scale": [0.2, 1.0], "jitter": [0.4, 0.4, 0.4, 0.1], "jitter_probability": 0.8,
    "greyscale_probability": 0.2, "epochs": 200, "batch_size": 8 * 128, "learning_rate": 0.5,
    "warmup_epochs": 10, "warmup_from": 0.01, "floor": 0.001, "momentum": 0.9, "nesterov": False,
    "weight_decay": 1e-4, "mixed_precision": True, "synchronised_batch_norm": False,
    "loss_scale": 0.125, "probe_epochs": 100, "probe_batch_size": 8 * 128,
    "probe_learning_rate": 5.0, "probe_decay_epochs": [60, 75, 90], "probe_decay": 0.2,
    "probe_momentum": 0.9, "probe_weight_decay": 0.0, "encoder": "resnet50 for 32 x 32",
}  # fmt: skip


def shown(*flags: str) -> dict:
    return json.loads(CliRunner().invoke(app, ["paper", "--show", *flags]).output)


def test_the_settings_are_the_authors_and_what_we_would_change_is_a_flag() -> None:
    theirs = shown()
    assert set(theirs) == set(asdict(AUTHORS)) == set(THEIRS)
    for setting, value in THEIRS.items():
        assert theirs[setting] == pytest.approx(value), setting
    changed = shown("--true-gradient", "--head", "mlp-bn", "--sync-batch-norm")
    assert (changed["loss_scale"], changed["head"]) == (1.0, "mlp-bn")
    assert changed["synchronised_batch_norm"]


def test_the_learning_rate_warms_up_then_falls_to_a_thousandth() -> None:
    assert AUTHORS.rate(1, 0, 48) == 0.01
    after = AUTHORS.rate(11, 0, 48)
    assert after == pytest.approx(0.0005 + 0.4995 * (1 + math.cos(math.pi * 11 / 200)) / 2)
    assert AUTHORS.rate(10, 48, 48) == pytest.approx(AUTHORS.rate(11, 0, 48), rel=0.01)
    assert AUTHORS.rate(200, 7, 48) == pytest.approx(0.0005)
    assert [AUTHORS.probe_rate(e) for e in (60, 61, 76, 91)] == pytest.approx([5, 1, 0.2, 0.04])


def _tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple:
    write_cifar("cifar100", 100, tmp_path, monkeypatch)
    return tuple(
        (images[labels < 3], labels[labels < 3])
        for images, labels in cifar_arrays("cifar100", tmp_path)
    )


def test_a_run_that_was_cut_off_ends_as_it_would_have(tmp_path, monkeypatch) -> None:
    train, test = _tiny(tmp_path, monkeypatch)
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    row = reproduce(train, test, TINY, seed=0, device="cpu", out=whole)
    assert row["loss_scale"] == 1 / 8
    assert 0 <= row["top1"] <= row["best_top1"] <= 1
    assert CifarResNet50()(torch.zeros(2, 3, 32, 32)).shape == (2, 2048)

    keep = paper._keep

    def stop_after_the_first(*arguments) -> None:
        keep(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(paper, "_keep", stop_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        reproduce(train, test, TINY, seed=0, device="cpu", out=parted)
    monkeypatch.setattr(paper, "_keep", keep)
    reproduce(train, test, TINY, seed=0, device="cpu", out=parted)
    states = [torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole, parted)]
    torch.testing.assert_close(states[0]["model"], states[1]["model"], rtol=0, atol=0)
    with pytest.raises(ValueError, match="another recipe or seed"):
        reproduce(train, test, TINY, seed=1, device="cpu", out=parted)


def _one_epoch(rank: int, world_size: int, train: tuple, out: Path) -> dict:
    recipe = replace(TINY, epochs=1)
    model = paper._trained(train, recipe, seed=0, device="cpu", path=out / "checkpoint.pt")
    return dict(model.named_parameters())


def test_several_processes_hold_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = _tiny(tmp_path, monkeypatch)
    first, second = run_ranks(_one_epoch, 2, tmp_path, train, tmp_path / "out")
    torch.testing.assert_close(first, second)
