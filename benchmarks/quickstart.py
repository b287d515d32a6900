"""Train one small encoder three ways on real images, and look at what it learned."""

import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table
from sklearn.manifold import TSNE

from benchmarks.data import ImageData, load
from benchmarks.progress import progress_bar
from benchmarks.readouts import (
    accuracy,
    centroid_predictions,
    knn_predictions,
    linear_predictions,
)
from benchmarks.training import Recipe, Run, encode, train

METHODS = ("VarCon", "VarCon memory", "SupCon", "cross-entropy")


def quickstart(
    out: Path, *, epochs: int, seed: int, console: Console
) -> dict[str, dict[str, float]]:
    """Train with each of `METHODS`, print held-out accuracies, save ``quickstart.png``.

    Returns:
        kNN and linear-probe accuracy on the held-out images, by method.
    """
    data = load("digits")
    recipe = Recipe(epochs=epochs, batch_size=256)
    console.print(
        f"scikit-learn's digits: {len(data.train.labels)} training and {len(data.test.labels)} "
        f"held-out images of {data.num_classes} classes; two augmented views an image"
    )
    runs: dict[str, Run] = {}
    table = Table(
        "method", "kNN", "linear probe", "centroids", "training time", title="Held-out accuracy"
    )
    scores: dict[str, dict[str, float]] = {}
    with progress_bar() as bar:
        for method in METHODS:
            task = bar.add_task(f"{method:14}", total=epochs, note="")

            def show(_: int, log: dict[str, float], __: object, task=task) -> None:
                note = "  ".join(
                    f"{name} {log[key]:.3f}"
                    for name, key in (
                        ("loss", "loss"),
                        ("confidence", "confidence"),
                        ("τ2", "tau2"),
                    )
                    if key in log
                )
                bar.update(task, advance=1, note=note)

            start = time.perf_counter()
            runs[method] = train(data, method, recipe, seed, on_epoch=show)
            seconds = time.perf_counter() - start
            scores[method] = _score(runs[method], data)
            cells = [
                f"{scores[method][name]:.1%}" if name in scores[method] else ""
                for name in ("knn", "linear", "centroids")
            ]
            mark = " (collapsed)" if runs[method].collapsed else ""
            table.add_row(method + mark, *cells, f"{seconds:.0f} s")
    console.print(table)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "quickstart.png"
    _draw(runs, data, path)
    console.print(f"Embeddings, τ2 and confidence over training: {path}")
    return scores


def _score(run: Run, data: ImageData) -> dict[str, float]:
    features, held_out = encode(run.encoder, data.train), encode(run.encoder, data.test)
    predictions = {
        "knn": knn_predictions(features, data.train.labels, held_out),
        "linear": linear_predictions(features, data.train.labels, held_out),
        "centroids": centroid_predictions(run.objective, held_out),
    }
    return {
        name: accuracy(predicted, data.test.labels)
        for name, predicted in predictions.items()
        if predicted is not None
    }


def _draw(runs: dict[str, Run], data: ImageData, path: Path) -> None:
    figure, axes = plt.subplots(1, len(runs) + 1, figsize=(4.2 * (len(runs) + 1), 4))
    for axis, (method, run) in zip(axes, runs.items(), strict=False):
        points = TSNE(init="pca", random_state=0).fit_transform(
            encode(run.encoder, data.test).numpy()
        )
        axis.scatter(*points.T, c=data.test.labels, cmap="tab10", s=8)
        axis.set(title=f"{method}: held-out images", xticks=[], yticks=[])
    history = runs["VarCon"].history
    axis = axes[-1]
    axis.plot([log["confidence"] for log in history], color="tab:blue")
    axis.set(title="VarCon while training", xlabel="epoch", ylim=(0, 1.02))
    axis.set_ylabel("confidence $p(y|z)$", color="tab:blue")
    twin = axis.twinx()
    twin.plot([log["tau2"] for log in history], color="tab:orange")
    twin.set_ylabel(r"$\tau_2$", color="tab:orange")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
