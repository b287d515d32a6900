"""``benchmarks/RESULTS.md`` from the saved results: one page made by rule, then the questions."""

from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.common import paired, results
from benchmarks.common.terminal import progress_bar, written
from benchmarks.report.cost import (
    costs_section,
    gpu_section,
    labels_section,
    large_batch_section,
    speed_section,
)
from benchmarks.report.first_page import first_page
from benchmarks.report.markdown import rows_of_question
from benchmarks.report.mixing import mixup_section, several_labels_section
from benchmarks.report.quality import quality_section
from benchmarks.report.questions import (
    evolution_section,
    hierarchy_section,
    momentum_section,
    robustness_section,
    settings_section,
)


def command() -> None:
    """Rebuild benchmarks/RESULTS.md and its pictures from benchmarks/results/."""
    written(write())


def write(folder: Path = results.RESULTS) -> Path:
    """Rebuild the report and its pictures; returns its path."""
    every = paired.told_apart(rows_of_question(folder, "quality"))
    mixed = [row for row in paired.reported(every) if row.get("mixup")]
    rows = [row for row in every if not row.get("mixup")]
    sections: dict[str, Callable[[], Iterable[str]]] = {
        "first page": lambda: first_page(rows, mixed, folder),
        "quality": lambda: quality_section(rows, folder),
        "mixup": lambda: mixup_section(mixed, every),
        "several labels": lambda: several_labels_section(folder),
        "settings": lambda: settings_section(folder),
        "robustness": lambda: robustness_section(folder),
        "hierarchy": lambda: hierarchy_section(folder),
        "momentum": lambda: momentum_section(folder),
        "evolution": lambda: evolution_section(folder),
        "speed": lambda: speed_section(folder),
        "labels": lambda: labels_section(folder),
        "large batch": lambda: large_batch_section(folder),
        "costs": lambda: costs_section(folder),
        "gpu": lambda: gpu_section(folder),
    }
    parts = []
    with progress_bar() as bar:
        task = bar.add_task("report", total=len(sections), note="")
        for name, section in sections.items():
            parts += section()
            bar.update(task, advance=1, note=name)
    path = folder.parent / "RESULTS.md"
    path.write_text("\n".join(parts).rstrip() + "\n")
    return path
