"""The output and the gradients of a problem, by lorafast.linear and by the eager chain.

The chain is the textbook sequence of stock torch ops, and shares no code with the reference or a
backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F

from lorafast import functional
from lorafast.engine import philox
from lorafast.testing.problems import GRADIENTS, Case, leaf


def ours(case: Case, t: dict[str, torch.Tensor | None]) -> torch.Tensor:
    """lorafast.linear on the case."""
    f, norm = case.form, None
    if not f.detach_norm:
        norm = functional.row_norm(
            t["weight"],
            t["lora_A"],
            t["lora_B"],
            t["core"],
            t["out_scale"],
            case.scaling,
            f.axis,
            detach=False,
        )
    names = (
        "x",
        "weight",
        "bias",
        "lora_A",
        "lora_B",
        "core",
        "magnitude",
        "out_scale",
        "lora_bias",
        "seed",
    )
    tensors: dict[str, Any] = {name: t[name] for name in names}
    return functional.linear(
        **tensors, norm=norm, axis=f.axis, scaling=case.scaling, dropout=case.dropout,
        dropout_on=f.dropout_on, keep=f.keep,
    )  # fmt: skip


def chain(
    case: Case,
    t: dict[str, torch.Tensor | None],
    drop: Callable[[torch.Tensor], torch.Tensor] | None = None,
    factor_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return the output of the eager chain: stock torch ops, factors cast to x's dtype.

    In float64 it is the truth. It computes nothing that a reader would not type, so it can be
    timed too.

    drop: drops elements of x, if not the mask of t["seed"].
    factor_dtype: the dtype of all but the base product, if not x's. With fp32 it is what PEFT
        computes with fp32 factors on a half-precision base: x is cast, not the factors.
    """
    f, s, x, W, dtype = case.form, case.scaling, t["x"], t["weight"], factor_dtype or t["x"].dtype
    A, B, core, m, b_B = (
        None if t[name] is None else t[name].to(dtype)
        for name in ("lora_A", "lora_B", "core", "magnitude", "lora_bias")
    )
    out_scale = None if t["out_scale"] is None else t["out_scale"].to(dtype)
    dropped = x.to(dtype)
    if case.dropout and drop:
        dropped = drop(dropped)
    elif case.dropout:
        kept = philox.keep_mask(t["seed"], case.dropout, slice(0, x.shape[0]), x.shape[1])
        dropped = dropped * (kept.to(dtype) * philox.scale(case.dropout))

    def base(z: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(z, W.to(z.dtype), None if bias is None else bias.to(z.dtype))

    def low_rank(z: torch.Tensor) -> torch.Tensor:
        h = F.linear(z, A)
        if core is not None:
            h = h * core if core.dim() == 1 else F.linear(h, core)
        low = F.linear(h, B)
        if out_scale is not None:
            low = low * out_scale
        low = low if b_B is None else low + b_B
        return low if s == 1 else low * s

    if m is None:
        return (base(x, t["bias"]) + low_rank(dropped)).to(x.dtype)
    middle = A if core is None else (core[:, None] * A if core.dim() == 1 else core @ A)
    delta = B @ middle if out_scale is None else out_scale[:, None] * (B @ middle)
    norm = (W.to(dtype) + s * delta).norm(dim=1 if f.axis == "out" else 0)
    gain = m / (norm.detach() if f.detach_norm else norm)
    if f.axis == "in":
        base_x = x * gain if f.dropout_on == "adapter" else x + (gain - 1) * dropped
        return (base(base_x, t["bias"]) + low_rank(dropped * gain)).to(x.dtype)
    if f.dropout_on == "adapter":
        y = gain * (base(x) + low_rank(dropped))
        return (y if t["bias"] is None else y + t["bias"]).to(x.dtype)
    y = base(x, t["bias"]) + (gain - 1) * base(dropped) + gain * low_rank(dropped)
    return y.to(x.dtype)


def run(
    function: Callable,
    case: Case,
    tensors: dict[str, torch.Tensor | None],
    wide: bool = False,
    trained: Iterable[str] = GRADIENTS,
) -> dict[str, torch.Tensor]:
    """Return y and the gradient of every `trained` tensor of function(case, tensors).

    wide: compute in float64 throughout.
    """
    trained = tuple(trained)
    t = {name: leaf(name, value, wide, trained) for name, value in tensors.items()}
    y = function(case, t)
    if trained:
        y.backward(t["dy"])
    return {"y": y.detach()} | {name: t[name].grad for name in trained if t[name] is not None}
