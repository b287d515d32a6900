"""A sweep becomes an operator: known to autograd and to torch.compile.

Both sweeps, eager and fused, are functions ``(rows, temperature, epsilon, need_grad, need_terms)``
that give the same four tensors. Forward has the gradient already, so backward is one
multiplication.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from varcon_loss.centroids import Centroids
from varcon_loss.rows import Rows, RowTerms, Samples

# loss [N]; KL, NLL, confidence and tau2 [4, N]; gradient [N, D] and what each of its rows is still
# to be multiplied by [N]. None: not needed, or a scale of 1. The custom operators, which take the
# parts of `Rows` one by one, cannot return None: there it is an empty tensor.
SweepResult = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]

_SCHEMA = (
    "(Tensor features, Tensor? unit, Tensor? norms, Tensor slots, Tensor w, "
    "Tensor? present, Tensor num_classes, bool packed, "
    "Tensor? own, Tensor? valid, Tensor? broken, "
    "float temperature, float epsilon, bool need_grad, bool need_terms) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


class _Scale(torch.autograd.Function):
    """Upstream times saved gradient, where the result may be differentiated again: refuse.

    The saved gradient has no history of its own, so the second derivative would be silently zero.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, upstream: Tensor) -> Tensor:
        return gradient * upstream.unsqueeze(1)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, None]:
        raise NotImplementedError(
            "the closed-form gradient of VarCon cannot be differentiated again: "
            "use impl='reference' where second derivatives are needed"
        )


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: SweepResult) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.dtype, ctx.num_others = inputs[0].dtype, len(inputs) - 1


def _scale_kept_gradient(
    ctx: Any, upstream: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    gradient = None if upstream is None else _scaled(ctx, upstream)
    return gradient, *(None,) * ctx.num_others


def _scaled(ctx: Any, upstream: Tensor) -> Tensor:
    gradient, scale = ctx.saved_tensors
    if scale is not None and scale.numel() > 0:
        upstream = upstream * scale
    if torch.is_grad_enabled():  # create_graph=True
        return _Scale.apply(gradient.detach().requires_grad_(), upstream).to(ctx.dtype)
    if gradient.dtype == upstream.dtype:
        return (gradient * upstream.unsqueeze(1)).to(ctx.dtype)
    # Half gradients: multiplied in float32 with no float32 copy of the whole.
    return torch.mul(gradient, upstream.unsqueeze(1), out=torch.empty_like(gradient))


def make_operator(
    name: str, sweep: Callable[..., SweepResult], *, fused: bool = False
) -> Callable[[Rows, float, float, bool], RowTerms]:
    """``sweep`` as a function of rows that can be differentiated, once, and compiled.

    Args:
        name: ``namespace::name`` of the custom operator.
        sweep: as above.
        fused: the sweep masks its rows itself, always gives all terms, and its gradient has the
            dtype of the features, and a scale, where others have that of ``w``.
    """

    class Sweep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor | None]:
            output = sweep(*inputs[1:])
            _keep_gradient(ctx, inputs, output)
            loss, others = output[:2]
            if others is not None:
                ctx.mark_non_differentiable(others)
            ctx.set_materialize_grads(False)
            return loss, others

        backward = staticmethod(_scale_kept_gradient)

    def flat(*arguments: Any) -> tuple[Tensor, ...]:
        samples, slots, centroids = Samples(*arguments[:3]), arguments[3], arguments[4:8]
        rows = Rows(samples, slots, Centroids(*centroids), *arguments[8:11])
        loss, others, gradient, scale = sweep(rows, *arguments[11:])
        return (
            loss,
            loss.new_empty(4, 0) if others is None else others,
            loss.new_empty(0) if gradient is None else gradient,
            loss.new_empty(0) if scale is None else scale,
        )

    # One operator, so that torch.compile neither looks inside nor breaks the graph.
    operator = torch.library.custom_op(name, flat, mutates_args=(), schema=_SCHEMA)
    operator.register_autograd(_scale_kept_gradient, setup_context=_keep_gradient)

    @operator.register_fake
    def _(features: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        norms, w, (need_grad, need_terms) = arguments[1], arguments[3], arguments[-2:]
        like = features if fused and need_grad else w
        num_rows = len(features)
        has_scale = need_grad and (fused or norms is not None)
        return (
            w.new_empty(num_rows),
            w.new_empty(4, num_rows if need_terms or fused else 0),
            like.new_empty(features.shape if need_grad else 0),
            w.new_empty(num_rows if has_scale else 0),
        )

    def run(rows: Rows, temperature: float, epsilon: float, need_terms: bool) -> RowTerms:
        samples, slots, centroids, *masks = rows
        need_grad = torch.is_grad_enabled() and samples.features.requires_grad
        options = (temperature, epsilon, need_grad, need_terms)
        if torch.compiler.is_compiling():
            loss, others = operator(*samples, slots, *centroids, *masks, *options)[:2]
        else:
            loss, others = Sweep.apply(samples.features, rows, *options)
        terms = RowTerms(loss, others)
        return terms if fused else terms.masked(rows)

    return run
