"""Methods that an adapted transformers model has instead of those of its class.

They are attributes of the instance, so that other models of the class keep theirs; and partials,
because copy.deepcopy and pickle then give a copy that calls them on itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from lorafast.models.module_names import adapter_layers, is_pretrained_model


def adapted_transformers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the transformers models in a model, itself included, that have adapters."""
    for module in model.modules():
        if is_pretrained_model(module) and adapter_layers(module, required=False):
            yield module


def replace_method(model: nn.Module, name: str, method: Callable[..., Any]) -> None:
    """Let model.name(...) call method(model, ...). One that someone has put there stays."""
    vars(model).setdefault(name, functools.partial(method, model))


def restore_method(model: nn.Module, name: str, method: Callable[..., Any]) -> None:
    """Undo replace_method with the same arguments."""
    present = vars(model).get(name)
    if isinstance(present, functools.partial) and present.func is method:
        del vars(model)[name]
