"""Options of the command line that several questions share, and how their text is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer

from benchmarks.common.data import DATASETS, ImageData, load
from benchmarks.common.measure import NO_DEVICE

Data = Annotated[str, typer.Option(help=", ".join(DATASETS))]
Root = Annotated[Path | None, typer.Option(help="folder of the images that come with no package")]
Seed = Annotated[int, typer.Option(help="of weights, order and augmentation")]
Seeds = Annotated[int, typer.Option(min=1, help="runs of each method")]
Epochs = Annotated[int, typer.Option(min=1, help="training epochs of each run")]
Workers = Annotated[int, typer.Option(min=1, help="runs at a time")]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
Budget = Annotated[float, typer.Option(min=0, help="minutes after which to stop; 0: never")]
Dim = Annotated[int, typer.Option(min=1, help="embedding width D")]
Out = Annotated[Path, typer.Option(help="folder of the result files")]

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


def loaded(name: str, root: Path | None) -> ImageData:
    """The data, or one line that says what is wrong, before any process has started."""
    try:
        return load(name, root)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def require(device: str) -> None:
    """End with one line where there is no such device."""
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(NO_DEVICE)
