"""The loss as a module."""

from torch import Tensor, nn

from varcon_loss import checks
from varcon_loss.functional import varcon_terms
from varcon_loss.reduction import VarConTerms


class VarConLoss(nn.Module):
    """Variational supervised contrastive loss (Wang et al., NeurIPS 2025, arXiv 2506.07413).

    Each embedding ``z_i`` is compared with one unit centroid ``w_k`` per class present in the
    batch, through which no gradient flows. With ``p`` the softmax of ``z_i . w_k / temperature``
    (Eq. 8), the adaptive temperature ``tau2 = temperature - epsilon + 2 epsilon p(y_i)`` (Eq. 13)
    and the target ``q``, proportional to ``exp(1 / tau2)`` for the own class and to 1 for every
    other (Eq. 10-12), the loss of a sample is ``KL(q || p) - log p(y_i)`` (Eq. 7).

    Args:
        temperature: ``tau1 > 0``.
        epsilon: how far the confidence moves ``tau2``; ``0 <= epsilon < temperature``.
        num_classes: labels are then ``0 ... num_classes - 1``. Needed by ``weight``; without it
            any integers serve as labels, but a GPU is synchronised once a call and
            ``torch.compile`` breaks the graph. The cost follows the classes present in the batch.
        normalize: divide features by their length first. ``False`` takes them as they are;
            centroids have unit length either way.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: samples with this label take part in nothing. ``None``: none are ignored.
        weight: ``[num_classes]``, scales the loss of each class as in `torch.nn.CrossEntropyLoss`
            (the mean is ``sum(w l) / sum(w)``, 0 if no weight is left); centroids are unaffected.
            Implies ``num_classes``.
        leave_one_out: an extension of the paper: compare each sample with the centroid of the
            *other* members of its class. A sample alone in its class has none: like a SupCon
            anchor without positives it is left out of the mean (``terms.valid`` is False), while
            its class still counts among the others.
        process_group: centroids over all ranks of a group. Not available yet.
        impl: ``"auto"`` (the fastest that suits), ``"eager"`` (one pass, any device) or
            ``"reference"`` (the paper's equations line by line, ``[N, K]`` memory, twice
            differentiable). ``"triton"`` is not available yet.

    Shape:
        features: ``[N, D]``, or ``[B, V, ...]`` for ``V`` views of each sample (trailing dimensions
        are flattened), float16, bfloat16, float32 or float64, with or without autocast.
        labels: ``[N]`` or ``[B]``, any integer dtype but uint64, on the same device.
        Output: a scalar, float32 or wider; ``[N]`` or ``[B, V]`` for ``reduction="none"``.

    Raises:
        TypeError, ValueError: bad arguments; on a CPU in eager mode also a label out of range or
            missing in the reference set. On an accelerator, or under ``torch.compile``, looking at
            values would synchronise or break the graph: the loss of such a row is NaN there.

    Example:
        >>> import torch
        >>> from varcon_loss import VarConLoss
        >>> criterion = VarConLoss(temperature=0.1, epsilon=0.02)
        >>> features = torch.randn(8, 2, 128, requires_grad=True)  # two views of 8 samples
        >>> labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
        >>> criterion(features, labels).backward()
    """

    weight: Tensor | None

    def __init__(
        self,
        temperature: float = 0.1,
        epsilon: float = 0.02,
        *,
        num_classes: int | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        ignore_index: int | None = -100,
        weight: Tensor | None = None,
        leave_one_out: bool = False,
        process_group: object | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        checks.check_temperatures(temperature, epsilon)
        checks.check_choices(reduction, impl, ignore_index)
        checks.check_available(process_group, impl)
        self.temperature = float(temperature)
        self.epsilon = float(epsilon)
        self.num_classes = checks.resolve_num_classes(num_classes, weight)
        self.normalize = bool(normalize)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.register_buffer("weight", None if weight is None else weight.detach().clone())
        self.leave_one_out = bool(leave_one_out)
        self.process_group = process_group
        self.impl = impl

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        ref_features: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The reduced loss; see the class for shapes.

        Args:
            features: ``[N, D]`` or ``[B, V, ...]``.
            labels: ``[N]`` or ``[B]``.
            ref_features: ``[M, D]`` or with views; centroids come from these instead of
                ``features``, detached, and ``K`` counts their classes.
            ref_labels: ``[M]``; must contain every label of ``labels``.
        """
        return self.terms(
            features, labels, ref_features=ref_features, ref_labels=ref_labels
        ).reduced

    def terms(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        ref_features: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> VarConTerms:
        """As the call, with the per-sample terms that one logs; the loss is ``.reduced``."""
        return varcon_terms(
            features,
            labels,
            self.temperature,
            self.epsilon,
            num_classes=self.num_classes,
            normalize=self.normalize,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            weight=self.weight,
            leave_one_out=self.leave_one_out,
            process_group=self.process_group,
            impl=self.impl,
            ref_features=ref_features,
            ref_labels=ref_labels,
        )

    def extra_repr(self) -> str:
        defaults = {
            "num_classes": None,
            "normalize": True,
            "reduction": "mean",
            "ignore_index": -100,
            "leave_one_out": False,
            "process_group": None,
            "impl": "auto",
        }
        changed = [
            f"{name}={value!r}"
            for name, default in defaults.items()
            if (value := getattr(self, name)) != default
        ]
        if self.weight is not None:
            changed.append(f"weight=[{len(self.weight)}]")
        return ", ".join([f"temperature={self.temperature}", f"epsilon={self.epsilon}", *changed])
