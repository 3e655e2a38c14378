"""The ops torch sees: schemas, fakes and autograd. lorafast::linear and lorafast::row_norm, each with its backward.

An op is one node for torch.compile and for checkpointing policies. Its arguments are LayerTensors and CallOptions
laid flat; it returns what backward needs beside y, so that nothing is computed twice and nothing is hidden from autograd.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable

import torch
from torch._C import DispatchKey, DispatchKeySet
from torch.autograd import forward_ad

from lorafast.engine import weight_norm
from lorafast.engine.backward import backward
from lorafast.engine.forward import forward
from lorafast.engine.problem import (
    CallOptions,
    GradMask,
    LayerTensors,
    SavedMask,
    accumulator,
    saves,
    tokens,
)
from lorafast.runtime import torch_internals

_LIBRARY = torch.library.Library("lorafast", "FRAGMENT")
_T, _S = len(LayerTensors._fields), len(CallOptions._fields)

_TENSORS = "Tensor weight, " + ", ".join(f"Tensor? {name}" for name in LayerTensors._fields[1:])
_SETTINGS = (
    "float scaling, float dropout, str axis, str dropout_on, str keep, SymInt frozen_columns"
)

_LINEAR = f"linear(Tensor x, {_TENSORS}, {_SETTINGS}) -> (Tensor y, Tensor h, Tensor z)"
_LINEAR_BACKWARD = f"linear_backward(Tensor dy, Tensor? x, Tensor? h, Tensor? kept, {_TENSORS}, {_SETTINGS}, bool[] wants) -> Tensor[]"
_ROW_NORM = f"row_norm({_TENSORS}, {_SETTINGS}, bool detach, bool cache) -> Tensor"
_ROW_NORM_BACKWARD = f"row_norm_backward(Tensor d_norm, Tensor value, {_TENSORS}, {_SETTINGS}, bool[] wants) -> Tensor[]"

# Autocast sits above every kernel and would re-cast the fp32 sums inside one; the dtypes were fixed at the door.
_AUTOCAST = DispatchKeySet(DispatchKey.AutocastCPU)
for _device in ("CUDA", "XPU", "MPS", "HPU", "PrivateUse1"):
    _AUTOCAST = _AUTOCAST | DispatchKeySet(getattr(DispatchKey, f"Autocast{_device}"))
# And with it, in the same guard, what torch._C._AutoDispatchBelowAutograd leaves out.
_AUTOGRAD_TOO = _AUTOCAST
for _key in (
    DispatchKey.AutogradFunctionality,
    DispatchKey.AutogradOther,
    DispatchKey.AutogradNestedTensor,
):
    _AUTOGRAD_TOO = _AUTOGRAD_TOO | DispatchKeySet(_key)


def below_autocast() -> contextlib.AbstractContextManager:
    """Inside, dtypes are what they are."""
    return torch._C._ExcludeDispatchKeyGuard(_AUTOCAST)


def below_autograd() -> contextlib.AbstractContextManager:
    """Inside, nothing is recorded either: where an op's kernel is, for what goes there without the dispatcher."""
    return torch._C._ExcludeDispatchKeyGuard(_AUTOGRAD_TOO)


def _directly(kernel: Callable, *args):
    """kernel(*args) where no gradient is recorded anyway: a guard would slow down every call of torch's inside."""
    if not torch._C._is_any_autocast_enabled():
        return kernel(*args)
    with below_autocast():
        return kernel(*args)


def linear(x: torch.Tensor, t: LayerTensors, c: CallOptions, plain: bool) -> torch.Tensor:
    """y [...,N] by lorafast::linear; past the dispatcher if all tensors are plain ones and nobody looks on. Checks nothing."""
    if not plain or torch_internals.present():
        return torch.ops.lorafast.linear(x, *t, *c)[0]
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, *t):
        return _differentiable_linear(t, c, x, *t)
    return _directly(forward, x, t, c)[0]


def row_norm(
    t: LayerTensors, c: CallOptions, detach: bool, cache: bool, plain: bool
) -> torch.Tensor:
    """The norm [N] or [K] by lorafast::row_norm; past the dispatcher as linear, where no gradient is asked for."""
    if not plain or not (detach or not torch.is_grad_enabled()) or torch_internals.present():
        return torch.ops.lorafast.row_norm(*t, *c, detach, cache)
    with below_autograd():
        return weight_norm.row_norm(t, c, cache)


def _linear(x: torch.Tensor, *flat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with below_autocast():
        y, h, z = forward(x, LayerTensors(*flat[:_T]), CallOptions(*flat[_T:]))
        return y, h, x.new_empty(0) if z is None else z


def _linear_backward(dy, x, h, kept, *flat) -> list[torch.Tensor]:
    with below_autocast():
        found = backward(
            dy,
            x,
            h,
            kept,
            LayerTensors(*flat[:_T]),
            CallOptions(*flat[_T : _T + _S]),
            GradMask(*flat[-1]),
        )
    return [gradient for gradient in found if gradient is not None]


def _row_norm(*flat) -> torch.Tensor:
    with below_autocast():
        return weight_norm.row_norm(
            LayerTensors(*flat[:_T]), CallOptions(*flat[_T : _T + _S]), flat[-1]
        )


def _row_norm_backward(d_norm, value, *flat) -> list[torch.Tensor]:
    with below_autocast():
        return weight_norm.row_norm_backward(
            d_norm,
            value,
            LayerTensors(*flat[:_T]),
            CallOptions(*flat[_T : _T + _S]),
            GradMask(*flat[-1]),
        )


def _fake_linear(x: torch.Tensor, *flat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    t, c, M = LayerTensors(*flat[:_T]), CallOptions(*flat[_T:]), tokens(x)
    N, R = t.weight.shape[0], t.lora_A.shape[0]
    z = x.new_empty(M, N) if c.keep == "inner" else x.new_empty(0)
    return x.new_empty(*x.shape[:-1], N), x.new_empty(M, R), z


def _fake_linear_backward(dy, x, h, kept, *flat) -> list[torch.Tensor]:
    t, wants = LayerTensors(*flat[:_T]), GradMask(*flat[-1])
    like = t._asdict()
    d_x = [dy.new_empty(*dy.shape[:-1], t.weight.shape[1])] if wants.x else []
    d_bias = dy.new_empty(t.weight.shape[0], dtype=accumulator(dy.dtype))
    like |= {name: d_bias for name in ("bias", "lora_bias") if like[name] is None}
    return d_x + [like[name].new_empty(like[name].shape) for name in wants.names if name != "x"]


def _fake_row_norm(*flat) -> torch.Tensor:
    t, c = LayerTensors(*flat[:_T]), CallOptions(*flat[_T : _T + _S])
    return t.weight.new_empty(
        t.weight.shape[0 if c.axis == "out" else 1], dtype=accumulator(t.weight.dtype)
    )


def _fake_row_norm_backward(d_norm, value, *flat) -> list[torch.Tensor]:
    like, wants = LayerTensors(*flat[:_T])._asdict(), GradMask(*flat[-1])
    return [like[name].new_empty(like[name].shape) for name in wants.names]


class _Linear(torch.autograd.Function):
    """y = gain⊙(x Wᵀ + s·h' Bᵀ) + bias, saving x by reference, h [M,R], and for DoRA y by reference or z [M,N]."""

    @staticmethod
    def forward(ctx, together, c, x, *tensors):
        # together: the tensors as the caller had them, where the call goes past the dispatcher.
        directly, t = together is not None, together or LayerTensors._make(tensors)
        wants, saved = _asked(ctx.needs_input_grad, c.axis, c.keep, t.magnitude is not None)
        if directly:
            y, h, z = _directly(forward, x, t, c)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                y, h, z = torch.ops.lorafast.linear(x, *t, *c)
        kept = y if saved.y else z if saved.z else None
        # The biases are read again only to correct Σ dy⊙kept; otherwise they may change before backward.
        bias, lora_bias = (
            t.bias if saved.y else None,
            t.lora_bias if saved.z or c.keep == "recompute" else None,
        )
        ctx.save_for_backward(
            x if saved.x else None,
            h if saved.h else None,
            kept,
            t.weight,
            bias,
            *t[2:8],
            lora_bias,
            *t[9:],
        )
        ctx.settings, ctx.wants = c, wants
        if c.keep == "output":
            ctx.output = weakref.ref(y), y._version
            ctx.layer = (
                getattr(t.magnitude, "lorafast_name", None)
                or f"the DoRA layer with weight {tuple(t.weight.shape)}"
            )
        if directly:
            return y
        ctx.mark_non_differentiable(h, z)
        return y, h, z

    @staticmethod
    def backward(ctx, dy, *_):
        c, wants = ctx.settings, ctx.wants
        x, h, kept, *flat = (
            ctx.saved_tensors if c.keep != "output" else _with_unmodified_output(ctx)
        )
        if (
            not torch.is_grad_enabled()
            and torch_internals.plain(dy, x, h, kept, *flat)
            and not torch_internals.present()
        ):
            d_x, *found = _directly(backward, dy, x, h, kept, LayerTensors._make(flat), c, wants)
        else:
            given = iter(torch.ops.lorafast.linear_backward(dy, x, h, kept, *flat, *c, list(wants)))
            d_x, *found = [next(given) if wanted else None for wanted in wants]
        return None, None, d_x, None, *found, None, None


@functools.lru_cache(maxsize=1024)
def _asked(
    needs: tuple[bool, ...], axis: str, keep: str, has_gain: bool
) -> tuple[GradMask, SavedMask]:
    """Of what _Linear's arguments need: the gradients wanted, and what to save for them."""
    _, _, want_x, want_weight, *wanted, _, want_scale = needs
    if want_weight or want_scale:
        raise RuntimeError(_TRAINED)
    wants = GradMask(want_x, *wanted)
    return wants, saves(wants, CallOptions(axis=axis, keep=keep), has_gain)


def _with_unmodified_output(ctx) -> tuple[torch.Tensor | None, ...]:
    """What keep="output" saved, its y as forward left it."""
    y, version = ctx.output[0](), ctx.output[1]
    modified = y is not None and y._version != version
    try:
        saved = ctx.saved_tensors
    except RuntimeError as error:
        # A y that nobody holds any more cannot be asked, but is the likeliest.
        if modified or (y is None and "inplace" in str(error)):
            raise RuntimeError(_MODIFIED.format(ctx.layer)) from error
        raise
    # Under saved-tensor hooks, non-reentrant checkpointing among them, torch itself checks nothing: what comes back is a y
    # that has been recomputed, and overwritten again by the op that follows.
    if modified or saved[2]._version != version:
        raise RuntimeError(_MODIFIED.format(ctx.layer))
    return saved


# Function.apply looks for a transform and its leftovers first; nobody comes here with either.
_differentiable_linear = super(torch.autograd.Function, _Linear).apply


class _RowNorm(torch.autograd.Function):
    """The norm with its exact gradient for A, B, core and out_scale; V = W + sBA is remade in panels, never saved."""

    @staticmethod
    def forward(ctx, *flat):
        asked = dict(zip(LayerTensors._fields, ctx.needs_input_grad, strict=False))
        if asked["weight"] or asked["scale"]:
            raise RuntimeError(_TRAINED)
        with torch._C._AutoDispatchBelowAutograd():
            value = torch.ops.lorafast.row_norm(*flat)
        ctx.wants = GradMask(
            **{name: asked[name] for name in ("lora_A", "lora_B", "core", "out_scale")}
        )
        ctx.settings = flat[_T : _T + _S]
        ctx.save_for_backward(value, *flat[:_T])
        return value

    @staticmethod
    def backward(ctx, d_norm):
        value, *flat = ctx.saved_tensors
        wants: GradMask = ctx.wants
        found = torch.ops.lorafast.row_norm_backward(
            d_norm, value, *flat, *ctx.settings, list(wants)
        )
        grads = dict(zip(wants.names, found, strict=True))
        return *(grads.get(name) for name in LayerTensors._fields), *([None] * (_S + 2))


_NO_TRANSFORM = "lorafast ops have no torch.func transforms and no forward-mode AD; use lorafast.reference.linear there"
_MODIFIED = (
    "{}: its output was modified in place, but keep='output' reads it again in backward for d_magnitude; "
    "use DoRA(keep='inner'), or an out-of-place op after this layer"
)
_TRAINED = "this op has no gradient for weight or a tensor scaling; lorafast.linear runs plain autograd where one is trained"
_NO_DOUBLE = "double backward unsupported, use lorafast.reference.linear, which is plain torch"


def differentiable(
    apply: Callable, op: str, plain_if: Callable[[tuple], bool] | None = None
) -> Callable:
    """The Autograd kernel of a forward op: the Function where a gradient can be asked for, else straight below autograd."""

    def kernel(*args):
        tensors = _tensors_of(args)
        if torch._C._are_functorch_transforms_active() or _has_tangent(tensors):
            raise NotImplementedError(_NO_TRANSFORM)
        wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if wanted and not (plain_if and plain_if(args)):
            return apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.lorafast, op)(*args)

    return kernel


def _tensors_of(args: tuple) -> list[torch.Tensor]:
    """The tensors among arguments, those in lists included."""
    laid_flat = itertools.chain.from_iterable(a if isinstance(a, list) else (a,) for a in args)
    return [a for a in laid_flat if isinstance(a, torch.Tensor)]


def _has_tangent(tensors: list[torch.Tensor]) -> bool:
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def once(op: str) -> Callable:
    """The Autograd kernel of a backward op: without one, torch would warn and return wrong second derivatives."""

    def kernel(*args):
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _tensors_of(args)):
            raise RuntimeError(_NO_DOUBLE)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.lorafast, op)(*args)

    return kernel


def _no_batching(*_):
    raise NotImplementedError(_NO_TRANSFORM)


def register(schema: str, kernel: Callable, fake: Callable, autograd: Callable) -> None:
    """Define lorafast::NAME and all its kernels."""
    op = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(op, kernel, "CompositeExplicitAutograd")
    _LIBRARY.impl(op, autograd, "Autograd")
    _LIBRARY.impl(op, _no_batching, "FuncTorchBatched")
    torch.library.register_fake(f"lorafast::{op}", fake, lib=_LIBRARY)


def _apply(x: torch.Tensor, *flat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _Linear.apply(None, CallOptions(*flat[_T:]), x, *flat[:_T])


register(_LINEAR, _linear, _fake_linear, differentiable(_apply, "linear"))
register(_LINEAR_BACKWARD, _linear_backward, _fake_linear_backward, once("linear_backward"))
register(
    _ROW_NORM,
    _row_norm,
    _fake_row_norm,
    differentiable(_RowNorm.apply, "row_norm", lambda args: args[-2]),
)
register(_ROW_NORM_BACKWARD, _row_norm_backward, _fake_row_norm_backward, once("row_norm_backward"))
