"""What the README and the site say is run, and their links lead somewhere."""

import ast
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
import yaml

pytest.importorskip("myst_nb")
from markdown_it import MarkdownIt
from markdown_it.token import Token

import varcon_loss
from tests import shown

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
NOTEBOOKS = sorted(DOCS.glob("*.ipynb"))


def blocks(page: Path, language: str) -> Iterator[Token]:
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == "fence" and token.info == language:
            yield token


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs_from_the_top(page: Path, tmp_path, monkeypatch, capsys) -> None:
    """And prints what the `text` block right after it shows."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    fences = [token for token in MarkdownIt().parse(page.read_text()) if token.type == "fence"]
    scope: dict = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="varcon_loss")
        for block, after in itertools.zip_longest(fences, fences[1:]):
            if block.info != "python":
                continue
            capsys.readouterr()
            assert block.map is not None
            start, end = block.map
            # In the line numbers of the page, so that a traceback points at it.
            exec(compile("\n" * (start + 1) + block.content, str(page), "exec"), scope)
            if after is not None and after.info == "text" and after.map and after.map[0] == end + 1:
                assert capsys.readouterr().out == after.content


def test_the_script_of_several_gpus_runs_by_its_command(tmp_path: Path) -> None:
    page = DOCS / "distributed.md"
    (code,) = (block.content for block in blocks(page, "python") if "WORLD_SIZE" in block.content)
    (tmp_path / "train.py").write_text(code)
    ((launcher, *rest),) = (words for name, words in commands() if name == page.name)
    assert launcher == "torchrun"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *rest],
        cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"loss \d", done.stdout)) == 2  # perhaps on one line


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line of the `sh` blocks: its page and its words."""
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.content.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    yield page.name, words


def test_the_commands_that_are_shown_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    command = [sys.executable, "-m", "varcon_loss.integrations.timm_train", "--help"]
    helped = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    launcher = set(re.findall(r"--[\w-]+", helped.stdout))
    seen = set()
    for page, words in commands():
        where = f"{page}: {' '.join(words)}"
        assert {word for word in words if word.startswith("--varcon")} <= launcher, where
        if words[:3] == ["python", "-m", "benchmarks"]:
            shown.check_benchmarks(words)
        elif words[0] == "make":
            assert set(words[1:]) <= targets, where
        seen.add(words[0])
    assert {"python", "make", "varcon-timm"} <= seen


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "RESULTS.md"],
    ids=lambda page: page.name,
)  # fmt: skip
def test_the_commands_within_a_text_can_be_given(page: Path) -> None:
    found = list(shown.inline(page.read_text()))
    for words in found:
        shown.check_benchmarks(words)
    assert len(found) >= {"RESULTS.md": 6, "questions.md": 2}.get(page.name, 0)


ADAPTERS = {
    "sklearn.linear_model": "scikit_learn",
    "varcon_loss.integrations.metric_learning": "pytorch_metric_learning",
    "varcon_loss.integrations.text": "sentence_transformers",
    "varcon_loss.integrations.timm_task": "timm",
}


def imported(code: str) -> Iterator[str]:
    """Packages that a block imports, as pip names them; for an adapter, its host."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = [alias.name for alias in node.names]
            for module in [node.module or ""] if isinstance(node, ast.ImportFrom) else named:
                yield ADAPTERS.get(module, module.partition(".")[0])


def test_what_an_example_needs_is_installed_on_its_page() -> None:
    """By a `pip install` line that names the package, or an extra that brings it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    installed = {page.name: {"torch", "varcon_loss", *sys.stdlib_module_names} for page in PAGES}
    for page, words in commands():
        if words[:2] == ["pip", "install"]:
            for word in words[2:]:
                extra = re.fullmatch(r"\.\[(.+)\]", word)
                for requirement in extras[extra[1]] if extra else [word]:
                    name = re.split(r"[<>=]", requirement)[0].replace("-", "_")
                    installed[page].add(name)
    needed = {
        page.name: {name for block in blocks(page, "python") for name in imported(block.content)}
        for page in PAGES
    }
    assert {"timm", "pytorch_metric_learning", "lightning"} <= set().union(*needed.values())
    missing = {page: names - installed[page] for page, names in needed.items()}
    assert not any(missing.values()), missing


LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def slug(heading: str) -> str:
    """The anchor that hosts and the site give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *NOTEBOOKS],
    ids=lambda page: page.name,
)  # fmt: skip
def test_links_in_the_sources_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        parts = urlsplit(target)
        if parts.scheme:
            assert parts.scheme == "https", target
            continue
        path = page.parent / parts.path if parts.path else page
        assert path.exists(), f"{page.name}: {target}"
        if parts.fragment:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
            assert parts.fragment in {slug(h) for h in headings}, f"{page.name}: {target}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole site, notebook executed, as `make docs` builds it; a warning is an error."""
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", DOCS, out],
        capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


class _Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := found.get(name))}
        self.links |= {value for name in ("href", "src") if (value := found.get(name))}


def test_no_link_of_the_site_is_broken(site: Path) -> None:
    pages = {path: _Page(path) for path in site.rglob("*.html")}
    assert {"index.html", "start.html", "digits.html", "api.html"} <= {p.name for p in pages}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = pages[target].anchors if target in pages else {parts.fragment}
            if not target.exists() or (parts.fragment and parts.fragment not in anchors):
                broken.append(f"{path.name}: {link}")
    assert not broken


def test_the_site_has_the_public_names_and_can_be_searched(site: Path) -> None:
    anchors = _Page(site / "api.html").anchors
    assert {f"varcon_loss.{name}" for name in varcon_loss.__all__ if name[0] != "_"} <= anchors
    index = (site / "searchindex.js").read_text()
    assert all(f'"{stem}"' in index for stem in ("temperatur", "centroid", "lightn"))


def test_the_notebook_was_executed(site: Path) -> None:
    page = (site / "digits.html").read_text()
    scores = [float(found) for found in re.findall(r"linear probe: ([\d.]+)%", page)]
    before, after = scores
    assert after > max(before, 97)
    assert page.count("<img") >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_kept_without_outputs(path: Path) -> None:
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs")
        assert not cell.get("execution_count")


def test_a_release_has_absolute_links(tmp_path: Path) -> None:
    """A package index shows the README alone."""
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    script = ROOT / ".github" / "absolute_links.py"
    repository = "https://example.org/owner/varcon-loss"
    subprocess.run([sys.executable, script, readme, repository, "v1.2.3"], check=True)
    targets = LINK.findall(readme.read_text())
    assert all(target.startswith("https://") for target in targets)
    assert f"{repository}/blob/v1.2.3/docs/settings.md" in targets
    assert any(target.startswith(f"{repository}/raw/v1.2.3/benchmarks/") for target in targets)
    for target in targets:
        if target.startswith(repository):
            path = urlsplit(target).path.split("/v1.2.3/")[1]
            assert (ROOT / path).exists(), target


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == varcon_loss.__version__
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## {re.escape(varcon_loss.__version__)}\b", changes, re.M)
    release = (ROOT / ".github/workflows/release.yml").read_text()
    (pattern,) = re.findall(r"sed -n '(s/.*?/p)' varcon_loss/__init__.py", release)
    command = ["sed", "-n", pattern, ROOT / "varcon_loss/__init__.py"]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == varcon_loss.__version__
