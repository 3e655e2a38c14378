"""A model's adapters as a file describes them: one config, and factors for the original weights.

An init that changes the weight W into W - s B₀ S₀ A₀ is written as one adapter of twice the rank,
whose second half undoes the init. The file then fits the original W, in PEFT too.
"""

from __future__ import annotations

import collections
import re
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from lorafast.methods.adalora import AdaLoRA
from lorafast.methods.adapter import Adapter
from lorafast.methods.dora import DoRA
from lorafast.methods.lamda import LaMDA
from lorafast.methods.lora_ga import LoRAGA
from lorafast.methods.pissa import PiSSA
from lorafast.methods.weight_init import WeightInit
from lorafast.models import adalora_format, extra_trainables, peft_config
from lorafast.models.adapt_spec import TASK_TYPE_ATTRIBUTE, match_patterns
from lorafast.models.module_names import canonical_name, endings, ends_with
from lorafast.nn.adapter_layer import AdapterLayer
from lorafast.nn.expert_parameter import ParameterExperts
from lorafast.nn.linear import Conv1D

# Fields of adapters that PEFT's config lacks; they are written beside it.
_EXTRA_FIELDS = (
    "freeze_A",
    "dropout_on",
    "keep",
    "detach_norm",
    "cache_norm",
    "magnitude_only",
)
# A field that PEFT refuses for experts, so that their config says 0 and it is written beside it.
_DROPOUT = "dropout"
# The tensors that are stacked with those of the init.
_STACKED_TENSORS = ("lora_A", "lora_B", "lora_core")
_INITS: dict[str, type[WeightInit]] = {"PiSSA": PiSSA, "LoRAGA": LoRAGA}


class MixtureError(ValueError):
    """The layers' adapters differ in what one file cannot say."""


class AdapterFormat(NamedTuple):
    """The description of a model's adapters in a file.

    config: PEFT's config. extras: what lorafast writes beside it, for load_adapter.
    """

    config: dict[str, Any]
    extras: dict[str, Any]


def describe_adapters(model: nn.Module, layers: dict[str, AdapterLayer]) -> AdapterFormat:
    """Return the config and extras of a model's adapters. MixtureError if one config cannot do."""
    adapters = {name: _adapter_as_scaled(name, layer) for name, layer in layers.items()}
    common = _common_adapter(adapters)
    extras = {
        "adapter": _extra_fields(common, _has_experts(layers)),
        "stacked": common.residual,
        "alpha": getattr(common, "alpha", None),
    }
    if common.residual:
        alphas = {name: adapter.alpha for name, adapter in adapters.items()}
        extras["alpha_pattern"] = _exceptions(alphas, common.alpha)
    magnitude_only = sorted(name for name, a in adapters.items() if is_magnitude_only(a))
    if magnitude_only and not is_magnitude_only(common):
        extras["magnitude_only"] = magnitude_only
    stacked = {name: stacked_adapter(adapter) for name, adapter in adapters.items()}
    return AdapterFormat(build_config(model, layers, stacked), extras)


def stacked_adapter(adapter: Adapter) -> Adapter:
    """Return the adapter that a file describes.

    For an init that changes the weight it has twice the rank, the same s, and an init that leaves
    the weight unchanged.
    """
    if not adapter.residual:
        return adapter
    alpha = adapter.alpha * (2**0.5 if adapter.rslora else 2)
    init = "zero" if isinstance(adapter, LaMDA) else "kaiming"
    return replace(adapter, r=2 * adapter.r, alpha=alpha, init=init)


def stack_tensors(
    tensors: dict[str, torch.Tensor], initial: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return s (B S A - B₀ S₀ A₀) as one adapter of twice the rank.

    A is [A; A₀], B is [B, -B₀], and the core has S and S₀ on its diagonal.

    Args:
        tensors: the trained values of a layer, by Parameter name.
        initial: what the init took out of the weight, with the same s.
    """
    initial = {
        name: tensor.to(tensors[name])
        for name, tensor in initial.items()
        if name in _STACKED_TENSORS and tensor is not None
    }
    stacked = {
        "lora_A": torch.cat([tensors["lora_A"], initial["lora_A"]], -2),
        "lora_B": torch.cat([tensors["lora_B"], -initial["lora_B"]], -1),
    }
    if "lora_core" in initial:
        stacked["lora_core"] = _block_diagonal(tensors["lora_core"], initial["lora_core"])
    return tensors | stacked


def _block_diagonal(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the matrices with those of first and of second on their diagonals."""
    r = first.shape[-1]
    both = first.new_zeros(*first.shape[:-2], r + second.shape[-1], r + second.shape[-1])
    both[..., :r, :r], both[..., r:, r:] = first, second
    return both


def unstack_tensors(
    stacked: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the trained values and the init that stack_tensors combined.

    ValueError if the tensors are not of that form.
    """
    r, odd = divmod(stacked["lora_A"].shape[-2], 2)
    if odd:
        raise ValueError(
            f"lora_A {tuple(stacked['lora_A'].shape)} is of odd rank, and cannot be a factor with "
            "its start"
        )
    A, B = stacked["lora_A"], stacked["lora_B"]
    tensors = stacked | {"lora_A": A[..., :r, :], "lora_B": B[..., :r]}
    initial = {"lora_A": A[..., r:, :], "lora_B": -B[..., r:]}
    if (core := stacked.get("lora_core")) is not None:
        if core[..., :r, r:].any() or core[..., r:, :r].any():
            raise ValueError(
                f"lora_core {tuple(core.shape)} is no core with its start: the blocks off its "
                "diagonal are not 0"
            )
        tensors["lora_core"], initial["lora_core"] = core[..., :r, :r], core[..., r:, r:]
    return tensors, initial


def apply_extras(adapter: Adapter, extras: dict[str, Any]) -> Adapter:
    """Return an adapter read from a config, with the fields that the file's extras add.

    Raises:
        ValueError, TypeError: the extras do not fit the adapter.
    """
    values = extras.get("adapter", {"method": type(adapter).__name__})
    allowed = {"method", "init", "svd_niter", _DROPOUT, *_EXTRA_FIELDS} & {
        "method",
        *(field.name for field in fields(adapter)),
    }
    if (
        not isinstance(values, dict)
        or values.get("method") != type(adapter).__name__
        or not values.keys() <= allowed
    ):
        raise ValueError(f"the file is of {values!r}, its config of {adapter}")
    values = {name: value for name, value in values.items() if name != "method"}
    if isinstance(values.get("init"), dict):
        values["init"] = _init_from_settings(values["init"])
    if isinstance(values.get("init"), LoRAGA) and not extras.get("stacked"):
        raise ValueError(f"the file is of {values['init']}, and holds no start")
    return replace(adapter, **values)


def _init_from_settings(settings: dict[str, Any]) -> WeightInit:
    """Return the init of these settings. Files from before LoRA-GA name no kind: it is PiSSA."""
    values = dict(settings)
    kind = values.pop("kind", "PiSSA")
    init = _INITS.get(kind) if isinstance(kind, str) else None
    if init is None or values.keys() != init().settings().keys():
        raise ValueError(f"init={settings!r} of the file is no start")
    return init(**values)


def _adapter_as_scaled(name: str, layer: AdapterLayer) -> Adapter:
    """Return the layer's adapter with the alpha that gives the layer's present scaling."""
    scaling = float(layer.scaling)
    if scaling == layer.adapter.scaling:
        return layer.adapter
    if not hasattr(layer.adapter, "alpha"):
        raise ValueError(
            f"{name}.scaling is {scaling}, and {layer.adapter} knows none but "
            f"{layer.adapter.scaling}"
        )
    return replace(layer.adapter, alpha=layer.adapter.alpha_for(scaling))


def is_magnitude_only(adapter: Adapter) -> bool:
    """True for a DoRA whose magnitude alone trains. A file may hold it beside a full DoRA."""
    return isinstance(adapter, DoRA) and adapter.magnitude_only


def _common_adapter(adapters: dict[str, Adapter]) -> Adapter:
    """Return the adapter with the most frequent rank and alpha, for the config.

    MixtureError if the others differ from it in more than the numbers that patterns can set.
    """
    full = {name: a for name, a in adapters.items() if not is_magnitude_only(a)} or adapters
    counts = collections.Counter((a.r, getattr(a, "alpha", None)) for a in full.values())
    most_common = counts.most_common(1)[0][0]
    common = next(a for a in full.values() if (a.r, getattr(a, "alpha", None)) == most_common)
    numbers = {
        field: getattr(common, field) for field in common.per_layer_fields if hasattr(common, field)
    }
    allows_magnitude_only = isinstance(common, DoRA) and not common.residual
    for name, adapter in adapters.items():
        if name not in full and allows_magnitude_only and adapter == common.without_factors():
            continue
        if type(adapter) is not type(common) or replace(adapter, **numbers) != common:
            raise MixtureError(
                f"{name} has {adapter}, other layers {common}: adapters of one file may differ in "
                f"{' and '.join(common.per_layer_fields)} alone, DoRA's (without an init that "
                "changes the weight) in magnitude_only too"
            )
    return common


def _has_experts(layers: dict[str, AdapterLayer]) -> bool:
    return any(isinstance(layer, ParameterExperts) for layer in layers.values())


def _extra_fields(adapter: Adapter, on_experts: bool = False) -> dict[str, Any]:
    """Return the method, and the fields that PEFT's config lacks, or lacks for experts."""
    names = {field.name for field in fields(adapter)}
    values = {name: getattr(adapter, name) for name in _EXTRA_FIELDS if name in names}
    if on_experts and adapter.dropout:
        values[_DROPOUT] = adapter.dropout
    if isinstance(adapter, LaMDA) and adapter.residual:
        values |= {"init": adapter.init, "svd_niter": adapter.svd_niter}
    elif adapter.residual:
        values["init"] = {"kind": type(adapter.init).__name__} | adapter.init.settings()
    return {"method": type(adapter).__name__} | values


def build_config(
    model: nn.Module, layers: dict[str, AdapterLayer], adapters: dict[str, Adapter]
) -> dict[str, Any]:
    """Return the config of a file.

    Args:
        model: the model of the layers.
        layers: its adapted layers by name.
        adapters: the adapter that the file describes for each.
    """
    common = _common_adapter(adapters)
    config = peft_config.config_from_adapter(common)
    saved = sorted(extra_trainables.saved_modules(model))
    task_type = model.__dict__.get(TASK_TYPE_ATTRIBUTE)
    config |= {
        "target_modules": _target_names(model, layers, saved),
        "modules_to_save": saved or None,
        "bias": _bias_option(model, layers, config["peft_type"]),
        "fan_in_fan_out": any(isinstance(layer, Conv1D) for layer in layers.values()),
        "base_model_name_or_path": str(getattr(model, "name_or_path", None) or "") or None,
        "inference_mode": True,
        "task_type": task_type,
        "auto_mapping": None if task_type else _auto_mapping(model),
    }
    if _has_experts(layers):
        config |= {"target_parameters": _parameter_names(model, layers), "lora_dropout": 0.0}
    if isinstance(common, AdaLoRA):
        config["rank_pattern"] = adalora_format.rank_pattern_to_peft(adapters)
        config |= model.__dict__.get(adalora_format.SCHEDULE_ATTRIBUTE, {})
        return config
    # Layers that share tensors have one rank, and PEFT's config of their method has no pattern.
    if common.bind_model([(1, 1)]) is common:
        ranks = {name: adapter.r for name, adapter in adapters.items()}
        config["rank_pattern"] = _exceptions(ranks, common.r)
    if hasattr(common, "alpha"):
        alphas = {name: adapter.alpha for name, adapter in adapters.items()}
        config["alpha_pattern"] = _exceptions(alphas, common.alpha)
    return config


def _bias_option(model: nn.Module, layers: dict[str, AdapterLayer], peft_type: str) -> str:
    biases = extra_trainables.trained_biases(model)
    if not biases:
        return "none"
    if any(name not in layers for name in biases):
        return "all"
    return "vera_only" if peft_type == "VERA" else "lora_only"


def _auto_mapping(model: nn.Module) -> dict[str, str]:
    """Return the model's class. FSDP replaces it by a subclass in torch.distributed."""
    kind = next(
        kind for kind in type(model).__mro__ if not kind.__module__.startswith("torch.distributed")
    )
    return {"base_model_class": kind.__name__, "parent_library": kind.__module__}


def _target_names(
    model: nn.Module, layers: dict[str, AdapterLayer], saved: list[str]
) -> list[str] | str:
    """Return the shortest target_modules that select these layers and nothing else.

    That is the last parts of their names, else their whole names, else a regular expression.
    """
    experts = {name for name, layer in layers.items() if isinstance(layer, ParameterExperts)}
    layers = {name: layer for name, layer in layers.items() if name not in experts}
    if not layers:
        return []
    names = [canonical_name(name) for name, _ in model.named_modules() if name]
    names = [
        name
        for name in names
        if name not in experts
        and not any(ends_with(name, module) or name.startswith(f"{module}.") for module in saved)
    ]
    last_parts = {name.rpartition(".")[2] for name in layers}
    for targets in (last_parts, set(layers)):
        selected = {name for name in names if not targets.isdisjoint(endings(name))}
        if selected == layers.keys():
            return sorted(targets)
    return "|".join(re.escape(name) for name in sorted(layers))


def _parameter_names(model: nn.Module, layers: dict[str, AdapterLayer]) -> list[str]:
    """Return the shortest target_parameters that select the adapted experts and nothing else.

    Those are the last two parts of their names, else their whole names.
    """
    adapted = {name for name, layer in layers.items() if isinstance(layer, ParameterExperts)}
    names = [canonical_name(name) for name, _ in model.named_parameters(remove_duplicate=False)]
    ends = {".".join(name.split(".")[-2:]) for name in adapted}
    selected = {name for name in names if not ends.isdisjoint(endings(name))}
    return sorted(ends if selected == adapted else adapted)


def _exceptions(numbers: dict[str, float], common: float) -> dict[str, float]:
    """Return a pattern that gives the numbers which differ from the common one.

    Its keys are layer names, or expressions where a name is also the end of another layer's name.
    """
    exceptions = {name: number for name, number in numbers.items() if number != common}
    matches = match_patterns(exceptions, numbers)
    result = {name: exceptions[matches[name]] if name in matches else common for name in numbers}
    if result == numbers:
        return exceptions
    return {f"^{re.escape(name)}": number for name, number in exceptions.items()}
