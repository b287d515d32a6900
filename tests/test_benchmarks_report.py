"""`python -m benchmarks report`: what RESULTS.md says, from the committed files and from others."""

import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
from benchmarks import report
from benchmarks.common import results
from benchmarks.report import gains, markdown
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
    assert "| SupCon 80.1, VarCon 72.6 | 0 ahead, 1 behind, 1 undecided" in few
    assert "| VarCon 92.6, SupCon 80.1 | 2 ahead, 0 behind, 0 undecided" in some


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
    assert ": VarCon +10.0 ± 0.0." in page
    assert ": VarCon +10.0 ± 0.0." in before.partition("- **Mixup**: ")[2].splitlines()[0]
    assert before.count("mixup") == 2  # it is not among the runs without
    assert "| VarCon, mixup 0.4 | 61.0 ± 2.5 (+10.0 ± 0.0) |" in page
    assert "| SupCon | 71.0 ± 2.5 |" in page
    assert "`python -m benchmarks quality --mixup 0.4 --data digits --batch-sizes 8 " in page


def test_a_folder_without_results_gives_a_page_that_says_little(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    text = report.write(tmp_path / "results").read_text()
    assert "No kernel has run on a GPU yet" in text
