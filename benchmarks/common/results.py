"""Saved results: rows, with everything needed to read them years later."""

import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.common.checkout import git

if TYPE_CHECKING:
    import pandas as pd  # imported only where a table is made: a bare machine may lack it

RESULTS = Path(__file__).parents[1] / "results"
PACKAGES = ("torch", "triton", "varcon-loss", "pytorch-metric-learning", "timm", "numpy")


def environment(device: str = "cpu") -> dict[str, Any]:
    """Versions, device, commit, date, and how busy the machine is."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": git("rev-parse", "--short", "HEAD")
        + ("+" if git("status", "-s", "-uno") else ""),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "load": os.getloadavg()[0],
    }


def busy(env: dict[str, Any]) -> str:
    """A sentence where other work on the machine makes times doubtful."""
    load = env.get("load", 0.0)
    return f"The machine was busy (load {load:.1f})." if load > 1 else ""


def save(
    name: str, rows: list[dict[str, Any]], env: dict[str, Any], folder: Path = RESULTS
) -> Path:
    """Write ``name.json`` (rows and environment) and ``name.csv`` (rows); returns the first."""
    import pandas as pd

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    body = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(f'{{"environment": {json.dumps(env)},\n "rows": [\n{body}\n ]}}\n')
    pd.DataFrame(rows).to_csv(path.with_suffix(".csv"), index=False)
    return path


def read(name: str, folder: Path = RESULTS) -> "tuple[pd.DataFrame, dict[str, Any]]":
    """The rows and the environment of a saved result.

    Raises:
        FileNotFoundError: nothing was saved under this name.
    """
    import pandas as pd

    content = json.loads((folder / f"{name}.json").read_text())
    return pd.DataFrame(content["rows"]), content["environment"]


def changed_since(commit: str) -> bool:
    """Whether the package has changed since; False also where git cannot say."""
    count = git("rev-list", "--count", f"{commit.rstrip('+')}..HEAD", "--", "../varcon_loss")
    return count.isdigit() and int(count) > 0


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()
