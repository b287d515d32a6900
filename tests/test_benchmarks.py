"""The benchmark harness, on sizes that take seconds."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

pytest.importorskip("sklearn")
from benchmarks import data, measure, quality, results, speed
from benchmarks.contenders import CONTENDERS
from benchmarks.measure import Problem
from benchmarks.methods import METHODS, VARIANTS, make_objective
from benchmarks.supcon import supcon_loss
from benchmarks.training import Recipe, train
from benchmarks.transcriptions import authors_operations, lean_log_space
from varcon_loss import varcon_loss


@pytest.mark.parametrize("num_classes", [1, 2, 9])
@pytest.mark.parametrize("transcription", [authors_operations, lean_log_space])
def test_the_yardsticks_compute_the_same_loss(transcription, num_classes: int) -> None:
    x = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    y = torch.arange(30) % num_classes
    got, want = transcription(x, y), varcon_loss(x, y, impl="reference")
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad(got, x), torch.autograd.grad(want, x), rtol=1e-8, atol=1e-10
    )


def test_a_composition_around_a_fused_cross_entropy() -> None:
    """`nll_of` stands where cut-cross-entropy goes on a GPU."""

    def nll_of(z, w, slots):
        return torch.nn.functional.cross_entropy(z @ w.T, slots, reduction="none")

    x, y = torch.randn(30, 8, dtype=torch.float64), torch.arange(30) % 7
    torch.testing.assert_close(lean_log_space(x, y, nll_of=nll_of), lean_log_space(x, y))


def test_supcon_is_pytorch_metric_learnings() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    x, y = torch.randn(40, 8, dtype=torch.float64), torch.arange(40) % 6
    y[0] = 99  # an anchor without a positive
    expected = losses.SupConLoss(temperature=0.1)(x, y)
    # Its AvgNonZeroReducer also leaves out anchors without positives.
    torch.testing.assert_close(supcon_loss(x, y), expected)
    views = supcon_loss(x.view(20, 2, 8), y[:20])
    torch.testing.assert_close(views, supcon_loss(x, y[:20].repeat_interleave(2)))


class TestMeasure:
    problem = Problem(64, 5, 8, "float32", "cpu")

    def test_a_contender_is_checked_weighed_and_timed(self) -> None:
        row = measure.in_child(
            measure.check_and_weigh, "varcon-loss", self.problem, timeout=60, memory_limit=None
        )
        assert row["status"] == "ok"
        assert row["error"] < 1e-5
        timed = measure.in_child(
            measure.time_together,
            ["varcon-loss", "equations, lean"],
            self.problem,
            "forward+backward",
            0.1,
            4,
            timeout=60,
            memory_limit=None,
        )
        assert timed["status"] == "ok"
        for timing in timed["timings"].values():
            assert 0 < timing["q1"] <= timing["median"] <= timing["q3"]

    def test_a_wrong_contender_is_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        wrong = dataclasses.replace(
            CONTENDERS["varcon-loss"], make=lambda: lambda x, y: 1.001 * varcon_loss(x, y)
        )
        monkeypatch.setitem(CONTENDERS, "wrong", wrong)
        with pytest.raises(ValueError, match="not timed"):
            measure.check_and_weigh("wrong", self.problem)

    def test_running_out_of_memory_is_a_result(self) -> None:
        big = Problem(20_000, 5, 8, "float32", "cpu")
        row = measure.in_child(
            measure.check_and_weigh, "SupCon (one matrix)", big, timeout=100, memory_limit=2**29
        )
        assert row["status"] == "out of memory"

    def test_taking_too_long_is_a_result(self) -> None:
        row = measure.in_child(
            measure.time_together, ["varcon-loss"], self.problem, "forward", 1e9, 10**9,
            timeout=3, memory_limit=None,
        )  # fmt: skip
        assert row["status"] == "over 3 s"

    def test_memory_sees_what_a_loss_holds(self) -> None:
        problem = Problem(3000, 500, 8, "float32", "cpu")
        rows = {
            name: measure.in_child(
                measure.check_and_weigh, name, problem, timeout=100, memory_limit=None
            )
            for name in ("varcon-loss", "equations, authors' operations", "SupCon (one matrix)")
        }
        peaks = {name: row["peak_bytes"] for name, row in rows.items()}
        assert peaks["SupCon (one matrix)"] > 3000 * 3000 * 4
        assert peaks["equations, authors' operations"] > 2 * 3000 * 500 * 4
        assert peaks["varcon-loss"] < peaks["equations, authors' operations"] / 2


def test_growth_recovers_an_exponent() -> None:
    sizes = np.array([4096, 8192, 16384, 65536])
    frame = pd.DataFrame({"num_rows": sizes, "median": 3e-9 * sizes**1.7})
    assert speed.growth(frame, "median") == pytest.approx(1.7)
    assert speed.growth(frame.head(2), "median") is None


def test_results_come_back(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": None}, {"a": 2, "b": 0.5}]
    results.save("x", rows, results.environment(), tmp_path)
    frame, env = results.read("x", tmp_path)
    assert frame["a"].tolist() == [1, 2]
    assert {"date", "commit", "device", "versions"} <= set(env)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_digits_in_a_few_epochs(method: str) -> None:
    digits = data.load("digits")
    run = train(digits, method, Recipe(epochs=3, batch_size=128, learning_rate=0.2), seed=0)
    scores = quality._read_out(run, digits, digits.validation, digits.train.labels, "cpu")
    assert not run.collapsed
    assert scores["linear"] is not None
    assert scores["linear"] > 0.8


@pytest.mark.parametrize("method", VARIANTS)
def test_variants_differ_from_what_they_vary(method: str) -> None:
    base = METHODS[method.split()[0]]
    losses = []
    for make in (base, VARIANTS[method]):
        torch.manual_seed(0)
        objective = make(8, 5, dim=4, head="mlp-bn", temperature=0.1)
        losses.append(float(objective(torch.randn(40, 8), torch.arange(40) % 5).loss.detach()))
    assert losses[0] != losses[1]


def test_collapse_is_noticed() -> None:
    """SupCon and VarCon on embeddings that all coincide."""
    for method in ("SupCon", "VarCon"):
        objective = make_objective(method, 8, 5, dim=4, head="linear")
        step = objective(torch.ones(40, 8), torch.arange(40) % 5)
        assert step.collapsed
        assert not objective(torch.randn(40, 8), torch.arange(40) % 5).collapsed


class TestData:
    def test_pairs_share_no_digit_between_splits(self) -> None:
        pairs = data.load("mnist-pairs")
        assert pairs.num_classes == 100

        def halves(split: data.Split) -> set[bytes]:
            both = torch.cat(split.images.split(14, dim=3))
            return {image.numpy().tobytes() for image in both}

        assert not halves(pairs.train) & halves(pairs.test)
        assert not halves(pairs.train) & halves(pairs.validation)

    @pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
    def test_cifar_from_files_in_the_true_format(
        self, name: str, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _write_cifar(name, classes, tmp_path, monkeypatch)
        loaded = data.load(name, tmp_path)
        assert loaded.num_classes == classes
        assert loaded.train.images.shape[1:] == (3, 32, 32)
        assert loaded.flips

    def test_the_papers_recipe_runs_end_to_end(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from benchmarks.paper import reproduce

        _write_cifar("cifar100", 100, tmp_path, monkeypatch)
        tiny = quality._first_classes(data.load("cifar100", tmp_path), 3)
        row = reproduce(tiny, seed=0, device="cpu", epochs=1, batch_size=8, probe_epochs=2)
        assert row["loss_scale"] == 1 / 8
        assert 0 <= row["top1"] <= 1

    def test_image_folder(self, tmp_path: Path) -> None:
        from PIL import Image

        for part in ("train", "test"):
            for label in ("cat", "dog"):
                folder = tmp_path / part / label
                folder.mkdir(parents=True)
                for i in range(8):
                    pixels = np.random.default_rng(i).integers(0, 255, (40, 50, 3), np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i}.png")
        loaded = data.load("folder", tmp_path)
        assert loaded.num_classes == 2
        assert loaded.test.images.shape == (16, 3, 32, 32)

    def test_errors(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="data must be one of digits"):
            data.load("imagenet")
        with pytest.raises(ValueError, match="cifar10 needs --root"):
            data.load("cifar10")
        with pytest.raises(ValueError, match="folder needs --root with train/ and test/"):
            data.load("folder", tmp_path)


def _write_cifar(
    name: str, classes: int, root: Path, monkeypatch: pytest.MonkeyPatch, per_class: int = 8
) -> None:
    """Tiny archives as CIFAR's authors pack them: pickled rows of 3072 bytes."""
    import hashlib
    import pickle

    from torchvision import datasets

    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    key = "labels" if name == "cifar10" else "fine_labels"

    def write(file: str, content: dict) -> tuple[str, str]:
        raw = pickle.dumps(content)
        (folder / file).write_bytes(raw)
        return file, hashlib.md5(raw).hexdigest()

    def batch(seed: int) -> dict:
        rng = np.random.default_rng(seed)
        labels = list(range(classes)) * per_class
        pixels = rng.integers(0, 255, (len(labels), 3072), dtype=np.uint8)
        return {"data": pixels, key: labels}

    train_list = [write(f, batch(i)) for i, (f, _) in enumerate(kind.train_list)]
    test_list = [write(f, batch(99)) for f, _ in kind.test_list]
    names = {kind.meta["key"]: [str(i) for i in range(classes)]}
    meta_file, digest = write(kind.meta["filename"], names)
    monkeypatch.setattr(kind, "train_list", train_list)
    monkeypatch.setattr(kind, "test_list", test_list)
    monkeypatch.setattr(kind, "meta", kind.meta | {"filename": meta_file, "md5": digest})


class TestQuality:
    def test_a_sweep_resumes_and_reports_pairs(self, tmp_path: Path) -> None:
        path = tmp_path / "digits.jsonl"
        methods = ["SupCon", "VarCon"]
        cells = {"batch_sizes": [256], "learning_rates": [0.1, 0.2], "seeds": 2, "epochs": 2}
        rows = quality.sweep("digits", methods, **cells, store=quality.Store(path))
        lines = path.read_text().splitlines()
        assert len(rows) == 4
        assert len(lines) == 8
        path.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40])  # cut short by a crash
        again = quality.sweep("digits", methods, **cells, store=quality.Store(path))
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
            assert mean == pytest.approx(
                sum(r[value] for r in again if r["method"] == "VarCon") / 2
            )
            assert f"{100 * mean:.1f} ±" in console.export_text(clear=False)
        table = quality.summary(again, "linear").set_index("method")
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
        table = quality.summary(rows, "linear").set_index("method")
        assert table.loc["SupCon", "collapsed"] == 1
        assert table.loc["SupCon", "mean"] == pytest.approx(0.85)
        assert table.loc["VarCon", "gain"] == pytest.approx(0.1)

    def test_a_wider_grid_overtakes_what_was_reported_before(self) -> None:
        base = {"data": "d", "noise": 0.0, "batch_size": 8, "collapsed": False, "seed": 0}
        rows = [
            base | {"method": m, "split": split, "learning_rate": rate, "linear": v, "knn": v}
            for m, split, rate, v in [
                ("SupCon", "validation", 0.1, 0.8), ("SupCon", "test", 0.1, 0.7),
                ("VarCon", "validation", 0.1, 0.6), ("VarCon", "test", 0.1, 0.5),
                ("VarCon", "validation", 0.4, 0.7), ("VarCon", "test", 0.4, 0.8),
                ("VarCon tau1=0.5", "validation", 0.4, 0.9),
            ]
        ]  # fmt: skip
        table = quality.summary(rows, "linear").set_index("method")
        assert table.loc["VarCon", ["learning_rate", "mean"]].tolist() == [0.4, 0.8]
        assert quality.best_by_validation(rows, ["SupCon", "VarCon"]) == "SupCon"

    def test_interval(self) -> None:
        mean, half = quality.interval([1.0, 2.0, 3.0])
        assert mean == 2
        assert half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
        json.dumps(half)


def test_bytes_sent_follow_the_model(tmp_path: Path) -> None:
    from benchmarks import distributed

    rows = distributed.measure(2, 64, 500, 32, 3, tmp_path)
    for row in rows:
        # Packets have headers, and a barrier is among what is counted.
        assert row["bytes_per_rank"] == pytest.approx(row["bytes_by_model"], rel=0.15, abs=3000)
    expected = pd.DataFrame(distributed.extrapolate())
    assert set(expected["ranks"]) == {8, 64, 256, 1024}


def test_the_report_rebuilds_from_the_saved_results(tmp_path: Path) -> None:
    from benchmarks.report import write

    text = write(_copy_of_results(tmp_path)).read_text()
    assert text.startswith("# Results")
    assert "## What was found" in text


def _copy_of_results(tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(results.RESULTS, tmp_path / "results"))


def test_evolution_follows_both_methods(tmp_path: Path) -> None:
    from benchmarks.evolution import METHODS, follow

    recipe = Recipe(epochs=2, batch_size=256)
    rows = follow(data.load("digits"), recipe, 0, [1, 2], tmp_path)
    assert [(row["method"], row["epoch"]) for row in rows] == [
        (m, e) for m in METHODS for e in (1, 2)
    ]
    assert all(row["knn"] > 0.5 for row in rows)
    assert (tmp_path / "evolution-digits.png").stat().st_size > 10_000


def test_a_missing_gpu_is_a_clear_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    from typer.testing import CliRunner

    from benchmarks.__main__ import app

    for command in (["speed", "--device", "cuda"], ["gpu-proof"]):
        outcome = CliRunner().invoke(app, command)
        assert outcome.exit_code == 2
        assert "CUDA device" in outcome.output
