"""Fused experts of transformers' models, which PEFT reaches by the names of layers they once were.

Where a model's experts became one Parameter gate_up_proj [experts, N, K] and its router a module of
its own, PEFT takes the former names in a config's target_modules for these, also where a layer of
such a name still exists, as among shared experts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from lorafast.models import expert_targets
from lorafast.models.module_names import endings

# The last parts of the former names.
_FORMER_NAMES = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


def converted(config: Any, model: nn.Module) -> Any:
    """Return a PEFT config with the target_parameters that its target_modules mean in PEFT.

    ValueError if they mean Parameters that cannot have an adapter, such as those of routers.
    """
    if getattr(config, "target_modules", None) is None:
        return config
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # a PEFT that knows no fused experts, or a transformers that has none
        return config
    changed = copy.deepcopy(config)
    conversion.convert_peft_config_for_transformers(changed, model, conversions=None)
    parameters = getattr(changed, "target_parameters", None)
    if not parameters or set(parameters) == set(config.target_parameters or ()):
        return config
    for name, module in model.named_modules():
        for key in module._parameters:
            meant = not parameters.isdisjoint(endings(f"{name}.{key}"))
            if meant and (why := expert_targets.why_not_parameter(module, key)):
                raise ValueError(
                    f"target_modules={config.target_modules!r}: in PEFT they mean "
                    f"target_parameters={sorted(parameters)} of this model too, and {name}.{key} "
                    f"{why}. Name other modules, or adapt it with PEFT"
                )
    return changed


def taken_for_experts(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the names of layers that PEFT may take for fused experts or routers of the model."""
    if not hasattr(getattr(model, "config", None), "model_type"):
        return []
    if not any(_holds_experts(module) for module in model.modules()):
        return []
    return [name for name in names if name.rpartition(".")[2] in _FORMER_NAMES]


def _holds_experts(module: nn.Module) -> bool:
    weight = module._parameters.get("gate_up_proj")
    return weight is not None and weight.dim() == 3
