"""Where a timm model's classifier begins: what an online probe may train, and what it sees."""

from typing import Any

from torch import Tensor, nn


def named_classifier(model: nn.Module) -> list[nn.Module]:
    """What the model itself calls its classifier."""
    found = model.get_classifier()  # type: ignore[operator]
    return list(found) if isinstance(found, (tuple, list, nn.ModuleList)) else [found]


def classifier_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that turn features into logits: what an online probe may train.

    Raises:
        ValueError: the model has no classifier (``num_classes=0``).
    """
    # Some models answer with their whole head; volo classifies patches with a layer of its own.
    layers = [getattr(layer, "fc", layer) for layer in named_classifier(model)]
    auxiliary = getattr(model, "aux_head", None)
    if isinstance(auxiliary, nn.Module):
        layers.append(auxiliary)
    parents = {id(child): parent for parent in model.modules() for child in parent.children()}
    result = []
    for layer in layers:
        parent = parents.get(id(layer))
        # A layer that normalises and classifies in one: its norm belongs to the probe.
        result.append(parent if type(parent).__name__.endswith("NormLinear") else layer)
    if any(isinstance(layer, nn.Identity) or layer is None for layer in result):
        raise ValueError(
            "the model has no classifier, which VarConTask trains as its online probe: create it "
            "with num_classes >= 1"
        )
    return result


def embedding_width(model: nn.Module) -> int:
    """Width of ``forward_head(..., pre_logits=True)``."""
    widths = {_input_width(layer) for layer in classifier_layers(model)} - {None}
    if len(widths) == 1:
        return int(widths.pop())  # type: ignore[arg-type]
    # Classifiers of several branches (crossvit) see a part each; or nothing tells.
    hidden = None if widths else getattr(model, "head_hidden_size", None)
    return int(hidden or model.num_features)  # type: ignore[arg-type]


def _input_width(layer: nn.Module) -> int | None:
    for module in layer.modules():
        width = getattr(module, "in_features", None) or getattr(module, "in_channels", None)
        if width:
            return int(width)
    return None


def detach_inputs(layers: list[nn.Module]) -> None:
    """From here on the loss of what these layers give teaches nothing that is before them."""
    for layer in layers:
        layer.register_forward_pre_hook(_detach_input)


def _detach_input(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in inputs)
