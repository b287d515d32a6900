"""Compiled graphs that refuse to be differentiated twice.

torch.compile keeps of a graph only what its backward needs. Where that is a finished gradient, a
second derivative would be zero without a word. Here the backward keeps the features: torch then
sees that a second derivative passes through them, and raises.
"""

from typing import Any

import torch
from torch import Tensor


def scale_rows(
    gradient: Tensor, scale: Tensor | None, upstream: Tensor, dtype: torch.dtype
) -> Tensor:
    """The gradient of the features ``[N, D]`` from what forward kept and ``upstream`` ``[N]``."""
    if scale is not None and scale.numel() > 0:
        upstream = upstream * scale
    if gradient.dtype == upstream.dtype:
        return (gradient * upstream.unsqueeze(1)).to(dtype)
    # Half gradients: multiplied in float32 with no float32 copy of the whole.
    return torch.mul(gradient, upstream.unsqueeze(1), out=torch.empty_like(gradient))


def _refuse(ctx: Any, *_: Tensor) -> None:
    raise NotImplementedError(
        "a compiled VarCon loss cannot be differentiated twice: call it outside torch.compile, "
        "where second derivatives are right"
    )


@torch.library.custom_op("varcon_loss::scale_rows_once", mutates_args=())
def scale_rows_once(features: Tensor, gradient: Tensor, scale: Tensor, upstream: Tensor) -> Tensor:
    """`scale_rows` for a compiled backward."""
    return scale_rows(gradient, scale, upstream, features.dtype)


@scale_rows_once.register_fake
def _(features: Tensor, gradient: Tensor, scale: Tensor, upstream: Tensor) -> Tensor:
    return torch.empty_like(gradient, dtype=features.dtype)


scale_rows_once.register_autograd(_refuse)


@torch.library.custom_op("varcon_loss::pass_once", mutates_args=())
def pass_once(features: Tensor, gradient: Tensor) -> Tensor:
    """The gradient as it is, for a compiled backward."""
    return gradient.clone()


@pass_once.register_fake
def _(features: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(gradient)


pass_once.register_autograd(_refuse)


@torch.library.custom_op("varcon_loss::differentiable_once", mutates_args=())
def differentiable_once(features: Tensor) -> Tensor:
    """The features as they are, for a compiled forward whose derivatives are left to autograd."""
    return features.clone()


@differentiable_once.register_fake
def _(features: Tensor) -> Tensor:
    return torch.empty_like(features)


def _keep_features(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _pass(ctx: Any, gradient: Tensor) -> Tensor:
    return pass_once(*ctx.saved_tensors, gradient)


differentiable_once.register_autograd(_pass, setup_context=_keep_features)
