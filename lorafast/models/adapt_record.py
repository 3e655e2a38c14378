"""The names of the layers that adapt adapted, kept on the model, and which of them are lost since.

Tools that replace every nn.Linear (pruning, quantising) replace adapted layers too, with their
adapters.
"""

from __future__ import annotations

import warnings

from torch import nn

from lorafast.models.module_names import adapter_layers, canonical_name, format_names, unwrap
from lorafast.nn.adapter_layer import AdapterLayer

# Attribute of an adapted model: the names of its adapted layers in it.
_ATTRIBUTE = "_lorafast_layers"


def remember(model: nn.Module) -> None:
    """Keep the names of the model's adapted layers on it."""
    model.__dict__[_ATTRIBUTE] = tuple(adapter_layers(model))


def forget(model: nn.Module) -> None:
    """Drop the names from the model and from its submodules."""
    for module in model.modules():
        vars(module).pop(_ATTRIBUTE, None)


def lost_layers(model: nn.Module) -> dict[str, str]:
    """Return what stands in the place of each adapted layer that is gone, by the layer's name."""
    lost: dict[str, str] = {}
    for parent, module in unwrap(model).named_modules():
        names = vars(module).get(_ATTRIBUTE)
        if not names:
            continue
        # Of a wrapper and the module in it, which have one name, the module comes last.
        parts = module.named_modules(remove_duplicate=False)
        present = {canonical_name(name): part for name, part in parts}
        for name in names:
            if not _holds_adapter(present.get(name)):
                lost[canonical_name(f"{parent}.{name}".lstrip("."))] = _kind(present.get(name))
    return lost


def _holds_adapter(module: nn.Module | None) -> bool:
    parts = () if module is None else module.modules()
    return any(isinstance(part, AdapterLayer) for part in parts)


def _kind(module: nn.Module | None) -> str:
    return "nothing" if module is None else f"a {type(module).__module__}.{type(module).__name__}"


def warn_about_lost(model: nn.Module) -> None:
    """Warn about adapted layers that are gone, which an adapter file then lacks."""
    if lost := lost_layers(model):
        names = format_names(f"{name} ({kind} is there now)" for name, kind in lost.items())
        warnings.warn(
            f"adapted layers have been replaced, and their adapters are not in the file: {names}",
            stacklevel=3,
        )
