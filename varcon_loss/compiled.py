"""The sweep as one function of the features: for autograd, and as an operator for torch.compile.

Forward has the gradient already, so backward is one multiplication. A second derivative goes by the
paper's equations.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from varcon_loss import fused
from varcon_loss.equations import sweep_by_equations
from varcon_loss.readable import without_autocast
from varcon_loss.sweep import sweep

_IN_PLACE = (
    "a second derivative of VarCon needs the features, and class probabilities, as they were when "
    "the loss was computed, and they were changed in place since: differentiate before that"
)


def losses(
    features: Tensor, z: Tensor, lengths: Tensor | None, valid: Tensor | None, w: Tensor,
    present: Tensor | None, slots: Tensor | None, shares: Tensor | None, own: Tensor | None,
    temperature: float, epsilon: float, *, need_terms: bool, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss ``[N]``, which autograd can differentiate, and terms ``[4, N]``; 0 where not valid.

    Args:
        features: ``[N, D]``, any float dtype; the way of the gradient.
        z: ``[N, D]``, the same divided by their ``lengths``, without a gradient.
        lengths: ``[N]``; None: ``z`` are the features as they are.
        valid: ``[N]`` bool, the rows that take part; None: all.
        w: and the rest: see `sweep_by_equations`.
        present: as there.
        slots: as there.
        shares: as there.
        own: as there.
        temperature: as there.
        epsilon: as there.
        need_terms: else they are ``[4, 0]``.
        impl: ``"eager"``, ``"triton"`` or ``"reference"``.
    """
    table = (w, present, slots, shares, own)
    left_out = None if valid is None else ~valid
    if impl == "reference":
        if slots is not None:
            table = (w, present, slots.clone(), shares, own)  # callers may reuse their labels
        if torch.compiler.is_compiling():
            features = differentiable_once(features)
        return by_equations(features, lengths is not None, left_out, *table, temperature, epsilon)
    need_grad = features.requires_grad and torch.is_grad_enabled()
    operands = features.dtype if impl == "triton" else None
    if torch.compiler.is_compiling():
        # Numbers would be compiled in; a tensor on the CPU is read without waiting.
        zero = torch.zeros((), dtype=torch.float64, device="cpu")
        temperatures = torch.stack((zero + temperature, zero + epsilon))
        given = (features, z, lengths, left_out, *table, temperatures)
        return sweep_operator(*given, need_grad, need_terms, operands)[:2]
    given = (features, z, lengths, left_out, *table, temperature, epsilon)
    if not need_grad or torch._C._are_functorch_transforms_active():
        return Sweep.apply(*given, need_grad, need_terms, operands)[:2]
    with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
        return Sweep.apply(*given, need_grad, need_terms, operands)[:2]


def by_equations(
    features: Tensor, normalize: bool, left_out: Tensor | None, *table: Any
) -> tuple[Tensor, Tensor]:
    """`losses` by the paper's equations, and under autograd."""
    z = features.to(table[0].dtype)
    if left_out is not None:
        z = z.masked_fill(left_out.unsqueeze(1), 0.0)
    if normalize:
        # Dividing by the (constant) largest entry first only keeps extreme features in range.
        largest = torch.linalg.vector_norm(z.detach(), ord=float("inf"), dim=1, keepdim=True)
        scaled = z / largest.masked_fill(largest == 0, torch.inf)
        z = torch.nn.functional.normalize(scaled, dim=1)
    loss, terms = sweep_by_equations(z, *table)
    if left_out is None:
        return loss, terms
    return loss.masked_fill(left_out, 0.0), terms.masked_fill(left_out, 0.0)


def _run(
    z: Tensor, left_out: Tensor | None, *given: Any, operands: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    run: Any = sweep if operands is None else functools.partial(fused.sweep, operands=operands)
    loss, terms, gradient = run(z, *given)
    if left_out is not None:
        loss.masked_fill_(left_out, 0.0)
        if terms.numel() > 0:
            terms.masked_fill_(left_out, 0.0)
    return loss, terms, gradient


def pull(
    gradient: Tensor, lengths: Tensor | None, left_out: Tensor | None, upstream: Tensor, dtype: Any
) -> Tensor:
    """The gradient of the features ``[N, D]``; exactly 0 where left out, whatever is upstream."""
    if lengths is not None:
        # A length without a finite inverse belongs to a gradient of 0, which must stay 0.
        upstream = upstream / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)
    result = (gradient * upstream.unsqueeze(1)).to(dtype)
    return result if left_out is None else result.masked_fill_(left_out.unsqueeze(1), 0.0)


# Backward reads nothing that a caller can change in place; only a second derivative does.
def _pack(saved: Tensor) -> tuple[Tensor, int]:
    return saved, saved._version


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    saved, version = packed
    if torch.is_grad_enabled() and saved._version != version:
        raise RuntimeError(_IN_PLACE)
    return saved


class Sweep(torch.autograd.Function):
    """`losses`, and the gradient."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        _, z, lengths, left_out, *given, need_grad, need_terms, operands = inputs
        given += (lengths is not None, need_grad, need_terms)
        return _run(z, left_out, *given, operands=operands)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        features, _, lengths, left_out, *table, temperature, epsilon, _, _, _ = inputs
        ctx.save_for_backward(output[2], lengths, left_out, features, *table)
        ctx.numbers = temperature, epsilon
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream = upstreams[0]
        if upstream is None:
            return (None,) * 14
        saved: Any = ctx.saved_tensors
        gradient, lengths, left_out, features, *table = saved
        if not torch.is_grad_enabled():
            return pull(gradient, lengths, left_out, upstream, features.dtype), *(None,) * 13

        if torch.is_autocast_enabled(features.device.type):  # it leaves float64 alone
            table = [x.double() if x is not None and x.is_floating_point() else x for x in table]

        def loss(x: Tensor) -> Tensor:  # to be differentiated again
            return by_equations(x, lengths is not None, left_out, *table, *ctx.numbers)[0]

        with without_autocast(features.device.type):
            value, pull_back, *_ = torch.func.vjp(loss, features)
            return pull_back(upstream.to(value.dtype))[0], *(None,) * 13


@torch.library.custom_op("varcon_loss::sweep", mutates_args=())
def sweep_operator(
    features: Tensor, z: Tensor, lengths: Tensor | None, left_out: Tensor | None, w: Tensor,
    present: Tensor | None, slots: Tensor | None, shares: Tensor | None, own: Tensor | None,
    temperatures: Tensor, need_grad: bool, need_terms: bool, operands: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`Sweep` for compiled graphs, which neither look inside nor break for it."""
    given = (w, present, slots, shares, own, *temperatures.tolist(), lengths is not None)
    return _run(z, left_out, *given, need_grad, need_terms, operands=operands)


@sweep_operator.register_fake
def _(features: Tensor, z: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_grad, need_terms, _ = given[-3:]
    terms = z.new_empty(4, z.shape[0] if need_terms else 0)
    return z.new_empty(z.shape[0]), terms, z.new_empty(z.shape if need_grad else 0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, _, lengths, left_out, *_ = inputs
    ctx.save_for_backward(features, output[2], lengths, left_out)


def _backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return pull_once(*ctx.saved_tensors, upstream), *(None,) * 12


sweep_operator.register_autograd(_backward, setup_context=_keep)


# torch.compile keeps of a graph only what its backward needs. The finished gradient has no history,
# so a second derivative would be zero without a word. This backward keeps the features: torch then
# sees that a second derivative passes through them, and raises.
@torch.library.custom_op("varcon_loss::pull_once", mutates_args=())
def pull_once(
    features: Tensor, gradient: Tensor, lengths: Tensor | None, left_out: Tensor | None,
    upstream: Tensor,
) -> Tensor:  # fmt: skip
    """`pull` for a compiled backward."""
    return pull(gradient, lengths, left_out, upstream, features.dtype)


@pull_once.register_fake
def _(features: Tensor, gradient: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(gradient, dtype=features.dtype)


def _refuse(ctx: Any, *_: Tensor) -> None:
    raise NotImplementedError(
        "a compiled VarCon loss cannot be differentiated twice: call it outside torch.compile, "
        "where second derivatives are right"
    )


pull_once.register_autograd(_refuse)


@torch.library.custom_op("varcon_loss::differentiable_once", mutates_args=())
def differentiable_once(features: Tensor) -> Tensor:
    """The features as they are, for a compiled forward that is left to autograd."""
    return features.clone()


@differentiable_once.register_fake
def _(features: Tensor) -> Tensor:
    return torch.empty_like(features)


def _keep_features(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _pass(ctx: Any, gradient: Tensor) -> Tensor:
    (features,) = ctx.saved_tensors
    return pull_once(features, gradient, None, None, gradient.new_ones(gradient.shape[0]))


differentiable_once.register_autograd(_pass, setup_context=_keep_features)
