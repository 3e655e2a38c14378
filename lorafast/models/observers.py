"""Functions that are told when a model gets adapters, is quantised, and is plain again.

The modules that give an adapted transformers model methods of its own register here: adapt and
merge cannot import those that import them when they are imported themselves.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import nn

# Called with the model that adapt, load_adapter, merge or unload has changed.
Observer = Callable[[nn.Module], None]

# Imported before the first model is adapted, whichever module of lorafast was imported first.
_REGISTERING_MODULES = (
    "lorafast.checkpoint.pretrained",
    "lorafast.models.quantised_flags",
    "lorafast.models.resize",
)

on_adapted: list[Observer] = []
on_quantised: list[Observer] = []
on_plain: list[Observer] = []


def tell_adapted(model: nn.Module) -> None:
    """Tell all that register that the model got adapters."""
    _tell_first(on_adapted, model)


def tell_quantised(model: nn.Module) -> None:
    """Tell all that register that quantize_base is about to quantise layers of the model."""
    _tell_first(on_quantised, model)


def tell_plain(model: nn.Module) -> None:
    """Tell all that registered that the model is plain again."""
    for tell in on_plain:
        tell(model)


def _tell_first(observers: list[Observer], model: nn.Module) -> None:
    for module in _REGISTERING_MODULES:
        importlib.import_module(module)
    for tell in observers:
        tell(model)
