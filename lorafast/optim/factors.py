"""The layers of adapter parameters, and parameter groups: for LoRA-FA and LoRA-Pro."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from lorafast.engine.problem import Scaling
from lorafast.models.module_names import adapter_layers, unwrap
from lorafast.nn.adapter_layer import NAMES, AdapterLayer

FACTORS = ("lora_A", "lora_B")


class AdapterParameter(NamedTuple):
    """The layer of an adapter parameter, and its name there.

    layer_name is "" for a model that is itself a layer; tensor_name is "lora_A", "lora_B", ….
    """

    layer_name: str
    layer: AdapterLayer
    tensor_name: str

    def __str__(self) -> str:
        return f"{self.layer_name}.{self.tensor_name}".lstrip(".")


def find_adapter_parameters(model: nn.Module) -> dict[nn.Parameter, AdapterParameter]:
    """Return every adapter parameter of the model, trained or not.

    Raises:
        RuntimeError: the adapters are disabled.
        ValueError: the model has no adapter, or an adapter tensor is parametrized.
    """
    parameters: dict[nn.Parameter, AdapterParameter] = {}
    for layer_name, layer in adapter_layers(model, require_enabled=True).items():
        for tensor_name in NAMES:
            tensor = getattr(layer, tensor_name)
            if tensor is None:
                continue
            origin = AdapterParameter(layer_name, layer, tensor_name)
            if not isinstance(tensor, nn.Parameter):
                raise ValueError(
                    f"{origin} {tuple(tensor.shape)} is parametrized: "
                    "what trains is not the factor itself"
                )
            parameters.setdefault(tensor, origin)
    return parameters


def parameter_groups(
    model: nn.Module, adapter_parameters: dict[nn.Parameter, AdapterParameter]
) -> list[dict[str, Any]]:
    """Return the groups "factors" and "other" of the parameters that train, if not empty."""
    inner = unwrap(model)
    trained = [parameter for parameter in inner.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(f"model {type(inner).__name__} has no parameter that trains")
    groups: dict[str, list[nn.Parameter]] = {"factors": [], "other": []}
    for parameter in trained:
        origin = adapter_parameters.get(parameter)
        is_factor = origin is not None and origin.tensor_name in FACTORS
        groups["factors" if is_factor else "other"].append(parameter)
    return [
        {"params": parameters, "name": name} for name, parameters in groups.items() if parameters
    ]


def check_two_factors(origin: AdapterParameter, optimizer: str) -> None:
    """Raise ValueError if the layer has a core or an out_scale beside its two factors.

    The closed forms of LoRA-FA and LoRA-Pro hold for s·BA alone.
    """
    for tensor_name in ("lora_core", "lora_out_scale"):
        tensor = getattr(origin.layer, tensor_name)
        if tensor is not None:
            raise ValueError(
                f"{origin.layer_name or 'the layer'}: {origin.layer.adapter} has {tensor_name} "
                f"{tuple(tensor.shape)}; {optimizer} is for s·BA of two factors alone"
            )


def inverse_squared_scaling(scaling: Scaling) -> float | torch.Tensor:
    """Return 1/s² as a number or a 0-d tensor, and 0 for s = 0.

    The gradients of the factors are 0 there too.
    """
    if isinstance(scaling, torch.Tensor):
        s = scaling.detach().reshape(())
        return torch.where(s == 0, 0.0, 1 / s**2)
    return 0.0 if scaling == 0 else 1 / float(scaling) ** 2
