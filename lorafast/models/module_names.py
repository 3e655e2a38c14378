"""Names of modules: through wrappers, and near to a mistyped one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lorafast.nn.adapter_layer import AdapterLayer

# What torch.compile, checkpoint wrappers and FSDP put between a name's parts.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel and torch.compile. TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod
        else:
            return model


def clean(name: str) -> str:
    """The name without its wrappers' parts."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def adapted(
    model: nn.Module, required: bool = True, awake: bool = False
) -> dict[str, AdapterLayer]:
    """Every adapted layer of the model by its (first) clean name. ValueError if there must be one and is none.

    awake: RuntimeError if adapters are disabled, when what trains besides them is away too.
    """
    found = {
        clean(name): module
        for name, module in unwrapped(model).named_modules()
        if isinstance(module, AdapterLayer)
    }
    if required and not found:
        raise ValueError(
            f"model {type(unwrapped(model)).__name__} has no adapted layer: lorafast.adapt(model, ...) first"
        )
    if awake and any(layer.disabled for layer in found.values()):
        raise RuntimeError("the adapters are disabled: leave disable_adapter() first")
    return found


def ends_with(name: str, target: str) -> bool:
    """Whether target is the name, or its end after a dot."""
    return name == target or name.endswith(f".{target}")


def near(target: str, names: Iterable[str]) -> str:
    """What to add to an error about a name that is not there."""
    names = list(names)
    ends = {name.rpartition(".")[2]: None for name in names} | dict.fromkeys(names)
    close = difflib.get_close_matches(
        target, [end for end in ends if not end.isdigit()], n=5, cutoff=0.4
    )
    return f"; near it: {', '.join(close)}" if close else ""


def some(names: Iterable[str], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    names = [name if len(name) <= 200 else f"{name[:200]}…" for name in names]
    return ", ".join(names[:limit]) + (
        f" and {len(names) - limit} more" if len(names) > limit else ""
    )
