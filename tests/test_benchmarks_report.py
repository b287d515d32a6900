"""`python -m benchmarks report`: what RESULTS.md says, from the committed files and from others."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
from benchmarks import report
from benchmarks.common import paired, results
from benchmarks.report import gains, markdown, mixing, quality
from tests import shown


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed results, and the report made from them."""
    folder = tmp_path_factory.mktemp("report")
    return report.write(Path(shutil.copytree(results.RESULTS, folder / "results")))


def test_the_report_rebuilds_from_the_saved_results(rebuilt: Path) -> None:
    text = rebuilt.read_text()
    assert text.startswith("# Results")
    assert text.index("## When to choose VarCon") < text.index("## Which features are better?")
    assert "nan" not in re.findall(r"\w+", text)
    for picture in re.findall(r"\]\(results/(.+?)\)", text):
        assert (rebuilt.parent / "results" / picture).stat().st_size > 10_000
    titles = {_anchor(line) for line in text.splitlines() if line.startswith("#")}
    assert set(re.findall(r"\]\(#(.+?)\)", text)) <= titles
    for words in shown.inline(text):
        shown.check_benchmarks(words)


ENV = {"device": "d", "threads": 1, "versions": {"torch": "2"}, "date": "today", "commit": "c"}


def _anchor(title: str) -> str:
    kept = re.sub(r"[^\w\- ]", "", title.lstrip("# ").lower())
    return kept.replace(" ", "-")


def test_the_first_page_tells_few_shot_losses(rebuilt: Path) -> None:
    page = rebuilt.read_text().partition("## Which features")[0]
    assert re.search(r"linear probe on 5 images a class: \d+ ahead, [1-9]\d* behind", page)
    assert re.search(r"fashion-pairs at batch 1024, .*\+\d\.\d ± \d\.\d after 10 epochs", page)


def test_gains_are_judged_by_their_intervals() -> None:
    base = {"data": "digits", "noise": 0.0, "split": "test", "learning_rate": 0.1}
    rows = [
        base
        | {"method": method, "batch_size": size, "seed": seed, "collapsed": False}
        | dict.fromkeys(("linear", "knn"), 0.8 + gain * (method == "VarCon") + 0.001 * seed)
        for size, gain in ((8, -0.1), (64, 0.1))
        for method in ("SupCon", "VarCon")
        for seed in range(3)
    ]
    for row in rows:
        row["knn"] += 0.05 * row["seed"] * (row["method"] == "VarCon")  # an interval around 0.05
    found = gains.paired_gains(rows, "VarCon", "SupCon").set_index(["readout", "batch_size"])
    assert found.loc[("linear", 8), "verdict"] == "behind"
    assert found.loc[("linear", 64), "verdict"] == "ahead"
    assert found.loc[("knn", 8), "verdict"] == "undecided"
    assert found.loc[("linear", 8), "images"] == pytest.approx(1.6)
    few, some = list(gains.verdicts_table(rows))[2:4]
    assert few.startswith(
        "| few (under 4) | SupCon 80.1, VarCon 72.6 | 0 ahead, 1 behind, 1 undecid"
    )
    assert some.startswith(
        "| some (4 to 20) | VarCon 92.6, SupCon 80.1 | 2 ahead, 0 behind, 0 undec"
    )


def test_one_seed_has_no_interval_and_collapse_is_said_in_words() -> None:
    base = {"data": "digits", "noise": 0.0, "split": "test", "learning_rate": 0.1, "batch_size": 8}
    rows = [
        base | {"method": method, "seed": seed, "linear": 0.5, "collapsed": collapsed}
        for method, seed, collapsed in (("SupCon", 0, False), ("VarCon", 0, True))
    ]
    table = paired.summary(rows, "linear")
    assert paired.text(table[table["method"] == "SupCon"]) == "50.0"
    assert paired.text(table[table["method"] == "VarCon"]) == "all 1 collapsed"


def test_results_of_an_older_commit_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "changed_since", lambda commit: commit == "c")
    assert "an older commit" in markdown.origin("speed", ENV)
    assert "older" not in markdown.origin("speed", ENV | {"commit": "other"})


def test_mixup_is_told_beside_the_same_without(tmp_path: Path) -> None:
    base = {"data": "digits", "noise": 0.0, "split": "test", "learning_rate": 0.1,
            "batch_size": 8, "collapsed": False, "environment": ENV, "epochs": 2}  # fmt: skip
    rows = [
        base | {"method": method, "seed": seed, "mixup": mixup, "linear": 0.5 + gain + 0.01 * seed,
                "tau2": [[0.1] * 5], "knn": 0.5, "linear, 5 a class": 0.5}
        for method, mixup, gain in (
            ("SupCon", None, 0.2), ("VarCon", None, 0), ("VarCon memory", None, 0),
            ("VarCon", 0.4, 0.1),
        )
        for seed in range(3)
    ]  # fmt: skip
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / "quality-digits.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before, _, page = report.write(path.parent).read_text().partition("## Does mixup help?")
    words = (
        "digits, batch 8, alpha 0.4, 3 seeds: linear probe with mixup, points from without: VarCon "
        "+10.0 ± 0.0."
    )
    assert words in page
    assert f"- **Mixup**: {words}" in before
    assert before.count("mixup") == 2  # it is not among the runs without
    assert "| VarCon, mixup 0.4 | 61.0 ± 2.5 (+10.0 ± 0.0) |" in page
    assert "| SupCon | 71.0 ± 2.5 |" in page
    assert (
        "`python -m benchmarks quality --mixup 0.4 --data digits --batch-sizes 8 --methods VarCon "
        "--learning-rates 0.1 --epochs 2 --seeds 3`; learning rates: VarCon 0.1."
    ) in page


def test_rates_with_mixup_that_differ_from_those_without_are_told() -> None:
    base = {"data": "digits", "noise": 0.0, "split": "test", "batch_size": 8}
    plain = [
        base | {"method": method, "learning_rate": 0.45, "mixup": None}
        for method in ("VarCon", "cross-entropy")
    ]
    mixed = [
        base | {"method": f"{method}, mixup 0.2", "learning_rate": rate, "mixup": 0.2}
        for method, rate in (("VarCon", 0.45), ("cross-entropy", 0.15))
    ]
    assert mixing._other_rates(mixed, plain + mixed) == (
        ", but for cross-entropy on digits (0.15 with mixup, 0.45 without)"
    )
    assert mixing._other_rates(mixed[:1], plain + mixed) == ""


def test_the_chosen_rates_say_where_they_lie_on_the_edge() -> None:
    base = {"data": "digits", "noise": 0.0, "batch_size": 8, "method": "VarCon"}
    rows = [
        base | {"split": "validation", "learning_rate": rate, "linear": score, "knn": score}
        for rate, score in ((0.05, 0.5), (0.15, 0.7), (0.45, 0.6))
    ]
    test = {"split": "test", "learning_rate": 0.15}
    assert list(quality._rates_table([*rows, base | test]))[-1] == "| VarCon | 0.15 |"
    rows[0] |= {"linear": 0.9, "knn": 0.9}
    test["learning_rate"] = 0.05
    assert list(quality._rates_table([*rows, base | test]))[-1] == "| VarCon | 0.05, edge |"


def test_a_folder_without_results_gives_a_page_that_says_little(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    text = report.write(tmp_path / "results").read_text()
    assert "No kernel has run on a GPU yet" in text


@pytest.mark.parametrize("there", [("VarCon", "SupCon"), ("VarCon memory", "SupCon"), ("SupCon",)])
def test_the_methods_there_are_enough_for_a_report(there: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / "quality-digits.jsonl"
    rows = map(json.loads, (results.RESULTS / path.name).read_text().splitlines())
    kept = [row for row in rows if row["method"] in there and row["batch_size"] == 128]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    page = report.write(path.parent).read_text()
    for method in ("VarCon", "VarCon memory"):
        assert (f"| {method} against SupCon |" in page) == (method in there)


def test_a_single_batch_size_still_draws_points(tmp_path: Path) -> None:
    """A line of one point would be invisible without a marker."""
    from PIL import Image

    from benchmarks.common import plots, style

    lines = (results.RESULTS / "quality-digits.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["batch_size"] == 128]
    (path,) = plots.draw_quality(rows, tmp_path)
    colour = [int(style.ORANGE[i : i + 2], 16) for i in (1, 3, 5)]
    pixels = np.array(Image.open(path).convert("RGB"))
    axes = pixels[: len(pixels) * 8 // 10]  # without the legend
    assert (axes == colour).all(2).sum() > 100
