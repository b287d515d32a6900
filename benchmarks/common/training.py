"""One training run: the same encoder, augmentation, optimiser and schedule for every method."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.common.methods import Method, make_method
from benchmarks.common.tasks import DIM, Samples, Task
from varcon_loss import VarConLoss, backward_in_chunks

WARMUP_EPOCHS = 1.0
WEIGHT_DECAY = 1e-2
PRETRAINED_SHARE = 0.1  # of the learning rate, for weights that were trained before


@dataclass(frozen=True)
class Recipe:
    """Everything that makes a run, apart from task, method and seed."""

    epochs: int = 15
    batch_size: int = 256  # images; each is seen in `views`
    views: int = 2
    learning_rate: float = 1e-3
    temperature: float = 0.1
    weight: float = 1.0  # of a contrastive loss beside cross-entropy
    momentum: float | None = None  # of a memory, where not `methods.MOMENTUM`
    epsilon: float | None = None  # of VarCon, where not in proportion to the temperature
    chunk_size: int | None = None  # images a chunk, for VarCon in chunks


@dataclass
class Run:
    encoder: nn.Module
    method: Method
    losses: list[float]  # an entry an epoch: mean over its steps
    seconds: float
    cpu_seconds: float


def train(
    task: Task,
    method: str,
    recipe: Recipe,
    seed: int,
    *,
    device: str = "cpu",
    on_epoch: Callable[[float, nn.Module, Method], None] | None = None,
) -> Run:
    """Train an encoder of the task by ``method``, with AdamW and a cosine schedule.

    Args:
        task: its training samples are used, nothing else.
        method: a name in `methods.METHODS`.
        recipe: hyper-parameters.
        seed: of the initial weights, the order of samples and their views.
        device: where to train.
        on_epoch: called after each epoch with its mean loss, the encoder and the method.

    Raises:
        ValueError: chunks are asked of a method that has none.
    """
    torch.manual_seed(seed)
    encoder = task.make_encoder().to(device)
    objective = make_method(
        method,
        DIM,
        task.num_classes,
        temperature=recipe.temperature,
        weight=recipe.weight,
        momentum=recipe.momentum,
        epsilon=recipe.epsilon,
    ).to(device)
    backward = _backward(objective, recipe)
    count = len(task.train.labels)
    batch_size = min(recipe.batch_size, count)
    steps = round(count / batch_size)  # a last batch of half the size or more is kept
    optimizer = _optimizer(encoder, objective, recipe.learning_rate)
    total, warmup = recipe.epochs * steps, WARMUP_EPOCHS * steps
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            (step + 1) / (warmup + 1)
            if step < warmup
            else 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
        ),
    )
    losses = []
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(recipe.epochs):
        encoder.train()
        objective.train()
        mean = 0.0
        for rows in torch.randperm(count).split(batch_size)[:steps]:
            samples = task.train[rows]
            views = torch.cat([task.augmented(samples.inputs) for _ in range(recipe.views)])
            labels = samples.labels.repeat(recipe.views)
            optimizer.zero_grad(set_to_none=True)
            mean += float(backward(encoder, views.to(device), labels.to(device))) / steps
            optimizer.step()
            scheduler.step()
        losses.append(mean)
        if on_epoch is not None:
            on_epoch(mean, encoder, objective)
    return Run(
        encoder.eval(),
        objective.eval(),
        losses,
        time.perf_counter() - start,
        time.process_time() - cpu_start,
    )


def _backward(objective: Method, recipe: Recipe) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """What evaluates the loss of a batch, adds up gradients and gives the loss."""
    criterion = getattr(objective, "criterion", None)

    def in_chunks(encoder: nn.Module, views: Tensor, labels: Tensor) -> Tensor:
        size = recipe.views * (recipe.chunk_size or 0)
        return backward_in_chunks(encoder, criterion, views, labels, chunk_size=size)

    def at_once(encoder: nn.Module, views: Tensor, labels: Tensor) -> Tensor:
        loss = objective(encoder(views), labels)
        loss.backward()
        return loss.detach()

    if recipe.chunk_size is None:
        return at_once
    if not isinstance(criterion, VarConLoss):
        raise ValueError(f"only VarCon trains in chunks, got {type(objective).__name__}")
    return in_chunks


def _optimizer(encoder: nn.Module, objective: nn.Module, rate: float) -> torch.optim.Optimizer:
    pretrained = getattr(encoder, "pretrained", None)
    before = list(pretrained.parameters()) if pretrained is not None else []
    known = {id(p) for p in before}
    fresh = [p for p in (*encoder.parameters(), *objective.parameters()) if id(p) not in known]
    groups = [{"params": fresh, "lr": rate}]
    if before:
        groups.append({"params": before, "lr": PRETRAINED_SHARE * rate})
    return torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)


@torch.no_grad()
def embed(encoder: nn.Module, task: Task, samples: Samples, device: str = "cpu") -> Tensor:
    """Embeddings ``[N, D]`` of samples as they are, on the CPU; finite, so that any are scored."""
    encoder.eval()
    batches = samples.inputs.split(512)
    found = [encoder(task.clean(inputs).to(device)).float().cpu() for inputs in batches]
    return torch.cat(found).nan_to_num()
