"""lorafast.trainable_summary and lorafast.adapter_parameters: what of a model trains."""

from __future__ import annotations

import collections
from typing import Any, NamedTuple

from torch import nn

from lorafast.models import extra_trainables
from lorafast.models.module_names import adapter_layers, unwrap
from lorafast.models.tables import html_table
from lorafast.nn.adapter_layer import NAMES, AdapterLayer


class TrainableSummary(NamedTuple):
    """How many elements of a model's Parameters train. str() gives PEFT's line and a breakdown.

    A notebook shows a table.

    Attributes:
        trainable: elements of all Parameters that train.
        total: elements of all Parameters, each Parameter counted once.
        parts: elements that train by what they belong to: lora_A, lora_B, lora_core,
            lora_magnitude, lora_out_scale, lora_bias, bias, modules_to_save or other. Empty parts
            are left out.
    """

    trainable: int
    total: int
    parts: dict[str, int]

    def __str__(self) -> str:
        share = 100 * self.trainable / max(1, self.total)
        counts = (
            f"trainable params: {self.trainable:,d} || all params: {self.total:,d} || "
            f"trainable%: {share:.4f}"
        )
        parts = ", ".join(f"{name} {count:,d}" for name, count in self.parts.items())
        return f"{counts}\n{parts}" if parts else counts

    def _repr_html_(self) -> str:
        counts = self.parts | {"trainable": self.trainable, "total": self.total}
        lines = [
            (name, f"{count:,d}", f"{100 * count / max(1, self.total):.4f}")
            for name, count in counts.items()
        ]
        header = ("parameters", "elements", "% of total")
        return html_table(header, lines, right=header[1:])


def trainable_summary(model: nn.Module) -> TrainableSummary:
    """Return how many of a model's parameters train, and which. The model need not be adapted.

    Args:
        model: any module; DDP, DataParallel and torch.compile around it are looked through.

    Returns:
        A TrainableSummary with the fields trainable, total and parts; print it for a summary.

    Raises:
        TypeError: model is no module.

    Example:
        import torch, lorafast

        model = torch.nn.Sequential(torch.nn.Linear(16, 16))
        lorafast.adapt(model, lorafast.LoRA(r=2))
        assert lorafast.trainable_summary(model).parts == {"lora_A": 32, "lora_B": 32}
    """
    model = unwrap(model)
    kinds: dict[nn.Parameter, str] = {}
    for module in model.modules():
        is_adapted = isinstance(module, AdapterLayer)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                kinds.setdefault(parameter, name if is_adapted and name in NAMES else "other")
    for module in extra_trainables.saved_modules(model).values():
        kinds |= dict.fromkeys(module.parameters(), "modules_to_save")
    for module in extra_trainables.trained_biases(model).values():
        bias: Any = module.bias
        kinds[bias] = "bias"
    counts = collections.Counter({kind: 0 for kind in (*NAMES, "bias", "modules_to_save", "other")})
    for parameter, kind in kinds.items():
        counts[kind] += parameter.numel() if parameter.requires_grad else 0
    parts = {kind: count for kind, count in counts.items() if count}
    total = sum(parameter.numel() for parameter in kinds)
    return TrainableSummary(sum(parts.values()), total, parts)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the Parameters that train and that an adapter file of the model holds.

    These are the trained adapter tensors, modules to save and biases: what to give an optimizer.
    Parameters that train for other reasons, for example a layer unfrozen by hand, are left out.

    Args:
        model: a model that lorafast.adapt adapted.

    Returns:
        The Parameters, each once.

    Raises:
        ValueError: the model has no adapted layer.
        RuntimeError: the adapters are disabled.

    Example:
        import torch, lorafast

        model = lorafast.adapt(torch.nn.Sequential(torch.nn.Linear(16, 16)), lorafast.LoRA(r=2))
        optimizer = torch.optim.AdamW(lorafast.adapter_parameters(model), lr=1e-3)
    """
    layers = adapter_layers(model, require_enabled=True).values()
    tensors = [getattr(layer, name) for layer in layers for name in NAMES]
    parameters = [tensor for tensor in tensors if tensor is not None]
    for module in extra_trainables.saved_modules(model).values():
        parameters += module.parameters()
    parameters += [module.bias for module in extra_trainables.trained_biases(model).values()]
    return [parameter for parameter in dict.fromkeys(parameters) if parameter.requires_grad]
