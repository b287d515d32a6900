"""VarCon as a timm training task: `VarConTask` stands where timm's ``ClassificationTask`` stands.

The task trains ``model`` by VarCon on projected pre-logits features, and the model's own classifier
as an online linear probe, on detached features. Validation, EMA, checkpoints and the optimizer see
the plain timm model (and the projection, where it trains).
"""

import copy
import logging
import math
from typing import Any

from varcon_loss.integrations.timm_flags import INSTALL_TIMM, installed

try:
    from timm.task import ClassificationTask
except ImportError as error:
    raise ImportError(
        "varcon_loss.integrations.timm_task needs timm 1.0.27 or newer, found "
        f"{installed('timm') or 'none'}: {INSTALL_TIMM}"
    ) from error

import torch
import torch.nn.functional as F
from timm.data.mixup import FastCollateMixup, Mixup
from timm.models import group_parameters
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from varcon_loss import ProjectionHead, VarConLoss
from varcon_loss.integrations.timm_classifier import (
    classifier_layers,
    detach_inputs,
    embedding_width,
    named_classifier,
)

_logger = logging.getLogger(__name__)

MIXUP_MODES = ("batch", "pair", "elem")
METRICS = ("varcon_loss", "probe_loss", "kl", "nll", "confidence", "tau2")


class VarConTrainableModule(nn.Module):
    """Model and projection in one forward, so that DDP and compilers see all that trains."""

    def __init__(self, model: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.projection = projection
        layers = classifier_layers(unwrap_model(model))
        plain = len(layers) == 1 and isinstance(layers[0], nn.Linear)
        if not plain:
            detach_inputs(layers)
        # In tuples, so that they are the model's alone.
        self._classifier = tuple(layers) if plain else ()
        self._named = tuple(named_classifier(unwrap_model(model)))

    def no_weight_decay(self) -> set[str]:
        """The model's own choice, under the names that the optimizer sees."""
        model = unwrap_model(self.model)
        return {f"model.{name}" for name in getattr(model, "no_weight_decay", set)()}

    def group_matcher(self, coarse: bool = False) -> Any:
        """The model's layers for layer-wise decay; the projection is with the last of them."""
        model = unwrap_model(self.model)
        if not hasattr(model, "group_matcher"):
            return {}
        layers = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values(), default=0)
        return lambda name: layers.get(name.removeprefix("model."), last)

    def check_classifier(self) -> None:
        """Is it the one that this was made with?

        Raises:
            RuntimeError: it was replaced, and what validates is not what the probe trains.
        """
        now = named_classifier(unwrap_model(self.model))
        same = len(now) == len(self._named)
        if not same or any(a is not b for a, b in zip(now, self._named, strict=True)):
            raise RuntimeError(
                "the model's classifier was replaced after VarConTask was made, which trains the "
                "one it had: make a new VarConTask"
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | tuple[Tensor, ...]]:
        """Images -> projections ``[N, dim]`` and the probe's logits."""
        features = self.model.forward_features(x)  # type: ignore[operator]
        embeddings = self.model.forward_head(features, pre_logits=True)  # type: ignore[operator]
        if embeddings.ndim > 2:
            embeddings = embeddings.flatten(1)
        if self._classifier:
            # Not the whole head again: its norms would count each batch twice, its dropout differ.
            return self.projection(embeddings), self._classifier[0](embeddings.detach())
        return self.projection(embeddings), self.model.forward_head(features)  # type: ignore[operator]


class VarConTask(ClassificationTask):
    """Train a timm model with VarCon, beside an online linear probe.

    Args:
        model: a timm model with a classifier, whose input is detached in the task's steps, so
            that the probe teaches the encoder nothing. (Where the classifier is not one
            `torch.nn.Linear`, it is detached from here on, without the task too.)
        criterion: the probe's loss on logits (timm's own choice where None).
        criterion_kwargs: for timm >= 1.0.31, as in ``ClassificationTask``.
        device: where task tensors live.
        dtype: of task tensors.
        verbose: log what is trained.
        temperature: ``tau1`` of VarCon.
        epsilon: how far the confidence moves ``tau2`` (Eq. 13).
        dim: width of the embeddings.
        head: `varcon_loss.ProjectionHead` kind: ``"mlp-bn"``, ``"mlp"`` or ``"linear"``.
        probe_weight: weight of the probe's loss; it trains nothing but the classifier. (Clipping
            by the norm of all gradients together still couples them.)
        leave_one_out: as in `varcon_loss.VarConLoss`.
        global_centroids: centroids over all ranks (``process_group="world"``). A memory implies
            it: ranks that remember different centroids would drift apart, and one rank's is saved.
        centroid_momentum: remember centroids, as in `varcon_loss.VarConLoss`.
        log_interval: after the first and then every so many training steps, log the means of
            `METRICS` since the last line; 0: never.
        mixup: mixup and CutMix of steps that learn, each view by itself. Its ``label_smoothing``
            is the probe's alone; the probe then trains on class probabilities, so ``criterion``
            must take them, as ``timm.loss.SoftTargetCrossEntropy`` does. While its
            ``mixup_enabled`` is False nothing is mixed.
        views: how many views a batch holds, one after the other. Only mixing needs to know.
        smoothing: share of VarCon's own labels that is spread over all classes. Every class is
            then in every batch: VarCon compares with all of them, also those of which the batch
            has no image.

    The result of a step holds ``loss``, ``output`` (the probe's logits) and the detached 0-d
    `METRICS`; VarCon's are means over this rank's images that take part, and 0 where none does.
    With ``global_centroids`` and ranks in which different numbers of images take part,
    ``varcon_loss`` is this rank's share of what is trained: its mean over ranks is the loss of the
    whole batch. Batches may hold several views of an image, as long as labels repeat with them.
    Whether a step learns (mixes, moves the memory, exchanges centroids) follows the trainable
    module's training mode, and gradients being enabled; other steps are local and count in no mean.

    Raises:
        ValueError: a model without classifier; options that do not go together; whatever
            `varcon_loss.VarConLoss` refuses.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Any = None,
        criterion_kwargs: dict[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
        *,
        temperature: float = 0.1,
        epsilon: float = 0.02,
        dim: int = 128,
        head: str = "mlp-bn",
        probe_weight: float = 1.0,
        leave_one_out: bool = False,
        global_centroids: bool = False,
        centroid_momentum: float | None = None,
        log_interval: int = 50,
        mixup: Mixup | None = None,
        views: int = 1,
        smoothing: float = 0.0,
    ) -> None:
        if criterion is None:
            criterion = nn.CrossEntropyLoss() if criterion_kwargs is None else None
        extra = {} if criterion_kwargs is None else {"criterion_kwargs": criterion_kwargs}
        super().__init__(
            model, criterion=criterion, device=device, dtype=dtype, verbose=verbose, **extra
        )
        projection: nn.Module = ProjectionHead(embedding_width(model), dim, head)
        if any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
            projection = nn.SyncBatchNorm.convert_sync_batchnorm(projection)
        if not (math.isfinite(probe_weight) and probe_weight >= 0):
            raise ValueError(f"probe_weight must be finite and at least 0, got {probe_weight}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be at least 0 and less than 1, got {smoothing}")
        if mixup is not None and mixup.mode not in MIXUP_MODES:
            raise ValueError(f"mixup must mix by one of {MIXUP_MODES}, got mode {mixup.mode!r}")
        if leave_one_out and (mixup is not None or smoothing):
            raise ValueError("leave_one_out has no meaning with mixed or smoothed labels")
        if isinstance(mixup, FastCollateMixup):
            raise ValueError("mixup must be a Mixup: a FastCollateMixup mixes in the loader")
        if mixup is not None and mixup.num_classes != model.num_classes:
            raise ValueError(
                f"mixup has num_classes={mixup.num_classes}, and the model {model.num_classes}: "
                "make Mixup with num_classes"
            )
        parameter = next(model.parameters())
        projection.to(device=parameter.device, dtype=parameter.dtype)
        self.trainable_module = VarConTrainableModule(model, projection)
        self.contrast = VarConLoss(
            temperature,
            epsilon,
            num_classes=int(model.num_classes),  # type: ignore[arg-type]
            feature_dim=dim,
            leave_one_out=leave_one_out,
            process_group="world" if global_centroids or centroid_momentum is not None else None,
            centroid_momentum=centroid_momentum,
        ).to(parameter.device)
        self.probe_weight = probe_weight
        self.log_interval = log_interval
        self.mixup = mixup
        self.views = views
        self.smoothing = float(smoothing)
        self.options: dict[str, Any] = {
            "temperature": float(temperature),
            "epsilon": float(epsilon),
            "dim": int(dim),
            "head": str(head),
            "probe_weight": float(probe_weight),
            "leave_one_out": bool(leave_one_out),
            "centroid_momentum": None if centroid_momentum is None else float(centroid_momentum),
            "smoothing": self.smoothing,
        }
        self._since_line = _Means()
        self._since_pop = _Means()
        if verbose:
            _logger.info(f"VarConTask: {self.contrast}, head {head} to {dim}")

    def prepare_distributed(
        self, device_ids: list[Any] | None = None, **ddp_kwargs: Any
    ) -> "VarConTask":
        """Wrap what trains in DDP; on CPUs without device ids, which DDP refuses there."""
        if self.device.type == "cpu":
            device_ids = None
        super().prepare_distributed(device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(
        self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any
    ) -> nn.Module:
        """Compile training and evaluation, which take different paths through the model."""
        plain = self.get_eval_model()
        options = {"backend": backend, "mode": mode, **compile_kwargs}
        self.trainable_module = torch.compile(self.trainable_module, **options)
        evaluated: Any = torch.compile(plain, **options)
        self.eval_model = evaluated
        return evaluated

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> Any:
        """The plain timm model, from inside EMA, DDP and compiled wrappers."""
        if module is None:
            kept = getattr(self, "eval_model_ema" if ema else "eval_model", None)
            if kept is not None:
                return kept
            module = self.get_trainable_module(ema=ema)
        if module is None:
            return None
        inner = unwrap_model(module)
        return inner.model if isinstance(inner, VarConTrainableModule) else inner

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The projection, the options, and the loss's memory where it has one."""
        module = self.get_trainable_module(ema=ema) if module is None else module
        state = {
            "projection": unwrap_model(module).projection.state_dict(),
            "options": dict(self.options),
        }
        if self.contrast.centroid_momentum is not None:
            state["contrast"] = self.contrast.state_dict()
        return state

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """The counterpart of `get_task_state`; a checkpoint without task state changes nothing.

        Raises:
            ValueError: the state is of a task with other options, where its tensors do not fit.
        """
        if not state:
            _logger.warning(
                "VarConTask: the checkpoint has no projection, which starts afresh; its optimizer "
                "cannot be resumed either (train.py: --no-resume-opt)"
            )
            return
        misfits = self.misfits(state)
        if misfits:
            raise ValueError(f"the state of a VarConTask with other options: {_changes(misfits)}")
        changed = self._changed(state)
        if changed and not ema:
            _logger.warning(f"VarConTask: resumed with other options: {_changes(changed)}")
        module = self.get_trainable_module(ema=ema) if module is None else module
        unwrap_model(module).projection.load_state_dict(state["projection"], strict=strict)
        if "contrast" in state and not ema:
            self.contrast.load_state_dict(state["contrast"], strict=strict)

    def misfits(self, state: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Options that keep this task from loading ``state``: name -> (the state's, this task's).

        Others, such as the temperature, may change between a checkpoint and the run that resumes.
        """
        return {
            name: (was, now)
            for name, (was, now) in self._changed(state).items()
            if name in ("dim", "head") or (name == "centroid_momentum" and None in (was, now))
        }

    def _changed(self, state: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        recorded = state.get("options", {})
        both = [name for name in self.options if name in recorded]
        pairs = {name: (recorded[name], self.options[name]) for name in both}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """All that trains; without the classifier where ``exclude_head``."""
        module = unwrap_model(self.get_trainable_module())
        excluded = set()
        if exclude_head:
            layers = classifier_layers(unwrap_model(module.model))
            excluded = {id(p) for layer in layers for p in layer.parameters()}
        return [p for p in module.parameters() if id(p) not in excluded]

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """One step.

        Args:
            input: images ``[N, 3, H, W]``.
            target: class indices ``[N]``, or class probabilities ``[N, C]`` of images that were
                mixed before.
        """
        module = unwrap_model(self.trainable_module)
        module.check_classifier()
        labels = target
        if self.mixup is not None:
            if self.mixup.mixup_enabled and module.training and torch.is_grad_enabled():
                input, labels = self._mixed(input, target)
            target = self._smoothed(labels, self.mixup.label_smoothing)
        projections, logits = self.trainable_module(input)
        self.contrast.train(module.training)
        if self.smoothing:
            labels = self._smoothed(labels, self.smoothing)
        terms = self.contrast.terms(projections, labels)
        branches = logits if isinstance(logits, (tuple, list)) else (logits,)
        probe_loss = torch.stack([self.criterion(x, target) for x in branches]).mean()
        images = terms.valid.sum()
        divisor = images.clamp_min(1)  # terms of images that take no part are 0
        metrics = {
            "varcon_loss": terms.reduced.detach(),
            "probe_loss": probe_loss.detach(),
            "kl": terms.kl.sum() / divisor,
            "nll": terms.nll.sum() / divisor,
            "confidence": terms.confidence.sum() / divisor,
            "tau2": terms.tau2.sum() / divisor,
        }
        if self.contrast.training and torch.is_grad_enabled():
            self._log(metrics, images > 0)
        loss = terms.reduced + self.probe_weight * probe_loss
        return {"loss": loss, "output": branches[0], **metrics}

    def _mixed(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Images mixed, each view by itself, and their classes ``[N, C]``, not smoothed."""
        if target.ndim != 1 or target.is_floating_point():
            raise ValueError(
                "mixing needs one class index an image, got targets "
                f"{target.dtype} {list(target.shape)}: mix them before, or here"
            )
        if len(input) % (2 * self.views):
            raise ValueError(
                f"mixing pairs the images of a view: {self.views} views need a batch that divides "
                f"by {2 * self.views}, got {len(input)} images"
            )
        mixer = copy.copy(self.mixup)
        assert mixer is not None
        mixer.label_smoothing = 0.0
        pairs = [  # of clones: Mixup writes into what it is given
            mixer(view.clone(), classes)
            for view, classes in zip(input.chunk(self.views), target.chunk(self.views), strict=True)
        ]
        return torch.cat([view for view, _ in pairs]), torch.cat([shares for _, shares in pairs])

    def _smoothed(self, labels: Tensor, smoothing: float) -> Tensor:
        """Class probabilities ``[N, C]``, ``smoothing`` of each row spread over all classes.

        Zeros where an index says that the image is to be ignored.
        """
        if not labels.is_floating_point():
            labels = labels.long()
            kept = labels != self.contrast.ignore_index
            rows = F.one_hot(labels * kept, self.contrast.num_classes).float()
            labels = rows * kept.unsqueeze(1)
        return labels * (1 - smoothing) + labels.mean(1, keepdim=True) * smoothing

    def _log(self, metrics: dict[str, Tensor], contrasted: Tensor) -> None:
        self._since_line.add(metrics, contrasted)
        self._since_pop.add(metrics, contrasted)
        if (
            self.verbose
            and self.log_interval
            and (self._since_pop.steps - 1) % self.log_interval == 0
        ):
            means = self._since_line.pop()
            shown = "  ".join(f"{name}: {value:.4g}" for name, value in means.items())
            _logger.info(f"VarCon: {shown}")

    def pop_means(self) -> dict[str, float]:
        """Means of `METRICS` over the training steps since the last call.

        Of VarCon's, over those in which any image took part; NaN if there was none.
        """
        return self._since_pop.pop()


def _changes(pairs: dict[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{name} was {was}, is {now}" for name, (was, now) in pairs.items())


class _Means:
    """Running means of 0-d tensors, which leave their device when they are asked for.

    A step in which no image took part says nothing about VarCon, and counts for the probe alone.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor | int] = {}
        self.steps = 0
        self.contrasted: Tensor | int = 0  # steps in which any image took part

    def add(self, metrics: dict[str, Tensor], contrasted: Tensor) -> None:
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.steps += 1
        self.contrasted = self.contrasted + contrasted

    def pop(self) -> dict[str, float]:
        contrasted = int(self.contrasted)
        counts = dict.fromkeys(METRICS, contrasted) | {"probe_loss": self.steps}
        means = {
            name: float(total) / counts[name] if counts[name] else math.nan
            for name, total in self.sums.items()
        }
        self.sums, self.steps, self.contrasted = {}, 0, 0
        return means
