"""`python -m benchmarks report`: what RESULTS.md says, from the committed files and from others."""

import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
from benchmarks import report
from benchmarks.common import results
from benchmarks.report import gains
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


def test_a_folder_without_results_gives_a_page_that_says_little(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    text = report.write(tmp_path / "results").read_text()
    assert "No kernel has run on a GPU yet" in text
