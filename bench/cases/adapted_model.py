"""The adapted layers of a whole model, lorafast's or PEFT's: found, started alike, and as torch."""

from __future__ import annotations

import torch
from torch import nn

from lorafast.bench.cases import peft_baseline, quantised_base
from lorafast.bench.cases.candidate import adapter_parameters, form_of
from lorafast.bench.cases.expected_grads import EagerLinear
from lorafast.bench.cases.implementations import Impl
from lorafast.methods.adapter import Adapter
from lorafast.nn.linear import AdapterLinearBase
from lorafast.nn.quantised_linear import QuantisedLinear


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return every adapted linear layer by its path in the model."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, AdapterLinearBase) or peft_baseline.is_peft_linear(module)
    }


@torch.no_grad()
def init_A(layers: dict[str, nn.Module], seed: int) -> None:
    """Set every trained lora_A to the same values in all implementations."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        A = adapter_parameters(layer)["lora_A"]
        if A.requires_grad:
            values = (torch.rand(A.shape, generator=generator) * 2 - 1) / A.shape[1] ** 0.5
            A.copy_(values)


@torch.no_grad()
def randomize(layers: dict[str, nn.Module], seed: int) -> None:
    """Add noise to every adapter parameter: where B is 0, an adapter changes no output."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        for parameter in adapter_parameters(layer).values():
            noise = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.add_(noise.to(parameter.device, parameter.dtype))


def eager_linear(
    impl: Impl, method: str, adapter: Adapter, layer: nn.Module, frozen_columns: int = 0
) -> EagerLinear:
    """Return an adapted layer as stock torch ops, on the Parameters that it has."""
    factors = adapter_parameters(layer)
    form = form_of(impl, method, adapter, factors)
    is_lorafasts = isinstance(layer, AdapterLinearBase)
    scaling = float(layer.scaling) if is_lorafasts else adapter.scaling
    base = layer
    if not is_lorafasts or isinstance(layer, QuantisedLinear):
        base = quantised_base.dense_linear(layer.base_layer)
    return EagerLinear(form, scaling, adapter.dropout, base, factors, frozen_columns=frozen_columns)
