"""Does the authors' CIFAR-100 recipe give their number? Their settings, on any device.

Settings are those of `main_varcon.py`, `main_linear.py` and their README in
github.com/ziwenwang28/VarContrast. One process with the whole batch differs from their eight in one
thing: BatchNorm sees 2048 views at once and not 256. `torchrun --nproc_per_node=8 -m benchmarks
paper` is theirs to the last setting.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import kornia.augmentation as augmentation
import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common import options, results
from benchmarks.common.data import cifar_arrays
from benchmarks.common.encoders import CifarResNet50, SmallCNN
from benchmarks.common.terminal import console, progress_bar, written
from varcon_loss import ProjectionHead, VarConLoss

MEAN, DEVIATION = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


@dataclass(frozen=True)
class PaperRecipe:
    """The authors' settings; what is changed on the command line is not theirs any more."""

    encoder: str = "resnet50 for 32 x 32"  # or small-cnn
    head: str = "mlp"  # Linear, ReLU, Linear: no BatchNorm
    hidden_dim: int = 2048
    dim: int = 128
    temperature: float = 0.1
    epsilon: float = 0.02
    views: int = 2
    crop_scale: tuple[float, float] = (0.2, 1.0)
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_probability: float = 0.8
    greyscale_probability: float = 0.2
    epochs: int = 200
    batch_size: int = 1024  # images over all processes; theirs are 8 with 128 each
    learning_rate: float = 0.5
    warmup_epochs: int = 10
    warmup_from: float = 0.01
    floor: float = 0.1**3  # of the cosine, as a share of the learning rate
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    mixed_precision: bool = True  # float16 on CUDA
    synchronised_batch_norm: bool = False
    # Their script differentiates the mean over all rows on every process and then averages over
    # 8 of them, each of which holds an eighth of the gradient (docs/distributed.md).
    loss_scale: float = 1 / 8
    probe_epochs: int = 100
    probe_batch_size: int = 1024
    probe_learning_rate: float = 5.0
    probe_decay_epochs: tuple[int, ...] = (60, 75, 90)
    probe_decay: float = 0.2
    probe_momentum: float = 0.9
    probe_weight_decay: float = 0.0

    def rate(self, epoch: int, step: int, steps: int) -> float:
        """The learning rate of step ``step`` out of ``steps`` in an epoch counted from 1."""

        def cosine(at: float) -> float:
            low = self.learning_rate * self.floor
            share = (1 + math.cos(math.pi * at / self.epochs)) / 2
            return low + (self.learning_rate - low) * share

        if epoch > self.warmup_epochs:
            return cosine(epoch)
        done = (step + (epoch - 1) * steps) / (self.warmup_epochs * steps)
        return self.warmup_from + done * (cosine(self.warmup_epochs) - self.warmup_from)

    def probe_rate(self, epoch: int) -> float:
        """The probe's learning rate in an epoch counted from 1."""
        passed = sum(epoch > at for at in self.probe_decay_epochs)
        return self.probe_learning_rate * self.probe_decay**passed


AUTHORS = PaperRecipe()


def command(
    root: Annotated[
        Path | None, typer.Option(help="folder with torchvision's CIFAR-100 files")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="print the recipe as JSON, and end")] = False,
    epochs: options.Epochs = AUTHORS.epochs,
    batch_size: Annotated[int, typer.Option(min=2, help="images a step")] = AUTHORS.batch_size,
    probe_epochs: Annotated[int, typer.Option(min=1, help="of it")] = AUTHORS.probe_epochs,
    true_gradient: Annotated[
        bool, typer.Option("--true-gradient", help="not an eighth of it, as in their script")
    ] = False,
    head: Annotated[str, typer.Option(help="mlp is theirs; mlp-bn cannot collapse")] = AUTHORS.head,
    sync_batch_norm: Annotated[
        bool, typer.Option("--sync-batch-norm", help="BatchNorm over all processes")
    ] = False,
    seed: options.Seed = 0,
    device: options.Device = "cuda",
    out: options.Out = Path("runs/paper"),
) -> None:
    """The authors' CIFAR-100 recipe: ResNet-50, 200 epochs, then a linear probe. Wants a GPU.

    Several processes: torchrun --nproc_per_node=8 -m benchmarks paper --root FOLDER. An interrupted
    run goes on after its last whole epoch when the same command is given again.
    """
    recipe = replace(
        AUTHORS,
        epochs=epochs,
        batch_size=batch_size,
        probe_epochs=probe_epochs,
        loss_scale=1.0 if true_gradient else AUTHORS.loss_scale,
        head=head,
        synchronised_batch_norm=sync_batch_norm,
    )
    if show:
        print(json.dumps(asdict(recipe), indent=2))
        return
    options.require(device)
    if root is None:
        raise typer.BadParameter("--root is needed: the folder of torchvision's CIFAR-100 files")
    try:
        train, test = cifar_arrays("cifar100", root)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    in_group = "WORLD_SIZE" in os.environ
    if in_group:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    row = reproduce(train, test, recipe, seed=seed, device=device, out=out)
    if not in_group or dist.get_rank() == 0:
        console.print(
            f"top-1 of the linear probe on the test images: {row['top1']:.2%} after its last epoch "
            f"({row['best_top1']:.2%} after its best one, which is what the authors' script prints "
            "and is a choice on the test images)"
        )
        saved = results.save("paper-cifar100", [row], results.environment(device), out)
        written(saved, saved.with_suffix(".csv"), out / "checkpoint.pt")
    if in_group:
        dist.destroy_process_group()


Images = tuple[Tensor, Tensor]  # [N, 3, 32, 32] uint8, [N] int64


class Model(nn.Module):
    def __init__(self, recipe: PaperRecipe) -> None:
        super().__init__()
        self.encoder = SmallCNN(3) if recipe.encoder == "small-cnn" else CifarResNet50(3)
        width = self.encoder.out_dim
        self.head = ProjectionHead(width, recipe.dim, recipe.head, recipe.hidden_dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))


def reproduce(
    train: Images, test: Images, recipe: PaperRecipe, *, seed: int, device: str, out: Path
) -> dict[str, Any]:
    """Train by the recipe in this process or its group, then a linear probe on frozen features.

    Returns:
        the recipe, and ``top1`` of the probe on ``test`` after its last epoch, ``best_top1`` after
        its best.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    first = ranks == 1 or dist.get_rank() == 0
    model = _trained(train, recipe, seed=seed, device=device, path=out / "checkpoint.pt")
    row: dict[str, Any] = {**asdict(recipe), "seed": seed, "processes": ranks}
    if first:
        scores = probe(model.encoder, train, test, recipe, seed=seed, device=device)
        row |= {"top1": scores[-1], "best_top1": max(scores)}
    if ranks > 1:
        dist.barrier()
    return row


def _trained(train: Images, recipe: PaperRecipe, *, seed: int, device: str, path: Path) -> Model:
    grouped = dist.is_initialized() and dist.get_world_size() > 1
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
    torch.manual_seed(seed)
    model = Model(recipe)
    if recipe.synchronised_batch_norm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(device)
    network = DistributedDataParallel(model) if grouped else model
    criterion = VarConLoss(
        temperature=recipe.temperature,
        epsilon=recipe.epsilon,
        num_classes=int(train[1].max()) + 1,
        process_group="world" if grouped else None,
    )
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
    )
    mixed = recipe.mixed_precision and device == "cuda"
    scaler = torch.amp.GradScaler(device, enabled=mixed)
    augment = make_views(recipe, colours=True).to(device)
    images, labels = train[0].to(device), train[1].to(device)
    start = 0
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        if state["recipe"] != _plain(recipe) or state["seed"] != seed:
            raise ValueError(f"{path} is of another recipe or seed: name another --out")
        start = state["epoch"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    local = recipe.batch_size // ranks
    steps = len(labels) // (local * ranks)
    with progress_bar() as bar:
        task = bar.add_task("training", total=recipe.epochs, completed=start, note="")
        for epoch in range(start + 1, recipe.epochs + 1):
            model.train()
            total = 0.0
            # Seeded by the epoch: a run that goes on draws what it would have drawn.
            order = torch.randperm(len(labels), generator=_generator(seed, epoch))
            torch.manual_seed(hash((seed, epoch, rank)) % 2**31)
            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = recipe.rate(epoch, step, steps)
                at = (step * ranks + rank) * local
                batch = order[at : at + local].to(device)
                views = torch.cat([augment(images[batch] / 255) for _ in range(recipe.views)])
                with torch.autocast(device, enabled=mixed):
                    loss = criterion(network(views), labels[batch].repeat(recipe.views))
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss * recipe.loss_scale).backward()
                scaler.step(optimizer)
                scaler.update()
                total += float(loss.detach()) / steps
            if rank == 0:
                _keep(path, model, optimizer, scaler, recipe, seed, epoch)
            rate = recipe.rate(epoch, 0, steps)
            bar.update(task, advance=1, note=f"loss {total:.3f}  learning rate {rate:.3f}")
    return model


def _keep(
    path: Path, model: nn.Module, optimizer: Any, scaler: Any, recipe: PaperRecipe, seed: int,
    epoch: int,
) -> None:  # fmt: skip
    """Write the checkpoint beside the old one first: a crash leaves one of them whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "recipe": _plain(recipe), "seed": seed, "epoch": epoch, "model": model.state_dict(),
        "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
    }  # fmt: skip
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def _plain(recipe: PaperRecipe) -> str:
    """Without the probe, which may be repeated with other settings."""
    return json.dumps({k: v for k, v in asdict(recipe).items() if not k.startswith("probe")})


def _generator(*seeds: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(seeds) % 2**31)


def make_views(recipe: PaperRecipe, *, colours: bool) -> nn.Module:
    """Images in 0 ... 1 to an augmented, standardised view, drawn for each image on its own."""
    changes: list[nn.Module] = [
        augmentation.RandomResizedCrop((32, 32), scale=recipe.crop_scale),
        augmentation.RandomHorizontalFlip(p=0.5),
    ]
    if colours:
        changes.append(augmentation.ColorJitter(*recipe.jitter, p=recipe.jitter_probability))
        changes.append(augmentation.RandomGrayscale(p=recipe.greyscale_probability))
    return nn.Sequential(*changes, augmentation.Normalize(MEAN, DEVIATION))


def probe(
    encoder: nn.Module, train: Images, test: Images, recipe: PaperRecipe, *, seed: int, device: str
) -> list[float]:
    """Top-1 on ``test`` after each epoch of a linear classifier on the frozen encoder."""
    encoder.eval()
    augment = make_views(recipe, colours=False).to(device)
    standardise = augmentation.Normalize(MEAN, DEVIATION).to(device)
    torch.manual_seed(seed)
    classifier = nn.Linear(encoder.out_dim, int(train[1].max()) + 1).to(device)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(
        classifier.parameters(),
        lr=recipe.probe_learning_rate,
        momentum=recipe.probe_momentum,
        weight_decay=recipe.probe_weight_decay,
    )
    images, labels = train[0].to(device), train[1].to(device)
    size = min(recipe.probe_batch_size, len(labels))
    with torch.no_grad():
        parts = test[0].split(512)
        held_out = torch.cat([encoder(standardise(x.to(device) / 255)) for x in parts])
    scores = []
    with progress_bar() as bar:
        task = bar.add_task("probe", total=recipe.probe_epochs, note="")
        for epoch in range(1, recipe.probe_epochs + 1):
            for group in optimizer.param_groups:
                group["lr"] = recipe.probe_rate(epoch)
            order = torch.randperm(len(labels), generator=_generator(seed, -epoch))
            for batch in order[: len(order) // size * size].split(size):
                batch = batch.to(device)
                with torch.no_grad():
                    features = encoder(augment(images[batch] / 255))
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(classifier(features), labels[batch]).backward()
                optimizer.step()
            with torch.no_grad():
                right = classifier(held_out).argmax(1).cpu() == test[1]
            scores.append(float(right.float().mean()))
            bar.update(task, advance=1, note=f"top-1 {scores[-1]:.2%}")
    return scores
