"""`python -m benchmarks report`: the page and its pictures, from the committed results."""

import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
from benchmarks import report
from benchmarks.common import results
from tests import shown


def test_the_committed_page_is_what_the_saved_results_give(tmp_path: Path) -> None:
    page = report.write(Path(shutil.copytree(results.RESULTS, tmp_path / "results")))
    text, committed = (
        # Only git knows whether the package has changed since.
        re.sub(r" \(an older commit: [^)]*\)", "", path.read_text())
        for path in (page, results.RESULTS.parent / "RESULTS.md")
    )
    assert text == committed, "python -m benchmarks report was not run"
    assert "nan" not in re.findall(r"\w+", text)
    pictures = re.findall(r"\]\(results/(.+?)\)", text)
    assert len(pictures) >= 4
    assert all((tmp_path / "results" / name).stat().st_size > 10_000 for name in pictures)
    for words in shown.inline(text):
        shown.check_benchmarks(words)


def test_a_folder_without_results_gives_a_page_that_says_little(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    text = report.write(tmp_path / "results").read_text()
    assert "No kernel has run on a GPU yet" in text


@pytest.mark.parametrize("name", ["README.md", "docs/results.md"])
def test_an_interval_that_a_page_quotes_is_one_of_the_report(name: str) -> None:
    root = results.RESULTS.parents[1]
    known = (results.RESULTS.parent / "RESULTS.md").read_text()
    quoted = re.findall(r"[\d.]+ ± [\d.]+", (root / name).read_text())
    assert len(quoted) >= 5
    assert [words for words in quoted if words not in known] == []
