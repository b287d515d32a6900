"""What the launcher changes inside timm while a script runs, and which of its flags it refuses."""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import timm.data
import timm.data.dataset
import timm.data.mixup
import timm.task
import timm.task.classification
import timm.utils
import timm.utils.summary
from timm.data.loader import fast_collate
from timm.data.mixup import FastCollateMixup, Mixup

from varcon_loss.integrations.timm_flags import PROGRAM, stop
from varcon_loss.integrations.timm_task import MIXUP_MODES, VarConTask

# Flags of train.py that VarCon has no meaning with: name, what is refused, why and what to do.
_Refusals = tuple[tuple[str, Callable[[Any], bool], str], ...]
_REFUSED: _Refusals = (
    ("jsd_loss", bool, "VarCon replaces it, drop it"),
    ("bce_loss", bool, "VarCon replaces it, drop it"),
    ("kd_model_name", bool, "distillation builds another task, drop it"),
    ("naflex_loader", bool, "its batches are dictionaries, drop it"),
    ("torchscript", bool, "the probe's hook cannot be scripted, drop it"),
    ("task", lambda v: v != "classification", "VarCon is single-label, drop it"),
    ("num_classes", lambda v: int(v) == 0, "the probe needs a classifier, give the number"),
    ("smoothing", lambda v: not 0 <= v < 1, "a share, give 0 or more and less than 1"),
    ("varcon_smoothing", lambda v: not 0 <= v < 1, "a share, give 0 or more and less than 1"),
)
_REFUSED_WITH_VIEWS: _Refusals = (
    ("no_aug", bool, "two views would be identical, drop it or use --varcon-views 1"),
    ("no_prefetcher", bool, "drop it or use --varcon-views 1"),
    ("train_img_sizes", bool, "drop it or use --varcon-views 1"),
    ("dataset", lambda v: v.split("/")[0].lower() in ("tfds", "wds", "hfids"),
     "it is iterable and has no two views, use --varcon-views 1"),
)  # fmt: skip


_REFUSED_WITH_MIXING: _Refusals = (
    ("batch_size", lambda v: v % 2 == 1, "mixing pairs images, give an even number"),
    ("train_batch_sizes", lambda v: any(size % 2 for size in v),
     "mixing pairs images, give even numbers"),
    ("mixup_mode", lambda v: v not in MIXUP_MODES, f"give one of {', '.join(MIXUP_MODES)}"),
    ("cutmix_minmax", lambda v: len(v) != 2, "give two numbers, the smallest and largest share"),
)  # fmt: skip
_REFUSED_WITH_SHARES: _Refusals = (
    ("varcon_leave_one_out", bool, "an image of several classes has none to be left out of, drop "
     "it, or the mixing and --varcon-smoothing"),
)  # fmt: skip


class TwoViews(timm.data.dataset.AugMixDataset):
    """Dataset wrapper: each image under the whole training transform, twice, independently."""

    def __init__(self, dataset: Any, num_splits: int = 2) -> None:
        self.dataset = dataset
        self.num_splits = num_splits
        self._transforms: Any = None

    @property
    def transform(self) -> Any:
        return self.dataset.transform

    @transform.setter
    def transform(self, x: Any) -> None:
        # timm splits a transform in three for AugMix; a view is all three in turn.
        self._transforms = x
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


class Launch:
    """One run of a script with VarCon."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.flags = flags
        self.arguments: argparse.Namespace | None = None  # the script's, once it has parsed them
        self.task: VarConTask | None = None
        self.mixup: Mixup | None = None  # of the script's settings, once it has made its own

    def task_class(self) -> type[VarConTask]:
        """What the script finds as ``ClassificationTask``: a class, as it may derive from it."""
        launch = self

        class LaunchedTask(VarConTask):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                try:
                    super().__init__(*args, **kwargs, **launch.task_options())
                except ValueError as error:
                    stop(error)
                launch.task = self

            def load_task_state(self, state: Any, *args: Any, **kwargs: Any) -> None:
                misfits = self.misfits(state or {})
                if misfits:
                    changes = "; ".join(
                        f"--varcon-{name.replace('_', '-')} was {_shown(was)}, is {_shown(now)}"
                        for name, (was, now) in misfits.items()
                    )
                    stop(f"cannot resume with other flags: {changes}; give the former, or start "
                         "from the model alone by --initial-checkpoint instead of --resume",
                    )  # fmt: skip
                super().load_task_state(state, *args, **kwargs)

        LaunchedTask.__name__ = LaunchedTask.__qualname__ = VarConTask.__name__
        return LaunchedTask

    def task_options(self) -> dict[str, Any]:
        """What `VarConTask` is made with."""
        if self.arguments is None:
            stop("the script builds its task before it parses its arguments, so that nothing can "
                 "be checked: use timm's train.py")  # fmt: skip
        flags = self.flags
        if _mixes(self.arguments) and self.mixup is None:
            stop("the script builds its task before it sets up mixup, so that nothing would be "
                 "mixed: use timm's train.py")  # fmt: skip
        updates = getattr(self.arguments, "log_interval", None)
        accumulated = int(getattr(self.arguments, "grad_accum_steps", None) or 1)
        return {
            "temperature": flags.varcon_temperature,
            "epsilon": flags.varcon_epsilon,
            "dim": flags.varcon_dim,
            "head": flags.varcon_head,
            "probe_weight": flags.varcon_probe_weight,
            "leave_one_out": flags.varcon_leave_one_out,
            "global_centroids": flags.varcon_global_centroids,
            "centroid_momentum": flags.varcon_centroid_momentum,
            "log_interval": 50 if updates is None else int(updates) * max(1, accumulated),
            "mixup": self.mixup,
            "views": flags.varcon_views,
            "smoothing": flags.varcon_smoothing,
        }

    def mixing_class(self) -> type[FastCollateMixup]:
        """What the script finds as ``Mixup`` and ``FastCollateMixup``.

        It takes the script's settings, and its word on when mixing ends, and mixes nothing: the
        task does that, where the views are batches of their own.
        """
        launch = self

        class LaunchedMixing(FastCollateMixup):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                self.of_task = launch.mixup = Mixup(*args, **kwargs)
                super().__init__(*args, **kwargs)

            @property
            def mixup_enabled(self) -> bool:
                return self.of_task.mixup_enabled

            @mixup_enabled.setter
            def mixup_enabled(self, x: bool) -> None:
                self.of_task.mixup_enabled = x

            def __call__(self, batch: Any, target: Any = None) -> Any:
                return fast_collate(batch) if target is None else (batch, target)

            def __reduce__(self) -> Any:
                return _plain_collate, ()  # all that a loader's workers need of it

        return LaunchedMixing

    def adopt(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace) -> None:
        """Refuse what cannot be combined; record our flags beside the script's own."""
        self.arguments = namespace
        refused = self._refused(namespace)
        if refused:
            stop(f"cannot be combined with --loss varcon: {'; '.join(refused)}")
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        first = int(os.environ.get("RANK", "0")) == 0
        flags, views = self.flags, self.flags.varcon_views
        if flags.varcon_centroid_momentum is not None and not flags.varcon_global_centroids:
            if ranks > 1 and first:
                print(f"{PROGRAM}: --varcon-centroid-momentum over {ranks} ranks implies "
                      "--varcon-global-centroids: ranks remember the same")  # fmt: skip
            flags.varcon_global_centroids = ranks > 1
        for name, value in vars(flags).items():
            if name != "loss":
                setattr(namespace, name, value)
        namespace.varcon = True  # what `-c args.yaml` is recognised by
        if views > 1:
            namespace.aug_splits = views
        if first and hasattr(namespace, "batch_size"):
            print(f"{PROGRAM}: {self._a_step(namespace.batch_size, ranks)}")
        if first:
            for line in self._labels(namespace):
                print(f"{PROGRAM}: {line}")
        _record(parser, namespace)

    def _refused(self, namespace: argparse.Namespace) -> list[str]:
        views, given = self.flags.varcon_views, {**vars(namespace), **vars(self.flags)}
        table = _REFUSED + (_REFUSED_WITH_VIEWS if views > 1 else ())
        mixes, smooths = _mixes(namespace), bool(self.flags.varcon_smoothing)
        table += _REFUSED_WITH_MIXING if mixes else ()
        table += _REFUSED_WITH_SHARES if mixes or smooths else ()
        found = []
        for name, refuses, advice in table:
            value = given.get(name)
            if value is not None and refuses(value):
                shown = "" if isinstance(value, bool) else f" {_shown(value)}"
                found.append(f"--{name.replace('_', '-')}{shown} ({advice})")
        splits = int(getattr(namespace, "aug_splits", None) or 0)
        if splits not in (0, views):
            found.append(f"--aug-splits {splits} (--varcon-views makes the views, drop it)")
        return found

    def _a_step(self, batch: int, ranks: int) -> str:
        views = self.flags.varcon_views
        text = f"a step of batch size {batch} sees {views} x {batch} images"
        if ranks == 1:
            return text
        whose = "all ranks'" if self.flags.varcon_global_centroids else "its own"
        return f"{text} on each of {ranks} ranks; a rank compares with centroids of {whose} images"

    def _labels(self, namespace: argparse.Namespace) -> Iterator[str]:
        """What is done to the labels, a line each."""
        ours, probes = self.flags.varcon_smoothing, getattr(namespace, "smoothing", None) or 0
        if _mixes(namespace):
            names = [name for name in _MIXUP_FLAGS if getattr(namespace, name, None) is not None]
            flags = (f"--{n.replace('_', '-')} {_shown(getattr(namespace, n))}" for n in names)
            views = "the images" if self.flags.varcon_views == 1 else "each view by itself"
            yield f"mixes {views}, for VarCon and the probe alike: {' '.join(flags)}"
        if ours or probes:
            yield f"smooths the labels of VarCon by {ours:g}, those of the probe by {probes:g}"

    def finish(self) -> None:
        """End with an error if the script came to its end without VarCon."""
        if self.task is None:
            stop("the script ended without building a ClassificationTask: nothing was trained "
                 "with VarCon")  # fmt: skip


@contextmanager
def varcon_in_timm(flags: argparse.Namespace) -> Iterator[Launch]:
    """While it lasts, timm's classification task, two-view data set and summary are ours."""
    launch = Launch(flags)
    plain_summary = timm.utils.summary.update_summary
    plain_parse = argparse.ArgumentParser.parse_known_args

    def update_summary(epoch: Any, train_metrics: Any, *args: Any, **kwargs: Any) -> Any:
        if launch.task is not None:
            train_metrics = {**train_metrics, **launch.task.pop_means()}
        return plain_summary(epoch, train_metrics, *args, **kwargs)

    def parse_known_args(
        parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None
    ) -> Any:
        namespace, extras = plain_parse(parser, args, namespace)
        script_parsed = hasattr(namespace, "model") and hasattr(namespace, "opt")
        if script_parsed and launch.arguments is None:
            if flags.varcon_smoothing is None:
                # Nothing replaces this None but a --smoothing that was typed, no default does.
                typed, _ = plain_parse(parser, args, argparse.Namespace(smoothing=None))
                flags.varcon_smoothing = float(typed.smoothing or 0)
            launch.adopt(parser, namespace)
        return namespace, extras

    with ExitStack() as stack:

        def put(name: str, value: Any, *owners: Any) -> None:
            for owner in owners:
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, value)

        put("ClassificationTask", launch.task_class(), timm.task, timm.task.classification)
        if flags.varcon_views > 1:
            put("AugMixDataset", TwoViews, timm.data, timm.data.dataset)
        mixing = launch.mixing_class()
        put("Mixup", mixing, timm.data, timm.data.mixup)
        put("FastCollateMixup", mixing, timm.data, timm.data.mixup)
        put("update_summary", update_summary, timm.utils, timm.utils.summary)
        put("parse_known_args", parse_known_args, argparse.ArgumentParser)
        yield launch


def _record(parser: argparse.ArgumentParser, namespace: argparse.Namespace) -> None:
    """Let the script read what it needs, where that is not what its records should hold.

    A script with a ``--loss`` of its own (timm >= 1.0.31) reads its own default, which is the
    probe's loss, and records ``varcon``: run again without the launcher, it refuses that.
    """
    read: dict[str, Any] = {}
    namespace.__dict__["loss"] = "varcon"
    own = next((action for action in parser._actions if action.dest == "loss"), None)
    if own is not None:
        read["loss"] = own.default
    if _mixes(namespace) and (getattr(namespace, "aug_splits", None) or 0) > 1:
        read["aug_splits"] = _MixedSplits(namespace.aug_splits)
    if not read:
        return

    class Arguments(argparse.Namespace):
        def __reduce__(self) -> Any:
            return argparse.Namespace, (), self.__dict__  # checkpoints hold a plain one

    for name in read:
        # A property is found before the instance's __dict__, which is what gets recorded.
        setattr(Arguments, name, _entry(read, name))
    namespace.__class__ = Arguments


def _entry(values: dict[str, Any], name: str) -> property:
    return property(lambda _: values[name], lambda _, value: values.update({name: value}))


class _MixedSplits(int):
    """Number of splits: train.py asserts that it has none, where it would mix in its collate."""

    def __bool__(self) -> bool:
        return False


_MIXUP_FLAGS = ("mixup", "cutmix", "cutmix_minmax", "mixup_mode", "mixup_prob",
                "mixup_switch_prob", "mixup_off_epoch")  # fmt: skip


def _mixes(namespace: argparse.Namespace) -> bool:
    """Does the script mix? Asked as train.py asks."""
    given = vars(namespace)
    alphas = (given.get("mixup") or 0, given.get("cutmix") or 0)
    return max(alphas) > 0 or given.get("cutmix_minmax") is not None


def _plain_collate() -> Callable[..., Any]:
    return fast_collate


def _shown(value: Any) -> str:
    if value is None:
        return "off"
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
