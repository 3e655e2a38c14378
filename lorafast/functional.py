"""lorafast.linear: one adapted layer as a function of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorafast.engine import checks, ops, philox, reference
from lorafast.engine.multi_adapter import Factors
from lorafast.engine.multi_adapter import several as call_several
from lorafast.engine.problem import (
    CallOptions,
    LayerTensors,
    Scaling,
    activation_dtype,
    resolved_keep,
    split_scaling,
)
from lorafast.runtime import torch_internals


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    core: torch.Tensor | None = None,
    magnitude: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    axis: str = "out",
    out_scale: torch.Tensor | None = None,
    lora_bias: torch.Tensor | None = None,
    scaling: Scaling = 1.0,
    dropout: float = 0.0,
    dropout_on: str = "adapter",
    keep: str = "auto",
    frozen_columns: int = 0,
    seed: torch.Tensor | None = None,
    training: bool = True,
) -> torch.Tensor:
    """y = gain⊙(x Wᵀ + s·out_scale⊙(core(drop(x) Aᵀ) Bᵀ + lora_bias)) + bias, gain = magnitude/norm (1 without magnitude).

    Shapes: x [...,K], weight [N,K] (or a transposed view), lora_A [R,K], lora_B [N,R], core [R,R] or [R], magnitude and norm
    [N] (axis="out") or [K] (axis="in": the gain scales x), bias, out_scale, lora_bias [N] -> y [...,N], never a view.
    Dtypes: x and weight alike (under autocast x is cast, once); factors of any float dtype, cast transiently; sums in fp32.
    Saved for backward: x by reference if lora_A trains, M·R of h, and by `keep` y, z or nothing for the magnitude.
    norm=None computes ‖W+sBA‖, detached; seed=None draws one from torch's generator. A trained weight runs on plain autograd.
    Raises ValueError or TypeError naming the argument and the shapes. Sources: arXiv 2106.09685, 2402.09353, 2406.12832.
    """
    t = LayerTensors(
        weight, bias, lora_A, lora_B, core, magnitude, norm, out_scale, lora_bias, seed
    )
    return of(x, t, scaling, dropout, dropout_on, axis, keep, frozen_columns, training)


def of(
    x: torch.Tensor,
    t: LayerTensors,
    scaling: Scaling,
    dropout: float,
    dropout_on: str = "adapter",
    axis: str = "out",
    keep: str = "auto",
    frozen_columns: int = 0,
    training: bool = True,
) -> torch.Tensor:
    """linear of tensors that are already together; t.scale is scaling's to set."""
    signature = torch_internals.signature(x, *t)
    runs_in = checks.call(x, t, scaling, dropout, axis, dropout_on, keep, frozen_columns, signature)
    plain = signature is not None
    p = float(dropout) if training else 0.0
    seed = (philox.draw(x.device) if t.seed is None else t.seed) if p else None
    number, scale = split_scaling(scaling)
    grad = torch.is_grad_enabled()
    if grad and (t.weight.requires_grad or (scale is not None and scale.requires_grad)):
        return reference.linear(
            x, t.weight, t.bias, t.lora_A, t.lora_B, t.core, t.magnitude, t.norm, axis, t.out_scale, t.lora_bias, scaling,
            p, dropout_on, keep, frozen_columns, seed,
        )  # fmt: skip
    if seed is not t.seed or scale is not t.scale:
        plain = plain and (scale is None or torch_internals.plain(scale))
        t = LayerTensors(*t[:-2], seed, scale)
    if t.magnitude is not None and t.norm is None:
        t = t._replace(norm=_row_norm(t, number, axis, plain))
    if x.dtype != runs_in:
        x = x.to(runs_in)
    settings = CallOptions(number, p, axis, dropout_on, "none", frozen_columns)
    if t.magnitude is not None and grad and (t.magnitude.requires_grad or t.norm.requires_grad):
        settings = settings._replace(
            keep=resolved_keep(
                keep, settings, True, t.bias is None and t.lora_bias is None, runs_in
            )
        )
    return ops.linear(x, t, settings, plain)


def several(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    adapters: Sequence[Factors],
    training: bool = True,
) -> torch.Tensor:
    """y = x Wᵀ + Σᵢ sᵢ(dropᵢ(x) Aᵢᵀ Bᵢᵀ + lora_biasᵢ) + bias: several LoRA adapters on one frozen weight, in one call.

    Shapes and dtypes as in linear, each adapter with a rank, scaling and dropout of its own. Saved for backward: x by reference if
    an A trains, M·Rᵢ for every B that trains. An adapter that drops without a seed gets one, in their order. Errors as linear's.
    """
    if not adapters:
        raise ValueError(
            f"adapters is empty; weight {tuple(weight.shape)} alone is torch.nn.functional.linear"
        )
    ready, plain = [], True
    for one in adapters:
        parts = LayerTensors(
            weight, bias, one.lora_A, one.lora_B, lora_bias=one.lora_bias, seed=one.seed
        )
        signature = torch_internals.signature(x, *parts)
        checks.call(x, parts, one.s, one.dropout, "out", "adapter", "auto", 0, signature)
        plain = (
            plain
            and signature is not None
            and (one.scale is None or torch_internals.plain(one.scale))
        )
        p = float(one.dropout) if training else 0.0
        seed = (philox.draw(x.device) if one.seed is None else one.seed) if p else None
        number, scale = split_scaling(one.s)
        ready.append(one._replace(seed=seed, dropout=p, scaling=number, scale=scale))
    trained = weight.requires_grad or any(
        one.scale is not None and one.scale.requires_grad for one in ready
    )
    if trained and torch.is_grad_enabled():
        raise ValueError(
            f"weight {tuple(weight.shape)} and tensor scalings must be frozen where several adapters share a call"
        )
    return call_several(x.to(activation_dtype(x)), weight, bias, ready, plain)


def row_norm(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    core: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    scaling: Scaling = 1.0,
    axis: str = "out",
    detach: bool = True,
    cache: bool = False,
) -> torch.Tensor:
    """‖W + s·(out_scale⊙B)·core·A‖ per row (axis="out", [N]) or column ("in", [K]), fp32, or fp64 for an fp64 weight.

    detach=True (arXiv 2402.09353 §4.3) has no gradient, False the exact one. cache=True gives the last result again while no
    factor has been replaced or written and no optimizer has stepped (a write through `.data` is not seen); it is ignored while
    torch.compile or a CUDA graph looks on.
    """
    parts = LayerTensors(weight, None, lora_A, lora_B, core, None, None, out_scale)
    signature = torch_internals.signature(*parts)
    checks.norm(parts, axis, signature)
    number, scale = split_scaling(scaling)
    if (
        not detach
        and torch.is_grad_enabled()
        and (weight.requires_grad or (scale is not None and scale.requires_grad))
    ):
        return reference.row_norm(weight, lora_A, lora_B, core, out_scale, scaling, axis)
    plain = signature is not None and (scale is None or torch_internals.plain(scale))
    return _row_norm(
        parts._replace(scale=scale),
        number,
        axis,
        plain,
        detach,
        cache and not torch.compiler.is_compiling(),
    )


def _row_norm(
    t: LayerTensors, number: float, axis: str, plain: bool, detach: bool = True, cache: bool = False
) -> torch.Tensor:
    factors = LayerTensors(
        t.weight, None, t.lora_A, t.lora_B, t.core, None, None, t.out_scale, None, None, t.scale
    )
    return ops.row_norm(factors, CallOptions(number, 0.0, axis), detach, cache, plain)
