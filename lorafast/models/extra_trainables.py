"""What trains besides adapters: whole modules (modules_to_save) and biases. Their first values stay, for the base model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from lorafast.models.adapt_spec import Plan
from lorafast.models.module_names import clean, ends_with, near, unwrapped
from lorafast.models.target_modules import owners, storage
from lorafast.nn.adapter_layer import AdapterLayer

# On a module: the first values of its own tensors that train, by name. Plain tensors, so that no state dict holds them.
_FIRST = "_lorafast_first"
# On a module: it trains as a whole.
_SAVED = "_lorafast_saved"


class Besides(NamedTuple):
    """saved: modules that train as a whole. first: the values of all that trains, by module and name, as they are now. tied: those
    Parameters, by module and name, that get a twin of their own to train.
    """

    saved: list[nn.Module]
    first: dict[nn.Module, dict[str, torch.Tensor]]
    tied: dict[nn.Module, dict[str, nn.Parameter]]


def chosen(model: nn.Module, plan: Plan, replaced: dict[nn.Module, list[str]]) -> Besides:
    """What a plan wants to train besides adapters, or the one error that says why not. replaced: the modules that get one."""
    saved, biases = selected(model, plan, replaced)
    first = {part: _values(part) for module in saved.values() for part in module.modules()}
    first |= {module: {"bias": module.bias.detach().clone()} for module in biases.values()}
    return Besides(list(saved.values()), first, _tied(model, saved) if plan.untie else {})


def selected(
    model: nn.Module, plan: Plan, replaced: dict[nn.Module, list[str]]
) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """By clean name, the modules that a plan wants to train as a whole, and those whose bias it wants to train."""
    modules = dict(model.named_modules())
    saved: dict[str, nn.Module] = {}
    for target in plan.modules_to_save:
        means = str.endswith if plan.loose else ends_with
        found = {name: module for name, module in modules.items() if name and means(name, target)}
        if not found and not plan.forgiving:
            raise ValueError(
                f"modules_to_save: {target!r} matches no module{near(target, modules)}"
            )
        saved |= found
    saved = {
        n: m for n, m in saved.items() if not any(n.startswith(f"{other}.") for other in saved)
    }
    _refuse_adapted(saved, replaced)
    if not plan.untie:
        _refuse_tied(model, saved)
    biases = {}
    if plan.bias != "none":
        inside = {part for module in saved.values() for part in module.modules()}
        wanted = {
            n: m
            for n, m in modules.items()
            if m not in inside and (plan.bias == "all" or m in replaced)
        }
        biases = {
            clean(n): m
            for n, m in wanted.items()
            if isinstance(getattr(m, "bias", None), nn.Parameter)
        }
    return {clean(n): m for n, m in saved.items()}, biases


def _values(module: nn.Module) -> dict[str, torch.Tensor]:
    buffers = {
        name: b
        for name, b in module._buffers.items()
        if name not in module._non_persistent_buffers_set
    }
    return {
        name: t.detach().clone()
        for name, t in (module._parameters | buffers).items()
        if t is not None
    }


def train(besides: Besides, layers: dict[nn.Module, AdapterLayer]) -> None:
    """Let all of it train, and keep its first values. layers: the adapted layer in each replaced module's place."""
    for module, parameters in besides.tied.items():
        for name, parameter in parameters.items():
            setattr(module, name, nn.Parameter(parameter.detach().clone()))
    for module in besides.saved:
        setattr(module, _SAVED, True)
    for module, first in besides.first.items():
        place = layers.get(module, module)
        setattr(place, _FIRST, first)
        _let_train(place, True)


@torch.no_grad()
def undo(besides: Besides, layers: dict[nn.Module, AdapterLayer]) -> None:
    """Take back train(), and whatever values have come since."""
    for module, parameters in besides.tied.items():
        for name, parameter in parameters.items():
            setattr(module, name, parameter)
    for module, first in besides.first.items():
        place = layers.get(module, module)
        for name, value in first.items() if _FIRST in vars(place) else ():
            getattr(place, name).copy_(value)
        for mark in (_FIRST, _SAVED):
            vars(place).pop(mark, None)


def let_train(model: nn.Module, trainable: bool) -> None:
    """Let what trains besides adapters go on doing so, or rest."""
    for module in unwrapped(model).modules():
        _let_train(module, trainable)


def _let_train(module: nn.Module, trainable: bool) -> None:
    for name in vars(module).get(_FIRST, {}):
        if (
            parameter := module._parameters.get(name)
        ) is not None and parameter.is_floating_point():
            parameter.requires_grad_(trainable)


def saved(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that train as a whole, by clean name."""
    return {
        clean(name): module
        for name, module in unwrapped(model).named_modules()
        if _SAVED in vars(module)
    }


def biases(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose bias trains on its own, by clean name."""
    inside = {part for module in saved(model).values() for part in module.modules()}
    named = unwrapped(model).named_modules()
    return {
        clean(name): module
        for name, module in named
        if module not in inside and "bias" in vars(module).get(_FIRST, {})
    }


@contextlib.contextmanager
def first_values(model: nn.Module) -> Iterator[None]:
    """Inside, what trains besides adapters is as it was before: other Parameters, on the same device and in the same dtype."""
    away: list[tuple[nn.Module, dict[str, torch.Tensor]]] = []
    for module in unwrapped(model).modules():
        first, ours = vars(module).get(_FIRST, {}), {}
        for name, value in first.items():
            ours[name] = getattr(module, name)
            _refuse_unknown(name, ours[name], value)
        away.append((module, ours))
    try:
        for module, ours in away:
            _put(
                module,
                {name: vars(module)[_FIRST][name].to(tensor) for name, tensor in ours.items()},
            )
        yield
    finally:
        for module, ours in away:
            _put(module, ours)


def _refuse_unknown(name: str, now: torch.Tensor, first: torch.Tensor) -> None:
    if hasattr(now, "full_tensor"):
        raise NotImplementedError(
            f"{name} {tuple(now.shape)} trains and is a sharded DTensor: its first value cannot stand in"
        )
    if first.is_meta:
        raise RuntimeError(
            f"{name} {tuple(now.shape)} was on the meta device when it began to train: its first value is unknown"
        )


def _put(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if name in module._parameters:
            held = isinstance(tensor, nn.Parameter)
            module._parameters[name] = tensor if held else nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[name] = tensor


@torch.no_grad()
def forget(model: nn.Module, restore: bool) -> None:
    """Let nothing besides adapters train any more. restore: first values again, else those of now."""
    for module in unwrapped(model).modules():
        for name, value in vars(module).get(_FIRST, {}).items():
            tensor = getattr(module, name)
            if restore:
                _refuse_unknown(name, tensor, value)
                tensor.copy_(value)
            tensor.requires_grad_(False)
    for module in unwrapped(model).modules():
        for mark in (_FIRST, _SAVED):
            vars(module).pop(mark, None)


def _refuse_adapted(saved: dict[str, nn.Module], replaced: dict[nn.Module, list[str]]) -> None:
    for name, module in saved.items():
        if both := next((part for part in module.modules() if part in replaced), None):
            raise ValueError(
                f"modules_to_save means {name}, and target_modules {replaced[both][0]} in it: a module is one or the other"
            )


def _tied(
    model: nn.Module, saved: dict[str, nn.Module]
) -> dict[nn.Module, dict[str, nn.Parameter]]:
    """The Parameters of modules to save that some other module holds too."""
    found: dict[nn.Module, dict[str, nn.Parameter]] = {}
    held = owners(model) if saved else {}
    for part in {part for module in saved.values() for part in module.modules()}:
        for name, parameter in part._parameters.items():
            if (
                parameter is not None
                and not parameter.is_meta
                and len(held[storage(parameter)]) > 1
            ):
                found.setdefault(part, {})[name] = parameter
    return found


def _refuse_tied(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    inside = {part for module in chosen.values() for part in module.modules()}
    held = owners(model) if chosen else {}
    for name, module in chosen.items():
        for key, parameter in module.named_parameters():
            sharing = {} if parameter.is_meta else held[storage(parameter)]
            if not sharing.keys() <= inside:
                both = " and ".join(sharing.values())
                raise ValueError(
                    f"modules_to_save: {name}.{key} is one tensor under {both}: save both modules, or neither"
                )
