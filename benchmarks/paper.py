"""The paper's CIFAR-100 recipe, ready for the owner of a GPU."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from benchmarks.common import options, results
from benchmarks.common.data import ImageData
from benchmarks.common.terminal import console, progress_bar, written
from benchmarks.common.training import Recipe, encode, train

# Sections 5 and appendix of arXiv 2506.07413. `loss_scale` reproduces the gradient of the authors'
# 8-GPU script, which is 1/8 of the true one (docs/distributed.md).
CIFAR100 = Recipe(
    epochs=200,
    batch_size=1024,
    learning_rate=0.5,
    warmup_epochs=10,
    momentum=0.9,
    weight_decay=1e-4,
    views=2,
    dim=128,
    temperature=0.1,
    epsilon=0.02,
    encoder="cifar-resnet50",
    loss_scale=1 / 8,
)
PROBE_EPOCHS = 100


def command(
    root: Annotated[Path, typer.Option(help="folder with torchvision's CIFAR-100 files")],
    epochs: options.Epochs = CIFAR100.epochs,
    batch_size: Annotated[int, typer.Option(min=2, help="images a step")] = CIFAR100.batch_size,
    probe_epochs: Annotated[int, typer.Option(min=1, help="of the probe")] = PROBE_EPOCHS,
    seed: options.Seed = 0,
    device: options.Device = "cuda",
    out: options.Out = Path("runs/paper"),
) -> None:
    """The paper's CIFAR-100 recipe: ResNet-50, 200 epochs, then a linear probe. Wants a GPU."""
    options.require(device)
    data = options.loaded("cifar100", root)
    with progress_bar() as bar:
        task = bar.add_task("CIFAR-100", total=epochs, note="")

        def show(_: int, log: dict[str, float], __: object) -> None:
            bar.update(task, advance=1, note=f"loss {log['loss']:.3f} τ2 {log['tau2']:.3f}")

        row = reproduce(
            data,
            seed=seed,
            device=device,
            epochs=epochs,
            batch_size=batch_size,
            probe_epochs=probe_epochs,
            on_epoch=show,
        )
    console.print(f"top-1 of the linear probe: {row['top1']:.2%}")
    saved = results.save("paper-cifar100", [row], results.environment(device), out)
    written(saved, saved.with_suffix(".csv"))


def reproduce(
    data: ImageData,
    *,
    seed: int,
    device: str,
    epochs: int = CIFAR100.epochs,
    batch_size: int = CIFAR100.batch_size,
    probe_epochs: int = PROBE_EPOCHS,
    on_epoch: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Train by the recipe, then a linear probe on frozen features; test accuracy of the probe."""
    recipe = replace(
        CIFAR100,
        epochs=epochs,
        batch_size=batch_size,
        warmup_epochs=min(CIFAR100.warmup_epochs, epochs / 2),
    )
    run = train(data, "VarCon", recipe, seed, device=device, on_epoch=on_epoch)
    features, test = encode(run.encoder, data.train, device), encode(run.encoder, data.test, device)
    top1 = linear_probe(
        features, data.train.labels, test, data.test.labels, epochs=probe_epochs, device=device
    )
    return {**recipe.as_dict(), "seed": seed, "collapsed": run.collapsed, "top1": top1}


def linear_probe(
    features: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, *, epochs: int, device: str
) -> float:
    """SGD on standardised features ``[N, F]``: top-1 on ``test``."""
    mean, deviation = features.mean(0), features.std(0).clamp_min(1e-6)
    features, test = ((x - mean) / deviation for x in (features, test))
    features, test, labels = features.to(device), test.to(device), labels.to(device)
    classifier = nn.Linear(features.shape[1], int(labels.max()) + 1).to(device)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), device=device).split(1024):
            optimizer.zero_grad()
            F.cross_entropy(classifier(features[batch]), labels[batch]).backward()
            optimizer.step()
        scheduler.step()
    with torch.no_grad():
        return float((classifier(test).argmax(1).cpu() == test_labels).float().mean())
