"""Options of the command line that several questions share, and how their text is read."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer

from benchmarks.common.measure import NO_DEVICE

Seed = Annotated[int, typer.Option(help="of weights, order and augmentation")]
Epochs = Annotated[int, typer.Option(min=1, help="training epochs of each run")]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
Dim = Annotated[int, typer.Option(min=1, help="embedding width D")]
MemoryGib = Annotated[float, typer.Option(help="that a measuring process may add, on a CPU")]
Out = Annotated[Path, typer.Option(help="folder of the result files")]
Resume = Annotated[bool, typer.Option(help="keep sizes already measured")]

CACHE = Path("runs/cache")  # what is rendered and encoded once

T = TypeVar("T", int, float)


def integers(text: str) -> list[int]:
    return _numbers(text, int, "integers")


def floats(text: str) -> list[float]:
    return _numbers(text, float, "numbers")


def _numbers(text: str, read: Callable[[str], T], name: str) -> list[T]:
    try:
        return [read(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected {name} separated by commas, got {text!r}") from None


def names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def check(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """End with one line where something is unknown."""
    for name in given:
        if name not in known:
            raise typer.BadParameter(f"{what} must be among {', '.join(known)}, got {name!r}")


def require(device: str) -> None:
    """End with one line where there is no such device."""
    check("--device", [device], ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(NO_DEVICE)
