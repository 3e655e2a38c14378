"""The ops torch sees: lorafast::linear and lorafast::row_norm, each with its backward.

An op is one node for torch.compile and for checkpointing policies. Its arguments are LayerTensors
and CallOptions field by field; it returns what backward needs beside y, so that nothing is computed
twice and nothing is hidden from autograd.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable

import torch

from lorafast.engine import (
    checks,
    formula,
    norm_grads,
    reference,
    weight_buffers,
    weight_norm,
)
from lorafast.engine.precision import accumulator
from lorafast.engine.problem import (
    CallOptions,
    GradMask,
    LayerTensors,
    SavedMask,
    scaling_of,
    tokens,
)
from lorafast.engine.weight_buffers import Loan
from lorafast.engine.weight_norm import NormPolicy
from lorafast.runtime import torch_internals
from lorafast.runtime.torch_internals import below_autocast, below_autograd

_LIBRARY = torch.library.Library("lorafast", "FRAGMENT")
_T, _O = len(LayerTensors._fields), len(CallOptions._fields)

TENSORS = "Tensor weight, " + ", ".join(f"Tensor? {name}" for name in LayerTensors._fields[1:])
OPTIONS = "float scaling, float dropout, str axis, str dropout_on, str keep, SymInt frozen_columns"
_LINEAR = f"linear(Tensor x, {TENSORS}, {OPTIONS}) -> (Tensor y, Tensor h, Tensor z)"
_LINEAR_BACKWARD = (
    f"linear_backward(Tensor dy, Tensor? x, Tensor? h, Tensor? kept, {TENSORS}, {OPTIONS}, "
    "bool[] wants) -> Tensor[]"
)
_ROW_NORM = f"row_norm({TENSORS}, {OPTIONS}, bool detach, bool cache) -> Tensor"
_ROW_NORM_BACKWARD = (
    f"row_norm_backward(Tensor d_norm, Tensor value, {TENSORS}, {OPTIONS}, bool[] wants) "
    "-> Tensor[]"
)

# The kernel of each op by its name, for what counts the operations inside an op.
KERNELS: dict[str, Callable] = {}

_NO_TRANSFORM = (
    "lorafast ops have no torch.func transforms, no batched gradients and no forward-mode AD; "
    "use lorafast.reference.linear there"
)
_MODIFIED = (
    "{}: its output was modified in place, but keep='output' reads it again in backward for "
    "d_magnitude; use DoRA(keep='inner'), or an out-of-place op after this layer"
)
_TRAINED = (
    "this op has no gradient for weight or a tensor scaling; "
    "lorafast.linear runs plain autograd where one is trained"
)
_NO_DOUBLE = "double backward unsupported, use lorafast.reference.linear, which is plain torch"


def linear(
    x: torch.Tensor,
    tensors: LayerTensors,
    options: CallOptions,
    loan: Loan | None = None,
) -> torch.Tensor:
    """Return y [...,N] by lorafast::linear; as a plain function where no observer is active.

    Where the op would be foreign, the formula runs in torch's ops. loan: from which backward takes
    the weight again, which is saved without one. Checks nothing: lorafast.functional does.
    """
    if not torch_internals.bypasses_dispatcher(x, tensors):
        if torch_internals.needs_plain_ops((x, *tensors)):
            if loan is not None:
                # Plain autograd saves it.
                tensors = tensors._replace(weight=tensors.weight.clone())
            return _plain_linear(x, tensors, options)
        if loan is not None:
            return _Linear.apply(None, loan, options, x, *tensors)[0]
        return torch.ops.lorafast.linear(x, *tensors, *options)[0]
    if torch.is_grad_enabled() and torch_internals.any_requires_grad(x, *tensors):
        return _apply_linear(tensors, loan, options, x, *tensors)
    return _call_directly(formula.forward, x, tensors, options)[0]


def row_norm(tensors: LayerTensors, options: CallOptions, policy: NormPolicy) -> torch.Tensor:
    """Return the norm [N] or [K] by lorafast::row_norm; otherwise as linear does.

    Checks nothing: lorafast.functional does.
    """
    detached = policy.detach or not torch.is_grad_enabled()
    if not detached or not torch_internals.bypasses_dispatcher(tensors.weight, tensors):
        if torch_internals.needs_plain_ops(tensors):
            norm = _plain_norm(tensors, options)
            return norm.detach() if policy.detach else norm
        return torch.ops.lorafast.row_norm(*tensors, *options, *policy)
    with below_autograd():
        return weight_norm.row_norm(tensors, options, policy.cache)


def _plain_linear(x: torch.Tensor, tensors: LayerTensors, options: CallOptions) -> torch.Tensor:
    _, p, axis, dropout_on, keep, frozen_columns = options
    if p:
        checks.maskable(x)
    with checks.readable(tensors.weight):
        return reference.linear(
            x, *tensors[:7], axis, tensors.out_scale, tensors.lora_bias,
            scaling_of(tensors, options), p, dropout_on, keep, frozen_columns, tensors.seed,
        )  # fmt: skip


def _plain_norm(tensors: LayerTensors, options: CallOptions) -> torch.Tensor:
    with checks.readable(tensors.weight):
        return reference.row_norm(
            tensors.weight, tensors.lora_A, tensors.lora_B, tensors.core, tensors.out_scale,
            scaling_of(tensors, options), options.axis,
        )  # fmt: skip


def _call_directly(function: Callable, *args):
    """function(*args) below autocast, where no gradient is recorded anyway."""
    # Where autocast is off there is no guard: it would slow down every torch call inside.
    if not torch_internals.any_autocast():
        return function(*args)
    with below_autocast():
        return function(*args)


def _linear(x: torch.Tensor, *flat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with below_autocast():
        y, h, z = formula.forward(x, LayerTensors(*flat[:_T]), CallOptions(*flat[_T:]))
        return y, h, x.new_empty(0) if z is None else z


def _linear_backward(dy, x, h, kept, *flat) -> list[torch.Tensor]:
    tensors, options, needs = _unflatten(flat)
    with below_autocast():
        grads = formula.backward(dy, x, h, kept, tensors, options, needs)
    return [grad for grad in grads if grad is not None]


def _row_norm(*flat) -> torch.Tensor:
    tensors, options = LayerTensors(*flat[:_T]), CallOptions(*flat[_T : _T + _O])
    with below_autocast():
        return weight_norm.row_norm(tensors, options, flat[-1])


def _row_norm_backward(d_norm, value, *flat) -> list[torch.Tensor]:
    with below_autocast():
        return norm_grads.row_norm_backward(d_norm, value, *_unflatten(flat))


def _unflatten(flat: tuple) -> tuple[LayerTensors, CallOptions, GradMask]:
    """The arguments of a backward op after its own: tensors, options, needs."""
    tensors, options = LayerTensors(*flat[:_T]), CallOptions(*flat[_T : _T + _O])
    return tensors, options, GradMask(*flat[-1])


def _fake_linear(x: torch.Tensor, *flat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tensors, options, M = LayerTensors(*flat[:_T]), CallOptions(*flat[_T:]), tokens(x)
    N, R = tensors.weight.shape[0], tensors.lora_A.shape[0]
    z = x.new_empty(M, N) if options.keep == "inner" else x.new_empty(0)
    return x.new_empty(*x.shape[:-1], N), x.new_empty(M, R), z


def _fake_linear_backward(dy, x, h, kept, *flat) -> list[torch.Tensor]:
    tensors, _, needs = _unflatten(flat)
    like = tensors._asdict()
    d_x = [dy.new_empty(*dy.shape[:-1], tensors.weight.shape[1])] if needs.x else []
    d_bias = dy.new_empty(tensors.weight.shape[0], dtype=accumulator(dy.dtype))
    like |= {name: d_bias for name in ("bias", "lora_bias") if like[name] is None}
    return d_x + [like[name].new_empty(like[name].shape) for name in needs.names if name != "x"]


def _fake_row_norm(*flat) -> torch.Tensor:
    tensors, options = LayerTensors(*flat[:_T]), CallOptions(*flat[_T : _T + _O])
    weight = tensors.weight
    length = weight.shape[0 if options.axis == "out" else 1]
    return weight.new_empty(length, dtype=accumulator(weight.dtype))


def _fake_row_norm_backward(d_norm, value, *flat) -> list[torch.Tensor]:
    tensors, _, needs = _unflatten(flat)
    like = tensors._asdict()
    return [like[name].new_empty(like[name].shape) for name in needs.names]


class _Linear(torch.autograd.Function):
    """y = gain⊙(x Wᵀ + s·h' Bᵀ) + bias.

    Saves x by reference, h [M,R], and for DoRA y by reference or z [M,N].
    """

    @staticmethod
    def forward(ctx, given, loan, options, x, *flat):
        # given: the tensors as the caller had them, where the call bypasses the dispatcher.
        direct, tensors = given is not None, given or LayerTensors._make(flat)
        has_gain, keep = tensors.magnitude is not None, options.keep
        needs, saved = _masks(ctx.needs_input_grad, options.axis, keep, has_gain)
        if direct:
            y, h, z = _call_directly(formula.forward, x, tensors, options)
        else:
            with torch_internals.dispatch_below_autograd():
                y, h, z = torch.ops.lorafast.linear(x, *tensors, *options)
        kept = y if saved.y else z if saved.z else None
        # Backward reads the biases only to correct Σ dy⊙kept; elsewhere they may change before it.
        bias = tensors.bias if saved.y else None
        lora_bias = tensors.lora_bias if saved.z or keep == "recompute" else None
        ctx.save_for_backward(
            x if saved.x else None, h if saved.h else None, kept,
            None if loan else tensors.weight, bias, *tensors[2:8], lora_bias, *tensors[9:],
        )  # fmt: skip
        ctx.options, ctx.needs = options, needs
        ctx.loan = loan
        if keep == "output":
            ctx.output = weakref.ref(y), torch_internals.version_of(y)
            ctx.words = modified_words(tensors.weight, tensors.magnitude)
        if direct:
            return y
        ctx.mark_non_differentiable(h, z)
        return y, h, z

    @staticmethod
    def backward(ctx, dy, *_):
        options, needs = ctx.options, ctx.needs
        saved = ctx.saved_tensors if options.keep != "output" else with_unmodified_output(ctx)
        if ctx.loan is None:
            return _Linear.gradients(dy, saved, options, needs)
        borrowed = ctx.loan.take()
        try:
            whole = (*saved[:3], borrowed.weight, *saved[4:])
            return _Linear.gradients(dy, whole, options, needs)
        finally:
            weight_buffers.give_back(borrowed)

    @staticmethod
    def gradients(dy, saved, options, needs):
        """Return the results of backward. saved: the saved tensors, with a weight in its place."""
        if not torch.is_grad_enabled() and torch_internals.bypasses_dispatcher(dy, saved):
            x, h, kept, *flat = saved
            tensors = LayerTensors._make(flat)
            grads = _call_directly(formula.backward, dy, x, h, kept, tensors, options, needs)
        else:
            made = iter(torch.ops.lorafast.linear_backward(dy, *saved, *options, list(needs)))
            grads = [next(made) if need else None for need in needs]
        d_x, *d_tensors = grads
        return None, None, None, d_x, None, *d_tensors, None, None


def modified_words(weight: torch.Tensor | None, magnitude: torch.Tensor | None) -> str:
    """The error where the output that keep="output" reads has been modified in place."""
    name = getattr(magnitude, "lorafast_name", None)
    shape = "of unknown shape" if weight is None else tuple(weight.shape)
    return _MODIFIED.format(name or f"the DoRA layer with weight {shape}")


@functools.lru_cache(maxsize=1024)
def _masks(
    needs_input_grad: tuple[bool, ...], axis: str, keep: str, has_gain: bool
) -> tuple[GradMask, SavedMask]:
    """The gradients that _Linear's arguments need, and what to save for them."""
    _, _, _, x, weight, *others, _, scale = needs_input_grad
    if weight or scale:
        raise RuntimeError(_TRAINED)
    needs = GradMask(x, *others)
    return needs, formula.saved_mask(needs, CallOptions(axis=axis, keep=keep), has_gain)


def with_unmodified_output(ctx) -> tuple[torch.Tensor | None, ...]:
    """Return the tensors that keep="output" saved, if y is as forward left it."""
    y, version = ctx.output[0](), ctx.output[1]
    modified = y is not None and torch_internals.version_of(y) != version
    try:
        saved = ctx.saved_tensors
    except RuntimeError as error:
        # A y that has been freed has no version to compare, but is the likeliest cause.
        if modified or (y is None and "inplace" in str(error)):
            raise RuntimeError(ctx.words) from error
        raise
    # Under saved-tensor hooks, non-reentrant checkpointing among them, torch itself checks nothing:
    # the y that comes back has been recomputed, and overwritten again by the op that follows.
    if modified or torch_internals.version_of(saved[2]) != version:
        raise RuntimeError(ctx.words)
    return saved


# No call comes here from inside a functorch transform, which Function.apply looks for first.
_apply_linear = torch_internals.function_apply(_Linear)


class _RowNorm(torch.autograd.Function):
    """The norm with its exact gradient for A, B, core and out_scale.

    V = W + sBA is computed again block by block, never saved.
    """

    @staticmethod
    def forward(ctx, *flat):
        needed = dict(zip(LayerTensors._fields, ctx.needs_input_grad, strict=False))
        if needed["weight"] or needed["scale"]:
            raise RuntimeError(_TRAINED)
        with torch_internals.dispatch_below_autograd():
            value = torch.ops.lorafast.row_norm(*flat)
        factors = ("lora_A", "lora_B", "core", "out_scale")
        ctx.needs = GradMask(**{name: needed[name] for name in factors})
        ctx.options = flat[_T : _T + _O]
        ctx.save_for_backward(value, *flat[:_T])
        return value

    @staticmethod
    def backward(ctx, d_norm):
        value, *flat = ctx.saved_tensors
        needs: GradMask = ctx.needs
        made = torch.ops.lorafast.row_norm_backward(d_norm, value, *flat, *ctx.options, list(needs))
        grads = dict(zip(needs.names, made, strict=True))
        return *(grads.get(name) for name in LayerTensors._fields), *([None] * (_O + 2))


def differentiable(
    apply: Callable, op: str, is_detached: Callable[[tuple], bool] | None = None
) -> Callable:
    """The Autograd kernel of a forward op: the Function where a gradient may be needed."""

    def kernel(*args):
        tensors = _tensors_of(args)
        if torch_internals.functorch_active() or torch_internals.has_tangent(tensors):
            raise NotImplementedError(_NO_TRANSFORM)
        needed = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if needed and not (is_detached and is_detached(args)):
            return apply(*args)
        with torch_internals.dispatch_below_autograd():
            return getattr(torch.ops.lorafast, op)(*args)

    return kernel


def once_differentiable(op: str) -> Callable:
    """The Autograd kernel of a backward op, which refuses to be differentiated again.

    Without one torch would warn and return wrong second derivatives.
    """

    def kernel(*args):
        if torch.is_grad_enabled() and any(t.requires_grad for t in _tensors_of(args)):
            raise RuntimeError(_NO_DOUBLE)
        with torch_internals.dispatch_below_autograd():
            return getattr(torch.ops.lorafast, op)(*args)

    return kernel


def register(schema: str, kernel: Callable, fake: Callable, autograd: Callable) -> None:
    """Define lorafast::NAME with all its kernels."""
    op = schema.partition("(")[0]
    KERNELS[op] = kernel
    _LIBRARY.define(schema)
    _LIBRARY.impl(op, kernel, "CompositeExplicitAutograd")
    _LIBRARY.impl(op, autograd, "Autograd")
    _LIBRARY.impl(op, _no_batching, "FuncTorchBatched")
    # The batched tensors of torch.autograd.grad(..., is_grads_batched=True).
    _LIBRARY.impl(op, _no_batching, "Batched")
    torch.library.register_fake(f"lorafast::{op}", fake, lib=_LIBRARY)


def _tensors_of(args: tuple) -> list[torch.Tensor]:
    """The tensors among the arguments, those inside lists too."""
    flat = itertools.chain.from_iterable(a if isinstance(a, list) else (a,) for a in args)
    return [a for a in flat if isinstance(a, torch.Tensor)]


def _no_batching(*_):
    raise NotImplementedError(_NO_TRANSFORM)


def _linear_autograd(x: torch.Tensor, *flat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _Linear.apply(None, None, CallOptions(*flat[_T:]), x, *flat[:_T])


register(_LINEAR, _linear, _fake_linear, differentiable(_linear_autograd, "linear"))
register(
    _LINEAR_BACKWARD, _linear_backward, _fake_linear_backward,
    once_differentiable("linear_backward"),
)  # fmt: skip
register(
    _ROW_NORM, _row_norm, _fake_row_norm,
    differentiable(_RowNorm.apply, "row_norm", lambda args: args[-2]),
)  # fmt: skip
register(
    _ROW_NORM_BACKWARD, _row_norm_backward, _fake_row_norm_backward,
    once_differentiable("row_norm_backward"),
)  # fmt: skip
