"""Methods that an adapted transformers model has instead of those of its class.

They are attributes of the instance, so that other models of the class keep theirs; and partials,
because copy.deepcopy and pickle then give a copy that calls them on itself.
"""

from __future__ import annotations

import contextlib
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


def drop_methods_of(original: nn.Module, copied: nn.Module) -> None:
    """Delete the methods that a copy of a model took over and that call the original.

    Trainers replace `forward` by a function around the bound method that it was (TRL's fused head).
    copy.deepcopy copies no function: in a copy it runs the original. The class's method is left.
    """
    originals = {id(module) for module in original.modules()}
    for module in copied.modules():
        for name, value in list(vars(module).items()):
            if hasattr(type(module), name) and _reaches(value, originals, set()):
                delattr(module, name)


def _reaches(value: Any, modules: set[int], seen: set[int]) -> bool:
    """True if a call of the value may call one of the modules, given by id."""
    if id(value) in modules:
        return True
    if id(value) in seen:
        return False
    seen.add(id(value))
    parts = [getattr(value, name, None) for name in ("__self__", "__func__", "__wrapped__")]
    if isinstance(value, functools.partial):
        parts += [value.func, *value.args, *value.keywords.values()]
    for cell in getattr(value, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # the cell is empty
            parts.append(cell.cell_contents)
    return any(callable(part) and _reaches(part, modules, seen) for part in parts)
