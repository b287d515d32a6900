"""Uses timm the way its train.py does, with nothing else: what the launcher is tested on."""

import argparse
import logging
import os

import torch
import yaml
from timm import utils
from timm.data import (
    AugMixDataset,
    FastCollateMixup,
    Mixup,
    create_dataset,
    create_loader,
    resolve_data_config,
)
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import create_model
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.task import ClassificationTask, resume_task_checkpoint

config_parser = argparse.ArgumentParser(add_help=False)
config_parser.add_argument("-c", "--config", default="")
parser = argparse.ArgumentParser()
parser.add_argument("data")
for name, default in (
    ("model", "resnet10t"), ("opt", "sgd"), ("lr", 0.05), ("weight-decay", 2e-5), ("momentum", 0.9),
    ("img-size", 32), ("interpolation", ""), ("train-split", "train"), ("val-split", "validation"),
    ("batch-size", 8), ("grad-accum-steps", 1), ("log-interval", 50), ("aug-splits", 0),
    ("epochs", 1), ("output", "out"), ("resume", ""), ("mixup", 0.0), ("cutmix", 0.0),
    ("mixup-prob", 1.0), ("mixup-switch-prob", 0.5), ("mixup-mode", "batch"),
    ("mixup-off-epoch", 0), ("smoothing", 0.1), ("dataset", ""),
):  # fmt: skip
    parser.add_argument(f"--{name}", type=type(default), default=default)
for name in ("layer-decay", "crop-pct"):
    parser.add_argument(f"--{name}", type=float)
for name in ("mean", "std", "cutmix-minmax"):
    parser.add_argument(f"--{name}", type=float, nargs="+")
for name in ("model-ema", "no-aug", "no-prefetcher", "jsd-loss", "bce-loss", "naflex-loader",
             "torchscript"):  # fmt: skip
    parser.add_argument(f"--{name}", action="store_true")
parser.add_argument("--num-classes", type=int)
parser.add_argument("--train-img-sizes", nargs="+", type=int)
parser.add_argument("--kd-model-name")
parser.add_argument("--gp")


def main():
    known, remaining = config_parser.parse_known_args()
    if known.config:
        with open(known.config) as file:
            parser.set_defaults(**yaml.safe_load(file))
    args = parser.parse_args(remaining)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.makedirs(args.output, exist_ok=True)
    with open(os.path.join(args.output, "args.yaml"), "w") as file:
        file.write(yaml.safe_dump(args.__dict__))
    torch.manual_seed(0)
    device = torch.device("cpu")
    model = create_model(args.model, num_classes=args.num_classes, global_pool=args.gp)
    args.num_classes = model.num_classes
    data = resolve_data_config(vars(args), model=model)
    dataset = create_dataset("", root=args.data, split=args.train_split, is_training=True)
    splits, collate, mixup = 0, None, None
    if args.aug_splits > 0:
        splits = args.aug_splits
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if mixes:
        settings = {
            "mixup_alpha": args.mixup, "cutmix_alpha": args.cutmix, "prob": args.mixup_prob,
            "cutmix_minmax": args.cutmix_minmax, "switch_prob": args.mixup_switch_prob,
            "mode": args.mixup_mode, "label_smoothing": args.smoothing,
            "num_classes": args.num_classes,
        }  # fmt: skip
        if args.no_prefetcher:
            mixup = Mixup(**settings)
        else:
            assert not splits
            collate = FastCollateMixup(**settings)
    if splits > 1:
        dataset = AugMixDataset(dataset, num_splits=splits)
    loader = create_loader(
        dataset, data["input_size"], args.batch_size, is_training=True, num_workers=1,
        device=device, mean=data["mean"], std=data["std"], interpolation=data["interpolation"],
        num_aug_splits=splits, use_prefetcher=not args.no_prefetcher, persistent_workers=False,
        collate_fn=collate,
    )  # fmt: skip
    if mixes:
        criterion = SoftTargetCrossEntropy()
    elif args.smoothing:
        criterion = LabelSmoothingCrossEntropy(smoothing=args.smoothing)
    else:
        criterion = torch.nn.CrossEntropyLoss()
    task = ClassificationTask(model=model, criterion=criterion, device=device)
    optimizer = create_optimizer_v2(task.get_trainable_module(), **optimizer_kwargs(cfg=args))
    if args.resume:
        resume_task_checkpoint(task, args.resume, optimizer=optimizer)
    if args.model_ema:
        task.setup_ema(decay=0.9)
    saver = utils.CheckpointSaver(
        model=model, optimizer=optimizer, args=args, checkpoint_dir=args.output,
        recovery_dir=args.output, task=task,
    )  # fmt: skip
    for epoch in range(args.epochs):
        if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
            if not args.no_prefetcher and loader.mixup_enabled:
                loader.mixup_enabled = False
            elif mixup is not None:
                mixup.mixup_enabled = False
        task.get_trainable_module().train()
        losses = utils.AverageMeter()
        for input, target in loader:
            if mixup is not None:
                input, target = mixup(input, target)
            result = task(input, target)
            loss = result["loss"]
            loss /= 1.0
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            task.update_ema(step=epoch)
            losses.update(loss.item(), len(input))
            print(f"batch {len(input)} {type(task).__name__}")
        task.get_eval_model().eval()(torch.zeros(2, *data["input_size"]))
        utils.update_summary(
            epoch, {"loss": losses.avg}, {"loss": 0.0}, os.path.join(args.output, "summary.csv"),
            write_header=epoch == 0,
        )  # fmt: skip
        saver.save_checkpoint(epoch, metric=losses.avg)


if __name__ == "__main__":
    main()
