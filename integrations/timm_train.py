"""``varcon-timm train.py ... --loss varcon``: timm's own, unmodified ``train.py`` with VarCon.

The launcher takes its own flags out of the command line, puts `VarConTask` where the script finds
``timm.task.ClassificationTask``, and runs the script as ``python train.py`` would. Without
``--loss varcon`` it only runs the script.
"""

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

PROGRAM = "varcon-timm"
OLDEST_TIMM = (1, 0, 27)

# Flags of train.py that VarCon has no meaning with: name, what is refused, what to change.
_SOFT_TARGETS = "VarCon needs one class an image"
_REFUSED: tuple[tuple[str, Any, str], ...] = (
    ("mixup", lambda v: float(v) > 0, f"{_SOFT_TARGETS}: use --mixup 0"),
    ("cutmix", lambda v: float(v) > 0, f"{_SOFT_TARGETS}: use --cutmix 0"),
    ("cutmix_minmax", bool, f"{_SOFT_TARGETS}: drop --cutmix-minmax"),
    ("jsd_loss", bool, "VarCon replaces it: drop --jsd-loss"),
    ("bce_loss", bool, "VarCon replaces it: drop --bce-loss"),
    ("kd_model_name", bool, "distillation builds another task: drop --kd-model-name"),
    ("naflex_loader", bool, "its batches are dictionaries: drop --naflex-loader"),
    ("torchscript", bool, "the probe's hook cannot be scripted: drop --torchscript"),
    ("task", lambda v: v not in (None, "classification"), "VarCon is single-label: drop --task"),
    ("num_classes", lambda v: v is not None and int(v) == 0, "the probe needs a classifier"),
)
_REFUSED_WITH_VIEWS: tuple[tuple[str, Any, str], ...] = (
    ("no_aug", bool, "two views would be identical: drop --no-aug or use --varcon-views 1"),
    ("no_prefetcher", bool, "drop --no-prefetcher or use --varcon-views 1"),
    ("train_img_sizes", bool, "drop --train-img-sizes or use --varcon-views 1"),
)


def _flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} path/to/train.py [its own arguments] --loss varcon [--varcon-...]\n"
        f"       {PROGRAM} probe CHECKPOINT DATA [--help]",
        description="Run timm's train.py with VarCon. Every other flag keeps its meaning.",
        allow_abbrev=False,
        add_help=False,
    )
    add = parser.add_argument
    add("--loss", help="'varcon', or whatever your train.py knows")
    add("--varcon-temperature", type=float, default=0.1, metavar="T", help="tau1 (default 0.1)")
    add("--varcon-epsilon", type=float, default=0.02, metavar="E", help="default 0.02")
    add("--varcon-dim", type=int, default=128, metavar="D", help="embedding width (default 128)")
    add("--varcon-head", choices=("mlp-bn", "mlp", "linear"), default="mlp-bn",
        help="projection head (default mlp-bn, which starts most reliably)")  # fmt: skip
    add("--varcon-views", type=int, choices=(1, 2), default=2,
        help="augmented views an image; a step then sees that many images (default 2)")  # fmt: skip
    add("--varcon-probe-weight", type=float, default=1.0, metavar="W",
        help="weight of the online linear probe's loss (default 1)")  # fmt: skip
    add("--varcon-leave-one-out", action="store_true", help="centroids without the sample itself")
    add("--varcon-global-centroids", action="store_true", help="centroids over all ranks")
    add("--varcon-centroid-momentum", type=float, metavar="M",
        help="remember centroids (an extension), 0 <= M < 1; off by default")  # fmt: skip
    return parser


def _stop(message: str) -> NoReturn:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    raise SystemExit(2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``varcon-timm`` and ``python -m varcon_loss.integrations.timm_train``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _flags()
    if not arguments or arguments[0] in ("-h", "--help"):
        parser.print_help()
        raise SystemExit(0 if arguments else 2)
    if arguments[0] == "probe":
        _check_timm()
        from varcon_loss.integrations import timm_probe

        timm_probe.main(arguments[1:])
        return
    script = Path(arguments[0])
    if not script.is_file():
        _stop(f"no such script: {script}; give the path of timm's train.py first")
    config = _read_config(arguments[1:])
    known = {action.dest for action in parser._actions}
    parser.set_defaults(**{k: v for k, v in config.items() if k in known})
    if config.get("varcon"):
        parser.set_defaults(loss="varcon")
    flags, rest = parser.parse_known_args(arguments[1:])
    strays = [a for a in rest if a.startswith("--varcon")]
    if strays:
        _stop(f"unknown flag {strays[0]}: see {PROGRAM} --help")
    if flags.loss != "varcon":
        _run(script, arguments[1:])
        return
    _check_timm()
    _check_script(script)
    _check_flags(flags)
    launch = _Launch(flags)
    launch.install()
    _run(script, rest)
    launch.finish()


def _read_config(arguments: Sequence[str]) -> dict[str, Any]:
    """The YAML file that train.py's ``-c`` names, if any."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config")
    path = parser.parse_known_args(list(arguments))[0].config
    if not path:
        return {}
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text()) or {}
    except OSError as error:
        _stop(f"cannot read the config {path}: {error}")


def _check_timm() -> None:
    try:
        version = metadata.version("timm")
    except metadata.PackageNotFoundError:
        _stop("timm is not installed: pip install 'varcon-loss[timm]'")
    numbers = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
    if numbers < OLDEST_TIMM:
        _stop(f"timm {version} is too old: pip install 'timm>=1.0.27'")


def _check_script(script: Path) -> None:
    text = script.read_text(encoding="utf-8", errors="replace")
    if "ClassificationTask" not in text:
        _stop(f"{script} builds no timm task: use train.py of timm 1.0.27 or newer")
    if "get_trainable_module" not in text:
        _stop(f"{script} would leave the projection head untrained: use train.py of timm >= 1.0.27")


def _check_flags(flags: argparse.Namespace) -> None:
    import varcon_loss

    try:
        varcon_loss.VarConLoss(
            flags.varcon_temperature,
            flags.varcon_epsilon,
            num_classes=2,
            feature_dim=flags.varcon_dim,
            leave_one_out=flags.varcon_leave_one_out,
            centroid_momentum=flags.varcon_centroid_momentum,
        )
    except (TypeError, ValueError) as error:
        _stop(str(error))


class _TwoViews:
    """Dataset wrapper: each image under the whole training transform, twice, independently."""

    def __init__(self, dataset: Any, num_splits: int = 2) -> None:
        self.dataset = dataset
        self.num_splits = num_splits
        self._transforms: Any = None

    @property
    def transform(self) -> Any:
        return self.dataset.transform

    @transform.setter
    def transform(self, transforms: Any) -> None:
        # timm splits a transform in three for AugMix; a view is all three in turn.
        self._transforms = transforms
        self.dataset.transform = None

    def __getitem__(self, index: int) -> tuple[tuple[Any, ...], Any]:
        image, target = self.dataset[index]
        return tuple(self._view(image) for _ in range(self.num_splits)), target

    def _view(self, image: Any) -> Any:
        steps = self._transforms
        for step in steps if isinstance(steps, (list, tuple)) else (steps,):
            image = image if step is None else step(image)
        return image

    def __len__(self) -> int:
        return len(self.dataset)


class _Launch:
    """What the launcher changes inside timm while the script runs."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.flags = flags
        self.task: Any = None

    def install(self) -> None:
        import timm.data
        import timm.data.dataset
        import timm.task
        import timm.task.classification
        import timm.utils
        import timm.utils.summary

        # Imported before timm is patched: VarConTask extends the real ClassificationTask.
        from varcon_loss.integrations import timm_task

        launch = self

        def make_task(*args: Any, **kwargs: Any) -> Any:
            launch.task = launch.make_task(timm_task.VarConTask, *args, **kwargs)
            return launch.task

        timm.task.ClassificationTask = make_task
        timm.task.classification.ClassificationTask = make_task  # type: ignore[assignment]
        if self.flags.varcon_views > 1:
            timm.data.AugMixDataset = _TwoViews  # type: ignore[assignment, misc]
            timm.data.dataset.AugMixDataset = _TwoViews  # type: ignore[assignment, misc]

        plain_summary = timm.utils.update_summary

        def update_summary(epoch: Any, train_metrics: Any, *args: Any, **kwargs: Any) -> Any:
            if launch.task is not None:
                train_metrics = {**train_metrics, **launch.task.pop_means()}
            return plain_summary(epoch, train_metrics, *args, **kwargs)

        timm.utils.update_summary = update_summary
        timm.utils.summary.update_summary = update_summary
        self._watch_parser()

    def make_task(self, task_class: Any, *args: Any, **kwargs: Any) -> Any:
        flags = self.flags
        return task_class(
            *args,
            **kwargs,
            temperature=flags.varcon_temperature,
            epsilon=flags.varcon_epsilon,
            dim=flags.varcon_dim,
            head=flags.varcon_head,
            probe_weight=flags.varcon_probe_weight,
            leave_one_out=flags.varcon_leave_one_out,
            global_centroids=flags.varcon_global_centroids,
            centroid_momentum=flags.varcon_centroid_momentum,
        )

    def _watch_parser(self) -> None:
        """See the script's parsed arguments once: refuse, add ours, ask for two views."""
        plain = argparse.ArgumentParser.parse_args
        launch = self

        def parse_args(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
            namespace = plain(parser, *args, **kwargs)
            if hasattr(namespace, "model") and hasattr(namespace, "opt"):
                argparse.ArgumentParser.parse_args = plain  # type: ignore[method-assign]
                launch.adopt(namespace)
                _restore_own_loss(parser, namespace)
            return namespace

        argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign, assignment]

    def adopt(self, namespace: argparse.Namespace) -> None:
        """Refuse what cannot be combined; record our flags beside the script's own."""
        views = self.flags.varcon_views
        for name, refuse, advice in _REFUSED + (_REFUSED_WITH_VIEWS if views > 1 else ()):
            if hasattr(namespace, name) and (value := getattr(namespace, name)) and refuse(value):
                _stop(f"--{name.replace('_', '-')} cannot be combined with --loss varcon: {advice}")
        if getattr(namespace, "num_classes", None) == 0:
            _stop("--num-classes 0 leaves no classifier for the probe: give the number of classes")
        dataset = str(getattr(namespace, "dataset", "") or "")
        if views > 1 and dataset.split("/")[0] in ("tfds", "wds", "hfids"):
            _stop(f"--dataset {dataset} is iterable and has no two views: use --varcon-views 1")
        splits = int(getattr(namespace, "aug_splits", 0) or 0)
        if splits not in (0, views):
            _stop(f"--aug-splits {splits} cannot be combined with --loss varcon: --varcon-views "
                  "makes the views")  # fmt: skip
        for name, value in vars(self.flags).items():
            if name != "loss":
                setattr(namespace, name, value)
        namespace.varcon = True  # what `-c args.yaml` is recognised by
        if views > 1:
            namespace.aug_splits = views
            if int(os.environ.get("RANK", "0")) == 0:
                batch = getattr(namespace, "batch_size", None)
                print(f"{PROGRAM}: two views an image: a step of batch size {batch} sees "
                      f"{views} x {batch} images")  # fmt: skip

    def finish(self) -> None:
        if self.task is None:
            _stop("the script ended without building a ClassificationTask: nothing was trained "
                  "with VarCon")  # fmt: skip


def _restore_own_loss(parser: argparse.ArgumentParser, namespace: argparse.Namespace) -> None:
    """A script with a ``--loss`` of its own (timm >= 1.0.31) takes the probe's loss from it."""
    own = next((action for action in parser._actions if action.dest == "loss"), None)
    if own is None:
        namespace.loss = "varcon"
    elif namespace.loss == "varcon":  # from a config
        namespace.loss = next(iter(own.choices), None) if own.choices else None


def _run(script: Path, arguments: Sequence[str]) -> None:
    """As ``python script arguments`` would."""
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
