"""VarCon as a timm training task: `VarConTask` stands where timm's ``ClassificationTask`` stands.

The task trains ``model`` by VarCon on projected pre-logits features, and the model's own classifier
as an online linear probe, on detached features. Validation, EMA, checkpoints and the optimizer see
the plain timm model (and the projection, where it trains).
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import Compose

try:
    from timm.data.dataset import AugMixDataset
    from timm.models import group_parameters
    from timm.task import ClassificationTask, resume_task_checkpoint  # noqa: F401  # since 1.0.27
    from timm.utils.model import unwrap_model
except ImportError as error:
    raise ImportError(f"{__name__} needs timm 1.0.27: pip install 'timm>=1.0.27'") from error

from varcon_loss import ProjectionHead, VarConLoss

_logger = logging.getLogger(__name__)

METRICS = ("varcon_loss", "probe_loss", "kl", "nll", "confidence", "tau2")


def _named_classifier(model: Any) -> list[nn.Module]:
    """What the model itself calls its classifier: one layer, or one a branch."""
    found = model.get_classifier()
    return list(found) if isinstance(found, (tuple, list, nn.ModuleList)) else [found]


def _classifier_layers(model: Any) -> list[Any]:
    """The layers that turn features into logits: what the probe may train."""
    # Some models answer with their whole head; volo classifies patches with a layer of its own.
    layers = [getattr(layer, "fc", layer) for layer in _named_classifier(model)]
    if isinstance(auxiliary := getattr(model, "aux_head", None), nn.Module):
        layers.append(auxiliary)
    if any(isinstance(layer, nn.Identity) or layer is None for layer in layers):
        raise ValueError("the model has no classifier to probe: create it with num_classes >= 1")
    # A layer that normalises and classifies in one: its norm belongs to the probe.
    joint = [m for m in model.modules() if type(m).__name__.endswith("NormLinear")]
    owners = {child: module for module in joint for child in module.children()}
    return [owners.get(layer, layer) for layer in layers]


def _embedding_width(model: Any) -> int:
    """Width of ``forward_head(..., pre_logits=True)``."""
    matrices = [[p for p in m.parameters() if p.ndim > 1] for m in _classifier_layers(model)]
    widths = {found[0].shape[1] for found in matrices if found}
    if len(widths) == 1:
        return widths.pop()
    # Classifiers of several branches (crossvit) see a part each; or nothing tells.
    return int((not widths and getattr(model, "head_hidden_size", None)) or model.num_features)


def _detach_input(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)


class VarConTrainableModule(nn.Module):
    """Model and projection in one forward, so that DDP and compilers see all that trains."""

    def __init__(self, model: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.projection = projection
        layers = _classifier_layers(unwrap_model(model))
        plain = len(layers) == 1 and isinstance(layers[0], nn.Linear)
        self._linear = tuple(layers) if plain else ()  # in a tuple: it is the model's child alone
        for layer in () if plain else layers:
            layer.register_forward_pre_hook(_detach_input)

    def no_weight_decay(self) -> set[str]:
        """The model's own choice, under the names that the optimizer sees."""
        names = getattr(unwrap_model(self.model), "no_weight_decay", set)()
        return {f"model.{name}" for name in names}

    def group_matcher(self, coarse: bool = False) -> Any:
        """The model's layers for layer-wise decay; the projection is with the last of them."""
        model = unwrap_model(self.model)
        if not hasattr(model, "group_matcher"):
            return {}
        layers = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values(), default=0)
        return lambda name: layers.get(name.removeprefix("model."), last)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | tuple[Tensor, ...]]:
        """Images -> projections ``[N, dim]`` and the probe's logits."""
        features = self.model.forward_features(x)
        embeddings = self.model.forward_head(features, pre_logits=True).flatten(1)
        if self._linear:
            # Not the whole head again: its norms would count each batch twice, its dropout differ.
            return self.projection(embeddings), self._linear[0](embeddings.detach())
        return self.projection(embeddings), self.model.forward_head(features)


class VarConTask(ClassificationTask):
    """Train a timm model with VarCon, beside an online linear probe.

    Args:
        model: a timm model with a classifier, whose input is detached in the task's steps, so
            that the probe teaches the encoder nothing. (Where the classifier is not one
            `torch.nn.Linear`, it is detached from here on, without the task too.)
        criterion: the probe's loss on logits; cross-entropy where None.
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
        **kwargs: ``device``, ``dtype``, ``verbose`` and the rest of ``ClassificationTask``.

    The result of a step holds ``loss``, ``output`` (the probe's logits) and the detached 0-d
    `METRICS`; VarCon's are means over this rank's images that take part, and 0 where none does.
    With ``global_centroids`` and ranks in which different numbers of images take part,
    ``varcon_loss`` is this rank's share of what is trained: its mean over ranks is the loss of the
    whole batch. Batches may hold several views of an image, as long as labels repeat with them.
    Whether a step learns (moves the memory, exchanges centroids) follows the trainable module's
    training mode, and gradients being enabled; other steps are local and count in no mean.

    Raises:
        ValueError: a model without classifier; whatever `varcon_loss.VarConLoss` refuses.

    Example:
        >>> import timm, torch
        >>> from varcon_loss.integrations.timm_task import VarConTask
        >>> task = VarConTask(timm.create_model("resnet10t", num_classes=4), verbose=False)
        >>> task(torch.randn(8, 3, 32, 32), torch.arange(8) % 4)["loss"].backward()
    """

    def __init__(
        self, model: Any, criterion: Any = None, *, temperature: float = 0.1,
        epsilon: float = 0.02, dim: int = 128, head: str = "mlp-bn", probe_weight: float = 1.0,
        leave_one_out: bool = False, global_centroids: bool = False,
        centroid_momentum: float | None = None, log_interval: int = 50, **kwargs: Any,
    ) -> None:  # fmt: skip
        if criterion is None and kwargs.get("criterion_kwargs") is None:
            criterion = nn.CrossEntropyLoss()
        super().__init__(model, criterion, **kwargs)
        self._classifier = _named_classifier(unwrap_model(model))
        projection: nn.Module = ProjectionHead(_embedding_width(unwrap_model(model)), dim, head)
        if any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
            projection = nn.SyncBatchNorm.convert_sync_batchnorm(projection)
        weight = next(model.parameters())
        self.trainable_module = VarConTrainableModule(model, projection.to(weight))
        self.contrast = VarConLoss(
            temperature, epsilon=epsilon, num_classes=int(model.num_classes), feature_dim=dim,
            leave_one_out=leave_one_out, centroid_momentum=centroid_momentum,
            process_group="world" if global_centroids or centroid_momentum is not None else None,
        ).to(weight.device)  # fmt: skip
        self.probe_weight, self.log_interval, self.steps = probe_weight, log_interval, 0
        self._totals: list[Any] = [0, 0]  # of METRICS: since the last line, since the last pop
        if self.verbose:
            _logger.info(f"VarConTask: {self.contrast}, head {head} to {dim}")

    def prepare_distributed(self, device_ids: Any = None, **ddp_kwargs: Any) -> "VarConTask":
        """Wrap what trains in DDP; on CPUs without device ids, which DDP refuses there."""
        device_ids = None if self.device.type == "cpu" else device_ids
        super().prepare_distributed(device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(self, backend: str = "inductor", mode: str | None = None, **kwargs: Any) -> Any:
        """Compile training and evaluation, which take different paths through the model."""
        options: dict[str, Any] = {"backend": backend, "mode": mode, **kwargs}
        self.eval_model: Any = torch.compile(self.get_eval_model(), **options)
        self.trainable_module = torch.compile(self.trainable_module, **options)
        return self.eval_model

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> Any:
        """The plain timm model, from inside EMA, DDP and compiled wrappers."""
        module = super().get_eval_model(module, ema=ema)
        inner = unwrap_model(module)
        return inner.model if isinstance(inner, VarConTrainableModule) else module

    def get_task_state(self, module: Any = None, ema: bool = False) -> dict[str, Any]:
        """The projection, and the loss's memory where it has one."""
        inner = unwrap_model(module or self.get_trainable_module(ema=ema))
        return {"projection": inner.projection.state_dict(), "contrast": self.contrast.state_dict()}

    def load_task_state(self, state: Any, strict=True, module: Any = None, ema=False) -> None:
        """The counterpart of `get_task_state`; a checkpoint without task state changes nothing.

        Raises:
            RuntimeError: the state is of a task with another ``dim``, ``head`` or memory.
        """
        inner = unwrap_model(module or self.get_trainable_module(ema=ema))
        if state:
            inner.projection.load_state_dict(state["projection"], strict=strict)
            self.contrast.load_state_dict(state["contrast"], strict=strict)
        else:
            _logger.warning("VarConTask: the checkpoint has no projection, which starts afresh")

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """All that trains; without the classifier where ``exclude_head``."""
        module = unwrap_model(self.get_trainable_module())
        layers = _classifier_layers(unwrap_model(module.model)) if exclude_head else []
        excluded = {p for layer in layers for p in layer.parameters()}
        return [p for p in module.parameters() if p not in excluded]

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """One step.

        Args:
            input: images ``[N, 3, H, W]``.
            target: class indices ``[N]``, or class probabilities ``[N, C]`` of images that were
                mixed before.

        Raises:
            RuntimeError: the model's classifier is not the one that the task was made with.
        """
        module = unwrap_model(self.trainable_module)
        if _named_classifier(unwrap_model(module.model)) != self._classifier:
            raise RuntimeError("the model's classifier was replaced: make a new VarConTask")
        self.contrast.train(module.training)
        projections, logits = self.trainable_module(input)
        terms = self.contrast.terms(projections, target)
        branches = logits if isinstance(logits, (tuple, list)) else (logits,)
        probe_loss = torch.stack([self.criterion(x, target) for x in branches]).mean()
        images = terms.valid.sum()
        means = [getattr(terms, name).sum() / images.clamp_min(1) for name in METRICS[2:]]
        values = torch.stack([terms.reduced.detach().float(), probe_loss.detach().float(), *means])
        if module.training and torch.is_grad_enabled():
            self._log(values, images > 0)
        loss = terms.reduced + self.probe_weight * probe_loss
        metrics = dict(zip(METRICS, values, strict=True))
        return {"loss": loss, "output": branches[0], **metrics}

    def _log(self, values: Tensor, contrasted: Tensor) -> None:
        """A step without a valid image counts only for the probe."""
        counts = torch.stack([contrasted | (name == "probe_loss") for name in METRICS])
        self._totals = [total + torch.stack([values, counts]) for total in self._totals]
        self.steps += 1
        if self.verbose and self.log_interval and (self.steps - 1) % self.log_interval == 0:
            means = self.pop_means(0).items()
            _logger.info("VarCon: " + "  ".join(f"{name}: {value:.4g}" for name, value in means))

    def pop_means(self, _which: int = 1) -> dict[str, float]:
        """Means of `METRICS` over the training steps since the last call.

        Of VarCon's, over those in which any image took part; NaN if there was none.
        """
        total, self._totals[_which] = self._totals[_which], 0
        if not isinstance(total, Tensor):
            return {}
        return dict(zip(METRICS, (total[0] / total[1]).tolist(), strict=True))


class TwoViews(AugMixDataset):
    """Each image under the whole training transform, ``num_splits`` times, independently."""

    def _set_transforms(self, x: Any) -> None:
        # timm splits a transform in three for AugMix; a view is all three in turn.
        self._view = Compose([step for step in x if step is not None])
        self.dataset.transform = None

    def __getitem__(self, index: int) -> tuple[tuple[Any, ...], Any]:
        image, target = self.dataset[index]
        return tuple(self._view(image) for _ in range(self.num_splits)), target
