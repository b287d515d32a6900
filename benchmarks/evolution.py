"""How do embeddings and temperatures come to be? The paper's figures 4 and 5, in small."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from torch import nn

from benchmarks.common import options, plots, results
from benchmarks.common.data import ImageData
from benchmarks.common.readouts import accuracy, flat_map, knn_predictions
from benchmarks.common.terminal import print_table, progress_bar, written
from benchmarks.common.training import Recipe, Run, encode, train

METHODS = ("VarCon", "SupCon")
SHOWN_IMAGES = 1000


def command(
    data: options.Data = "mnist5k",
    epochs: options.Epochs = 10,
    batch_size: Annotated[int, typer.Option(min=2, help="images a step")] = 256,
    learning_rate: Annotated[float, typer.Option(help="the same for both methods")] = 0.15,
    snapshots: Annotated[str, typer.Option(help="epochs after which to look")] = "1,2,5,10",
    seed: options.Seed = 0,
    root: options.Root = None,
    device: options.Device = "cpu",
    out: options.Out = Path("runs/evolution"),
) -> None:
    """t-SNE of held-out images and the density of τ2 while VarCon and SupCon train."""
    options.require(device)
    wanted = options.integers(snapshots)
    if not all(1 <= epoch <= epochs for epoch in wanted):
        raise typer.BadParameter(f"snapshots must lie in 1 ... {epochs}, got {snapshots}")
    images = options.loaded(data, root)
    recipe = Recipe(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate)
    with progress_bar() as bar:
        task = bar.add_task("evolution", total=epochs * len(METHODS), note="")
        rows, picture = follow(
            images, recipe, seed, wanted, out,
            lambda method, epoch: bar.update(task, advance=1, note=f"{method} epoch {epoch + 1}"),
            device=device,
        )  # fmt: skip
    print_table(
        f"{data}: means over an epoch, and kNN on held-out images after it",
        ("method", "epoch", "loss", "confidence", "τ2", "kNN, %"),
        [
            (
                row["method"], row["epoch"], f"{row['loss']:.3f}",
                *(f"{row[key]:.3f}" if key in row else None for key in ("confidence", "tau2")),
                f"{100 * row['knn']:.1f}",
            )
            for row in rows
            if "knn" in row
        ],
    )  # fmt: skip
    env = results.environment(device) | {"seed": seed, **recipe.as_dict()}
    saved = results.save(f"evolution-{data}", rows, env, out)
    written(saved, saved.with_suffix(".csv"), picture)


def follow(
    data: ImageData,
    recipe: Recipe,
    seed: int,
    snapshots: Sequence[int],
    out: Path,
    on_epoch: Callable[[str, int], None] = lambda method, epoch: None,
    *,
    device: str = "cpu",
) -> tuple[list[dict[str, Any]], Path]:
    """Train by each of `METHODS`, look at held-out features after some epochs, draw.

    Args:
        data: the features shown are of its test split.
        recipe: the same for all methods.
        seed: of weights, order and augmentation.
        snapshots: epochs after which to look, counted from 1.
        out: folder of ``evolution-DATA.png``.
        on_epoch: told the method and the epoch just ended.
        device: where to train.

    Returns:
        a row for each method and epoch (what was logged, and kNN accuracy at snapshots), and the
        path of the picture.
    """
    maps: dict[str, dict[int, np.ndarray]] = {}
    runs: dict[str, Run] = {}
    rows = []
    for method in METHODS:
        maps[method] = {}

        def look(epoch: int, log: dict[str, float], encoder: nn.Module, method=method) -> None:
            row = {"data": data.name, "method": method, "epoch": epoch + 1, **log}
            if epoch + 1 in snapshots:
                held_out = encode(encoder, data.test, device)
                maps[method][epoch + 1] = flat_map(held_out[:SHOWN_IMAGES])
                known = encode(encoder, data.train, device)
                predictions = knn_predictions(known, data.train.labels, held_out)
                row["knn"] = accuracy(predictions, data.test.labels)
            rows.append(row)
            on_epoch(method, epoch)

        runs[method] = train(data, method, recipe, seed, on_epoch=look, device=device)
    epsilon = 0.02 if recipe.epsilon is None else recipe.epsilon
    picture = plots.draw_evolution(
        maps,
        data.test.labels[:SHOWN_IMAGES].numpy(),
        data.class_names,
        {epoch: runs["VarCon"].tau2[epoch - 1].flatten().numpy() for epoch in maps["VarCon"]},
        (recipe.temperature - epsilon, recipe.temperature + epsilon),
        out / f"evolution-{data.name}.png",
    )
    return rows, picture
