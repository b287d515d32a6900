"""Contenders measured at many sizes: what is measured is saved at once, and kept."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.common import results
from benchmarks.common.terminal import console, progress_bar

Row = dict[str, Any]
Note = Callable[[str], None]


def sweep(
    name: str,
    sizes: Sequence[Row],
    contenders: Iterable[str],
    measure: Callable[[Row, list[Row], Note], Iterable[Row]],
    *,
    device: str,
    folder: Path,
    resume: bool = True,
) -> pd.DataFrame:
    """The rows of all sizes, saved after each as ``name``.

    Args:
        name: of the result files.
        sizes: columns that tell a size from the others.
        contenders: a size that has rows of them all is not measured again.
        measure: makes the rows of a size, without its columns, from the size, the rows of earlier
            ones, and what shows a note beside the progress bar.
        device: what is measured.
        folder: of the result files.
        resume: keep what an earlier run has saved there.
    """
    env, rows, wanted = results.environment(device), [], set(contenders)
    path = folder / f"{name}.json"
    if resume and path.exists():
        content = json.loads(path.read_text())
        rows, env["kept_from"] = content["rows"], content["environment"]
    todo = [size for size in sizes if not wanted <= {row["contender"] for row in _at(size, rows)}]
    if rows:
        before = env["kept_from"]
        console.print(
            f"kept {len(sizes) - len(todo)} of {len(sizes)} sizes, measured on {before['date']} at "
            f"commit {before['commit']}; --no-resume measures them again"
        )
    with progress_bar() as bar:
        task = bar.add_task(name, total=len(todo), note="")
        for size in todo:
            text = ", ".join(f"{key} {value}" for key, value in size.items())

            def tell(note: str, text: str = text) -> None:
                bar.update(task, note=f"{text}: {note}")

            old = _at(size, rows)
            made = [size | row for row in measure(size, rows, tell)]
            rows = [row for row in rows if row not in old] + made
            results.save(name, rows, env, folder)
            bar.advance(task)
    if note := results.busy(env):
        console.print(f"{note} Run it again when it is idle.")
    return pd.DataFrame(rows)


def _at(size: Row, rows: list[Row]) -> list[Row]:
    return [row for row in rows if size.items() <= row.items()]
