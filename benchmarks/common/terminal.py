"""What a user sees of a run: progress, tables, and where the files are."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

PIPED_WIDTH = 160
LINE_SECONDS = 20.0  # between two lines of progress where output is no terminal

console = Console() if Console().is_terminal else Console(width=PIPED_WIDTH)


class _Progress(Progress):
    """A bar, or a line now and then where output goes to a file or a pipe."""

    def __init__(self) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._last_line = time.monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._tell(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._tell(task_id)

    def _tell(self, task_id: TaskID) -> None:
        if not self.disable:
            return
        task = self.tasks[self.task_ids.index(task_id)]
        if task.finished or time.monotonic() - self._last_line > LINE_SECONDS:
            self._last_line = time.monotonic()
            done = f"{task.description.strip()}: {task.completed:.0f} of {task.total:.0f}"
            self.console.print(f"{done} {task.fields['note']}".rstrip(), highlight=False)


def progress_bar() -> Progress:
    """A bar whose tasks have a ``note``, a short text of their latest numbers."""
    return _Progress()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Rows under named columns; None is an empty cell."""
    drawn = Table(*columns, title=title, title_justify="left")
    for row in rows:
        drawn.add_row(*("" if cell is None else str(cell) for cell in row))
    return drawn


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    console.print(table(title, columns, rows))


def written(*paths: Path) -> None:
    """Say where each file is, a line each, so that a path can be copied."""
    for path in paths:
        console.print(f"written: {path}", soft_wrap=True, highlight=False)
