"""The ops of experts that torch sees: lorafast::grouped_linear, its backward, and DoRA's norm.

Its arguments are the rows' experts, and then those of lorafast::linear with a leading dim of
experts. The formula is the layer's, on grouped primitives.
"""

from __future__ import annotations

import weakref

import torch

from lorafast.engine import formula
from lorafast.engine.grouped import routes
from lorafast.engine.grouped.groups import Groups, of_expert
from lorafast.engine.ops import (
    OPTIONS,
    TENSORS,
    differentiable,
    modified_words,
    once_differentiable,
    register,
    with_unmodified_output,
)
from lorafast.engine.precision import accumulator
from lorafast.engine.problem import CallOptions, GradMask, LayerTensors
from lorafast.runtime import torch_internals
from lorafast.runtime.torch_internals import below_autocast

_T, _O = len(LayerTensors._fields), len(CallOptions._fields)
_FORWARD = (
    f"grouped_linear(Tensor x, Tensor offsets, Tensor? rows, {TENSORS}, {OPTIONS}) "
    "-> (Tensor y, Tensor h, Tensor z)"
)
_BACKWARD = (
    "grouped_linear_backward(Tensor dy, Tensor? x, Tensor? h, Tensor? kept, Tensor offsets, "
    f"Tensor? rows, {TENSORS}, {OPTIONS}, bool[] wants) -> Tensor[]"
)
_ROW_NORM = (
    "grouped_row_norm(Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? core, "
    "Tensor? out_scale, Tensor? scale, float scaling) -> Tensor"
)


def grouped_linear(
    x: torch.Tensor, groups: Groups, tensors: LayerTensors, options: CallOptions
) -> torch.Tensor:
    """Return y [S,N] of x [S,K] whose rows are sorted by expert, by lorafast::grouped_linear.

    As a plain function where no observer is active. Checks nothing: lorafast.functional does.
    """
    if not torch_internals.bypasses_dispatcher(x, (*groups, *tensors)):
        return torch.ops.lorafast.grouped_linear(x, *groups, *tensors, *options)[0]
    if torch.is_grad_enabled() and torch_internals.any_requires_grad(x, *tensors):
        return _apply(True, options, *groups, x, *tensors)
    with below_autocast():
        return _computed(x, groups, tensors, options)[0]


def row_norm(tensors: LayerTensors, scaling: float) -> torch.Tensor:
    """Return ‖W + s·(out_scale⊙B)·core·A‖ of each row, [E,N], by an op without a gradient."""
    _, _, A, B, core, _, _, out_scale, _, _, scale = tensors
    with torch.no_grad():
        return torch.ops.lorafast.grouped_row_norm(
            tensors.weight, A, B, core, out_scale, scale, scaling
        )


def _forward(x, offsets, rows, *flat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tensors, options = LayerTensors(*flat[:_T]), CallOptions(*flat[_T:])
    with below_autocast():
        y, h, z = _computed(x, Groups(offsets, rows), tensors, options)
        return y, h, x.new_empty(0) if z is None else z


def _computed(
    x: torch.Tensor, groups: Groups, tensors: LayerTensors, options: CallOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    groups.check(x.shape[0])
    return formula.forward(x, tensors, options, routes.of(x, tensors, options, groups))


def _backward(dy, x, h, kept, offsets, rows, *flat) -> list[torch.Tensor]:
    tensors, options = LayerTensors(*flat[:_T]), CallOptions(*flat[_T : _T + _O])
    needs, groups = GradMask(*flat[-1]), Groups(offsets, rows)
    grads = _gradients(dy, x, h, kept, groups, tensors, options, needs)
    return [grad for grad in grads if grad is not None]


def _gradients(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    h: torch.Tensor | None,
    kept: torch.Tensor | None,
    groups: Groups,
    tensors: LayerTensors,
    options: CallOptions,
    needs: GradMask,
) -> list[torch.Tensor | None]:
    with below_autocast():
        backends = routes.of(dy, tensors, options, groups)
        return formula.backward(dy, x, h, kept, tensors, options, needs, backends)


def _fake_forward(x, offsets, rows, *flat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tensors, options = LayerTensors(*flat[:_T]), CallOptions(*flat[_T:])
    S, N, R = x.shape[0], tensors.weight.shape[1], tensors.lora_A.shape[-2]
    z = x.new_empty(S, N) if options.keep == "inner" else x.new_empty(0)
    return x.new_empty(S, N), x.new_empty(S, R), z


def _fake_backward(dy, x, h, kept, offsets, rows, *flat) -> list[torch.Tensor]:
    tensors, needs = LayerTensors(*flat[:_T]), GradMask(*flat[-1])
    E, N, K = tensors.weight.shape
    like = tensors._asdict()
    d_bias = dy.new_empty(E, N, dtype=accumulator(dy.dtype))
    like |= {name: d_bias for name in ("bias", "lora_bias") if like[name] is None}
    d_x = [dy.new_empty(dy.shape[0], K)] if needs.x else []
    return d_x + [like[name].new_empty(like[name].shape) for name in needs.names if name != "x"]


def _row_norm(weight, A, B, core, out_scale, scale, scaling) -> torch.Tensor:
    tensors = LayerTensors(weight, None, A, B, core, out_scale=out_scale, scale=scale)
    options = CallOptions(scaling)
    with below_autocast():
        norm = _fake_row_norm(weight)
        for e in range(weight.shape[0]):
            norm[e] = formula.row_norm(of_expert(tensors, e), options)
        return norm


def _fake_row_norm(weight, *_) -> torch.Tensor:
    return weight.new_empty(weight.shape[:2], dtype=accumulator(weight.dtype))


class _GroupedLinear(torch.autograd.Function):
    """Saves x by reference, h [S,R], and for DoRA y by reference or z [S,N]."""

    @staticmethod
    def forward(ctx, direct, options, offsets, rows, x, *flat):
        tensors = LayerTensors(*flat)
        if direct:
            with below_autocast():
                y, h, z = _computed(x, Groups(offsets, rows), tensors, options)
        else:
            with torch_internals.dispatch_below_autograd():
                y, h, z = torch.ops.lorafast.grouped_linear(x, offsets, rows, *flat, *options)
        _, _, _, _, need_x, need_weight, *others, _, need_scale = ctx.needs_input_grad
        if need_weight or need_scale:
            raise RuntimeError(
                "lorafast::grouped_linear has no gradient for weight or a tensor scaling"
            )
        ctx.needs = GradMask(need_x, *others)
        saved = formula.saved_mask(ctx.needs, options, tensors.magnitude is not None)
        ctx.options = options
        kept = y if saved.y else z if saved.z else None
        # Backward reads the biases only to correct Σ dy⊙kept; elsewhere they may change before it.
        bias = tensors.bias if saved.y else None
        lora_bias = tensors.lora_bias if saved.z or options.keep == "recompute" else None
        tensors = tensors._replace(bias=bias, lora_bias=lora_bias)
        ctx.save_for_backward(
            x if saved.x else None, h if saved.h else None, kept, offsets, rows, *tensors
        )
        if options.keep == "output":
            ctx.output = weakref.ref(y), torch_internals.version_of(y)
            ctx.words = modified_words(tensors.weight, tensors.magnitude)
        if direct:
            return y
        ctx.mark_non_differentiable(h, z)
        return y, h, z

    @staticmethod
    def backward(ctx, dy, *_):
        needs, options = ctx.needs, ctx.options
        saved = ctx.saved_tensors if options.keep != "output" else with_unmodified_output(ctx)
        if not torch.is_grad_enabled() and torch_internals.bypasses_dispatcher(dy, saved):
            x, h, kept, offsets, rows, *flat = saved
            tensors, groups = LayerTensors(*flat), Groups(offsets, rows)
            d_x, *d_tensors = _gradients(dy, x, h, kept, groups, tensors, options, needs)
        else:
            op = torch.ops.lorafast.grouped_linear_backward
            made = iter(op(dy, *saved, *options, list(needs)))
            d_x, *d_tensors = (next(made) if need else None for need in needs)
        return None, None, None, None, d_x, None, *d_tensors, None, None


_apply = torch_internals.function_apply(_GroupedLinear)


def _autograd(x, offsets, rows, *flat):
    return _GroupedLinear.apply(False, CallOptions(*flat[_T:]), offsets, rows, x, *flat[:_T])


register(_FORWARD, _forward, _fake_forward, differentiable(_autograd, "grouped_linear"))
register(_BACKWARD, _backward, _fake_backward, once_differentiable("grouped_linear_backward"))
register(_ROW_NORM, _row_norm, _fake_row_norm, once_differentiable("grouped_row_norm"))
