# pyright: reportPrivateImportUsage=false
"""``varcon-timm probe CHECKPOINT DATA``: what frozen features are worth.

The second stage of the usual protocol: features of a trained timm model are computed once, without
augmentation, and read out by a fresh linear classifier and by nearest neighbours.
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.data import create_dataset, create_loader, resolve_data_config
from torch import Tensor, nn
from tqdm import tqdm


class Features(NamedTuple):
    """Frozen features of one split, on the CPU."""

    values: Tensor  # [N, F] float32
    labels: Tensor  # [N] int64


class Scores(NamedTuple):
    """Accuracies on the validation split, in percent."""

    top1: float
    top5: float
    knn: float


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="varcon-timm probe", description="Linear probe and kNN on frozen features."
    )
    add = parser.add_argument
    add("checkpoint", help="written by train.py, e.g. model_best.pth.tar")
    add("data", help="root of the data set, as for train.py")
    add("--model", help="name of the timm model; by default what the checkpoint records")
    add("--dataset", default="", help="as for train.py")
    add("--train-split", default="train")
    add("--val-split", default="validation")
    add("--img-size", type=int, help="by default the model's own")
    add("--batch-size", type=int, default=256)
    add("--workers", type=int, default=4)
    add("--epochs", type=int, default=100, help="of the classifier (default 100)")
    add("--lr", type=float, default=0.1, help="of the classifier (default 0.1)")
    add("--neighbours", type=int, default=20, help="k of kNN (default 20)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> Scores:
    """Read out a checkpoint and print top-1, top-5 and kNN."""
    args = _parse(arguments)
    torch.manual_seed(args.seed)
    model = _load(args.checkpoint, args.model).to(args.device).eval()
    splits = [extract(model, args, split) for split in (args.train_split, args.val_split)]
    train, validation = splits
    logits = probe(train, validation, epochs=args.epochs, lr=args.lr, device=args.device)
    found = neighbours(train, validation, args.neighbours) == validation.labels
    scores = Scores(
        top1=_accuracy(logits, validation.labels, 1),
        top5=_accuracy(logits, validation.labels, 5),
        knn=100 * float(found.float().mean()),
    )
    print(f"linear probe top-1 {scores.top1:.2f}  top-5 {scores.top5:.2f}  kNN {scores.knn:.2f}")
    return scores


def _load(checkpoint: str, name: str | None) -> nn.Module:
    if name is None:
        content = torch.load(checkpoint, map_location="cpu", weights_only=False)
        name = content.get("arch") if isinstance(content, dict) else None
        if name is None:
            raise SystemExit("varcon-timm probe: the checkpoint names no model: give --model")
    model = timm.create_model(name, checkpoint_path=None, num_classes=0)
    state = timm.models.load_state_dict(checkpoint, weights_only=False)
    wanted = set(model.state_dict())
    missing = wanted - set(state)
    if missing:
        raise SystemExit(
            f"varcon-timm probe: the checkpoint is not a {name}: it lacks {sorted(missing)[0]}"
        )
    model.load_state_dict({key: value for key, value in state.items() if key in wanted})
    return model


@torch.no_grad()
def extract(model: nn.Module, args: argparse.Namespace, split: str) -> Features:
    """Pre-logits features of every image of a split, without augmentation."""
    config = resolve_data_config({"img_size": args.img_size}, model=model)
    dataset = create_dataset(args.dataset, root=args.data, split=split, is_training=False)
    loader = create_loader(
        dataset,  # type: ignore[arg-type]
        config["input_size"],
        args.batch_size,
        is_training=False,
        use_prefetcher=False,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=config["crop_pct"],
        num_workers=args.workers,
        device=torch.device(args.device),
        persistent_workers=False,
    )
    values, labels = [], []
    for images, target in tqdm(loader, desc=f"features of {split}"):
        values.append(model(images.to(args.device)).flatten(1).float().cpu())
        labels.append(target)
    return Features(torch.cat(values), torch.cat(labels))


def probe(train: Features, validation: Features, *, epochs: int, lr: float, device: str) -> Tensor:
    """Logits ``[N, C]`` of a linear classifier trained on standardised features."""
    mean, deviation = train.values.mean(0), train.values.std(0).clamp_min(1e-6)
    num_classes = int(torch.maximum(train.labels.max(), validation.labels.max())) + 1
    classifier = nn.Linear(train.values.shape[1], num_classes).to(device)
    nn.init.zeros_(classifier.weight)
    optimizer = torch.optim.SGD(classifier.parameters(), lr, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in tqdm(range(epochs), desc="linear classifier"):
        for rows in torch.randperm(len(train.labels)).split(1024):
            batch = ((train.values[rows] - mean) / deviation).to(device)
            optimizer.zero_grad()
            F.cross_entropy(classifier(batch), train.labels[rows].to(device)).backward()
            optimizer.step()
        scheduler.step()
    with torch.no_grad():
        parts = ((validation.values - mean) / deviation).split(8192)
        return torch.cat([classifier(part.to(device)).cpu() for part in parts])


def neighbours(train: Features, validation: Features, k: int) -> Tensor:
    """Majority class ``[N]`` of the ``k`` most similar training images, by cosine similarity."""
    keys = F.normalize(train.values, dim=1)
    predictions = []
    for part in F.normalize(validation.values, dim=1).split(512):
        nearest = (part @ keys.T).topk(min(k, len(keys)), dim=1).indices
        predictions.append(train.labels[nearest].mode(dim=1).values)
    return torch.cat(predictions)


def _accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return 100 * float((best == labels.unsqueeze(1)).any(1).float().mean())
