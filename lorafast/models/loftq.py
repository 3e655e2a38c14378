"""LoftQ (arXiv:2310.08659): A and B that start at the error of quantising the weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from lorafast.methods.lora import LoRA
from lorafast.methods.pissa import PiSSA
from lorafast.models.adapt import weight_matrix
from lorafast.models.adapt_spec import AdaptSpec
from lorafast.models.module_names import canonical_name


class Start(NamedTuple):
    """One layer as LoftQ starts it.

    Attributes:
        module: the quantised module.
        values: the adapter's Parameters by name.
        error: ‖Q + s·BA - W‖ / ‖W‖.
    """

    module: nn.Module
    values: dict[str, torch.Tensor]
    error: float


def check_adapter(adapter: Any) -> None:
    """Raise TypeError if LoftQ does not start the adapter."""
    if type(adapter) is not LoRA or adapter.residual:
        raise TypeError(f"loftq={adapter!r} must be a lorafast.LoRA without an init of its own")


def checked_adapters(model: nn.Module, names: list[list[str]], spec: AdaptSpec) -> dict[str, LoRA]:
    """Return the adapter of each layer by its canonical name. ValueError if one cannot start."""
    adapters: Any = spec.adapters([canonical_name(one[0]) for one in names])
    for one in names:
        adapter = adapters[canonical_name(one[0])]
        smallest = min(weight_matrix(model.get_submodule(one[0])).shape)
        if type(adapter) is not LoRA or adapter.residual or adapter.alpha <= 0:
            raise ValueError(f"{one[0]}: LoftQ starts a LoRA with a positive alpha, not {adapter}")
        if adapter.r > smallest:
            raise ValueError(f"{one[0]}: r={adapter.r} exceeds min(N, K)={smallest}")
    return adapters


def start(
    weight: torch.Tensor,
    quantise: Callable[[torch.Tensor], nn.Module],
    dequantised: Callable[[nn.Module], torch.Tensor],
    adapter: LoRA,
    iterations: int,
) -> Start:
    """Return a layer's start by alternating Q = Q(W - s·BA) and s·BA = SVD_r(W - Q).

    Args:
        weight: W [N,K].
        quantise: makes the quantised module of a weight in W's dtype.
        dequantised: gives such a module's weight in fp32.
        adapter: gives r and s.
        iterations: how many quantisations, of which the first is that of W.
    """
    # PiSSA's factors of a matrix M: s·BA is M's first r singular triplets.
    principal = replace(adapter, init=PiSSA())
    wide = weight.float()
    delta = torch.zeros_like(wide)
    for _ in range(iterations):
        module = quantise((wide - delta).to(weight.dtype))
        left = wide - dequantised(module)
        values = principal.init_tensors(left)
        delta = adapter.scaling * values["lora_B"] @ values["lora_A"]
    error = (left - delta).norm() / wide.norm().clamp_min(1e-30)
    return Start(module, values, error.item())
