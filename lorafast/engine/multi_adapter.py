"""Several LoRA adapters on one frozen weight in one call, as lorafast::several and its backward.

    y = x Wᵀ + Σᵢ sᵢ(dropᵢ(x) Aᵢᵀ Bᵢᵀ + lora_biasᵢ) + bias

Kept for backward: x by reference if an A trains, and M·Rᵢ for every B that trains.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch

from lorafast.engine import dispatch
from lorafast.engine.dispatch import Routes
from lorafast.engine.ops import below_autocast, below_autograd, differentiable, once, register
from lorafast.engine.problem import (
    BaseTerm,
    CallOptions,
    DownProj,
    LayerTensors,
    LowRankTerm,
    Scaling,
    UpProj,
    UpProjGradSpec,
    accumulator,
    facts,
    tokens,
)
from lorafast.runtime import torch_internals


class Factors(NamedTuple):
    """One adapter of several: lora_A [R,K], lora_B [N,R], lora_bias [N], seed int64 [1] where it drops; s is scale or scaling."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    lora_bias: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    scaling: float = 1.0
    dropout: float = 0.0

    @property
    def s(self) -> Scaling:
        """The scaling, the tensor if it is one."""
        return self.scaling if self.scale is None else self.scale


# How many of Factors' fields are tensors, and which of them autograd may ask a gradient for.
_TENSORS, _TRAINABLE = 5, 3
_LISTS = "Tensor[] lora_A, Tensor[] lora_B, Tensor?[] lora_bias, Tensor?[] seed, Tensor?[] scale, float[] scaling, float[] dropout"
_FORWARD = f"several(Tensor x, Tensor weight, Tensor? bias, {_LISTS}) -> (Tensor y, Tensor[] h)"
_BACKWARD = f"several_backward(Tensor dy, Tensor? x, Tensor?[] h, Tensor weight, {_LISTS}, bool[] wants) -> Tensor[]"


def several(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    adapters: Sequence[Factors],
    plain: bool = False,
) -> torch.Tensor:
    """y [...,N] of x [...,K], weight [N,K] and at least one adapter. Checks nothing: lorafast.functional.several does.

    plain: as in ops.linear.
    """
    lists = [list(one) for one in zip(*adapters, strict=True)]
    if not plain or torch_internals.present():
        return torch.ops.lorafast.several(x, weight, bias, *lists)[0]
    laid_flat = [one for some in lists for one in some]
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, weight, bias, *laid_flat):
        return _Several.apply(True, len(adapters), x, weight, bias, *laid_flat)
    with below_autograd():
        return _several(x, weight, bias, *lists)[0]


def _several(x, weight, bias, *lists) -> tuple[torch.Tensor, list[torch.Tensor]]:
    adapters = [Factors(*one) for one in zip(*lists, strict=True)]
    with below_autocast():
        routes = _routes(x, weight, adapters)
        downs = [DownProj(one.lora_A, None, one.seed, one.dropout) for one in adapters]
        projected = routes["project"].project(x, downs)
        ups = [
            UpProj(mixed, one.lora_B, one.s)
            for (_, mixed), one in zip(projected, adapters, strict=True)
        ]
        y, _ = routes["linear"].linear(x, weight, ups, None, _bias(bias, weight, adapters))
        return y, [h for h, _ in projected]


def _several_backward(dy, x, hs, weight, *rest) -> list[torch.Tensor]:
    """Gradients of x and bias, then of each adapter's A, B and lora_bias, as far as `wants` says."""
    *lists, wants = rest
    adapters = [Factors(*one) for one in zip(*lists, strict=True)]
    want_x, want_bias, asked = _unpacked(wants)
    with below_autocast():
        routes = _routes(dy, weight, adapters)
        returns = [
            UpProjGradSpec(one.lora_B, one.s, h=h, want_v=want_x or want_A, want_B=want_B)
            for one, h, (want_A, want_B, _) in zip(adapters, hs, asked, strict=True)
        ]
        any_bias = want_bias or any(want for _, _, want in asked)
        sums = routes["grad_output"].grad_output(dy, returns, None, None, want_bias=any_bias)
        lows = [
            LowRankTerm(own.v, one.lora_A, one.seed, one.dropout)
            for own, one in zip(sums.adapters, adapters, strict=True)
        ]
        trained = [low for low, (want_A, _, _) in zip(lows, asked, strict=True) if want_A]
        in_A = iter(routes["grad_project"].grad_project(x, trained) if trained else ())
        found = [routes["grad_input"].grad_input([BaseTerm(dy, weight)], lows)] if want_x else []
    found += [sums.d_bias] if want_bias else []
    for own, one, (want_A, want_B, want_lora_bias) in zip(
        sums.adapters, adapters, asked, strict=True
    ):
        found += [next(in_A).to(one.lora_A.dtype)] if want_A else []
        found += [own.dB.to(one.lora_B.dtype)] if want_B else []
        found += [sums.d_bias * one.s] if want_lora_bias else []
    return found


def _routes(x: torch.Tensor, weight: torch.Tensor, adapters: list[Factors]) -> Routes:
    """One entry of R for each adapter; dropout is the largest."""
    first, p = adapters[0], max(one.dropout for one in adapters)
    ranks = tuple(one.lora_A.shape[0] for one in adapters)
    return dispatch.routes(
        facts(
            x,
            LayerTensors(weight, lora_A=first.lora_A, lora_B=first.lora_B),
            CallOptions(dropout=p),
            ranks,
        )
    )


def _bias(
    bias: torch.Tensor | None, weight: torch.Tensor, adapters: list[Factors]
) -> torch.Tensor | None:
    """bias + Σ s·lora_bias, in the accumulator's dtype if there is an adapter's.  [N]"""
    for one in adapters:
        if one.lora_bias is not None:
            low = one.lora_bias.to(accumulator(weight.dtype)) * one.s
            bias = low if bias is None else low + bias
    return bias


def _unpacked(wants: Sequence[bool]) -> tuple[bool, bool, list[tuple[bool, ...]]]:
    want_x, want_bias, *flat = wants
    return (
        want_x,
        want_bias,
        [tuple(flat[i : i + _TRAINABLE]) for i in range(0, len(flat), _TRAINABLE)],
    )


def _fake_several(x, weight, bias, *lists):
    return x.new_empty(*x.shape[:-1], weight.shape[0]), [
        x.new_empty(tokens(x), A.shape[0]) for A in lists[0]
    ]


def _fake_several_backward(dy, x, hs, weight, *rest):
    *lists, wants = rest
    want_x, want_bias, asked = _unpacked(wants)
    d_bias = dy.new_empty(weight.shape[0], dtype=accumulator(dy.dtype))
    found = [dy.new_empty(*dy.shape[:-1], weight.shape[1])] if want_x else []
    found += [d_bias] if want_bias else []
    for one, (want_A, want_B, want_lora_bias) in zip(
        map(Factors._make, zip(*lists, strict=True)), asked, strict=True
    ):
        found += [one.lora_A.new_empty(one.lora_A.shape)] if want_A else []
        found += [one.lora_B.new_empty(one.lora_B.shape)] if want_B else []
        found += [torch.empty_like(d_bias)] if want_lora_bias else []
    return found


class _Several(torch.autograd.Function):
    """Lists laid flat, because autograd looks at arguments one by one: x, weight, bias, then all A, all B, …"""

    @staticmethod
    def forward(ctx, directly, count, x, weight, bias, *flat):
        lists = [list(flat[i : i + count]) for i in range(0, len(flat), count)]
        with torch._C._AutoDispatchBelowAutograd():
            y, hs = (_several if directly else torch.ops.lorafast.several)(x, weight, bias, *lists)
        _, _, asked_x, asked_weight, asked_bias, *asked = ctx.needs_input_grad
        if asked_weight or any(asked[_TRAINABLE * count :]):
            raise RuntimeError("lorafast::several has no gradient for weight or a tensor scaling")
        each = list(
            zip(*(asked[i * count : (i + 1) * count] for i in range(_TRAINABLE)), strict=True)
        )
        ctx.wants = [asked_x, asked_bias, *(flag for one in each for flag in one)]
        kept_x = x if any(want_A for want_A, _, _ in each) else None
        kept_h = [h if want_B else None for h, (_, want_B, _) in zip(hs, each, strict=True)]
        # Backward reads no lora_bias, which may change before it.
        lists[2] = [None] * count
        ctx.save_for_backward(
            kept_x, weight, *kept_h, *(one for some in lists[:_TENSORS] for one in some)
        )
        ctx.count, ctx.numbers = count, lists[_TENSORS:]
        if directly:
            return y
        ctx.mark_non_differentiable(*hs)
        return y, *hs

    @staticmethod
    def backward(ctx, dy, *_):
        n, (x, weight, *flat) = ctx.count, ctx.saved_tensors
        hs, *lists = [list(flat[i : i + n]) for i in range(0, len(flat), n)]
        directly = (
            not torch.is_grad_enabled()
            and torch_internals.plain(dy, x, weight, *flat)
            and not torch_internals.present()
        )
        with below_autograd() if directly else contextlib.nullcontext():
            call = _several_backward if directly else torch.ops.lorafast.several_backward
            found = iter(call(dy, x, hs, weight, *lists, *ctx.numbers, ctx.wants))
        want_x, want_bias, asked = _unpacked(ctx.wants)
        d_x, d_bias = (next(found) if want else None for want in (want_x, want_bias))
        each = [[next(found) if want else None for want in one] for one in asked]
        by_list = [one[i] for i in range(_TRAINABLE) for one in each]
        return (
            None,
            None,
            d_x,
            None,
            d_bias,
            *by_list,
            *([None] * (n * (len(Factors._fields) - _TRAINABLE))),
        )


def _apply(x, weight, bias, *lists) -> tuple[torch.Tensor, list[torch.Tensor]]:
    y, *hs = _Several.apply(
        False, len(lists[0]), x, weight, bias, *(one for some in lists for one in some)
    )
    return y, hs


register(_FORWARD, _several, _fake_several, differentiable(_apply, "several"))
register(_BACKWARD, _several_backward, _fake_several_backward, once("several_backward"))
