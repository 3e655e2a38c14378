"""Several LoRA adapters on one frozen weight in one call: lorafast::several and its backward.

    y = x Wᵀ + Σᵢ sᵢ(dropᵢ(x) Aᵢᵀ Bᵢᵀ + lora_biasᵢ) + bias

Kept for backward: x by reference if an A trains, and h [M,Rᵢ] for every B that trains.

It is an op of its own beside lorafast::linear, because torch passes lists of tensors to an op one
by one: with one adapter it takes twice the time of linear's call on tiny tensors (`make micro`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch

from lorafast.engine import dispatch, masks
from lorafast.engine.dispatch import Routes
from lorafast.engine.ops import differentiable, once_differentiable, register
from lorafast.engine.precision import accumulator
from lorafast.engine.problem import (
    BaseTerm,
    CallOptions,
    DownProj,
    LayerTensors,
    LowRankTerm,
    OutputGrads,
    Scaling,
    UpProj,
    UpProjGradSpec,
    tokens,
)
from lorafast.runtime import torch_internals
from lorafast.runtime.torch_internals import below_autocast, below_autograd


class Factors(NamedTuple):
    """One of several adapters.

    lora_A [R,K], lora_B [N,R], lora_bias [N]; seed int64 [1] where it drops. Its scaling s is the
    tensor scale if there is one, else the number scaling.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    lora_bias: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    scaling: float = 1.0
    dropout: float = 0.0

    @property
    def s(self) -> Scaling:
        """The scaling: the tensor if it is one."""
        return self.scaling if self.scale is None else self.scale


# The tensors among Factors' fields, and those of them that may get a gradient, come first.
_TENSORS, _TRAINABLE = 5, 3
_LISTS = (
    "Tensor[] lora_A, Tensor[] lora_B, Tensor?[] lora_bias, Tensor?[] seed, Tensor?[] scale, "
    "float[] scaling, float[] dropout"
)
_FORWARD = f"several(Tensor x, Tensor weight, Tensor? bias, {_LISTS}) -> (Tensor y, Tensor[] h)"
_BACKWARD = (
    f"several_backward(Tensor dy, Tensor? x, Tensor?[] h, Tensor weight, {_LISTS}, bool[] wants) "
    "-> Tensor[]"
)


class _Needs(NamedTuple):
    """The gradients needed of one adapter."""

    lora_A: bool
    lora_B: bool
    lora_bias: bool


def several(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, adapters: Sequence[Factors]
) -> torch.Tensor:
    """Return y [...,N] of x [...,K], weight [N,K] and at least one adapter.

    Checks nothing: lorafast.functional.several does.
    """
    lists = [list(field) for field in zip(*adapters, strict=True)]
    tensors = [tensor for field in lists[:_TENSORS] for tensor in field]
    if not torch_internals.bypasses_dispatcher(x, (weight, bias, *tensors)):
        return torch.ops.lorafast.several(x, weight, bias, *lists)[0]
    if torch.is_grad_enabled() and torch_internals.any_requires_grad(x, weight, bias, *tensors):
        flat = [value for field in lists for value in field]
        return _Several.apply(True, len(adapters), x, weight, bias, *flat)
    with below_autograd():
        return _several(x, weight, bias, *lists)[0]


def _several(x, weight, bias, *lists) -> tuple[torch.Tensor, list[torch.Tensor]]:
    adapters = [Factors(*fields) for fields in zip(*lists, strict=True)]
    with below_autocast():
        routes = _routes(x, weight, adapters)
        downs = [DownProj(a.lora_A, None, a.seed, a.dropout) for a in adapters]
        projected = routes["project"].project(x, downs)
        ups = [
            UpProj(h_core, a.lora_B, a.s)
            for (_, h_core), a in zip(projected, adapters, strict=True)
        ]
        total_bias = _total_bias(bias, weight, adapters)
        y, _ = routes["linear"].linear(x, weight, ups, None, total_bias)
        return y, [h for h, _ in projected]


def _several_backward(dy, x, hs, weight, *rest) -> list[torch.Tensor]:
    """The gradients of x and bias, then of each adapter's A, B and lora_bias, as `wants` says."""
    *lists, wants = rest
    adapters = [Factors(*fields) for fields in zip(*lists, strict=True)]
    need_x, need_bias, needs = _unflatten(wants)
    with below_autocast():
        routes = _routes(dy, weight, adapters)
        specs = [
            UpProjGradSpec(a.lora_B, a.s, h=h, want_v=need_x or need.lora_A, want_B=need.lora_B)
            for a, h, need in zip(adapters, hs, needs, strict=True)
        ]
        any_bias = need_bias or any(need.lora_bias for need in needs)
        sums = routes["grad_output"].grad_output(dy, specs, None, None, any_bias)
        sizes = tokens(dy), weight.shape[1]
        terms = [
            LowRankTerm(
                own.v, a.lora_A, a.seed, a.dropout,
                masks.shared(*sizes) if a.dropout and need_x and need.lora_A else None,
            )
            for own, a, need in zip(sums.adapters, adapters, needs, strict=True)
        ]  # fmt: skip
        trained = [term for term, need in zip(terms, needs, strict=True) if need.lora_A]
        d_A = routes["grad_project"].grad_project(x, trained) if trained else []
        grads = []
        if need_x:
            grads.append(routes["grad_input"].grad_input([BaseTerm(dy, weight)], terms))
    if need_bias:
        grads.append(sums.d_bias)
    return grads + _adapter_grads(sums, d_A, adapters, needs)


def _adapter_grads(
    sums: OutputGrads, d_A: list[torch.Tensor], adapters: list[Factors], needs: list[_Needs]
) -> list[torch.Tensor]:
    next_d_A, grads = iter(d_A), []
    for own, a, need in zip(sums.adapters, adapters, needs, strict=True):
        if need.lora_A:
            grads.append(next(next_d_A).to(a.lora_A.dtype))
        if need.lora_B:
            grads.append(own.dB.to(a.lora_B.dtype))
        if need.lora_bias:
            grads.append(sums.d_bias * a.s)
    return grads


def _routes(x: torch.Tensor, weight: torch.Tensor, adapters: list[Factors]) -> Routes:
    """The backends of the call; the problem's dropout is the largest of the adapters'."""
    first, p = adapters[0], max(adapter.dropout for adapter in adapters)
    ranks = tuple(adapter.lora_A.shape[0] for adapter in adapters)
    tensors = LayerTensors(weight, lora_A=first.lora_A, lora_B=first.lora_B)
    return dispatch.routes(x, tensors, CallOptions(dropout=p), ranks)


def _total_bias(
    bias: torch.Tensor | None, weight: torch.Tensor, adapters: list[Factors]
) -> torch.Tensor | None:
    """bias + Σ s·lora_bias, in the accumulator's dtype if an adapter has one.  [N]"""
    for adapter in adapters:
        if adapter.lora_bias is not None:
            scaled = adapter.lora_bias.to(accumulator(weight.dtype)) * adapter.s
            bias = scaled if bias is None else scaled + bias
    return bias


def _unflatten(wants: Sequence[bool]) -> tuple[bool, bool, list[_Needs]]:
    need_x, need_bias, *flat = wants
    steps = range(0, len(flat), _TRAINABLE)
    return need_x, need_bias, [_Needs(*flat[i : i + _TRAINABLE]) for i in steps]


def _fake_several(x, weight, bias, *lists):
    hs = [x.new_empty(tokens(x), A.shape[0]) for A in lists[0]]
    return x.new_empty(*x.shape[:-1], weight.shape[0]), hs


def _fake_several_backward(dy, x, hs, weight, *rest):
    *lists, wants = rest
    need_x, need_bias, needs = _unflatten(wants)
    adapters = [Factors(*fields) for fields in zip(*lists, strict=True)]
    d_bias = dy.new_empty(weight.shape[0], dtype=accumulator(dy.dtype))
    grads = [dy.new_empty(*dy.shape[:-1], weight.shape[1])] if need_x else []
    grads += [d_bias] if need_bias else []
    for adapter, need in zip(adapters, needs, strict=True):
        grads += [adapter.lora_A.new_empty(adapter.lora_A.shape)] if need.lora_A else []
        grads += [adapter.lora_B.new_empty(adapter.lora_B.shape)] if need.lora_B else []
        grads += [torch.empty_like(d_bias)] if need.lora_bias else []
    return grads


class _Several(torch.autograd.Function):
    """Autograd looks at arguments one by one, so lists are flat: x, weight, bias, all A, all B…"""

    @staticmethod
    def forward(ctx, direct, count, x, weight, bias, *flat):
        lists = [list(flat[i : i + count]) for i in range(0, len(flat), count)]
        call = _several if direct else torch.ops.lorafast.several
        with torch_internals.dispatch_below_autograd():
            y, hs = call(x, weight, bias, *lists)
        _, _, need_x, need_weight, need_bias, *needed = ctx.needs_input_grad
        if need_weight or any(needed[_TRAINABLE * count :]):
            raise RuntimeError("lorafast::several has no gradient for weight or a tensor scaling")
        by_field = (needed[i * count : (i + 1) * count] for i in range(_TRAINABLE))
        needs = [_Needs(*fields) for fields in zip(*by_field, strict=True)]
        ctx.wants = [need_x, need_bias, *(flag for need in needs for flag in need)]
        kept_x = x if any(need.lora_A for need in needs) else None
        kept_h = [h if need.lora_B else None for h, need in zip(hs, needs, strict=True)]
        # Backward reads no lora_bias, which may change before it.
        lists[2] = [None] * count
        tensors = [tensor for field in lists[:_TENSORS] for tensor in field]
        ctx.save_for_backward(kept_x, weight, *kept_h, *tensors)
        ctx.count, ctx.numbers = count, lists[_TENSORS:]
        if direct:
            return y
        ctx.mark_non_differentiable(*hs)
        return y, *hs

    @staticmethod
    def backward(ctx, dy, *_):
        n, saved = ctx.count, ctx.saved_tensors
        x, weight, *flat = saved
        hs, *lists = [list(flat[i : i + n]) for i in range(0, len(flat), n)]
        direct = not torch.is_grad_enabled() and torch_internals.bypasses_dispatcher(dy, saved)
        with below_autograd() if direct else contextlib.nullcontext():
            call = _several_backward if direct else torch.ops.lorafast.several_backward
            grads = iter(call(dy, x, hs, weight, *lists, *ctx.numbers, ctx.wants))
        need_x, need_bias, needs = _unflatten(ctx.wants)
        d_x, d_bias = (next(grads) if need else None for need in (need_x, need_bias))
        each = [[next(grads) if need else None for need in needed] for needed in needs]
        by_field = [adapter[i] for i in range(_TRAINABLE) for adapter in each]
        without = [None] * (n * (len(Factors._fields) - _TRAINABLE))
        return None, None, d_x, None, d_bias, *by_field, *without


def _autograd(x, weight, bias, *lists) -> tuple[torch.Tensor, list[torch.Tensor]]:
    flat = [value for field in lists for value in field]
    y, *hs = _Several.apply(False, len(lists[0]), x, weight, bias, *flat)
    return y, hs


register(_FORWARD, _several, _fake_several, differentiable(_autograd, "several"))
register(
    _BACKWARD, _several_backward, _fake_several_backward, once_differentiable("several_backward")
)
