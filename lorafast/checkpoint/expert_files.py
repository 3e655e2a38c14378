"""Adapters of experts as PEFT's files hold them.

PEFT packs lora_A [E,R,K] as [E·R,K], the expert slowest, and lora_B [E,N,R] as [N,R·E], the expert
fastest. Of several Parameters of one module it wraps each around those before it, and the key of an
inner one has `.base_layer` in it for each wrapper around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lorafast.methods.adapter import Adapter, TensorSpec
from lorafast.nn.expert_parameter import ExpertParameter, ParameterExperts
from lorafast.nn.experts import Experts, stacked_specs

_WRAPPER = ".base_layer"


def specs_of(module: nn.Module, adapter: Adapter, shape: tuple[int, int]) -> dict[str, TensorSpec]:
    """Return the specifications of an adapter's tensors on a layer, or on what becomes one.

    shape: (N, K) of its weight.
    """
    if isinstance(module, Experts):
        return stacked_specs(adapter, tuple(module._W().shape), module.shared)
    if isinstance(module, ExpertParameter):
        return stacked_specs(adapter, tuple(module.matrix().shape))
    return adapter.tensor_specs(*shape)


def file_name(name: str, layer: nn.Module) -> str:
    """Return the name of a layer in the keys of a file."""
    if not isinstance(layer, ParameterExperts):
        return name
    return name.rpartition(".")[0] + _WRAPPER * layer.depth()


def to_file(part: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of a layer as a file holds it."""
    if tensor.dim() != 3 or part not in ("lora_A", "lora_B"):
        return tensor
    if part == "lora_A":
        return tensor.reshape(-1, tensor.shape[2])
    return tensor.permute(1, 2, 0).reshape(tensor.shape[1], -1)


def from_file(part: str, tensor: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """Return a file's tensor as the layer holds it."""
    if len(spec.shape) != 3 or part not in ("lora_A", "lora_B"):
        return tensor
    E, rows, columns = spec.shape
    if part == "lora_A":
        return tensor.reshape(E, rows, columns)
    return tensor.reshape(rows, columns, E).permute(2, 0, 1)


def file_shape(part: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in a file of a tensor with this shape."""
    if len(shape) != 3 or part not in ("lora_A", "lora_B"):
        return shape
    E, rows, columns = shape
    return (E * rows, columns) if part == "lora_A" else (rows, columns * E)


def renamed(layers: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Return what a file has by layer, that of experts under the names of their Parameters.

    modules: the layers, or what becomes one, by name.
    """
    names: dict[str, str] = {}
    parameters_of: dict[nn.Module, list[str]] = {}
    for name, module in modules.items():
        if isinstance(module, ExpertParameter | ParameterExperts):
            parameters_of.setdefault(module.host, []).append(name)
    for host, own in parameters_of.items():
        order = list(host._parameters)
        own.sort(key=lambda name: order.index(name.rpartition(".")[2]), reverse=True)
        for depth, name in enumerate(own):
            names[name.rpartition(".")[0] + _WRAPPER * depth] = name
    return {names.get(name, name): value for name, value in layers.items()}
