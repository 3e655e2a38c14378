"""What trains beside adapters: whole modules (modules_to_save) and biases.

Each such module remembers the values its tensors had before training, so that disable_adapter and
unload can return to the base model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import nn

from lorafast.models.adapt_spec import AdaptSpec
from lorafast.models.module_names import canonical_name, ends_with, similar_names, unwrap
from lorafast.models.target_modules import Targets, parameter_owners
from lorafast.nn.adapter_layer import AdapterLayer
from lorafast.nn.quantised_linear import QuantisedLinear, why_not_trained
from lorafast.runtime.torch_internals import storage_key

# Attribute of a module: the initial values of those of its own tensors that train, by name. They
# are plain tensors, so that no state dict holds them.
_INITIAL = "_lorafast_first"
# Attribute of a module: it trains as a whole.
_SAVED = "_lorafast_saved"

AdapterLayers = dict[nn.Module, AdapterLayer]


class ExtraTrainables(NamedTuple):
    """What trains beside adapters.

    modules: those that train as a whole. initial: the present values of all tensors that train, by
    module and name. tied: those Parameters, by module and name, that get a copy of their own.
    """

    modules: list[nn.Module]
    initial: dict[nn.Module, dict[str, torch.Tensor]]
    tied: dict[nn.Module, dict[str, nn.Parameter]]


def collect(model: nn.Module, spec: AdaptSpec, targets: Targets) -> ExtraTrainables:
    """Return what a spec trains beside adapters. ValueError if that is not possible.

    targets: the modules that get an adapter.
    """
    saved, biases = select(model, spec, targets)
    initial = {part: _copy_tensors(part) for module in saved.values() for part in module.modules()}
    initial |= {
        module: {"bias": cast(nn.Parameter, module.bias).detach().clone()}
        for module in biases.values()
    }
    tied = _tied_parameters(model, saved) if spec.untie else {}
    return ExtraTrainables(list(saved.values()), initial, tied)


def select(
    model: nn.Module, spec: AdaptSpec, targets: Targets
) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Return the modules to train as a whole, and those whose bias trains, by canonical name."""
    saved = _select_saved(model, spec)
    _refuse_adapted(saved, targets)
    _refuse_quantised(saved)
    if not spec.untie:
        _refuse_tied(model, saved)
    biases = {}
    if spec.bias != "none":
        inside = {part for module in saved.values() for part in module.modules()}
        biases = {
            canonical_name(name): module
            for name, module in model.named_modules()
            if module not in inside
            and (spec.bias == "all" or module in targets)
            and isinstance(getattr(module, "bias", None), nn.Parameter)
        }
    return {canonical_name(name): module for name, module in saved.items()}, biases


def _select_saved(model: nn.Module, spec: AdaptSpec) -> dict[str, nn.Module]:
    """Return the modules that modules_to_save selects, without those inside another of them."""
    modules = dict(model.named_modules())
    matches = str.endswith if spec.match_any_ending else ends_with
    selected: dict[str, nn.Module] = {}
    for target in spec.modules_to_save:
        named = {name: module for name, module in modules.items() if name and matches(name, target)}
        if not named and not spec.ignore_unmatched:
            raise ValueError(
                f"modules_to_save: {target!r} matches no module{similar_names(target, modules)}"
            )
        selected |= named
    if spec.keep_ties:
        selected |= _tied_modules(model, selected)
    return {
        name: module
        for name, module in selected.items()
        if not any(name.startswith(f"{other}.") for other in selected)
    }


def _tied_modules(model: nn.Module, selected: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the modules that hold a Parameter of a selected one, by name."""
    owners = parameter_owners(model)
    keys = {
        storage_key(parameter)
        for module in selected.values()
        for parameter in module.parameters()
        if not parameter.is_meta
    }
    return {name.rpartition(".")[0]: module for key in keys for module, name in owners[key].items()}


def _copy_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the module's own Parameters and persistent buffers."""
    buffers = {
        name: buffer
        for name, buffer in module._buffers.items()
        if name not in module._non_persistent_buffers_set
    }
    return {
        name: tensor.detach().clone()
        for name, tensor in (module._parameters | buffers).items()
        if tensor is not None
    }


def enable_training(extra: ExtraTrainables, layers: AdapterLayers) -> None:
    """Let the modules and biases train, and store their initial values.

    layers: the adapted layer that replaces each target.
    """
    for module, parameters in extra.tied.items():
        for name, parameter in parameters.items():
            setattr(module, name, nn.Parameter(parameter.detach().clone()))
    for module in extra.modules:
        setattr(module, _SAVED, True)
    for module, initial in extra.initial.items():
        current = layers.get(module, module)
        setattr(current, _INITIAL, initial)
        _set_trainable(current, True)


@torch.no_grad()
def undo_training(extra: ExtraTrainables, layers: AdapterLayers) -> None:
    """Undo enable_training, as far as it got, and restore the initial values."""
    for module, parameters in extra.tied.items():
        for name, parameter in parameters.items():
            setattr(module, name, parameter)
    for module, initial in extra.initial.items():
        current = layers.get(module, module)
        if _INITIAL in vars(current):
            for name, value in initial.items():
                getattr(current, name).copy_(value)
        for attribute in (_INITIAL, _SAVED):
            vars(current).pop(attribute, None)


def set_trainable(model: nn.Module, trainable: bool) -> None:
    """Set requires_grad of everything in the model that trains beside adapters."""
    for module in unwrap(model).modules():
        _set_trainable(module, trainable)


def _set_trainable(module: nn.Module, trainable: bool) -> None:
    for name in vars(module).get(_INITIAL, {}):
        parameter = _owner(module)._parameters.get(name)
        if parameter is not None and parameter.is_floating_point():
            parameter.requires_grad_(trainable)


def _owner(module: nn.Module) -> nn.Module:
    """Return the module that holds the tensors of a module that trains or whose bias does."""
    return module.base_layer if isinstance(module, QuantisedLinear) else module


def has_initial_values(module: nn.Module) -> bool:
    """True if a tensor of the module itself trains beside adapters."""
    return _INITIAL in vars(module)


def saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that train as a whole, by canonical name."""
    return {
        canonical_name(name): module
        for name, module in unwrap(model).named_modules()
        if _SAVED in vars(module)
    }


def trained_biases(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules whose bias trains but which do not train as a whole, by canonical name."""
    inside = {part for module in saved_modules(model).values() for part in module.modules()}
    return {
        canonical_name(name): module
        for name, module in unwrap(model).named_modules()
        if module not in inside and "bias" in vars(module).get(_INITIAL, {})
    }


@contextlib.contextmanager
def initial_values(model: nn.Module) -> Iterator[None]:
    """A context in which what trains beside adapters has its initial values.

    The trained Parameters are replaced by others on the same device and of the same dtype, and
    come back on exit.
    """
    trained: list[tuple[nn.Module, dict[str, torch.Tensor]]] = []
    for module in unwrap(model).modules():
        tensors = {}
        for name, value in vars(module).get(_INITIAL, {}).items():
            tensors[name] = getattr(module, name)
            _refuse_unknown(name, tensors[name], value)
        trained.append((module, tensors))
    try:
        for module, tensors in trained:
            initial = vars(module).get(_INITIAL, {})
            _set_tensors(
                module, {name: initial[name].to(tensor) for name, tensor in tensors.items()}
            )
        yield
    finally:
        for module, tensors in trained:
            _set_tensors(module, tensors)


def _refuse_unknown(name: str, tensor: torch.Tensor, initial: torch.Tensor) -> None:
    if hasattr(tensor, "full_tensor"):
        raise NotImplementedError(
            f"{name} {tuple(tensor.shape)} trains and is a sharded DTensor: its initial value "
            "cannot replace it"
        )
    if initial.is_meta:
        raise RuntimeError(
            f"{name} {tuple(tensor.shape)} was on the meta device when it began to train: its "
            "initial value is unknown"
        )


def _set_tensors(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    module = _owner(module)
    for name, tensor in tensors.items():
        if name not in module._parameters:
            module._buffers[name] = tensor
        elif isinstance(tensor, nn.Parameter):
            module._parameters[name] = tensor
        else:
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)


@torch.no_grad()
def stop_training(model: nn.Module, restore: bool) -> None:
    """Freeze what trains beside adapters, and forget its initial values.

    restore: write the initial values back first; otherwise the trained values stay.
    """
    modules = list(unwrap(model).modules())
    for module in modules:
        for name, value in vars(module).get(_INITIAL, {}).items():
            tensor = getattr(module, name)
            if restore:
                _refuse_unknown(name, tensor, value)
                tensor.copy_(value)
            tensor.requires_grad_(False)
    for module in modules:
        for attribute in (_INITIAL, _SAVED):
            vars(module).pop(attribute, None)


def _refuse_adapted(saved: dict[str, nn.Module], targets: Targets) -> None:
    for name, module in saved.items():
        inside = set(module.modules())
        target = next((t for t in targets if t in inside or vars(t).get("host") in inside), None)
        if target is not None:
            raise ValueError(
                f"modules_to_save means {name}, and target_modules {targets[target][0]} in it: a "
                "module is one or the other"
            )


def _refuse_quantised(saved: dict[str, nn.Module]) -> None:
    for name, module in saved.items():
        for inner, part in module.named_modules(prefix=name):
            if why := why_not_trained(part):
                raise ValueError(
                    f"modules_to_save means {name}, but {inner} cannot train as a whole: {why}; "
                    "dequantise it first, or give it an adapter"
                )


def _tied_parameters(
    model: nn.Module, saved: dict[str, nn.Module]
) -> dict[nn.Module, dict[str, nn.Parameter]]:
    """Return the Parameters of modules to save that another module holds too."""
    if not saved:
        return {}
    owners = parameter_owners(model)
    tied: dict[nn.Module, dict[str, nn.Parameter]] = {}
    for part in {part for module in saved.values() for part in module.modules()}:
        for name, parameter in part._parameters.items():
            if parameter is None or parameter.is_meta:
                continue
            if len(owners[storage_key(parameter)]) > 1:
                tied.setdefault(part, {})[name] = parameter
    return tied


def _refuse_tied(model: nn.Module, saved: dict[str, nn.Module]) -> None:
    if not saved:
        return
    inside = {part for module in saved.values() for part in module.modules()}
    owners = parameter_owners(model)
    for name, module in saved.items():
        for key, parameter in module.named_parameters():
            holders = {} if parameter.is_meta else owners[storage_key(parameter)]
            if not holders.keys() <= inside:
                names = " and ".join(holders.values())
                raise ValueError(
                    f"modules_to_save: {name}.{key} is one tensor under {names}: save both "
                    "modules, or neither"
                )
