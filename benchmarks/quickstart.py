"""What does VarCon learn, in two minutes? One small encoder trained four ways on real images."""

from pathlib import Path

import numpy as np
import torch
from sklearn.manifold import TSNE
from torch import Tensor, nn

from benchmarks.common import options, plots
from benchmarks.common.methods import Method, VarCon
from benchmarks.common.scores import class_means, linear_probe, nearest_mean
from benchmarks.common.tasks import Samples, Task, make_task
from benchmarks.common.terminal import console, print_table, progress_bar, written
from benchmarks.common.training import Recipe, Run, embed, train

BATCH = 64
METHODS = ("cross-entropy", "SupCon", "VarCon", "VarCon memory")
RATE = 1e-2  # the best of 1e-3, 3e-3 and 1e-2 on validation images, for each of them
READOUTS = {"linear": "linear probe, %", "mean": "nearest class mean, %"}
SHOWN_LEFT = 3  # the picture maps the ten classes 30 ... 39, which share their left digit
LUCK = 0.02  # two runs of one method that differ in nothing but the seed are this far apart
History = list[dict[str, float]]  # of each epoch


def command(
    epochs: options.Epochs = 12,
    seed: options.Seed = 0,
    out: options.Out = Path("runs/quickstart"),
) -> None:
    """Train a small CNN on pairs of MNIST digits by VarCon and its rivals, compare, and draw.

    100 classes in batches of 64: the case in which the methods differ most.
    """
    task = make_task("mnist-pairs")
    test = task.held_out["images", "test"]
    console.print(
        f"Two MNIST digits side by side: {task.num_classes} classes, {len(task.train.labels)} "
        f"training and {len(test.labels)} held-out images; batches of {BATCH}, two augmented "
        "views an image"
    )
    runs, histories = {}, {}
    recipe = Recipe(epochs=epochs, batch_size=BATCH, learning_rate=RATE)
    for method in METHODS:
        runs[method], histories[method] = _train(task, method, recipe, seed)
    scores = {method: _score(run, task, test) for method, run in runs.items()}
    print_table(
        "Held-out accuracy",
        ("method", *READOUTS.values(), "training time"),
        [
            (
                method,
                *(f"{100 * score[key]:.1f}" for key in READOUTS),
                f"{runs[method].seconds:.0f} s",
            )
            for method, score in scores.items()
        ],
    )
    for line in meaning(scores):
        console.print(line, soft_wrap=True)
    written(_draw(runs, histories, scores, task, test, out / "quickstart.png"))


def _train(task: Task, method: str, recipe: Recipe, seed: int) -> tuple[Run, History]:
    history: History = []
    watched = task.train[torch.arange(0, len(task.train.labels), 3)]
    with progress_bar() as bar:
        line = bar.add_task(f"{method:14}", total=recipe.epochs, note="")

        def watch(loss: float, encoder: nn.Module, objective: Method) -> None:
            seen = {"loss": loss}
            if isinstance(objective, VarCon):
                seen |= _terms(objective.eval(), embed(encoder, task, watched), watched.labels)
            history.append(seen)
            names = {"loss": "loss", "confidence": "confidence", "tau2": "τ2"}
            note = "  ".join(f"{names[key]} {value:.3f}" for key, value in seen.items())
            bar.update(line, advance=1, note=note)

        return train(task, method, recipe, seed, on_epoch=watch), history


def _terms(objective: VarCon, embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    terms = objective.criterion.terms(embeddings, labels)
    return {name: float(getattr(terms, name).mean()) for name in ("confidence", "tau2")}


def _score(run: Run, task: Task, test: Samples) -> dict[str, float]:
    known, found = embed(run.encoder, task, task.train), embed(run.encoder, task, test)
    means = class_means(known, task.train.labels, task.num_classes)
    probe = linear_probe(known, task.train.labels)
    return {
        "linear": float(probe.score(found.numpy(), test.labels.numpy())),
        "mean": float((nearest_mean(means, found) == test.labels).float().mean()),
    }


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
        f"under {100 * LUCK:.0f} points are luck, `python -m benchmarks evaluate` has intervals.",
    ]


def _draw(
    runs: dict[str, Run],
    histories: dict[str, History],
    scores: dict[str, dict[str, float]],
    task: Task,
    test: Samples,
    path: Path,
) -> Path:
    shown = test[test.labels // 10 == SHOWN_LEFT]
    right = shown.labels.numpy() % 10
    return plots.draw_quickstart(
        {method: _flat_map(embed(run.encoder, task, shown)) for method, run in runs.items()},
        {
            method: f"{method}\n{100 * of['linear']:.1f} % linear\n{100 * of['mean']:.1f} % mean"
            for method, of in scores.items()
        },
        right,
        [f"{SHOWN_LEFT}{digit}" for digit in range(10)],
        [shown.inputs[right == digit][0, 0].numpy() for digit in range(10)],
        histories,
        path,
    )


def _flat_map(embeddings: Tensor) -> np.ndarray:
    """``[N, 2]`` by t-SNE, whose axes mean nothing."""
    few = min(30.0, (len(embeddings) - 1) / 3)
    unit = nn.functional.normalize(embeddings, dim=1).numpy()
    return TSNE(init="pca", random_state=0, perplexity=few).fit_transform(unit)
