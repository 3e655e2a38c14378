"""Base weights that an adapter's file brought into a model, and the values that they replaced."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lorafast.models import observers
from lorafast.models.module_names import canonical_name, unwrap

# Attribute of a module: by name, the values that those of its tensors had that a file brought.
# They are kept on the CPU, and are plain tensors, so that no state dict holds them.
_REPLACED = "_lorafast_replaced"


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a model's Parameters by canonical name, a shared one under each of its names."""
    return {
        canonical_name(name): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


@torch.no_grad()
def load(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Write a file's base weights into the model, all or none.

    What an earlier file brought, and this one lacks, is restored. The values that the model had
    without a file are kept for restore.
    """
    parameters = parameters_by_name(model)
    replaced = _replaced(model)
    present = {name: parameters[name].detach().clone() for name in (*replaced, *weights)}
    try:
        for name in replaced.keys() - weights.keys():
            parameters[name].copy_(replaced[name])
        kept = {
            name: replaced.get(name, parameters[name].detach()).to("cpu", copy=True)
            for name in weights
        }
        for name, value in weights.items():
            parameters[name].copy_(value)
    except BaseException:
        for name, value in present.items():
            parameters[name].copy_(value)
        raise
    forget(model)
    modules = {
        canonical_name(name): module for name, module in model.named_modules(remove_duplicate=False)
    }
    for name, value in kept.items():
        module, _, tensor = name.rpartition(".")
        vars(modules[module]).setdefault(_REPLACED, {})[tensor] = value


@torch.no_grad()
def restore(model: nn.Module) -> None:
    """Write back the values that the model had without a file, and forget them."""
    for _, module, tensor in from_file(model):
        getattr(module, tensor).copy_(vars(module)[_REPLACED][tensor])
    forget(model)


def refuse_sharded(model: nn.Module) -> None:
    """Raise NotImplementedError if restore could not write what it has to."""
    for name, module, tensor in from_file(model):
        if hasattr(getattr(module, tensor), "full_tensor"):
            raise NotImplementedError(
                f"{name}.{tensor} {tuple(getattr(module, tensor).shape)} came from an adapter's "
                "file and is a sharded DTensor: the base's value cannot replace it"
            )


def forget(model: nn.Module) -> None:
    """Take what files brought for the model's own."""
    for module in model.modules():
        vars(module).pop(_REPLACED, None)


def has_any(module: nn.Module) -> bool:
    """True if a file brought a tensor of the module itself."""
    return _REPLACED in vars(module)


def from_file(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Return what load wrote, each as the module's name, the module and the tensor's name in it."""
    return [
        (canonical_name(name), module, tensor)
        for name, module in unwrap(model).named_modules()
        for tensor in sorted(vars(module).get(_REPLACED, ()))
    ]


def _replaced(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the values that load has replaced, by the tensor's name in the model."""
    return {
        f"{name}.{tensor}": vars(module)[_REPLACED][tensor]
        for name, module, tensor in from_file(model)
    }


# A merged model, and a reference model, have the file's values for good.
observers.on_plain.append(forget)
