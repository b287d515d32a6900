"""What is published: the wheel holds the package alone, the sdist all that its tests need."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("varcon_loss", "benchmarks", "docs", "tests", ".github")
LOOSE = ("pyproject.toml", "MANIFEST.in", "Makefile", "LICENSE")
PROSE = ("README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md")


def files_under(folder: str) -> set[str]:
    """Paths from the root of what is written by hand."""
    paths = (path for path in (ROOT / folder).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in paths if path.suffix != ".pyc"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that was made from it."""
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "dist"))
    # From a copy, so that a stale build/ of the checkout can add nothing.
    for name in (*LOOSE, *PROSE):
        shutil.copy(ROOT / name, source)
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name)
    # As a Windows checkout has the link of that name: nothing may need it.
    (source / "integrations").write_text("varcon_loss/integrations")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def unpacked(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(built[0]) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return root


def test_the_wheel_holds_every_source_file_and_no_more(built: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(built[1]).namelist()
    packaged = {name for name in names if ".dist-info/" not in name}
    assert packaged == files_under("varcon_loss")
    # One of each folder, should a walk go wrong.
    for name in ("module.py", "py.typed", "integrations/metric_learning.py"):
        assert f"varcon_loss/{name}" in packaged
    for folder in {str(Path(name).parent) for name in packaged}:
        assert f"{folder}/__init__.py" in packaged


def test_the_sdist_holds_what_its_tests_need(unpacked: Path) -> None:
    held = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    made = {name for name in held if name.startswith("varcon_loss.egg-info/")}
    written = {*LOOSE, *PROSE}.union(*(files_under(folder) for folder in SOURCES))
    assert held - made == written | {"PKG-INFO", "setup.cfg"}


def test_the_tests_run_from_the_unpacked_sdist(unpacked: Path) -> None:
    """With data, the harness, an adapter and doctests; and nothing is taken from this checkout."""
    chosen = ["tests/test_golden.py", "tests/test_benchmarks_speed.py::test_results_come_back"]
    chosen += ["varcon_loss/heads.py", "varcon_loss/integrations/metric_learning.py"]
    script = f"""
import sys, pytest
code = pytest.main(["-q", "-x", *{chosen!r}])
here = {str(unpacked)!r}
for name, module in list(sys.modules.items()):
    if name.partition(".")[0] in ("varcon_loss", "benchmarks", "tests"):
        assert module.__file__.startswith(here), module.__file__
sys.exit(code)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=unpacked, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_an_index_would_take_both(built: tuple[Path, Path]) -> None:
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 2


def test_an_installed_wheel_works_elsewhere(built: tuple[Path, Path], tmp_path: Path) -> None:
    """In a new environment that borrows only third-party packages from this one."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = tmp_path / "env" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    site = site / "site-packages"
    with zipfile.ZipFile(built[1]) as archive:
        archive.extractall(site)
    # Appended to sys.path without its .pth files: the editable install stays out.
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    folder = ROOT / "varcon_loss" / "integrations"
    modules = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
    assert modules
    script = f"""
import importlib, torch, varcon_loss
assert varcon_loss.__file__.startswith({str(site)!r}), varcon_loss.__file__
for name in {modules!r}:
    importlib.import_module("varcon_loss.integrations." + name)
x = torch.randn(8, 4, requires_grad=True)
varcon_loss.VarConLoss()(x, torch.arange(8) % 3).backward()
for name in ("integrations", "benchmarks", "tests"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(name + " is importable")
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([str(python), "-c", script], check=True, cwd=tmp_path, env=environment)


def test_a_workflow_runs_actions_of_a_known_commit() -> None:
    """A tag can be moved by others; the version stays as a comment, which dependabot reads."""
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        uses = re.findall(r"uses: (.*)", path.read_text())
        assert uses
        for action in uses:
            assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


def test_without_numpy_nothing_is_missing_and_nothing_is_said() -> None:
    """Torch itself says "Failed to initialize NumPy" where it is imported; we add no warning."""
    script = """
import sys, warnings
sys.modules["numpy"] = None
with warnings.catch_warnings(record=True):
    warnings.simplefilter("always")
    import torch
    torch.tensor([1.0])
warnings.simplefilter("error")
import varcon_loss
x, y = torch.randn(8, 4, requires_grad=True), torch.arange(8) % 3
for options in (
    {},
    {"impl": "reference", "leave_one_out": True},
    {"num_classes": 3, "weight": torch.ones(3)},
    {"num_classes": 3, "feature_dim": 4, "centroid_momentum": 0.9},
):
    criterion = varcon_loss.VarConLoss(**options)
    criterion(x, y).backward()
    criterion.terms(x, y)
    repr(criterion)
criterion.predict(x)
varcon_loss.ProjectionHead(4)(x)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
