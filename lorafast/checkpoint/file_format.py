"""The form a model's adapters take in a file: one config for all layers, and factors that fit the untouched weights."""

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
from lorafast.models.adapt_spec import matching
from lorafast.models.module_names import clean, ends_with
from lorafast.nn.adapter_layer import AdapterLayer
from lorafast.nn.linear import Conv1D

# Fields that PEFT's config has no word for.
_BEYOND = ("freeze_A", "dropout_on", "keep", "detach_norm", "cache_norm", "magnitude_only")
# What a start leaves of an adapter in a file: twice its rank, the second half undoing what the start took out of the weight.
_STACKED = ("lora_A", "lora_B", "lora_core")
_STARTS: dict[str, type[WeightInit]] = {"PiSSA": PiSSA, "LoRAGA": LoRAGA}


class Form(NamedTuple):
    """adapters: of every layer as the file has it, by name. config and extras: what the file says of them."""

    adapters: dict[str, Adapter]
    config: dict[str, Any]
    extras: dict[str, Any]


def form_of(model: nn.Module, layers: dict[str, AdapterLayer]) -> Form:
    """The form of a model's adapters. ValueError if the layers' adapters cannot share one config."""
    own = {name: _as_it_scales(name, layer) for name, layer in layers.items()}
    held = {name: stacked(adapter) for name, adapter in own.items()}
    common = _common(own)
    extras = {
        "adapter": _extras(common),
        "stacked": common.residual,
        "alpha": getattr(common, "alpha", None),
    }
    if common.residual:
        extras["alpha_pattern"] = _pattern(
            {name: adapter.alpha for name, adapter in own.items()}, common.alpha
        )
    if (
        alone := sorted(name for name, adapter in own.items() if is_alone(adapter))
        if not is_alone(common)
        else []
    ):
        extras["magnitude_only"] = alone
    return Form(held, config_of(model, layers, held), extras)


def stacked(adapter: Adapter) -> Adapter:
    """The adapter as a file has it: for a start that changes the weight, one of twice the rank and the same s that does not."""
    if not adapter.residual:
        return adapter
    alpha = adapter.alpha * (2**0.5 if adapter.rslora else 2)
    return replace(
        adapter,
        r=2 * adapter.r,
        alpha=alpha,
        init="zero" if isinstance(adapter, LaMDA) else "kaiming",
    )


def stack(now: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """s (B S A - B₀ S₀ A₀) as one adapter of twice the rank: [A; A₀], [B, -B₀] and S beside S₀ on the diagonal."""
    first = {
        part: tensor.to(now[part])
        for part, tensor in start.items()
        if part in _STACKED and tensor is not None
    }
    both = {
        "lora_A": torch.cat([now["lora_A"], first["lora_A"]]),
        "lora_B": torch.cat([now["lora_B"], -first["lora_B"]], 1),
    }
    if "lora_core" in first:
        both["lora_core"] = torch.block_diag(now["lora_core"], first["lora_core"])
    return now | both


def unstack(
    both: dict[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What stack put together: the trained values and the start. ValueError if the halves are not what stack makes."""
    r, odd = divmod(both["lora_A"].shape[0], 2)
    if odd:
        raise ValueError(
            f"lora_A {tuple(both['lora_A'].shape)} is of odd rank, and cannot be a factor with its start"
        )
    now = both | {"lora_A": both["lora_A"][:r], "lora_B": both["lora_B"][:, :r]}
    start = {"lora_A": both["lora_A"][r:], "lora_B": -both["lora_B"][:, r:]}
    if (core := both.get("lora_core")) is not None:
        if core[:r, r:].any() or core[r:, :r].any():
            raise ValueError(
                f"lora_core {tuple(core.shape)} is no core with its start: the blocks off its diagonal are not 0"
            )
        now["lora_core"], start["lora_core"] = core[:r, :r], core[r:, r:]
    return now, start


def overlaid(adapter: Adapter, extras: dict[str, Any]) -> Adapter:
    """An adapter read from a config, with what the file says of it beyond PEFT's words. ValueError or TypeError if it cannot be."""
    said = extras.get("adapter", {"method": type(adapter).__name__})
    known = {"method", "init", "svd_niter", *_BEYOND} & {
        "method",
        *(field.name for field in fields(adapter)),
    }
    if (
        not isinstance(said, dict)
        or said.get("method") != type(adapter).__name__
        or not said.keys() <= known
    ):
        raise ValueError(f"the file is of {said!r}, its config of {adapter}")
    own = {name: value for name, value in said.items() if name != "method"}
    if isinstance(own.get("init"), dict):
        own["init"] = _start_of(own["init"])
    if isinstance(own.get("init"), LoRAGA) and not extras.get("stacked"):
        raise ValueError(f"the file is of {own['init']}, and holds no start")
    return replace(adapter, **own)


def _start_of(said: dict[str, Any]) -> WeightInit:
    """The start of these settings. Before there was a second kind, none was named."""
    settings = dict(said)
    kind = settings.pop("kind", "PiSSA")
    start = _STARTS.get(kind) if isinstance(kind, str) else None
    if start is None or settings.keys() != start().settings().keys():
        raise ValueError(f"init={said!r} of the file is no start")
    return start(**settings)


def _as_it_scales(name: str, layer: AdapterLayer) -> Adapter:
    """The layer's adapter, its alpha such that it gives the scaling the layer has now."""
    scaling = float(layer.scaling)
    if scaling == layer.adapter.scaling:
        return layer.adapter
    if not hasattr(layer.adapter, "alpha"):
        raise ValueError(
            f"{name}.scaling is {scaling}, and {layer.adapter} knows none but {layer.adapter.scaling}"
        )
    return replace(layer.adapter, alpha=layer.adapter.alpha_for(scaling))


def is_alone(adapter: Adapter) -> bool:
    """Whether it is a DoRA whose magnitude alone trains, and which may stand beside whole ones in a file."""
    return isinstance(adapter, DoRA) and adapter.magnitude_only


def _common(own: dict[str, Adapter]) -> Adapter:
    whole = {name: adapter for name, adapter in own.items() if not is_alone(adapter)} or own
    ranks = collections.Counter(
        (adapter.r, getattr(adapter, "alpha", None)) for adapter in whole.values()
    )
    (r, alpha), _ = ranks.most_common(1)[0]
    common = next(a for a in whole.values() if (a.r, getattr(a, "alpha", None)) == (r, alpha))
    for name, adapter in own.items():
        if (
            name not in whole
            and isinstance(common, DoRA)
            and not common.residual
            and adapter == common.alone()
        ):
            continue
        numbers = {
            field: getattr(common, field) for field in common.per_layer if hasattr(common, field)
        }
        if type(adapter) is not type(common) or replace(adapter, **numbers) != common:
            apart = " and ".join(common.per_layer)
            raise ValueError(
                f"{name} has {adapter}, other layers {common}: adapters of one file may differ in {apart} alone, DoRA's (without "
                "an init that changes the weight) in magnitude_only too"
            )
    return common


def _extras(adapter: Adapter) -> dict[str, Any]:
    """What PEFT's config has no word for, a start that changes the weight included."""
    names = {field.name for field in fields(adapter)}
    said = {name: getattr(adapter, name) for name in _BEYOND if name in names}
    if isinstance(adapter, LaMDA) and adapter.residual:
        said |= {"init": adapter.init, "svd_niter": adapter.svd_niter}
    elif adapter.residual:
        said["init"] = {"kind": type(adapter.init).__name__} | adapter.init.settings()
    return {"method": type(adapter).__name__} | said


def config_of(
    model: nn.Module, layers: dict[str, AdapterLayer], held: dict[str, Adapter]
) -> dict[str, Any]:
    """The config of these adapters, one a layer, on the layers of a model."""
    common = _common(held)
    said = peft_config.dict_of(common)
    also = sorted(extra_trainables.biases(model))
    everywhere = any(name not in layers for name in also)
    task = model.__dict__.get("_lorafast_task_type")
    only = "vera_only" if said["peft_type"] == "VERA" else "lora_only"
    saved = sorted(extra_trainables.saved(model))
    # FSDP makes a class of its own of a model's.
    kind = next(
        one for one in type(model).__mro__ if not one.__module__.startswith("torch.distributed")
    )
    said |= {
        "target_modules": _targets(model, layers, saved),
        "modules_to_save": saved or None,
        "bias": "none" if not also else "all" if everywhere else only,
        "fan_in_fan_out": any(isinstance(layer, Conv1D) for layer in layers.values()),
        "base_model_name_or_path": str(getattr(model, "name_or_path", None) or "") or None,
        "inference_mode": True,
        "task_type": task,
        "auto_mapping": None
        if task
        else {"base_model_class": kind.__name__, "parent_library": kind.__module__},
    }
    if isinstance(common, AdaLoRA):
        said |= {"rank_pattern": adalora_format.pattern(held)} | model.__dict__.get(
            adalora_format.SCHEDULE, {}
        )
    elif (
        common.bind_model([(1, 1)]) is common
    ):  # else its layers share tensors of one rank, and PEFT's config has no pattern
        said["rank_pattern"] = _pattern(
            {name: adapter.r for name, adapter in held.items()}, common.r
        )
    if hasattr(common, "alpha") and not isinstance(common, AdaLoRA):
        said["alpha_pattern"] = _pattern(
            {name: adapter.alpha for name, adapter in held.items()}, common.alpha
        )
    return said


def _targets(
    model: nn.Module, layers: dict[str, AdapterLayer], saved: list[str]
) -> list[str] | str:
    """The shortest names that mean these layers and nothing else: their last parts, else their whole names, else an expression."""
    names = [clean(name) for name, _ in model.named_modules() if name]
    names = [
        name
        for name in names
        if not any(ends_with(name, one) or name.startswith(f"{one}.") for one in saved)
    ]
    for targets in (sorted({name.rpartition(".")[2] for name in layers}), sorted(layers)):
        if {
            name for name in names if any(ends_with(name, target) for target in targets)
        } == layers.keys():
            return targets
    return "|".join(re.escape(name) for name in sorted(layers))


def _pattern(numbers: dict[str, float], common: float) -> dict[str, float]:
    """The numbers that differ from the common one, by patterns that match their layers alone."""
    other = {name: number for name, number in numbers.items() if number != common}
    found = matching(other, numbers)
    plain = {name: other[found[name]] if name in found else common for name in numbers}
    return (
        other
        if plain == numbers
        else {f"^{re.escape(name)}": number for name, number in other.items()}
    )
