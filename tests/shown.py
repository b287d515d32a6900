"""Commands that a page shows, read as the command line would read them."""

import re
import shlex
from collections.abc import Iterator


def inline(text: str) -> Iterator[list[str]]:
    """The words of each `python -m benchmarks ...` within a text, perhaps wrapped."""
    for command in re.findall(r"`(python\s+-m\s+benchmarks\s[^`]+)`", text):
        yield shlex.split(command)


def check_benchmarks(words: list[str]) -> None:
    """Raises what the command line would answer to ``python -m benchmarks QUESTION ...``."""
    import typer

    from benchmarks.__main__ import question

    name, *given = words[3:]
    typer.main.get_command(question(name)).make_context(name, given)
