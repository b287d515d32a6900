"""What does VarCon learn, in two minutes? One small encoder trained four ways on real images."""

import time
from pathlib import Path

from benchmarks.common import options, plots
from benchmarks.common.data import ImageData, Split, load
from benchmarks.common.readouts import (
    accuracy,
    class_mean_predictions,
    flat_map,
    knn_predictions,
    linear_predictions,
)
from benchmarks.common.terminal import console, print_table, progress_bar, written
from benchmarks.common.training import Recipe, Run, encode, train

BATCH = 64
# The learning rate of each method that was best on validation images at this batch size.
METHODS = {"cross-entropy": 0.05, "SupCon": 0.05, "VarCon": 1.35, "VarCon memory": 0.15}
READOUTS = {"linear": "linear probe, %", "knn": "kNN, %", "class mean": "nearest class mean, %"}
SHOWN_LEFT = 3  # the picture maps the ten classes 30 ... 39, which share their left digit
LUCK = 0.02  # two runs of one method that differ in nothing but the seed are this far apart


def command(
    epochs: options.Epochs = 12,
    seed: options.Seed = 0,
    out: options.Out = Path("runs/quickstart"),
) -> None:
    """Train a small CNN on pairs of MNIST digits by VarCon and its rivals, compare, and draw.

    100 classes in batches of 64: the case in which the methods differ most.
    """
    data = load("mnist-pairs")
    console.print(
        f"Two MNIST digits side by side: {data.num_classes} classes, {len(data.train.labels)} "
        f"training and {len(data.test.labels)} held-out images; batches of {BATCH}, two augmented "
        "views an image"
    )
    runs, scores, seconds = compare(data, epochs=epochs, seed=seed)
    print_table(
        "Held-out accuracy",
        ("method", *READOUTS.values(), "training time"),
        [
            (
                method + (" (collapsed)" if runs[method].collapsed else ""),
                *(f"{100 * score[key]:.1f}" for key in READOUTS),
                f"{seconds[method]:.0f} s",
            )
            for method, score in scores.items()
        ],
    )
    for line in meaning(scores):
        console.print(line, soft_wrap=True)
    written(_draw(runs, scores, data, out / "quickstart.png"))


def compare(
    data: ImageData, *, epochs: int, seed: int
) -> tuple[dict[str, Run], dict[str, dict[str, float]], dict[str, float]]:
    """By method: the run, its accuracies on held-out images, and the seconds it trained."""
    runs: dict[str, Run] = {}
    scores: dict[str, dict[str, float]] = {}
    seconds: dict[str, float] = {}
    with progress_bar() as bar:
        for method, rate in METHODS.items():
            task = bar.add_task(f"{method:14}", total=epochs, note="")

            def show(_: int, log: dict[str, float], __: object, task=task) -> None:
                names = {"loss": "loss", "confidence": "confidence", "tau2": "τ2"}
                notes = [f"{names[key]} {log[key]:.3f}" for key in names if key in log]
                bar.update(task, advance=1, note="  ".join(notes))

            recipe = Recipe(epochs=epochs, batch_size=BATCH, learning_rate=rate)
            start = time.perf_counter()
            runs[method] = train(data, method, recipe, seed, on_epoch=show)
            seconds[method] = time.perf_counter() - start
            known, test = (encode(runs[method].encoder, part) for part in (data.train, data.test))
            scores[method] = {
                name: accuracy(predict(known, data.train.labels, test), data.test.labels)
                for name, predict in (
                    ("linear", linear_predictions),
                    ("knn", knn_predictions),
                    ("class mean", class_mean_predictions),
                )
            }
    return runs, scores, seconds


def meaning(scores: dict[str, dict[str, float]]) -> list[str]:
    """What the numbers say, in two lines; made from the numbers, whatever they are."""
    linear = {method: score["linear"] for method, score in scores.items()}
    gain = linear["VarCon memory"] - linear["VarCon"]
    what = (
        f"mends it: {100 * gain:+.1f} points on the linear probe"
        if gain > LUCK
        else f"costs {-100 * gain:.1f} points on the linear probe in this run"
        if gain < -LUCK
        else f"changes little in this run ({100 * gain:+.1f} points)"
    )
    best = max(linear, key=lambda method: linear[method])
    others = [
        f"{method} {100 * (linear['VarCon memory'] - linear[method]):+.1f}"
        for method in ("SupCon", "cross-entropy")
    ]
    level = [m for m in linear if m != best and linear[best] - linear[m] <= LUCK]
    return [
        f"A batch holds each of 100 classes less than once, so VarCon's centroids are little more "
        f"than the samples themselves; a memory of centroids {what}.",
        f"Best here: {best} ({100 * linear[best]:.1f} %)"
        + (f", with {' and '.join(level)} within {100 * LUCK:.0f} points" if level else "")
        + f"; VarCon memory against {', against '.join(others)} points. One seed: differences "
        f"under {100 * LUCK:.0f} points are luck.",
    ]


def _draw(
    runs: dict[str, Run], scores: dict[str, dict[str, float]], data: ImageData, path: Path
) -> Path:
    kept = data.test.labels // 10 == SHOWN_LEFT
    shown = Split(data.test.images[kept], data.test.labels[kept])
    right = shown.labels.numpy() % 10
    return plots.draw_quickstart(
        {method: flat_map(encode(run.encoder, shown)) for method, run in runs.items()},
        {
            method: f"{method}\n{100 * of['linear']:.1f} % linear\n{100 * of['knn']:.1f} % kNN"
            for method, of in scores.items()
        },
        right,
        data.class_names[10 * SHOWN_LEFT : 10 * SHOWN_LEFT + 10],
        [shown.images[right == digit][0, 0].numpy() for digit in range(10)],
        {method: run.history for method, run in runs.items()},
        path,
    )
