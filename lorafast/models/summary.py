"""What of a model trains: lorafast.trainable_summary and lorafast.adapter_parameters."""

from __future__ import annotations

import collections
from typing import NamedTuple

from torch import nn

from lorafast.models import extra_trainables
from lorafast.models.module_names import adapted, unwrapped
from lorafast.nn.adapter_layer import NAMES, AdapterLayer


class TrainableSummary(NamedTuple):
    """Counts of elements, each Parameter once. parts: what trains, by what it is (lora_A, …, bias, modules_to_save, other)."""

    trainable: int
    total: int
    parts: dict[str, int]

    def __str__(self) -> str:
        share = 100 * self.trainable / max(1, self.total)
        parts = ", ".join(f"{name} {count:,d}" for name, count in self.parts.items())
        counts = f"trainable params: {self.trainable:,d} || all params: {self.total:,d} || trainable%: {share:.4f}"
        return f"{counts}\n{parts}" if parts else counts


def trainable_summary(model: nn.Module) -> TrainableSummary:
    """How many of a model's parameters train, adapted or not."""
    model = unwrapped(model)
    kinds: dict[nn.Parameter, str] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                kinds.setdefault(
                    parameter,
                    name if isinstance(module, AdapterLayer) and name in NAMES else "other",
                )
    for module in extra_trainables.saved(model).values():
        kinds |= dict.fromkeys(module.parameters(), "modules_to_save")
    kinds |= {module.bias: "bias" for module in extra_trainables.biases(model).values()}
    counts = collections.Counter({kind: 0 for kind in (*NAMES, "bias", "modules_to_save", "other")})
    for parameter, kind in kinds.items():
        counts[kind] += parameter.numel() if parameter.requires_grad else 0
    parts = {kind: count for kind, count in counts.items() if count}
    return TrainableSummary(
        sum(parts.values()), sum(parameter.numel() for parameter in kinds), parts
    )


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every Parameter an adapter file of this model holds and that trains: what to give an optimizer. ValueError if not adapted."""
    layers = adapted(model, awake=True).values()
    held = [
        parameter
        for layer in layers
        for name in NAMES
        if (parameter := getattr(layer, name)) is not None
    ]
    held += [
        parameter
        for module in extra_trainables.saved(model).values()
        for parameter in module.parameters()
    ]
    held += [module.bias for module in extra_trainables.biases(model).values()]
    return [parameter for parameter in dict.fromkeys(held) if parameter.requires_grad]
