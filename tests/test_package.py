"""The wheel holds the whole package, and nothing that belongs to the checkout alone."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    # From a copy, so that a stale build/ of the checkout can add nothing.
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "varcon_loss", "integrations"):
        subprocess.run(["cp", "-a", str(ROOT / name), str(source)], check=True)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), "."],
        check=True,
        cwd=source,
        capture_output=True,
    )
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_every_source_file_and_no_more(wheel: Path) -> None:
    packaged = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {f"varcon_loss/{p.name}" for p in (ROOT / "varcon_loss").glob("*.py")}
    expected |= {f"varcon_loss/integrations/{p.name}" for p in (ROOT / "integrations").glob("*.py")}
    assert packaged == expected | {"varcon_loss/py.typed"}
    assert not [p for p in (ROOT / "integrations").iterdir() if p.is_dir() and p.name[0] != "_"]


def test_an_installed_wheel_works_elsewhere(wheel: Path, tmp_path: Path) -> None:
    """In a new environment that borrows only third-party packages from this one."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = tmp_path / "env" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    site = site / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # Appended to sys.path without its .pth files: the editable install stays out.
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    modules = [p.stem for p in (ROOT / "integrations").glob("*.py") if p.stem != "__init__"]
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
    subprocess.run([str(python), "-c", script], check=True, cwd=tmp_path)
