# pyright: reportPrivateImportUsage=false
"""``varcon-timm probe CHECKPOINT DATA``: what frozen features are worth.

The second stage of the usual protocol: features of a trained timm model are computed once, without
augmentation, and read out by a fresh linear classifier and by nearest neighbours.
"""

import argparse
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.data import create_dataset, create_loader, resolve_data_config
from torch import Tensor, nn
from tqdm import tqdm

from varcon_loss.integrations.timm_checkpoint import read_checkpoint, rebuild
from varcon_loss.integrations.timm_flags import Parser, stop

# What changes the pixels that a model sees, or which images those are: by default as in training.
_PREPROCESSING = ("input_size", "img_size", "mean", "std", "crop_pct", "interpolation")
_DATA = ("dataset", "train_split", "val_split", "class_map", "input_img_mode", "input_key",
         "target_key", "train_num_samples", "val_num_samples")  # fmt: skip


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
    parser = Parser(
        prog="varcon-timm probe",
        description="Linear probe and kNN on frozen features. What is not said is as the "
        "checkpoint's training had it.",
    )
    add = parser.add_argument
    add("checkpoint", help="written by train.py, e.g. model_best.pth.tar")
    add("data", help="root of the data set, as for train.py")
    add("--model", help="name of the timm model")
    add("--dataset", help="as for train.py")
    add("--train-split")
    add("--val-split")
    add("--class-map", help="as for train.py")
    add("--img-size", type=int)
    add("--mean", type=float, nargs="+")
    add("--std", type=float, nargs="+")
    add("--crop-pct", type=float)
    add("--interpolation")
    add("--batch-size", type=int, default=256)
    add("--workers", type=int, default=4)
    add("--epochs", type=int, default=100, help="of the classifier (default 100)")
    add("--lr", type=float, default=0.1, help="of the classifier (default 0.1)")
    add("--neighbours", type=int, default=20, help="k of kNN (default 20)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--unsafe-load", action="store_true", help="also read files that may run code")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> Scores:
    """Read out a checkpoint and print top-1, top-5 and kNN."""
    args = _parse(arguments)
    if os.path.isdir(args.checkpoint) and os.path.isfile(args.data):
        stop(f"the checkpoint comes first: varcon-timm probe {args.data} {args.checkpoint}")
    torch.manual_seed(args.seed)
    checkpoint = read_checkpoint(args.checkpoint, unsafe=args.unsafe_load)
    recorded = checkpoint.args
    settings = _settings(args, recorded)
    name = args.model or recorded.get("model") or checkpoint.arch
    model = rebuild(checkpoint, name).to(args.device).eval()
    try:
        config = resolve_data_config(settings, model=model)
    except AssertionError:
        stop("mean and std are one number, or one for each channel of the images")
    datasets = _datasets(args.data, settings)
    counts = ", ".join(f"{len(dataset)} of {split}" for split, dataset in datasets.items())
    print(f"model {name}: {checkpoint.weights} of {args.checkpoint}")
    print(f"images of {_image(config)}" + ("" if recorded else ": the model's own, none recorded"))
    print(f"data {args.data} ({settings['dataset'] or 'folders'}): {counts}")
    train, validation = (
        extract(model, dataset, config, args, split) for split, dataset in datasets.items()
    )
    logits = probe(train, validation, epochs=args.epochs, lr=args.lr, device=args.device)
    found = neighbours(train, validation, args.neighbours) == validation.labels
    scores = Scores(
        top1=_accuracy(logits, validation.labels, 1),
        top5=_accuracy(logits, validation.labels, 5),
        knn=100 * float(found.float().mean()),
    )
    print(f"linear probe top-1 {scores.top1:.2f}  top-5 {scores.top5:.2f}  kNN {scores.knn:.2f}")
    return scores


def _settings(args: argparse.Namespace, recorded: dict[str, Any]) -> dict[str, Any]:
    """What the user said, else what training had."""
    settings = {name: recorded.get(name) for name in (*_PREPROCESSING, *_DATA)}
    if args.img_size is not None:
        settings["input_size"] = None  # would win
    settings |= {
        name: value for name in settings if (value := getattr(args, name, None)) is not None
    }
    settings["in_chans"] = recorded.get("in_chans")
    settings["dataset"] = settings["dataset"] or ""
    settings["train_split"] = settings["train_split"] or "train"
    settings["val_split"] = settings["val_split"] or "validation"
    return settings


def _datasets(root: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Split name -> data set; it is an error if a folder of a split is missing or differs."""
    datasets: dict[str, Any] = {}
    channels = settings["in_chans"] or (settings["input_size"] or [3])[0]
    if not settings["dataset"] and not os.path.exists(root):
        stop(f"no such data set: {root}")
    for part in ("train", "val"):
        split = settings[f"{part}_split"]
        try:
            datasets[split] = create_dataset(
                settings["dataset"],
                root=root,
                split=split,
                is_training=False,
                class_map=settings["class_map"] or "",  # type: ignore[arg-type]
                input_img_mode=settings["input_img_mode"] or ("RGB" if channels == 3 else "L"),
                input_key=settings["input_key"],
                target_key=settings["target_key"],
                num_samples=settings[f"{part}_num_samples"],
            )
        except Exception as error:  # each kind of data set raises its own
            stop(f"cannot read the {split} images of {root}: {error}")
    readers = [getattr(dataset, "reader", None) for dataset in datasets.values()]
    for split, reader in zip(datasets, readers, strict=True):
        # timm reads all of a folder where it does not find the one of a split.
        if os.path.isdir(root) and str(getattr(reader, "root", "")) == str(root):
            stop(f"{root} has no folder for the split {split}: give the folder above train and "
                 "validation, or --train-split and --val-split")  # fmt: skip
    classes = [set(getattr(reader, "class_to_idx", None) or ()) for reader in readers]
    only = sorted(classes[0] ^ classes[-1])
    if only:
        stop(f"the splits of {root} have different classes, so that their numbers would differ: "
             f"{only[0]} is in one only; give --class-map")  # fmt: skip
    if len(datasets) == 1:
        stop(f"training and validation split are the same: {settings['train_split']}")
    return datasets


@torch.no_grad()
def extract(
    model: nn.Module, dataset: Any, config: dict[str, Any], args: argparse.Namespace, split: str
) -> Features:
    """Pre-logits features of every image of a data set, without augmentation."""
    loader = create_loader(
        dataset,
        config["input_size"],
        args.batch_size,
        is_training=False,
        use_prefetcher=True,  # as train.py: it also fits mean and std to the channels
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
        features = model.forward_features(images)  # type: ignore[operator]
        embeddings = model.forward_head(features, pre_logits=True)  # type: ignore[operator]
        values.append(embeddings.flatten(1).float().cpu())
        labels.append(target.cpu())
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


def _image(config: dict[str, Any]) -> str:
    size = "x".join(map(str, config["input_size"]))
    mean, std = (" ".join(f"{v:.4g}" for v in config[name]) for name in ("mean", "std"))
    crop, interpolation = config["crop_pct"], config["interpolation"]
    return f"{size}, crop {crop:g} {interpolation}, mean {mean}, std {std}"
