"""A sweep becomes an operator: known to autograd and to torch.compile.

Both sweeps, eager and fused, are functions ``(rows, temperature, epsilon, need_grad, need_terms)``
that give `Swept`. Forward has the gradient already, so backward is one multiplication.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from varcon_loss.readable import without_autocast
from varcon_loss.rows import TENSORS, Rows, Swept, rows_of
from varcon_loss.soft_labels import SoftLabels
from varcon_loss.sweeps.once import scale_rows, scale_rows_once
from varcon_loss.sweeps.reference import reference_terms


class _Differentiable(torch.autograd.Function):
    """`scale_rows`, where it may be differentiated again.

    What forward kept has no history of its own: a further derivative goes by the equations.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        features: Tensor,
        upstream: Tensor,
        gradient: Tensor,
        scale: Tensor | None,
        temperatures: tuple[float, float],
        *parts: Tensor | None,
    ) -> Tensor:
        known = gradient if scale is None else gradient * scale.unsqueeze(1)
        return (known * upstream.unsqueeze(1)).to(features.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        features, upstream, _, _, ctx.temperatures, *parts = inputs
        ctx.save_for_backward(features, upstream, *parts)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor) -> tuple[Tensor | None, ...]:
        features, upstream, *parts = ctx.saved_tensors

        def loss(features: Tensor) -> Tensor:
            rows = rows_of(features, dict(zip(TENSORS, parts, strict=True)))
            return reference_terms(rows, *ctx.temperatures, need_terms=False).loss

        def gradient(features: Tensor, upstream: Tensor) -> Tensor:
            return torch.func.vjp(loss, features)[1](upstream)[0]

        with without_autocast(features):
            back = torch.func.vjp(gradient, features, upstream)[1](*directions)
        return *back, *(None,) * (3 + len(parts))


# Where the saved tensors of `Sweep` are that may be changed in place before backward, which needs
# none of them: features, and shares given as labels, by a caller who reuses them, and remembered
# centroids by the next step. Features, gradient and scale are saved before `Rows.tensors`.
_CHANGEABLE = (0, 3 + TENSORS.index("w"))
_SOFT = 3 + TENSORS.index("soft")  # None for integer labels


def _versions(saved: tuple[Any, ...]) -> list[tuple[int, int]]:
    """Where each lies, and how often it was written to."""
    changeable = [saved[i] for i in (*_CHANGEABLE, _SOFT)]
    return [(x.untyped_storage()._cdata, x._version) for x in changeable if x is not None]


def _allow_changes(loss: Tensor, *, soft: bool) -> None:
    """Have autograd not check the versions of these saved tensors: `_check_unchanged` does."""
    # Under hooks of the caller's nothing is checked, and no other hooks may be added.
    with contextlib.suppress(RuntimeError):
        saved = loss.grad_fn._raw_saved_tensors  # type: ignore[union-attr]
        for index in (*_CHANGEABLE, _SOFT) if soft else _CHANGEABLE:
            saved[index].register_hooks(_as_is, _as_is)


def _as_is(tensor: Tensor) -> Tensor:
    return tensor


def _backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of both functions below: one multiplication, unless it is to be differentiated again."""
    result = None
    if upstream is not None:
        saved = ctx.saved_tensors  # read once: under checkpointing it is made anew
        features, gradient, scale, *parts = saved
        if not torch.is_grad_enabled():
            result = scale_rows(gradient, scale, upstream, ctx.dtype)
        else:  # create_graph=True
            _check_unchanged(ctx, saved)
            result = _Differentiable.apply(
                features, upstream, gradient, scale, ctx.temperatures, *parts
            )
    return result, *(None,) * ctx.num_others


def _check_unchanged(ctx: Any, saved: tuple[Any, ...]) -> None:
    """Copies that a caller's hooks made of what was saved are as it was, whatever their version."""
    if ctx.versions is None:
        return
    kept, now = ctx.versions, _versions(saved)
    if any(a[0] == b[0] and a[1] != b[1] for a, b in zip(kept, now, strict=True)):
        raise RuntimeError(
            "a second derivative of VarCon needs the features, and class probabilities or a "
            "centroid memory where there are any, as they were when the loss was computed, and "
            "they were changed in place since: differentiate before the next step, or use "
            "impl='reference'"
        )


def _refuse_forward_mode() -> None:
    raise NotImplementedError(
        "VarCon's loss has no forward-mode derivative (torch.func.jvp, jacfwd, hessian): use "
        "reverse mode (torch.func.vjp, jacrev, jacrev(jacrev(...))), or impl='reference'"
    )


def _keep_for_operator(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], *output[2:])
    ctx.num_others = len(inputs) - 1


def _operator_backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    gradient = None
    if upstream is not None:
        gradient = scale_rows_once(*ctx.saved_tensors, upstream)
    return gradient, *(None,) * ctx.num_others


def _options_of_operator(temperature: float, epsilon: float) -> tuple[float, float, Tensor | None]:
    """An operator's numbers are fixed when it is compiled: those that change go as a tensor.

    On the CPU, where reading them waits for nothing.
    """
    from torch.fx.experimental import symbolic_shapes

    is_fixed = getattr(symbolic_shapes, "has_static_value", None)
    # An older torch cannot tell, and compiles again for each value.
    if is_fixed is None or (is_fixed(temperature) and is_fixed(epsilon)):
        return temperature, epsilon, None
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    return 0.0, 0.0, torch.stack((zero + temperature, zero + epsilon))


def gradient_scale(rows: Rows, need_grad: bool) -> Tensor | None:
    """What a gradient is still to be multiplied by where rows are normalised, ``[N]``."""
    norms = rows.anchors.norms
    if not need_grad or norms is None:
        return None
    # Finite for lengths that have no finite inverse, where a gradient of 0 must stay 0.
    return norms.reciprocal().clamp_max_(torch.finfo(norms.dtype).max)


def make_operator(
    name: str, sweep: Callable[..., Swept], *, fused: bool = False
) -> Callable[[Rows, float, float, bool], Swept]:
    """``sweep`` as a function of rows that can be differentiated, once, and compiled.

    Args:
        name: ``namespace::name`` of the custom operator.
        sweep: as above.
        fused: the sweep always gives all terms, and its gradient has the dtype of the features,
            and a scale, where others have that of ``w``.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Swept) -> None:
        features, rows, *temperatures, need_grad, _ = inputs
        ctx.versions = None
        if need_grad:
            saved = (features, output.gradient, output.scale, *rows.tensors().values())
            ctx.save_for_backward(*saved)
            if not torch._C._are_functorch_transforms_active():
                ctx.versions = _versions(saved)
        ctx.temperatures, ctx.dtype = temperatures, features.dtype
        ctx.num_others = len(inputs) - 1
        ctx.set_materialize_grads(False)

    class Sweep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor | None]:
            output = sweep(*inputs[1:])
            keep(ctx, inputs, output)
            if output.terms is not None:
                ctx.mark_non_differentiable(output.terms)
            return output.loss, output.terms

        backward = staticmethod(_backward)

        @staticmethod
        def jvp(ctx: Any, *_: Any) -> None:
            _refuse_forward_mode()

    class TransformedSweep(torch.autograd.Function):
        """The same for torch.func, which asks for another form, and takes longer."""

        @staticmethod
        def forward(*inputs: Any) -> Swept:
            return sweep(*inputs[1:])

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            loss, terms, gradient, scale = output  # torch.func hands on a plain tuple
            swept = Swept(loss=loss, terms=terms, gradient=gradient, scale=scale)
            keep(ctx, inputs, swept)
            ctx.mark_non_differentiable(*(part for part in output[1:] if part is not None))

        backward = staticmethod(_backward)

        @staticmethod
        def jvp(ctx: Any, *_: Any) -> None:
            _refuse_forward_mode()

        @staticmethod
        def vmap(info: Any, in_dims: Any, *_: Any) -> None:
            _refuse_forward_mode()  # jacfwd maps over directions

    # One operator, so that torch.compile neither looks inside nor breaks the graph.
    @torch.library.custom_op(name, mutates_args=())
    def operator(
        features: Tensor,
        norms: Tensor | None,
        w: Tensor,
        need_grad: bool,
        need_terms: bool,
        unit: Tensor | None,
        slots: Tensor | None,
        soft: Tensor | None,
        entries: Tensor | None,
        columns: Tensor | None,
        background: Tensor | None,
        class_weight: Tensor | None,
        present: Tensor | None,
        num_present: Tensor,
        packed: bool,
        own: Tensor | None,
        valid: Tensor | None,
        broken: Tensor | None,
        temperature: float,
        epsilon: float,
        temperatures: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tensors = {
            "w": w,
            "present": present,
            "num_present": num_present,
            "slots": slots,
            "soft": soft,
            "entries": entries,
            "columns": columns,
            "background": background,
            "own": own,
            "norms": norms,
            "valid": valid,
            "broken": broken,
            "class_weight": class_weight,
        }
        rows = rows_of(features, tensors, unit=unit, packed=packed)
        if temperatures is not None:
            temperature, epsilon = temperatures.tolist()
        swept = sweep(rows, temperature, epsilon, need_grad, need_terms)
        loss = swept.loss  # an operator cannot return None: there it is an empty tensor
        return (
            loss,
            loss.new_empty(4, 0) if swept.terms is None else swept.terms,
            loss.new_empty(0) if swept.gradient is None else swept.gradient,
            loss.new_empty(0) if swept.scale is None else swept.scale,
        )

    @operator.register_fake
    def _(
        features: Tensor,
        norms: Tensor | None,
        w: Tensor,
        need_grad: bool,
        need_terms: bool,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, ...]:
        num_rows = features.shape[0]
        like = features if fused and need_grad else w
        has_scale = need_grad and (fused or norms is not None)
        return (
            w.new_empty(num_rows),
            w.new_empty(4, num_rows if need_terms or fused else 0),
            like.new_empty(features.shape if need_grad else 0),
            w.new_empty(num_rows if has_scale else 0),
        )

    operator.register_autograd(_operator_backward, setup_context=_keep_for_operator)

    def run(rows: Rows, temperature: float, epsilon: float, need_terms: bool) -> Swept:
        anchors, features = rows.anchors, rows.anchors.features
        need_grad = torch.is_grad_enabled() and features.requires_grad
        if torch.compiler.is_compiling():
            temperature, epsilon, temperatures = _options_of_operator(temperature, epsilon)
            loss, terms, *_ = operator(
                features=features,
                **rows.tensors(),
                need_grad=need_grad,
                need_terms=need_terms,
                unit=anchors.unit,
                packed=rows.centroids.packed,
                temperature=temperature,
                epsilon=epsilon,
                temperatures=temperatures,
            )
        else:
            several = torch._C._are_functorch_transforms_active()
            function = TransformedSweep if several else Sweep
            given = (features, rows, temperature, epsilon, need_grad, need_terms)
            loss, terms, *_ = function.apply(*given)
            if need_grad and not several:
                _allow_changes(loss, soft=isinstance(rows.slots, SoftLabels))
        return Swept(loss=loss, terms=terms)

    return run
