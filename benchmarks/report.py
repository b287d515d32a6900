"""``benchmarks/RESULTS.md`` from the saved results: one page made by rule, then the questions."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import hierarchy, momentum, robustness, settings, several_labels, speed
from benchmarks.common import measure, methods, paired, plots, results
from benchmarks.common.contenders import OURS
from benchmarks.common.data import class_names
from benchmarks.common.terminal import progress_bar, written

YARDSTICKS = {
    "the authors' operations": "equations, authors' operations",
    "the lean equations": "equations, lean",
    "pytorch-metric-learning's SupCon": "SupCon (pytorch-metric-learning)",
}
SIZES_IN_WORDS = ((64, 10), (4096, 1000), (8192, 1000), (16384, 1000), (16384, 10))
FEW, MANY = 4, 20  # images of a class that a step sees: fewer than, and at least
RIVALS = ("SupCon", "SupCon memory", "cross-entropy", "NormFace", "SINCERE")
PAIRS = (
    *(("VarCon", rival) for rival in RIVALS),
    *(("VarCon memory", rival) for rival in (*RIVALS, "VarCon")),
    ("VarCon leave-one-out", "VarCon"),
    ("VarCon epsilon=0", "VarCon"),
)


def command() -> None:
    """Rebuild benchmarks/RESULTS.md and its pictures from benchmarks/results/."""
    written(write())


def write(folder: Path = results.RESULTS) -> Path:
    """Rebuild the report and its pictures; returns its path."""
    every = paired.told_apart(_lines_of(folder, "quality"))
    mixed = [row for row in paired.reported(every) if row.get("mixup")]
    rows = [row for row in every if not row.get("mixup")]
    sections: dict[str, Callable[[], Iterable[str]]] = {
        "first page": lambda: _first_page(rows, mixed, folder),
        "quality": lambda: _quality(rows, folder),
        "mixup": lambda: _mixup(mixed, every),
        "several labels": lambda: _several_labels(folder),
        "settings": lambda: _swept(folder),
        "robustness": lambda: _robustness(folder),
        "hierarchy": lambda: _hierarchy(folder),
        "momentum": lambda: _momentum(folder),
        "evolution": lambda: _evolution(folder),
        "speed": lambda: _speed(folder),
        "labels": lambda: _labels(folder),
        "costs": lambda: _costs(folder),
        "gpu": lambda: _gpu(folder),
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


def _lines_of(folder: Path, question: str) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob(f"{question}-*.jsonl")) for row in _lines(path)]


# Pieces of Markdown


def _grid(columns: Sequence[str], lines: Iterable[Sequence[object]]) -> Iterator[str]:
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for line in lines:
        yield "| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |"


def _folded(title: str, body: Iterable[str]) -> Iterator[str]:
    yield f"\n<details><summary>{title}</summary>\n"
    yield from body
    yield "\n</details>\n"


def _picture(path: Path, what: str) -> str:
    return f"\n![{what}](results/{path.name})\n"


def _origin(command: str, env: dict[str, Any]) -> str:
    """Which command, where and when; and whether the code has changed since."""
    text = (
        f"`python -m benchmarks {command}`; {env['device']}, {env['threads']} threads, torch "
        f"{env['versions']['torch']}, {env['date']}, commit {env['commit']}"
    )
    if results.changed_since(env["commit"]):
        text += " (an older commit: `varcon_loss/` has changed since)"
    return text + "."


def _setup(rows: list[dict[str, Any]]) -> str:
    """What the runs had in common, and how learning rates were found."""
    runs = paired.reported(rows)
    sizes, epochs = (
        ", ".join(str(value) for value in sorted({row[key] for row in runs}))
        for key in ("batch_size", "epochs")
    )
    seeds = _seeds(pd.Series(pd.DataFrame(runs).groupby("method")["seed"].nunique()))
    rates = "; ".join(
        f"{method} {', '.join(f'{rate:g}' for rate in sorted(set(mine)))}"
        for method, mine in pd.DataFrame(runs).groupby("method", sort=False)["learning_rate"]
    )
    grid = sorted({row["learning_rate"] for row in rows if row["split"] == "validation"})
    found = f"chosen from {', '.join(f'{rate:g}' for rate in grid)}" if grid else "not searched"
    return f"Batch {sizes}, {epochs} epochs, {seeds}. Learning rates, {found}: {rates}."


# The first page


def _first_page(
    rows: list[dict[str, Any]], mixed: list[dict[str, Any]], folder: Path
) -> Iterator[str]:
    yield "# Results\n"
    yield (
        "Rebuilt by `python -m benchmarks report` from the files in `benchmarks/results/`; every "
        "sentence with a number is made by rule from them. Small data sets, a small CNN, two CPU "
        "cores: nothing here says what happens on ImageNet.\n"
    )
    yield "## When to choose VarCon\n"
    if rows:
        gains = _gains(rows)
        yield (
            "*Ahead* and *behind*: the 95 % interval of the paired difference excludes 0. "
            "*Images a class*: how many images of a class a step sees on average, in two views; "
            f"few is under {FEW}, many from {MANY} on. [Evidence](#which-features-are-better).\n"
        )
        yield f"- **Highest mean** over all read-outs: {_ranking(rows)}."
        for method in ("VarCon", "VarCon memory"):
            yield f"- **{method} against SupCon**: {_by_images(gains[method])}."
        yield f"- **By read-out**, VarCon against SupCon: {_by_readout(gains['VarCon'])}."
        against = paired_gains(rows, "VarCon memory", "cross-entropy")
        yield f"- **VarCon memory against cross-entropy**: {_by_images(against)}."
        for sentence in _temperature(rows):
            yield f"- **Temperature**: {sentence}"
        for group in _mixed_groups(mixed, rows + mixed):
            yield f"- **Mixup**: {_mixup_words(*group)} [Evidence](#does-mixup-help)."
        yield from _collapsed(rows)
        yield _picture(
            plots.draw_gains(gains, folder / "gains.png"),
            "difference from SupCon over the images of a class that a step sees",
        )
        yield from _gains_table(rows, gains)
    if (folder / "speed-cpu.json").exists():
        yield from _speed_words(folder)


def paired_gains(rows: list[dict[str, Any]], method: str, baseline: str) -> pd.DataFrame:
    """Differences of ``method`` from ``baseline`` with right labels, a row a setting and read-out.

    Columns are those of `paired.summary`, and ``readout``, ``images`` (of a class that a step
    sees), ``verdict``.
    """
    clean = [row for row in rows if row["noise"] == 0.0 and row["method"] in (method, baseline)]
    parts = []
    for value in paired.MAIN:
        if not any(row.get(value) is not None for row in clean):
            continue
        table = paired.summary(clean, value, baseline)
        parts.append(table[table["method"] == method].assign(readout=value))
    frame = pd.concat(parts).dropna(subset=["gain", "gain_half_width"])
    frame["images"] = _images(frame)
    frame["verdict"] = [
        "undecided" if abs(gain) <= half else "ahead" if gain > 0 else "behind"
        for gain, half in zip(frame["gain"], frame["gain_half_width"], strict=True)
    ]
    return frame.reset_index(drop=True)


def _images(frame: pd.DataFrame) -> list[float]:
    """Images of a class that a step sees, in two views; sets of pairs have a hundred classes."""
    return [
        2 * size / (100 if data.endswith("-pairs") or data == "cifar100" else 10)
        for data, size in zip(frame["data"], frame["batch_size"], strict=True)
    ]


def _gains(rows: list[dict[str, Any]]) -> dict[str, pd.DataFrame]:
    return {m: paired_gains(rows, m, "SupCon") for m in ("VarCon", "VarCon memory")}


def _counts(part: pd.DataFrame) -> str:
    found = part["verdict"].value_counts()
    gain = 100 * part["gain"]
    words = [f"{found.get(name, 0)} {name}" for name in ("ahead", "behind", "undecided")]
    return f"{', '.join(words)} (points: {gain.min():+.1f} to {gain.max():+.1f})"


def _by_images(gains: pd.DataFrame) -> str:
    return "; ".join(f"{name}: {_counts(part)}" for name, part in _groups(gains))


def _groups(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Few, some and many images of a class in a step."""
    images = frame["images"]
    for name, mask in (
        (f"few images a class (under {FEW})", images < FEW),
        (f"some ({FEW} to {MANY})", (images >= FEW) & (images < MANY)),
        (f"many ({MANY} and more)", images >= MANY),
    ):
        if mask.any():
            yield name, frame[mask]


def _ranking(rows: list[dict[str, Any]]) -> str:
    """Methods by their mean over read-outs and settings, in percent."""
    clean = [
        row
        for row in rows
        if row["noise"] == 0.0 and row["method"] in ("VarCon", "VarCon memory", *RIVALS)
    ]
    parts = [
        paired.summary(clean, value).assign(readout=value)
        for value in paired.MAIN
        if any(row.get(value) is not None for row in clean)
    ]
    frame = pd.concat(parts).dropna(subset=["mean"])
    frame["images"] = _images(frame)
    return "; ".join(
        f"{name}: "
        + ", ".join(
            f"{method} {100 * mean:.1f}"
            for method, mean in part.groupby("method")["mean"].mean().sort_values()[::-1].items()
        )
        for name, part in _groups(frame)
    )


def _by_readout(gains: pd.DataFrame) -> str:
    return "; ".join(
        f"{paired.TITLES[value]}: {_counts(part)}"
        for value, part in gains.groupby("readout", sort=False)
    )


def _gains_table(rows: list[dict[str, Any]], gains: dict[str, pd.DataFrame]) -> Iterator[str]:
    shown = ("linear", "knn", "linear, 5 a class", "linear, 1 a class")
    columns = [
        "data, batch", "images a class",
        *(f"VarCon: {paired.TITLES[value]}" for value in shown),
        *(f"VarCon memory: {paired.TITLES[value]}" for value in (shown[0], shown[2])),
        "best linear probe",
    ]  # fmt: skip
    best = paired.summary(
        [row for row in rows if row["noise"] == 0.0 and row["method"] in methods.METHODS], "linear"
    )
    lines = []
    settings = gains["VarCon"][["data", "batch_size", "images"]].drop_duplicates()
    for _, (data, size, images) in settings.sort_values(["images", "data"]).iterrows():
        cells = []
        for method, values in (("VarCon", shown), ("VarCon memory", ("linear", shown[2]))):
            here = gains[method]
            here = here[(here["data"] == data) & (here["batch_size"] == size)].set_index("readout")
            cells += [_gain(here.loc[value]) if value in here.index else "" for value in values]
        top = best[(best["data"] == data) & (best["batch_size"] == size)]
        top = top.loc[top["mean"].idxmax()]
        lines.append(
            [f"{data}, {size}", f"{images:.3g}", *cells,
             f"{top['method']} {100 * top['mean']:.1f}"]
        )  # fmt: skip
    yield (
        "Paired differences from SupCon in points, with 95 % intervals over "
        f"{_seeds(gains['VarCon']['seeds'])}; bold where "
        "the interval excludes 0.\n"
    )
    yield from _grid(columns, lines)
    yield ""


def _gain(row: pd.Series) -> str:
    text = f"{100 * row['gain']:+.1f} ± {100 * row['gain_half_width']:.1f}"
    return text if row["verdict"] == "undecided" else f"**{text}**"


def _temperature(rows: list[dict[str, Any]]) -> Iterator[str]:
    for data, size, here in _variants(rows):
        best = {
            family: paired.best_by_validation(here, _temperatures(family))
            for family in ("VarCon", "SupCon")
        }
        table = paired.summary(here, "linear", best["SupCon"])
        line = table[table["method"] == best["VarCon"]]
        yield (
            f"{data} at batch {size}, each method's chosen by validation, linear probe: "
            f"{best['VarCon']} {paired.text(line)} against {best['SupCon']} "
            "([table](#which-temperature-and-which-head))."
        )


def _temperatures(family: str) -> list[str]:
    return [family, *(name for name in methods.VARIANTS if name.startswith(f"{family} tau"))]


def _variants(rows: list[dict[str, Any]]) -> Iterator[tuple[str, int, list[dict[str, Any]]]]:
    """Where other temperatures and heads were tried, and all rows there."""
    tried = [row for row in rows if row["method"] in methods.VARIANTS]
    for data, size in dict.fromkeys((row["data"], row["batch_size"]) for row in tried):
        wanted = (data, size, 0.0)
        yield (
            data,
            size,
            [row for row in rows if (row["data"], row["batch_size"], row["noise"]) == wanted],
        )


def _collapsed(rows: list[dict[str, Any]]) -> Iterator[str]:
    frame = pd.DataFrame([{key: row[key] for key in paired.KEYS} for row in paired.reported(rows)])
    bad = frame[frame["collapsed"].astype(bool)]
    where = [
        f"{n} of {method} on {data} at {size}{f' with {noise:.0%} wrong labels' if noise else ''}"
        for (data, method, size, noise), n in bad.groupby(
            ["data", "method", "batch_size", "noise"]
        ).size().items()
    ]  # fmt: skip
    yield (
        f"- **Collapse** (all embeddings alike): {len(bad)} of {len(frame)} runs"
        + (f": {'; '.join(where)}" if where else "")
        + ". They are left out of means."
    )


# Questions


def _quality(rows: list[dict[str, Any]], folder: Path) -> Iterator[str]:
    if not rows:
        return
    yield "## Which features are better?\n"
    yield (
        "`python -m benchmarks quality --data DATA` (`--noise` for wrong labels). Accuracy on "
        "held-out images in percent: mean ± half-width of the 95 % interval over seeds; in "
        "brackets the paired difference from SupCon in points. The learning rate of each method, "
        "batch size and share of wrong labels is chosen on a validation split, from one grid for "
        "all, which was widened where a choice lay on its edge (SupCon at batch 512 of "
        "mnist-pairs: lower rates were tried too, and are worse).\n"
    )
    yield from _epochs_and_origin(rows)
    for data in dict.fromkeys(row["data"] for row in rows):
        of_data = [row for row in rows if row["data"] == data]
        known = [row for row in of_data if row["method"] in methods.METHODS]
        yield f"### {data}"
        for picture in plots.draw_quality(known, folder):
            yield _picture(picture, f"{data}: accuracy over batch sizes")
        yield f"VarCon against SupCon: {_by_readout(paired_gains(known, 'VarCon', 'SupCon'))}.\n"
        yield from _folded(f"{data}: every number", _tables(known))
    yield from _settings(rows)
    yield from _folded("Every comparison, in words", _comparisons(rows))


def _epochs_and_origin(rows: list[dict[str, Any]]) -> Iterator[str]:
    dated = [row["environment"] for row in rows if row.get("environment")]
    without = len(rows) - len(dated)
    if without:
        yield (
            ("All runs" if not dated else f"{without} of the {len(rows)} runs")
            + " are from before runs carried versions, device, commit and date (2026-11-25): older "
            "commits, which the history of the files has.\n"
        )
    commits = sorted({env["commit"] for env in dated})
    if commits:
        old = [commit for commit in commits if results.changed_since(commit)]
        yield (
            f"Commits of the others: {', '.join(commits)}"
            + (f"; `varcon_loss/` has changed since {', '.join(old)}" if old else "")
            + ".\n"
        )


def _tables(rows: list[dict[str, Any]]) -> Iterator[str]:
    for value, title in paired.TITLES.items():
        if not any(row.get(value) is not None for row in rows):
            continue
        table = paired.summary(rows, value)
        for noise, noisy in table.groupby("noise"):
            sizes = sorted(noisy["batch_size"].unique())
            share = f", {noise:.0%} wrong labels" if noise else ""
            yield f"\n{title}{share}; {_seeds(noisy['seeds'] + noisy['collapsed'])}\n"
            lines = [
                [method, *(paired.text(line[line["batch_size"] == size]) for size in sizes)]
                for method, line in noisy.groupby("method", sort=False)
                if line["mean"].notna().any()
            ]
            yield from _grid(["method", *(f"batch {size}" for size in sizes)], lines)


def _seeds(counts: pd.Series) -> str:
    least, most = counts.min(), counts.max()
    return f"{most} seeds" if least == most else f"{least} to {most} seeds"


def _settings(rows: list[dict[str, Any]]) -> Iterator[str]:
    variants = list(_variants(rows))
    if not variants:
        return
    yield "## Which temperature, and which head?\n"
    yield (
        "`python -m benchmarks quality --methods variants`: tau1 = 0.1 and the head mlp-bn unless "
        "said (epsilon = 0.02; 0.01 at tau1 = 0.05); learning rates chosen as everywhere.\n"
    )
    for sentence in _temperature(rows):
        yield f"- {sentence}"
    for data, size, here in variants:
        best = paired.best_by_validation(here, _temperatures("SupCon"))
        tables = [
            paired.summary(here, "linear"),
            paired.summary(here, "knn"),
            paired.summary(here, "linear", best),
        ]
        lines = []
        for method in ("SupCon", "VarCon", *methods.VARIANTS):
            found = [table[table["method"] == method] for table in tables]
            if not found[0].empty:
                rate = found[0]["learning_rate"].iloc[0]
                lines.append([method, f"{rate:g}", *map(paired.text, found)])
        yield from _folded(
            f"{data} at batch {size}",
            _grid(
                ["method", "learning rate", "linear probe (- SupCon)", "kNN (- SupCon)",
                 f"linear probe (- {best}, SupCon's best by validation)"],
                lines,
            ),
        )  # fmt: skip


def _comparisons(rows: list[dict[str, Any]]) -> Iterator[str]:
    for noisy in (False, True):
        kept = [row for row in rows if (row["noise"] > 0) == noisy]
        for method, baseline in PAIRS:
            for value in ("linear",) if noisy else paired.MAIN:
                both = [r for r in kept if r["method"] in (method, baseline)]
                if not any(row.get(value) is not None for row in both):
                    continue
                listed = _verdicts(paired.summary(both, value, baseline), method)
                if listed:
                    start = "With wrong labels, " if noisy else ""
                    yield f"- {start}{method} against {baseline}, {paired.TITLES[value]}: {listed}."


def _verdicts(table: pd.DataFrame, method: str) -> str:
    part = table[table["method"] == method]
    groups: dict[str, list[str]] = {"ahead": [], "behind": [], "undecided": []}
    part = part.dropna(subset=["gain_half_width"]).sort_values(["data", "noise", "batch_size"])
    for _, line in part.iterrows():
        gain, half = line["gain"], line["gain_half_width"]
        verdict = "undecided" if abs(gain) <= half else "ahead" if gain > 0 else "behind"
        share = f", {line['noise']:.0%} wrong" if line["noise"] else ""
        groups[verdict].append(
            f"{line['data']} at {line['batch_size']}{share} ({100 * gain:+.1f} ± {100 * half:.1f})"
        )
    return "; ".join(f"{name}: {', '.join(cells)}" for name, cells in groups.items() if cells)


def _mixup(mixed: list[dict[str, Any]], rows: list[dict[str, Any]]) -> Iterator[str]:
    """With and without mixup, beside SupCon, which cannot be trained on mixed images."""
    if not mixed:
        return
    yield "## Does mixup help?\n"
    searched = any(row.get("mixup") and row["split"] == "validation" for row in rows)
    rates = "chosen with it" if searched else "those chosen without it"
    yield (
        f"{_origin('quality --mixup', mixed[-1]['environment'])} Mixed images have class "
        "probabilities as labels; each view is mixed on its own. Learning rates with mixup are "
        f"{rates}. Runs with and without are paired by seed. An extension of the paper; SupCon "
        "does not take such labels.\n"
    )
    shown = ("linear", "knn", "linear, 5 a class", "linear, 1 a class")
    for name, part, here in _mixed_groups(mixed, rows):
        plain = [paired.summary(here, value) for value in shown]
        lines = [["SupCon", *(paired.text(table[table["method"] == "SupCon"]) for table in plain)]]
        for method in dict.fromkeys(part["method"]):
            tables = [_with_and_without(method, here, value) for value in shown]
            for which in (method.partition(", mixup ")[0], method):
                found = [table[table["method"] == which] for table in tables]
                lines.append([which, *map(paired.text, found)])
        yield f"{_mixup_words(name, part, here)}\n"
        yield from _folded(
            f"{name}: accuracy, %: mean ± 95 % interval (difference from the same without mixup)",
            _grid(["method", *(paired.TITLES[value] for value in shown)], lines),
        )


def _mixed_groups(
    mixed: list[dict[str, Any]], rows: list[dict[str, Any]]
) -> Iterator[tuple[str, pd.DataFrame, list[dict[str, Any]]]]:
    """Data, mixed runs and all runs, for each data set and batch size that has mixed ones."""
    if not mixed:
        return
    for (name, size), part in pd.DataFrame(mixed).groupby(["data", "batch_size"]):
        wanted = (name, size, 0.0)
        here = [r for r in rows if (r["data"], r["batch_size"], r["noise"]) == wanted]
        yield name, part, here


def _with_and_without(method: str, here: list[dict[str, Any]], value: str) -> pd.DataFrame:
    base = method.partition(", mixup ")[0]
    return paired.summary([row for row in here if row["method"] in (base, method)], value, base)


def _mixup_words(name: str, part: pd.DataFrame, here: list[dict[str, Any]]) -> str:
    said = []
    for method in dict.fromkeys(part["method"]):
        table = _with_and_without(method, here, "linear")
        said.append(f"{method.partition(', ')[0]} {paired.gain(table[table['method'] == method])}")
    alphas = ", ".join(f"{alpha:g}" for alpha in sorted(set(part["mixup"])))
    seeds = _seeds(part.groupby("method")["seed"].nunique())
    return (
        f"{name}, batch {part['batch_size'].iloc[0]}, alpha {alphas}, {seeds}: linear probe with "
        f"mixup, points from without: {'; '.join(said)}."
    )


def _several_labels(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("several-labels-*.jsonl")):
        rows = _lines(path)
        yield f"## Can an image have several labels? {rows[0]['data']}\n"
        yield (
            f"{_origin('several-labels', rows[-1]['environment'])} The two digits of a pair are "
            "two labels out of twenty; VarCon takes the multi-hot rows, divided by their sums, as "
            f"class probabilities. An extension of the paper. {_setup(rows)} Percent: mean ± 95 % "
            f"interval (difference from {several_labels.BASELINE}); {several_labels.FLOOR}.\n"
        )
        columns = ["method", *several_labels.TITLES.values()]
        yield from _grid(columns, several_labels.lines(rows))
        yield ""


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _swept(folder: Path) -> Iterator[str]:
    """Results of `settings`, where there are any."""
    for vary in settings.SETTINGS:
        for path in sorted(folder.glob(f"{vary}-*.jsonl")):
            rows = _lines(path)
            table = settings.tabulate(rows, vary)
            best = table.loc[table[table["readout"] == "linear"].groupby("method")["mean"].idxmax()]
            yield f"## Which {vary}? {rows[0]['data']}\n"
            yield (
                f"{_origin(f'settings {vary}', rows[-1]['environment'])} {_setup(rows)} Best "
                "linear probe: "
                + ", ".join(
                    f"{row['method']} at {row[vary]} ({100 * row['mean']:.1f} %)"
                    for _, row in best.iterrows()
                )
                + ".\n"
            )
            yield _picture(
                plots.draw_settings(table, vary, path.with_suffix(".png")), f"accuracy over {vary}"
            )
            values = list(dict.fromkeys(table[vary]))
            for (size, readout), part in table.groupby(["batch_size", "readout"], sort=False):
                lines = (
                    [method, *(paired.text(mine[mine[vary] == value]) for value in values)]
                    for method, mine in part.groupby("method", sort=False)
                )
                yield from _folded(
                    f"batch {size}: {paired.TITLES[readout]}, %",
                    _grid(["method", *(f"{vary} {value}" for value in values)], lines),
                )


def _robustness(folder: Path) -> Iterator[str]:
    """Results of `robustness`, where there are any."""
    for kind, title in (
        ("corruption", "Do features survive corrupted images?"),
        ("transfer", "Do features serve other data?"),
    ):
        for path in sorted(folder.glob(f"{kind}-*.jsonl")):
            rows = _lines(path)
            table = robustness.tabulate(rows)
            yield f"## {title} {rows[0]['data']}\n"
            yield f"{_origin(f'robustness {kind}', rows[-1]['environment'])} {_setup(rows)}\n"
            if kind == "corruption":
                picture = plots.draw_corruption(table, path.with_suffix(".png"))
                yield _picture(picture, "accuracy over severity")
            parts = list(dict.fromkeys(table["readout"]))
            lines = (
                [part, *(paired.text(mine[mine["readout"] == part]) for _, mine in
                         table.groupby("method", sort=False))]
                for part in parts
            )  # fmt: skip
            yield from _folded(
                "Linear probe (and kNN where named), %: mean ± 95 % interval (difference from "
                "SupCon)",
                _grid(["images", *dict.fromkeys(table["method"])], lines),
            )


def _hierarchy(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("hierarchy-*.jsonl")):
        rows = _lines(path)
        name = rows[0]["data"]
        yield f"## Do similar classes lie near one another? {name}\n"
        yield (
            f"{_origin('hierarchy', rows[-1]['environment'])} {_setup(rows)} Trees of class means "
            "of held-out features, by cosine distance: how well a tree keeps the distances, and "
            "how well cutting it finds known groups (kinds of clothes; the left digit of a pair). "
            "Percent: mean ± 95 % interval (difference from SupCon).\n"
        )
        yield from _grid(*hierarchy.tabulate(rows))
        trees = hierarchy.trees(rows)
        names = class_names(name, len(next(iter(trees.values()))) + 1)
        picture = plots.draw_trees(trees, names, path.with_suffix(".png"))
        yield _picture(picture, "trees of class means")


def _momentum(folder: Path) -> Iterator[str]:
    path = folder / "momentum.jsonl"
    if not path.exists():
        return
    table = momentum.summary([json.loads(line) for line in path.read_text().splitlines()])
    best = table.loc[table.groupby(["classes", "batch_size"])["mean"].idxmax()]
    yield "## Which momentum of the centroid memory?\n"
    yield (
        "`python -m benchmarks momentum`: mean of linear probe and kNN on the validation split of "
        "mnist-pairs, at one learning rate, percent, mean ± half-width of the 95 % interval over "
        f"{table['seeds'].max()} seeds. Highest mean: "
        + ", ".join(
            f"{row['momentum']:g} ({row['classes']:.0f} classes, batch {row['batch_size']:.0f})"
            for _, row in best.iterrows()
        )
        + ".\n"
    )
    yield _picture(plots.draw_momentum(table, path.parent), "accuracy over momentum")
    columns, lines = momentum.by_momentum(table)
    yield from _folded("Every number", _grid(columns, lines))


def _evolution(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("evolution-*.json")):
        frame, env = results.read(path.stem, folder)
        yield f"## How do embeddings and temperatures come to be? {frame['data'].iloc[0]}\n"
        yield (
            f"{_origin('evolution', env)} Batch {env['batch_size']}, learning rate "
            f"{env['learning_rate']}, one seed: to look at and not to compare. t-SNE of held-out "
            "images' features, whose axes mean nothing; τ2 over the last batch of an epoch.\n"
        )
        yield _picture(path.with_suffix(".png"), "t-SNE and density of tau2")


def _speed_words(folder: Path) -> Iterator[str]:
    frame, env = results.read("speed-cpu", folder)
    full = frame[frame["mode"] == "forward+backward"]
    yield "## How fast\n"
    yield (
        f"{_origin('speed', env)} float32, D = 128, forward + backward, medians of interleaved "
        "runs. [Evidence](#how-long-does-a-step-take-and-how-much-memory).\n"
    )
    for n, k in SIZES_IN_WORDS:
        here = full[(full["num_rows"] == n) & (full["num_classes"] == k)].set_index("contender")
        if OURS not in here.index:
            continue
        ours = here.loc[OURS]
        ratios = [
            f"{title} {speed.times(here.loc[name, 'median'] / ours['median'])} as long"
            for title, name in YARDSTICKS.items()
            if name in here.index and pd.notna(here.loc[name, "median"])
        ]
        if pd.notna(ours["over_two_products"]):
            floor = speed.times(ours["over_two_products"])
            ratios.append(f"ours is {floor} the two bare matrix products")
        yield f"- N = {n:,}, K = {k:,}: {ours['median'] * 1e3:.3g} ms; " + "; ".join(ratios) + "."
    slower = _slower_than_authors(full)
    yield (
        "- Slower than the authors' operations beyond the quartiles at: "
        + (", ".join(slower) if slower else "no size measured")
        + "."
    )
    here = full[(full["num_rows"] == 8192) & (full["num_classes"] == 1000)].set_index("contender")
    authors = YARDSTICKS["the authors' operations"]
    if {OURS, authors} <= set(here.index):
        ours, theirs = here.loc[OURS, "peak_bytes"], here.loc[authors, "peak_bytes"]
        yield (
            f"- Peak extra memory at N = 8,192, K = 1,000: {ours / 2**20:.0f} MiB against "
            f"{theirs / 2**20:.0f} MiB for the authors' operations ({ours / theirs:.2g}x)."
        )
    yield ""


def _slower_than_authors(full: pd.DataFrame) -> list[str]:
    found = []
    for (n, k), part in full.groupby(["num_rows", "num_classes"]):
        by_name = part.set_index("contender")
        authors = YARDSTICKS["the authors' operations"]
        if not {OURS, authors} <= set(by_name.index):
            continue
        ours, theirs = by_name.loc[OURS], by_name.loc[authors]
        if pd.notna(theirs["median"]) and ours["q1"] > theirs["q3"]:
            found.append(f"N = {n}, K = {k} ({ours['median'] / theirs['median']:.2f}x)")
    return found


def _speed(folder: Path) -> Iterator[str]:
    if not (folder / "speed-cpu.json").exists():
        return
    frame, _ = results.read("speed-cpu", folder)
    absent = frame.groupby("contender")["median"].agg(lambda values: values.isna().all())
    reasons = frame.groupby("contender")["status"].first()
    names = [
        f"{name} ({'the same as varcon-loss on a CPU' if 'eager' in str(name) else reasons[name]})"
        for name, is_absent in absent.items()
        if is_absent
    ]
    frame = frame[~frame["contender"].isin(absent[absent].index)]
    yield "## How long does a step take, and how much memory?\n"
    yield (
        "`python -m benchmarks speed`. Memory is the peak of a fresh process's resident set in one "
        "forward and backward, beyond what it held before. Compiled contenders were compiled for "
        "each size; compiling is not in the time."
        + (f" Not here: {', '.join(names)}." if names else "")
    )
    yield _picture(
        plots.draw_hero(frame, folder / "speed-hero.png"), "time and memory over batch size"
    )
    for k in sorted(frame["num_classes"].unique()):
        ours = frame[(frame["contender"] == OURS) & (frame["num_classes"] == k)]
        slope = speed.growth(ours[ours["mode"] == "forward+backward"], "median")
        if slope is not None:
            yield f"- Our time grows as N^{slope:.2f} from N = {speed.SLOPE_FROM:,} at K = {k:,}."
    for picture in plots.draw_speed(frame, folder, "speed-cpu"):
        yield _picture(picture, "time and memory over batch size, every contender")
    for (k, mode), part in frame.groupby(["num_classes", "mode"]):
        title = "forward alone, without a gradient" if mode == "forward" else "forward + backward"
        yield from _folded(f"K = {k:,}, {title}: ms (times ours)", _speed_table(part))


def _labels(folder: Path) -> Iterator[str]:
    """Time of class probabilities beside integer labels."""
    for kind, title in (
        ("mixup", "What do mixed labels cost?"), ("smooth", "What do smoothed labels cost?"),
    ):  # fmt: skip
        if not (folder / f"speed-cpu-{kind}.json").exists():
            continue
        frame, env = results.read(f"speed-cpu-{kind}", folder)
        yield f"## {title}\n"
        busy = f" The machine was busy (load {env['load']:.1f})." if env["load"] > 1 else ""
        yield f"{_origin(f'speed --labels {kind}', env)} Forward and backward, D = 128.{busy}\n"
        for line in speed.beside_integers(frame):
            yield f"- {line}"
        yield ""


def _speed_table(part: pd.DataFrame) -> Iterator[str]:
    sizes = sorted(part["num_rows"].unique())
    ours = part[part["contender"] == OURS].set_index("num_rows")["median"]
    lines = []
    for name, line in part.groupby("contender", sort=False):
        cells = []
        for _, cell in line.sort_values("num_rows").iterrows():
            if pd.isna(cell["median"]):
                cells.append(str(cell["status"]))
            else:
                ratio = speed.times(cell["median"] / ours[cell["num_rows"]])
                cells.append(f"{cell['median'] * 1e3:.3g} ({ratio})")
        slopes = [speed.growth(line, value) for value in ("median", "peak_bytes")]
        lines.append([name, *cells, *("" if s is None else f"N^{s:.2f}" for s in slopes)])
    columns = ["contender", *(f"N = {n:,}" for n in sizes), "time ~", "memory ~"]
    yield from _grid(columns, lines)


def _costs(folder: Path) -> Iterator[str]:
    """Memories, and exchanges between ranks."""
    if (folder / "memory-cost.json").exists():
        frame, env = results.read("memory-cost", folder)
        yield "## What does the centroid memory cost?\n"
        yield _origin("memory-cost", env) + "\n"
        yield from _grid(
            ["", "N", "classes C", "time, ms", "peak extra memory, MiB"],
            (
                [row["contender"], row["N"], f"{row['C']:,}", *measure.time_and_memory(dict(row))]
                for _, row in frame.iterrows()
            ),
        )
        yield ""
    if (folder / "metric-learning-memory.json").exists():
        frame, env = results.read("metric-learning-memory", folder)
        yield "## What does CrossBatchMemory cost?\n"
        yield (
            f"{_origin('metric-learning --cost', env)} One forward and backward, N = 256, memory "
            "65,536, D = 128.\n"
        )
        yield from _grid(
            ["", "time, ms", "peak extra memory, MiB"],
            (
                [row["loss"], *measure.time_and_memory(dict(row))]
                for _, row in frame.dropna(subset=["status"]).iterrows()
            ),
        )
        for ratio in frame["ratio"].dropna():
            yield f"\nThe adapter takes {ratio:.2f}x the core's time at N = 4,096, K = 1,000.\n"
    if (folder / "distributed.json").exists():
        yield from _distributed(folder)


def _distributed(folder: Path) -> Iterator[str]:
    frame, env = results.read("distributed", folder)
    yield "## What do centroids over ranks cost?\n"
    yield (
        f"{_origin('distributed', env)} gloo processes on one machine, so times are of little "
        "meaning and bytes are exact.\n"
    )
    expected, _ = results.read("distributed-model", folder)
    picture = plots.draw_bytes(expected.to_dict("records"), folder / "distributed-model.png")
    yield _picture(picture, "bytes over classes")
    lines = [
        [
            row["contender"], row["ranks"], f"{row['C']:,}", f"{row['bytes_per_rank'] / 1e3:,.0f}",
            f"{row['bytes_by_model'] / 1e3:,.0f}", f"{row['seconds'] * 1e3:.1f}",
        ]
        for _, row in frame.iterrows()
    ]  # fmt: skip
    columns = ["", "ranks", "classes C", "sent a rank and step, kB", "by the model, kB", "ms"]
    yield from _folded("Measured", _grid(columns, lines))
    pivot = expected.pivot_table(
        index=["contender", "ranks"], columns="C", values="MB sent", sort=False
    )
    yield from _folded(
        "The same model from 8 to 1024 ranks of 256 samples: MB sent a rank and step",
        _grid(
            ["", "ranks", *(f"C = {c:,}" for c in pivot.columns)],
            ([*key, *(f"{value:,.3g}" for value in row)] for key, row in pivot.iterrows()),
        ),
    )


def _gpu(folder: Path) -> Iterator[str]:
    yield "## What happens on a GPU?\n"
    if not (folder / "gpu-proof.json").exists():
        yield (
            "**No kernel has run on a GPU yet.** What is known without one (registers, spills, "
            "matrix instructions, floors) is in [docs/kernels.md](../docs/kernels.md); "
            "`python -m benchmarks gpu-proof` measures the rest.\n"
        )
        return
    frame, env = results.read("gpu-proof", folder)
    yield _origin("gpu-proof", env) + "\n"
    keys = ["stage", "status", "seconds", "last_line"]
    yield from _grid(
        ["stage", "outcome", "seconds", "last line"],
        ([row[key] for key in keys] for _, row in frame.iterrows()),
    )
    for _, row in frame.dropna(subset=["rows"]).iterrows():
        # What is a table itself stays in the file.
        measured = pd.DataFrame(row["rows"]).drop(
            columns=["microseconds", "floor"], errors="ignore"
        )
        measured = measured.astype(object).where(measured.notna(), None)
        lines = (
            [f"{v:.3g}" if isinstance(v, float) else v for v in line]
            for line in measured.itertuples(index=False)
        )
        yield from _folded(str(row["stage"]), _grid(list(measured.columns), lines))
    yield ""
