"""Pieces of Markdown, and where a result comes from."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import results


def grid(columns: Sequence[str], lines: Iterable[Sequence[object]]) -> Iterator[str]:
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for line in lines:
        yield "| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |"
    yield ""


def folded(title: str, body: Iterable[str]) -> Iterator[str]:
    yield f"<details><summary>{title}</summary>\n"
    yield from body
    yield "</details>\n"


def embedded(path: Path, what: str) -> str:
    return f"![{what}](results/{path.name})\n"


def origin(command: str, env: dict[str, Any], *more: str) -> str:
    """A paragraph: which command, where and when, whether the code has changed since, and more."""
    text = (
        f"`python -m benchmarks {command}`; {env['device']}, {env['threads']} threads, torch "
        f"{env['versions']['torch']}, {env['date']}, commit {env['commit']}"
    )
    if results.changed_since(env["commit"]):
        text += " (an older commit: `varcon_loss/` has changed since)"
    return " ".join(part for part in (f"{text}.", *more, results.busy(env)) if part) + "\n"
