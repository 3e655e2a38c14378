"""lorafast.adapt: give a model's linears an adapter, in place, and freeze everything else."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Collection

import torch
from torch import nn

from lorafast.layer import Linear, why_not_plain
from lorafast.methods.adapter import Adapter

# What PEFT reads the same way: every linear but the head that makes logits.
ALL_LINEAR = "all-linear"


def adapt(model: nn.Module, adapter: Adapter, target_modules: str | Collection[str] = ALL_LINEAR) -> nn.Module:
    """Replace, in place, every nn.Linear that target_modules names with a lorafast.Linear, and freeze everything but the adapters.

    target_modules: "all-linear" (every nn.Linear but the model's output embeddings), a regular expression that must match a whole
    name, or a collection of names, each whole or the end of one after a dot. Weights and biases stay the same Parameters; a linear
    used in several places is replaced in all. Adapters start in module order from torch's generator. Returns the model.
    Raises ValueError or TypeError, and changes nothing, where a target matches no module, a match is no plain nn.Linear or carries
    hooks, an init would change a weight that others share, or the model is adapted already. If an init fails midway, weights it
    has already changed are restored to within one rounding.
    """
    places = _places(model, adapter, target_modules)
    layers: dict[nn.Linear, Linear] = {}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for linear, names in places.items():
            layers[linear] = _adapted(linear, adapter, names[0])
    except BaseException:
        for layer in layers.values():
            layer.restore_base()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    for linear, names in places.items():
        for name in names:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layers[linear])
    return model


def _adapted(linear: nn.Linear, adapter: Adapter, name: str) -> Linear:
    with warnings.catch_warnings():
        # Not the user's concern that linear and layer share a weight: the linear is about to be dropped.
        warnings.filterwarnings("ignore", message=".* now holds the residual")
        layer = Linear.from_linear(linear, adapter)
    if layer.lora_magnitude is not None:
        layer.lora_magnitude.lorafast_name = name
    return layer


def _places(model: nn.Module, adapter: Adapter, target_modules: str | Collection[str]) -> dict[nn.Linear, list[str]]:
    """The linears to replace, each with every name it goes by, or the one error that says why not."""
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter must be a lorafast adapter such as lorafast.LoRA(r=8), not {adapter!r}")
    modules = list(model.named_modules(remove_duplicate=False))
    for name, module in modules:
        if isinstance(module, Linear):
            raise ValueError(f"model is adapted already: {name or 'it'} is a lorafast.Linear")
        if type(module).__module__.startswith("peft.tuners"):
            raise ValueError(f"model carries PEFT adapters already: {name or 'it'} is a {type(module).__qualname__}")
    if isinstance(model, nn.Linear):
        raise TypeError("model is itself an nn.Linear and cannot be replaced in place: lorafast.Linear.from_linear(model, adapter)")
    names = _matches(model, [name for name, _ in modules if name], target_modules)
    for name, module in modules:
        if name in names and (why := why_not_plain(module) or _carried(module) or _bypassed(model, name)):
            raise TypeError(f"target_modules={target_modules!r} matches {name}, which {why}")
    matched = {module for name, module in modules if name in names}
    places: dict[nn.Linear, list[str]] = {}
    for name, module in modules:
        if module in matched:
            places.setdefault(module, []).append(name)
    if adapter.residual:
        _refuse_tied(modules, places, adapter)
    return places


def _matches(model: nn.Module, names: list[str], target_modules: str | Collection[str]) -> set[str]:
    if target_modules == ALL_LINEAR:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        modules = model.named_modules(remove_duplicate=False)
        matched = {name for name, module in modules if isinstance(module, nn.Linear) and module is not head}
        if not matched:
            raise ValueError(f"target_modules='all-linear' matches nothing: {type(model).__name__} has no nn.Linear")
        return matched
    if isinstance(target_modules, str):
        try:
            matched = {name for name in names if re.fullmatch(target_modules, name)}
        except re.error as error:
            raise ValueError(f"target_modules={target_modules!r} is no regular expression: {error}") from error
        if not matched:
            raise ValueError(f"target_modules={target_modules!r} matches no module{_near(target_modules, names)}")
        return matched
    wanted = list(target_modules)
    if not wanted or not all(isinstance(target, str) and target for target in wanted):
        raise ValueError(f"target_modules={target_modules!r} must be 'all-linear', a regular expression or names of modules")
    matched = set()
    for target in wanted:
        found = {name for name in names if name == target or name.endswith(f".{target}")}
        if not found:
            raise ValueError(f"target_modules: {target!r} matches no module{_near(target, names)}")
        matched |= found
    return matched


def _near(target: str, names: list[str]) -> str:
    ends = {name.rpartition(".")[2]: None for name in names} | dict.fromkeys(names)
    near = difflib.get_close_matches(target, [end for end in ends if not end.isdigit()], n=5, cutoff=0.4)
    return f"; near it: {', '.join(near)}" if near else ""


def _carried(linear: nn.Linear) -> str | None:
    """What replacing the module would lose: hooks, a forward somebody put on this one object, more than weight and bias."""
    if any(value for kind, value in vars(linear).items() if kind.endswith("_hooks")) or "forward" in vars(linear):
        return "has hooks or a patched forward (offloading, pruning?) that its replacement would lose"
    if more := [name for name, _ in [*linear.named_parameters(), *linear.named_buffers()] if name not in ("weight", "bias")]:
        return f"holds {', '.join(more)} besides weight and bias, which its replacement would lose"
    return None


def _bypassed(model: nn.Module, name: str) -> str | None:
    """Whether the owner of the module reads its weight without calling it: an adapter there would be skipped."""
    parent, _, child = name.rpartition(".")
    if isinstance(model.get_submodule(parent), nn.TransformerEncoderLayer) and child in ("linear1", "linear2"):
        return "nn.TransformerEncoderLayer does not call in eval, but reads its weight"
    return None


def _refuse_tied(modules: list[tuple[str, nn.Module]], places: dict[nn.Linear, list[str]], adapter: Adapter) -> None:
    owners: dict[torch.UntypedStorage, dict[nn.Module, str]] = {}
    for name, module in modules:
        for key, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                owners.setdefault(parameter.untyped_storage()._cdata, {}).setdefault(module, f"{name}.{key}")
    for linear, names in places.items():
        sharing = [] if linear.weight.is_meta else owners[linear.weight.untyped_storage()._cdata]
        if len(sharing) > 1:
            both = " and ".join(sharing.values())
            raise ValueError(f"{adapter} would change {both}, which are one tensor: leave {names[0]} out, or choose another init")
