"""``benchmarks/RESULTS.md`` from the saved results: a section a question."""

from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.common import results
from benchmarks.common.terminal import written
from benchmarks.report import evidence, sections

HEAD = """# Results

Rebuilt by `python -m benchmarks report` from the files in `benchmarks/results/`, which hold every
number. What it means is said in the [documentation](../docs/results.md).
"""
# Each makes its part of the page, pictures included, from the folder of the results; without
# results it is empty.
SECTIONS: list[Callable[[Path], Iterable[str]]] = [
    evidence.evidence,
    sections.speed,
    sections.soft_labels,
    sections.large_batch,
    sections.distributed,
    sections.kernel_code,
    sections.gpu_proof,
    sections.paper,
]


def command() -> None:
    """Rebuild benchmarks/RESULTS.md and its pictures from benchmarks/results/."""
    written(write())


def write(folder: Path = results.RESULTS) -> Path:
    """Rebuild the report and its pictures; returns its path."""
    parts = [HEAD]
    for section in SECTIONS:
        parts += section(folder)
    path = folder.parent / "RESULTS.md"
    path.write_text("\n".join(parts).rstrip() + "\n")
    return path
