"""``benchmarks/RESULTS.md`` from the saved results: every number in it comes from a file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from benchmarks import momentum, speed
from benchmarks.common import measure, methods, paired, plots, results
from benchmarks.common.contenders import OURS
from benchmarks.common.terminal import written

YARDSTICKS = {
    "authors": "equations, authors' operations",
    "lean": "equations, lean",
    "supcon": "SupCon (pytorch-metric-learning)",
}


def command() -> None:
    """Rebuild benchmarks/RESULTS.md and its pictures from benchmarks/results/."""
    written(write())


def write(folder: Path = results.RESULTS) -> Path:
    """Rebuild the report and its pictures; returns its path."""
    parts = [
        "# Results\n",
        "Rebuilt by `python -m benchmarks report` from the files in `benchmarks/results/`, which "
        "carry versions, device, commit and date (runs of `quality` and `momentum` from before "
        "2026-11-25 carry none: the history of their files has commit and date). Measured on what "
        "those files say, and nowhere else.\n",
    ]
    quality_rows = _quality_rows(folder)
    has_speed = (folder / "speed-cpu.json").exists()
    parts.append("## What was found\n")
    if has_speed:
        parts += _speed_findings(folder)
    if quality_rows:
        parts += _quality_findings(quality_rows)
    if has_speed:
        parts += _speed_tables(folder)
    parts += _gpu(folder)
    parts += _costs(folder)
    parts += _momentum(folder)
    if quality_rows:
        parts += _quality_tables(quality_rows, folder)
    parts += _evolution(folder)
    path = folder.parent / "RESULTS.md"
    path.write_text("\n".join(parts).rstrip() + "\n")
    return path


def _quality_rows(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for path in sorted(folder.glob("quality-*.jsonl")):
        rows += [json.loads(line) for line in path.read_text().splitlines()]
    return rows


def _speed_findings(folder: Path) -> Iterator[str]:
    frame, env = results.read("speed-cpu", folder)
    full = frame[frame["mode"] == "forward+backward"]

    def cell(name: str, n: int, k: int, value: str = "median") -> float | None:
        found = full[
            (full["contender"] == name) & (full["num_rows"] == n) & (full["num_classes"] == k)
        ][value].dropna()
        return float(found.iloc[0]) if len(found) else None

    yield (
        f"**Speed** ({env['device']}, {env['threads']} threads, torch {env['versions']['torch']}, "
        f"{env['date']}, commit {env['commit']}; float32, D = 128, forward + backward, medians of "
        "interleaved runs):\n"
    )
    for n, k in ((64, 10), (4096, 1000), (8192, 1000), (16384, 1000), (16384, 10)):
        ours = cell(OURS, n, k)
        if ours is None:
            continue
        ratios = []
        for short, name in YARDSTICKS.items():
            other = cell(name, n, k)
            title = {"authors": "the authors' operations", "lean": "the lean equations"}.get(
                short, "pytorch-metric-learning's SupCon"
            )
            if other is not None:
                ratios.append(f"{title} {speed.times(other / ours)} as long")
        floor = cell(OURS, n, k, "over_two_products")
        if floor is not None:
            ratios.append(f"ours is {speed.times(floor)} the two bare matrix products")
        yield f"- N = {n}, K = {k}: {ours * 1e3:.3g} ms; " + "; ".join(ratios) + "."
    slower = _slower_than_authors(full)
    yield (
        "- Slower than the authors' operations beyond the quartiles at: "
        + (", ".join(slower) if slower else "no size measured")
        + "."
    )
    for k in sorted(full["num_classes"].unique()):
        ours = full[(full["contender"] == OURS) & (full["num_classes"] == k)]
        slope = speed.growth(ours, "median")
        if slope is not None:
            yield f"- Time grows as N^{slope:.2f} from N = {speed.SLOPE_FROM} at K = {k}."
    ours, authors = (cell(n, 8192, 1000, "peak_bytes") for n in (OURS, YARDSTICKS["authors"]))
    if ours and authors:
        yield (
            f"- Peak extra memory at N = 8192, K = 1000: {ours / 2**20:.0f} MiB against "
            f"{authors / 2**20:.0f} MiB for the authors' operations ({ours / authors:.2g}x)."
        )
    yield ""


def _slower_than_authors(full: pd.DataFrame) -> list[str]:
    found = []
    for (n, k), part in full.groupby(["num_rows", "num_classes"]):
        by_name = part.set_index("contender")
        if not {OURS, YARDSTICKS["authors"]} <= set(by_name.index):
            continue
        ours, theirs = by_name.loc[OURS], by_name.loc[YARDSTICKS["authors"]]
        if pd.notna(theirs["median"]) and ours["q1"] > theirs["q3"]:
            found.append(f"N = {n}, K = {k} ({ours['median'] / theirs['median']:.2f}x)")
    return found


HEADLINES = (
    ("VarCon", "SupCon", "linear"),
    ("VarCon memory", "SupCon", "linear"),
    ("VarCon memory", "SupCon memory", "linear"),
    ("VarCon", "cross-entropy", "linear"),
    ("VarCon memory", "cross-entropy", "linear"),
)
OTHER_COMPARISONS = (
    ("VarCon", "SupCon", "knn"),
    ("VarCon epsilon=0", "SupCon", "linear"),
    ("VarCon epsilon=0", "SupCon", "knn"),
    ("VarCon epsilon=0", "VarCon", "linear"),
    ("VarCon leave-one-out", "SupCon", "linear"),
    ("VarCon leave-one-out", "SupCon", "knn"),
    ("VarCon leave-one-out", "VarCon", "linear"),
    ("VarCon memory", "SupCon", "knn"),
    ("VarCon memory", "VarCon", "linear"),
    ("VarCon memory", "VarCon", "knn"),
    ("VarCon memory", "SupCon memory", "knn"),
    ("VarCon memory", "cross-entropy", "knn"),
)
NOISY_COMPARISONS = (
    ("VarCon epsilon=0", "VarCon", "linear"),
    ("VarCon memory", "SupCon memory", "linear"),
    ("VarCon", "cross-entropy", "linear"),
)


def _quality_findings(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield (
        "**Quality** (small CNN, two views, learning rate chosen for each method, batch size and "
        "share of wrong training labels on a validation split; differences are paired by seed, in "
        "points, with 95 % intervals; "
        "*ahead* and *behind* mean that the interval excludes 0):\n"
    )
    yield from _comparisons(rows, HEADLINES)
    for setting in _settings_of(rows):
        yield f"- {setting.sentence}"
    yield from _comparisons(rows, (("VarCon", "SupCon", "linear"),), noisy=True)
    reported = pd.DataFrame(paired.reported(rows))
    where = [
        f"{method} on {data} at {size}"
        + (f", {noise:.0%} wrong labels" if noise else "")
        + f": {n}"
        for (data, method, size, noise), n in reported[reported["collapsed"].astype(bool)]
        .groupby(["data", "method", "batch_size", "noise"])
        .size()
        .items()
    ]
    yield (
        f"- Collapsed runs: {reported['collapsed'].sum()} of {len(reported)} reported ones"
        + (f" ({'; '.join(where)})" if where else "")
        + ", left out of means."
    )
    yield "- All other comparisons: [below](#every-other-comparison).\n"


def _comparisons(
    rows: list[dict[str, Any]], wanted: tuple[tuple[str, str, str], ...], *, noisy: bool = False
) -> Iterator[str]:
    for method, baseline, value in wanted:
        listed = _verdicts(paired.summary(rows, value, baseline), method, noisy=noisy)
        if listed:
            start = "With wrong labels, " if noisy else ""
            yield f"- {start}{method} against {baseline}, {paired.READOUTS[value]}: {listed}."


def _verdicts(table: pd.DataFrame, method: str, *, noisy: bool) -> str:
    part = table[(table["method"] == method) & ((table["noise"] > 0.0) == noisy)]
    groups: dict[str, list[str]] = {"ahead": [], "behind": [], "undecided": []}
    part = part.dropna(subset=["gain_half_width"]).sort_values(["data", "noise", "batch_size"])
    for _, line in part.iterrows():
        gain, half = line["gain"], line["gain_half_width"]
        verdict = "undecided" if abs(gain) <= half else "ahead" if gain > 0 else "behind"
        share = f", {line['noise']:.0%} wrong" if noisy else ""
        groups[verdict].append(
            f"{line['data']} at {line['batch_size']}{share} ({100 * gain:+.1f} ± {100 * half:.1f})"
        )
    return "; ".join(f"{name}: {', '.join(cells)}" for name, cells in groups.items() if cells)


def _speed_tables(folder: Path) -> Iterator[str]:
    frame, _ = results.read("speed-cpu", folder)
    yield "## Speed\n"
    yield (
        "`python -m benchmarks speed`: ms (times ours). *forward* is evaluation, without a "
        "gradient. Compiled contenders were compiled for each size; compiling is not in the time. "
        "Memory is the peak of a fresh process's resident set in one forward and backward, beyond "
        "what it held before; growth is fitted from N = 4096 on.\n"
    )
    absent = frame.groupby("contender")["status"].agg(
        lambda s: all("CUDA" in x or "on a CPU" in x for x in s)
    )
    names = [str(name) for name, is_absent in absent.items() if is_absent]
    if names:
        yield f"Not here, since they need CUDA: {', '.join(names)}.\n"
        frame = frame[~frame["contender"].isin(names)]
    for (k, mode), part in frame.groupby(["num_classes", "mode"]):
        sizes = sorted(part["num_rows"].unique())
        yield f"\nK = {k}, {mode.replace('+', ' + ')}\n"
        yield "| contender | " + " | ".join(f"N = {n}" for n in sizes) + " | time ~ | memory ~ |"
        yield "|---" * (len(sizes) + 3) + "|"
        ours = part[part["contender"] == OURS].set_index("num_rows")["median"]
        for name, line in part.groupby("contender", sort=False):
            cells = []
            for _, cell in line.sort_values("num_rows").iterrows():
                if pd.isna(cell["median"]):
                    cells.append(str(cell["status"]))
                else:
                    ratio = cell["median"] / ours[cell["num_rows"]]
                    cells.append(f"{cell['median'] * 1e3:.3g} ({speed.times(ratio)})")
            slopes = [speed.growth(line, value) for value in ("median", "peak_bytes")]
            cells += ["" if s is None else f"N^{s:.2f}" for s in slopes]
            yield f"| {name} | " + " | ".join(cells) + " |"
    yield ""
    for picture in plots.draw_speed(frame, folder, "speed-cpu"):
        yield f"![time, memory and speed-up over batch size](results/{picture.name})\n"


def _gpu(folder: Path) -> Iterator[str]:
    yield "## On a GPU\n"
    if not (folder / "gpu-proof.json").exists():
        yield (
            "**No kernel has run on a GPU yet.** What is known without one (registers, spills, "
            "matrix instructions, floors) is in [docs/kernels.md](../docs/kernels.md); "
            "`python -m benchmarks gpu-proof` measures the rest.\n"
        )
        return
    frame, env = results.read("gpu-proof", folder)
    yield f"`python -m benchmarks gpu-proof` ({env['device']}, {env['date']}, {env['commit']}).\n"
    yield "| stage | outcome | seconds | last line |\n|---|---|---|---|"
    for _, row in frame.iterrows():
        yield f"| {row['stage']} | {row['status']} | {row['seconds']} | {row['last_line']} |"
    for _, row in frame.dropna(subset=["rows"]).iterrows():
        measured = pd.DataFrame(row["rows"]).drop(columns="names", errors="ignore")
        yield f"\n{row['stage']}\n"
        yield "| " + " | ".join(measured.columns) + " |"
        yield "|---" * len(measured.columns) + "|"
        for _, line in measured.iterrows():
            cells = (f"{v:.3g}" if isinstance(v, float) else str(v) for v in line)
            yield "| " + " | ".join(cells) + " |"
    yield ""


def _evolution(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("evolution-*.json")):
        frame, env = results.read(path.stem, folder)
        yield f"## Over training: {frame['data'].iloc[0]}\n"
        yield (
            f"`python -m benchmarks evolution` ({env['date']}, commit {env['commit']}): batch "
            f"{env['batch_size']}, learning rate {env['learning_rate']}, one seed, so to look at "
            "and not to compare. t-SNE of held-out images' features; τ2 over the last batch of "
            "an epoch.\n"
        )
        yield f"![t-SNE and density of tau2](results/{path.stem}.png)\n"


def _momentum(folder: Path) -> Iterator[str]:
    path = folder / "momentum.jsonl"
    if not path.exists():
        return
    table = momentum.summary([json.loads(line) for line in path.read_text().splitlines()])
    yield "## Momentum of the centroid memory\n"
    yield (
        "`python -m benchmarks momentum`: mean of linear probe and kNN on the validation split of "
        "mnist-pairs, at one learning rate, mean ± half-width of the 95 % interval over "
        f"{table['seeds'].min()} to {table['seeds'].max()} seeds.\n"
    )
    columns, lines = momentum.by_momentum(table)
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for line in lines:
        yield "| " + " | ".join(line) + " |"
    yield f"\n![accuracy over momentum](results/{plots.draw_momentum(table, path.parent).name})\n"


def _costs(folder: Path) -> Iterator[str]:
    """Smaller tables: memories, and exchanges between ranks."""
    if (folder / "memory-cost.json").exists():
        frame, env = results.read("memory-cost", folder)
        yield "## Centroid memory: cost\n"
        yield f"`python -m benchmarks memory-cost` ({env['date']}, commit {env['commit']}).\n"
        yield "| | N | C | ms | peak extra memory, MiB |\n|---|---|---|---|---|"
        for _, row in frame.iterrows():
            cost = " | ".join(measure.time_and_memory(dict(row)))
            yield f"| {row['contender']} | {row['N']} | {row['C']} | {cost} |"
        yield ""
    if (folder / "metric-learning-memory.json").exists():
        frame, env = results.read("metric-learning-memory", folder)
        yield "## CrossBatchMemory\n"
        yield (
            f"`python -m benchmarks metric-learning --cost` ({env['date']}, commit "
            f"{env['commit']}): one forward and backward, N = 256, memory 65,536, D = 128.\n"
        )
        yield "| | ms | peak extra memory, MiB |\n|---|---|---|"
        for _, row in frame.dropna(subset=["status"]).iterrows():
            yield f"| {row['loss']} | {' | '.join(measure.time_and_memory(row))} |"
        for ratio in frame["ratio"].dropna():
            yield f"\nThe adapter takes {ratio:.2f}x the core's time at N = 4096, K = 1000.\n"
    if (folder / "distributed.json").exists():
        frame, env = results.read("distributed", folder)
        yield "## Between ranks\n"
        yield (
            f"`python -m benchmarks distributed` ({env['date']}, commit {env['commit']}): gloo "
            "processes on one machine, so times are of little meaning and bytes are exact.\n"
        )
        yield "| | ranks | C | KB sent a rank and step | by the model | ms |"
        yield "|---|---|---|---|---|---|"
        for _, row in frame.iterrows():
            sent, model = row["bytes_per_rank"] / 1e3, row["bytes_by_model"] / 1e3
            yield (
                f"| {row['contender']} | {row['ranks']} | {row['C']} | {sent:.0f} | {model:.0f} | "
                f"{row['seconds'] * 1e3:.1f} |"
            )
        yield "\nThe same model from 8 to 1024 ranks of 256 samples (MB sent a rank and step):\n"
        model_frame, _ = results.read("distributed-model", folder)
        pivot = model_frame.pivot_table(
            index=["contender", "ranks"], columns="C", values="MB sent", sort=False
        )
        yield "| | ranks | " + " | ".join(f"C = {c:,}" for c in pivot.columns) + " |"
        yield "|---" * (len(pivot.columns) + 2) + "|"
        for (name, ranks), row in pivot.iterrows():
            yield f"| {name} | {ranks} | " + " | ".join(f"{v:.3g}" for v in row) + " |"
        yield "\n![bytes over classes](results/distributed-model.png)\n"


def _quality_tables(rows: list[dict[str, Any]], folder: Path) -> Iterator[str]:
    yield "## Quality\n"
    yield (
        "Accuracy on held-out images, mean ± half-width of the 95 % interval over seeds; in "
        "brackets the paired difference from SupCon in points.\n"
    )
    yield from _settings(rows)
    rows = [row for row in rows if row["method"] in methods.METHODS]
    for data in dict.fromkeys(row["data"] for row in rows):
        of_data = [row for row in rows if row["data"] == data]
        for value, title in (paired.READOUTS | paired.DETAILS).items():
            kept = [row for row in of_data if value in paired.READOUTS or row["noise"] == 0.0]
            if not any(row.get(value) is not None for row in kept):
                continue
            table = paired.summary(kept, value)
            for noise, noisy in table.groupby("noise"):
                sizes = sorted(noisy["batch_size"].unique())
                suffix = f", {noise:.0%} wrong labels" if noise else ""
                yield f"\n{data}: {title}{suffix}\n"
                yield "| method | " + " | ".join(f"batch {s}" for s in sizes) + " |"
                yield "|---" * (len(sizes) + 1) + "|"
                for method, line in noisy.groupby("method", sort=False):
                    if line["mean"].isna().all():
                        continue
                    cells = [paired.text(line[line["batch_size"] == size]) for size in sizes]
                    yield f"| {method} | " + " | ".join(cells) + " |"
        for picture in plots.draw_quality(of_data, folder):
            yield f"\n![{data}](results/{picture.name})"
    yield "\n### Every other comparison\n"
    yield from _comparisons(rows, OTHER_COMPARISONS)
    yield from _comparisons(rows, NOISY_COMPARISONS, noisy=True)
    yield ""


class _Setting(NamedTuple):
    """What other temperatures and heads do, where they were tried."""

    data: str
    batch_size: int
    rows: list[dict[str, Any]]  # of all methods there
    best_supcon: str  # by validation, among SupCon's temperatures

    @property
    def sentence(self) -> str:
        """VarCon at its best temperature against SupCon at its own, both chosen by validation."""
        best = paired.best_by_validation(self.rows, _temperatures("VarCon"))
        cells = [
            paired.text(table[table["method"] == best])
            for table in (
                paired.summary(self.rows, "linear", baseline)
                for baseline in ("SupCon", self.best_supcon)
            )
        ]
        return (
            f"Temperature chosen by validation as well, {self.data} at {self.batch_size}, linear "
            f"probe: {best} {cells[0]} against SupCon at 0.1, {cells[1]} against "
            f"{self.best_supcon}."
        )


def _temperatures(family: str) -> list[str]:
    return [family, *(name for name in methods.VARIANTS if name.startswith(f"{family} tau"))]


def _settings_of(rows: list[dict[str, Any]]) -> Iterator[_Setting]:
    variants = [row for row in rows if row["method"] in methods.VARIANTS]
    for data, size in dict.fromkeys((row["data"], row["batch_size"]) for row in variants):
        here = [
            row
            for row in rows
            if (row["data"], row["batch_size"], row["noise"]) == (data, size, 0.0)
        ]
        best = paired.best_by_validation(here, _temperatures("SupCon"))
        yield _Setting(data, size, here, best)


def _settings(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Tables of temperatures and heads, beside the methods they are variants of."""
    for data, size, here, best in _settings_of(rows):
        yield (
            f"\nSettings, {data} at batch {size}: tau1 = 0.1 and the head mlp-bn unless said "
            "(epsilon = 0.02; 0.01 at tau1 = 0.05); learning rates chosen as everywhere; in "
            f"brackets the paired difference from SupCon, and in the last column from {best}, "
            "SupCon's best temperature by validation.\n"
        )
        yield f"| method | learning rate | linear probe | kNN | linear probe, against {best} |"
        yield "|---|---|---|---|---|"
        tables = [
            paired.summary(here, "linear"),
            paired.summary(here, "knn"),
            paired.summary(here, "linear", best),
        ]
        for method in ("SupCon", "VarCon", *methods.VARIANTS):
            lines = [table[table["method"] == method] for table in tables]
            if not lines[0].empty:
                rate = lines[0]["learning_rate"].iloc[0]
                yield (
                    f"| {method} | {rate} | "
                    + " | ".join(paired.text(line) for line in lines)
                    + " |"
                )
