"""One training run: the same encoder, augmentation, optimiser and schedule for every method."""

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from benchmarks.common.data import ImageData, Split
from benchmarks.common.encoders import CifarResNet50, SmallCNN, make_augmentation
from benchmarks.common.methods import MIXABLE, make_objective

COLLAPSE_EPOCHS = 3  # a run counts as collapsed if its last epochs all read so


@dataclass(frozen=True)
class Recipe:
    """Everything that makes a run, apart from data, method and seed."""

    epochs: int = 20
    batch_size: int = 256
    learning_rate: float = 0.2
    warmup_epochs: float = 2.0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    views: int = 2
    dim: int = 64
    head: str = "mlp-bn"
    temperature: float = 0.1
    epsilon: float | None = None  # the method's own where None
    centroid_momentum: float | None = None  # likewise
    augmentation: str = "default"  # or weak, strong
    mixup: float = 0.0  # alpha; each view of a batch is mixed on its own
    encoder: str = "small-cnn"
    loss_scale: float = 1.0  # the authors' 8-GPU script trains with 1 / 8

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass
class Run:
    encoder: nn.Module
    objective: nn.Module
    history: list[dict[str, float]]  # one entry an epoch: means of what the steps logged
    tau2: list[Tensor]  # per-sample tau2 of the last batch of each epoch, where there is one
    collapsed: bool


def train(
    data: ImageData,
    method: str,
    recipe: Recipe,
    seed: int,
    *,
    labels: Tensor | None = None,
    device: str = "cpu",
    on_epoch: Callable[[int, dict[str, float], nn.Module], None] | None = None,
) -> Run:
    """Train an encoder by ``method``.

    Args:
        data: its training split is used, nothing else.
        method: a name in `methods.METHODS`.
        recipe: hyper-parameters.
        seed: of the initial weights, the order of images and the augmentation.
        labels: ``[N]`` instead of the training labels (label noise).
        device: where to train.
        on_epoch: called after each epoch with its number, its log and the encoder.

    Raises:
        ValueError: a method that cannot be trained on mixed images is asked to be.
    """
    if recipe.mixup and method not in MIXABLE:
        raise ValueError(f"mixup needs one of {', '.join(MIXABLE)}, got {method!r}")
    torch.manual_seed(seed)
    channels = data.train.images.shape[1]
    make = {"small-cnn": SmallCNN, "cifar-resnet50": CifarResNet50}[recipe.encoder]
    encoder = make(channels).to(device, memory_format=torch.channels_last)  # convolves faster
    options = {"temperature": recipe.temperature}
    for name in ("epsilon", "centroid_momentum"):
        if getattr(recipe, name) is not None:
            options[name] = getattr(recipe, name)
    objective = make_objective(
        method, encoder.out_dim, data.num_classes, dim=recipe.dim, head=recipe.head, **options
    ).to(device)
    augment = make_augmentation(flips=data.flips, strength=recipe.augmentation)
    mix = v2.MixUp(alpha=recipe.mixup, num_classes=data.num_classes) if recipe.mixup else None

    images = data.train.images.to(device)
    labels = (data.train.labels if labels is None else labels).to(device)
    batch_size = min(recipe.batch_size, len(images))
    steps_per_epoch = len(images) // batch_size
    optimizer = torch.optim.SGD(
        [*encoder.parameters(), *objective.parameters()],
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.momentum > 0,
    )
    total, warmup = recipe.epochs * steps_per_epoch, recipe.warmup_epochs * steps_per_epoch
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            (step + 1) / warmup
            if step < warmup
            else 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
        ),
    )

    history, tau2, collapsed_epochs = [], [], 0
    for epoch in range(recipe.epochs):
        encoder.train()
        objective.train()
        said: dict[str, list[float]] = {}
        collapsed_steps = 0
        last_tau2 = None
        for batch in torch.randperm(len(images))[: steps_per_epoch * batch_size].split(batch_size):
            batch = batch.to(device)
            views = [(augment(images[batch]), labels[batch]) for _ in range(recipe.views)]
            if mix is not None:
                views = [mix(*view) for view in views]
            pictures, targets = map(torch.cat, zip(*views, strict=True))
            step = objective(encoder(pictures), targets)
            optimizer.zero_grad(set_to_none=True)
            (step.loss * recipe.loss_scale).backward()
            optimizer.step()
            scheduler.step()
            collapsed_steps += step.collapsed
            last_tau2 = step.tau2
            for key, value in step.log.items():
                said.setdefault(key, []).append(value)
        means = {key: statistics.fmean(values) for key, values in said.items()}
        history.append(means)
        collapsed_epochs = collapsed_epochs + 1 if 2 * collapsed_steps > steps_per_epoch else 0
        if last_tau2 is not None:
            tau2.append(last_tau2.cpu())
        if on_epoch is not None:
            on_epoch(epoch, means, encoder)
    collapsed = collapsed_epochs >= min(COLLAPSE_EPOCHS, recipe.epochs)
    collapsed = collapsed or not math.isfinite(history[-1]["loss"])
    return Run(encoder, objective, history, tau2, collapsed)


@torch.no_grad()
def encode(encoder: nn.Module, split: Split, device: str = "cpu") -> Tensor:
    """Features ``[N, F]`` of a split, without augmentation, on the CPU."""
    encoder.eval()
    batches = split.images.split(512)
    return torch.cat([encoder(images.to(device)).cpu() for images in batches])
