"""What optimizers of factors share: whose part a Parameter is, the groups they start with, and what s does to a gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from lorafast.engine.problem import Scaling
from lorafast.models.module_names import adapted, unwrapped
from lorafast.nn.adapter_layer import NAMES, AdapterLayer

FACTORS = ("lora_A", "lora_B")


class Held(NamedTuple):
    """Of an adapter's Parameter: the name of its layer, the layer, and which of adapted.NAMES it is there."""

    name: str
    layer: AdapterLayer
    part: str

    def __str__(self) -> str:
        return f"{self.name}.{self.part}".lstrip(".")


def held(model: nn.Module) -> dict[nn.Parameter, Held]:
    """Every adapter tensor of the model, trained or not. ValueError if it has none or one is parametrized, RuntimeError if adapters
    are disabled.
    """
    found: dict[nn.Parameter, Held] = {}
    for name, layer in adapted(model, awake=True).items():
        for part in NAMES:
            parameter = getattr(layer, part)
            if parameter is not None and not isinstance(parameter, nn.Parameter):
                where = f"{name}.{part}".lstrip(".")
                raise ValueError(
                    f"{where} {tuple(parameter.shape)} is parametrized: what trains is not the factor itself"
                )
            if parameter is not None:
                found.setdefault(parameter, Held(name, layer, part))
    return found


def groups(model: nn.Module, parts: dict[nn.Parameter, Held]) -> list[dict[str, Any]]:
    """All that trains in two groups, by "name" the factors and what else there is; an empty one is left out."""
    trained = [parameter for parameter in unwrapped(model).parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(f"model {type(unwrapped(model)).__name__} has no parameter that trains")
    factors = [p for p in trained if p in parts and parts[p].part in FACTORS]
    taken = set(factors)
    found = {"factors": factors, "other": [p for p in trained if p not in taken]}
    return [
        {"params": parameters, "name": name} for name, parameters in found.items() if parameters
    ]


def refuse_middle(one: Held, optimizer: str) -> None:
    """ValueError where something trained or changing lies beside the two factors, which the closed forms do not know."""
    for part in ("lora_core", "lora_out_scale"):
        if getattr(one.layer, part) is not None:
            shape = tuple(getattr(one.layer, part).shape)
            where = f"{one.name or 'the layer'}: {one.layer.adapter} has {part} {shape}"
            raise ValueError(f"{where}; {optimizer} is for s·BA of two factors alone")


def inverse_square(scaling: Scaling) -> float | torch.Tensor:
    """1/s², a number or a 0-d tensor as s is one; 0 where s is 0, for then the factors' gradients are 0 too."""
    if isinstance(scaling, torch.Tensor):
        s = scaling.detach().reshape(())
        return torch.where(s == 0, 0.0, 1 / s**2)
    return 0.0 if scaling == 0 else 1 / float(scaling) ** 2
