"""Commands that a page shows, read as the command line would read them."""

import re
import shlex
from collections.abc import Iterator

# What stands in a shown command for something that the reader chooses.
PLACEHOLDERS = {"DATA": "digits", "RATE": "0.1", "FOLDER": "folder"}


def inline(text: str) -> Iterator[list[str]]:
    """The words of each `python -m benchmarks ...` within a text, perhaps wrapped."""
    for command in re.findall(r"`(python\s+-m\s+benchmarks\s[^`]+)`", text):
        yield shlex.split(command)


def check_benchmarks(words: list[str]) -> None:
    """Raises what the command line would answer to ``python -m benchmarks QUESTION ...``."""
    import typer

    from benchmarks.__main__ import question
    from benchmarks.common import options

    name, *given = words[3:]
    given = [PLACEHOLDERS.get(word, word) for word in given]
    command = typer.main.get_command(question(name))
    parameters = command.make_context(name, given).params
    # Text to the command line, read by the question itself.
    for key, read in {
        "batch_sizes": options.integers, "learning_rates": options.floats, "methods": options.names,
        "noise": options.floats,
    }.items():  # fmt: skip
        if parameters.get(key):
            read(parameters[key])
