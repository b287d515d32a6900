"""``varcon-timm train.py ... --loss varcon``: timm's own, unmodified ``train.py`` with VarCon.

The launcher takes ``--loss varcon`` out of the command line, adds its ``--varcon-`` flags to the
script's parser, puts `VarConTask` where the script finds ``timm.task.ClassificationTask``, and runs
the script as ``python train.py`` would. Without ``--loss varcon`` it only runs the script.
"""

import argparse
import difflib
import os
import re
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

PROGRAM = "varcon-timm"
TRAIN_PY = "train.py is in github.com/huggingface/pytorch-image-models, at the tag of your timm"

FLAGS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "temperature": (0.1, {"type": float, "metavar": "T"}, "tau1"),
    "epsilon": (0.02, {"type": float, "metavar": "E"}, "how far the confidence moves tau2"),
    "dim": (128, {"type": int, "metavar": "D"}, "embedding width"),
    "head": ("mlp-bn", {"choices": ("mlp-bn", "mlp", "linear")}, "projection head"),
    "views": (2, {"type": int, "choices": (1, 2)}, "augmented views an image, all in one step"),
    "probe_weight": (1.0, {"type": float, "metavar": "W"}, "weight of the online probe's loss"),
    "leave_one_out": (False, {}, "centroids without the sample itself"),
    "global_centroids": (False, {}, "centroids over all ranks; a memory implies it"),
    "centroid_momentum": (None, {"type": float, "metavar": "M"}, "remember centroids, 0 <= M < 1"),
}

# What VarCon has no meaning with: flags, the values that are refused, and why or what to do.
REFUSED: tuple[tuple[str, Callable[[Any], object], str], ...] = (
    ("mixup cutmix cutmix_minmax", bool, "VarCon trains on images that are not mixed, drop it"),
    ("jsd_loss bce_loss", bool, "VarCon replaces it, drop it"),
    ("kd_model_name", bool, "distillation builds another task, drop it"),
    ("task", lambda v: v != "classification", "VarCon is single-label, drop it"),
    ("naflex_loader torchscript", bool, "not supported, drop it"),
    ("num_classes", lambda v: v == 0, "the probe needs a classifier, give the number"),
    ("smoothing", lambda v: not 0 <= v < 1, "a share, give 0 or more and less than 1"),
    ("aug_splits", bool, "--varcon-views makes the views, drop it"),
    ("varcon_views", lambda v: v not in (1, 2), "give 1 or 2"),
)
REFUSED_WITH_TWO_VIEWS: tuple[tuple[str, Callable[[Any], object], str], ...] = (
    ("no_aug no_prefetcher train_img_sizes", bool, "drop it, or use --varcon-views 1"),
    ("dataset", re.compile("(?i)(tfds|wds|hfids)(/|$)").match, "iterable, use --varcon-views 1"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``varcon-timm`` and ``python -m varcon_loss.integrations.timm_train``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        usage = f"{PROGRAM} path/to/train.py [its own arguments] --loss varcon [--varcon-...]"
        parser = _Parser(prog=PROGRAM, usage=usage, epilog=f"{TRAIN_PY}.", add_help=False)
        _add_flags(parser)
        parser.print_help()
        raise SystemExit(0 if arguments else 2)
    script = Path(arguments[0])
    if arguments[0] == "probe":
        stop("the probe is a recipe of 30 lines: docs/timm.md, 'Reading out a checkpoint'")
    if not script.is_file():
        stop(f"no such script: {script}; it comes first, its flags after it; {TRAIN_PY}")
    text = script.read_text(encoding="utf-8", errors="replace")
    with tempfile.TemporaryDirectory(prefix=PROGRAM) as folder:
        with_varcon, rest = _read_command_line(arguments[1:], text, Path(folder))
        if with_varcon and not ("ClassificationTask" in text and "get_trainable_module" in text):
            stop(f"{script} builds no ClassificationTask of timm 1.0.27 or newer; {TRAIN_PY}")
        (_run_with_varcon if with_varcon else _run)(script, rest)


def stop(message: object) -> NoReturn:
    """End with one line and exit code 2."""
    print(f"{PROGRAM}: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def _errors_in_one_line(start: str = "") -> Iterator[None]:
    try:
        yield
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        stop(f"{start}{error}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        stop(f"{message} (see {PROGRAM} --help)")


def _add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("VarCon, with --loss varcon")
    for name, (default, kind, text) in FLAGS.items():
        kind = kind or {"action": argparse.BooleanOptionalAction}
        flag = f"--varcon-{name.replace('_', '-')}"
        group.add_argument(flag, default=default, help=f"{text} (default {default})", **kind)


def _read_command_line(arguments: list[str], text: str, folder: Path) -> tuple[bool, list[str]]:
    """Whether VarCon was asked for, and the script's arguments without that."""
    parser = _Parser(prog=PROGRAM, add_help=False)
    parser.add_argument("-c", "--config", default="")
    parser.add_argument("--loss")
    known, rest = parser.parse_known_args(arguments)
    path, config = known.config, _read_config(known.config) if known.config else {}
    loss = str(known.loss or config.get("loss", ""))
    slip = re.search(r"(?i)(?<!\S)--?lo?s\S*[ =]varc\S*", " ".join(rest))
    if slip or (loss != "varcon" and difflib.get_close_matches(loss.lower(), ["varcon"])):
        stop(f"{slip[0] if slip else f'--loss {loss}'}: did you mean --loss varcon?")
    recorded, keys = config.get("loss") == "varcon", [k for k in config if k.startswith("varcon")]
    if loss != "varcon":
        flags = [word.partition("=")[0] for word in rest if re.match("--(no-)?varcon", word)]
        unasked = flags if recorded else flags + keys
        if unasked:
            stop(f"{', '.join(unasked)} without --loss varcon: add --loss varcon, or drop it")
        if known.loss and not re.search("""['"]--loss['"]""", text):
            stop(f"--loss {loss}: this script has no --loss of its own; give --loss varcon")
        rest += ["--loss", loss] if known.loss else []
    if recorded:
        import yaml

        # The script may refuse the name; the two splits of a recorded run are the launcher's doing.
        dropped = ["loss", "aug_splits"] + ([] if loss == "varcon" else keys)
        config = {key: value for key, value in config.items() if key not in dropped}
        path = str(folder / Path(path).name)
        Path(path).write_text(yaml.safe_dump(config), encoding="utf-8")
    return loss == "varcon", [*rest, *(["--config", path] if path else [])]


def _read_config(path: str) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        return {str(key): value for key, value in content.items()}
    except (AttributeError, OSError, ValueError, yaml.YAMLError) as error:
        stop(f"cannot read 'name: value' lines from the config {path}: {error}")


def _run(script: Path, arguments: Sequence[str]) -> None:
    """As ``python script arguments`` would."""
    before = sys.argv, sys.path[0]
    sys.argv, sys.path[0] = [str(script), *arguments], str(script.resolve().parent)
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv, sys.path[0] = before


def _run_with_varcon(script: Path, arguments: Sequence[str]) -> None:
    """With our parser, task, two-view data set and summary where the script finds timm's."""
    with _errors_in_one_line():
        from varcon_loss.integrations import timm_task
    import timm.data.dataset
    import timm.task.classification
    import timm.utils.summary

    given: dict[str, Any] = {}  # what the script parsed
    tasks: list[timm_task.VarConTask] = []
    plain_summary = timm.utils.summary.update_summary
    plain_init = argparse.ArgumentParser.__init__
    plain_parse = argparse.ArgumentParser.parse_known_args

    def init(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        plain_init(parser, *args, **kwargs)
        if parser.add_help:  # the script's; its parser of -c alone has no help
            _add_flags(parser)

    def parse_known_args(parser: Any, args: Any = None, namespace: Any = None) -> Any:
        namespace, extras = plain_parse(parser, args, namespace)
        if not given and hasattr(namespace, "model"):
            _adopt(namespace)
            given.update(vars(namespace))
        return namespace, extras

    class VarConTask(timm_task.VarConTask):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            every = given.get("log_interval", 50) * max(1, given.get("grad_accum_steps", 1))
            options = {name: given[f"varcon_{name}"] for name in FLAGS if name != "views"}
            with _errors_in_one_line():
                super().__init__(*args, log_interval=every, **options, **kwargs)
            tasks.append(self)

        def load_task_state(self, *args: Any, **kwargs: Any) -> None:
            with _errors_in_one_line("cannot resume with other --varcon- flags: "):
                super().load_task_state(*args, **kwargs)

    def update_summary(epoch: Any, train_metrics: Any, *args: Any, **kwargs: Any) -> Any:
        check_trained()
        return plain_summary(epoch, {**train_metrics, **tasks[0].pop_means()}, *args, **kwargs)

    def check_trained() -> None:
        if not tasks:
            stop("the script built no ClassificationTask: nothing was trained with VarCon")
        if not tasks[0].steps:
            stop(
                f"no step was trained: with --epochs {given.get('epochs')}, and batches of "
                f"{given.get('batch_size')} of which none was full; use a smaller --batch-size"
            )

    with ExitStack() as stack:
        for name, ours, *owners in (
            ("__init__", init, argparse.ArgumentParser),
            ("parse_known_args", parse_known_args, argparse.ArgumentParser),
            ("error", _Parser.error, argparse.ArgumentParser),
            ("ClassificationTask", VarConTask, timm.task, timm.task.classification),
            ("AugMixDataset", timm_task.TwoViews, timm.data, timm.data.dataset),
            ("update_summary", update_summary, timm.utils, timm.utils.summary),
        ):
            for owner in owners:
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, ours)
        try:
            _run(script, arguments)
        except SystemExit as end:
            if end.code or not given:  # its own error, or its --help
                raise
    if not (tasks and given.get("resume")):  # a finished run has no epoch left
        check_trained()


def _adopt(namespace: argparse.Namespace) -> None:
    """Refuse what cannot be combined; say and record what runs."""
    given, views = vars(namespace), namespace.varcon_views
    refused = [
        f"--{name.replace('_', '-')} ({why})"
        for names, refuses, why in REFUSED + (REFUSED_WITH_TWO_VIEWS if views == 2 else ())
        for name in names.split()
        if given.get(name) is not None and refuses(given[name])
    ]
    ours = [name.removeprefix("varcon_") for name in given if name.startswith("varcon")]
    refused += [f"--varcon-{name} (no such flag)" for name in ours if name not in FLAGS]
    if refused:
        stop(f"cannot be combined with --loss varcon: {'; '.join(refused)}")
    read = {"loss": given.get("loss")}

    class Arguments(argparse.Namespace):
        """What the script reads and what is recorded: ``loss`` is the probe's, or ``varcon``.

        Run again without the launcher, the script refuses that record.
        """

        # A property is found before the instance's __dict__, which is what gets recorded.
        loss = property(lambda _: read["loss"], lambda _, value: read.update(loss=value))

        def __reduce__(self) -> Any:
            return argparse.Namespace, (), self.__dict__  # checkpoints hold a plain one

    given.update(loss="varcon", aug_splits=views if views > 1 else 0)
    namespace.__class__ = Arguments
    if os.environ.get("RANK", "0") == "0":
        print(f"{PROGRAM}: a step sees {views} x {given.get('batch_size')} images on each rank")


if __name__ == "__main__":
    main()
