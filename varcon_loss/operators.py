"""A sweep becomes an operator: known to autograd and to torch.compile.

Both sweeps, eager and fused, are functions ``(rows, temperature, epsilon, need_grad)`` that give
the same four tensors; an operator takes the parts of `Rows` one by one. Forward has the gradient
already, so backward is one multiplication.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from varcon_loss.centroids import Centroids
from varcon_loss.rows import Rows, RowTerms, Samples

# loss [N]; KL, NLL, confidence and tau2 [4, N]; gradient [N, D] and what each of its rows is still
# to be multiplied by [N]. The gradient is empty where none is needed, and so is the scale where it
# is 1.
SweepResult = tuple[Tensor, Tensor, Tensor, Tensor]

_SCHEMA = (
    "(Tensor features, Tensor? unit, Tensor? norms, Tensor slots, Tensor w, "
    "Tensor? present, Tensor num_classes, bool packed, "
    "Tensor? own, Tensor? valid, Tensor? broken, "
    "float temperature, float epsilon, bool need_grad) -> (Tensor, Tensor, Tensor, Tensor)"
)
_NUM_ARGUMENTS = 14


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
    ctx.dtype = inputs[0].dtype


def _scale_kept_gradient(
    ctx: Any, upstream: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * _NUM_ARGUMENTS
    return _scaled(ctx, upstream), *(None,) * (_NUM_ARGUMENTS - 1)


def _scaled(ctx: Any, upstream: Tensor) -> Tensor:
    gradient, scale = ctx.saved_tensors
    if scale.numel() > 0:
        upstream = upstream * scale
    if torch.is_grad_enabled():  # create_graph=True
        return _Scale.apply(gradient.detach().requires_grad_(), upstream).to(ctx.dtype)
    if gradient.dtype == upstream.dtype:
        return (gradient * upstream.unsqueeze(1)).to(ctx.dtype)
    # Half gradients: multiplied in float32 with no float32 copy of the whole.
    return torch.mul(gradient, upstream.unsqueeze(1), out=torch.empty_like(gradient))


def make_operator(
    name: str, sweep: Callable[..., SweepResult], *, fused: bool = False
) -> Callable[[Rows, float, float], RowTerms]:
    """``sweep`` as a function of rows that can be differentiated, once, and compiled.

    Args:
        name: ``namespace::name`` of the custom operator.
        sweep: as above.
        fused: the sweep masks its rows itself, and its gradient has the dtype of the features,
            and a scale, where others have that of ``w``.
    """

    def flat(*arguments: Any) -> SweepResult:
        samples, slots, centroids = Samples(*arguments[:3]), arguments[3], arguments[4:8]
        rows = Rows(samples, slots, Centroids(*centroids), *arguments[8:11])
        return sweep(rows, *arguments[11:])

    class Sweep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
            output = flat(*arguments)
            _keep_gradient(ctx, arguments, output)
            loss, others = output[:2]
            ctx.mark_non_differentiable(others)
            ctx.set_materialize_grads(False)
            return loss, others

        backward = staticmethod(_scale_kept_gradient)

    # One operator, so that torch.compile neither looks inside nor breaks the graph.
    operator = torch.library.custom_op(name, flat, mutates_args=(), schema=_SCHEMA)
    operator.register_autograd(_scale_kept_gradient, setup_context=_keep_gradient)

    @operator.register_fake
    def _(features: Tensor, *arguments: Any) -> SweepResult:
        w, need_grad = arguments[3], arguments[-1]
        like = features if fused else w
        num_rows = len(features)
        return (
            w.new_empty(num_rows),
            w.new_empty(4, num_rows),
            like.new_empty(features.shape if need_grad else 0),
            w.new_empty(num_rows if need_grad and fused else 0),
        )

    def run(rows: Rows, temperature: float, epsilon: float) -> RowTerms:
        need_grad = torch.is_grad_enabled() and rows.features.requires_grad
        arguments = (
            *rows.anchors,
            rows.slots,
            *rows.centroids,
            rows.own,
            rows.valid,
            rows.broken,
            temperature,
            epsilon,
            need_grad,
        )
        loss, others = (operator if torch.compiler.is_compiling() else Sweep.apply)(*arguments)[:2]
        terms = RowTerms(loss, *others.unbind())
        return terms if fused else terms.masked(rows)

    return run
