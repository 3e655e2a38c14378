"""The eager chain as a module: what stands in for every adapted layer of a model when the model is held against the truth."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lorafast.testing import Case, Form, chain


class EagerLinear(nn.Module):
    """One adapted layer, without dropout, as stock ops: x [...,K] -> [...,N]."""

    def __init__(self, form: Form, scaling: float, base: nn.Linear, parts: dict[str, torch.Tensor]) -> None:
        super().__init__()
        (N, K), R = base.weight.shape, parts["lora_A"].shape[0]
        self._case = Case(form, 0, N, K, R, base.weight.dtype, bias=base.bias is not None, scaling=scaling)
        held = {"weight": base.weight, "bias": base.bias} | parts
        for name in ("weight", "bias", "lora_A", "lora_B", "core", "magnitude", "out_scale", "lora_bias"):
            value = held.get(name)
            copied = None if value is None else nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
            self.register_parameter(name, copied)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return chain(self._case, self._parameters | {"x": x})


def replaced(model: nn.Module, layers: dict[str, EagerLinear], wide: bool) -> nn.Module:
    """A copy of the model with these layers, by their path, put in; in float64 if wide."""
    copied = copy.deepcopy(model)
    for path, layer in layers.items():
        parent, _, child = path.rpartition(".")
        setattr(copied.get_submodule(parent), child, copy.deepcopy(layer))
    return copied.double() if wide else copied
