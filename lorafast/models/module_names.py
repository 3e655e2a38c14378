"""Module names: without the parts that wrappers add, and as they appear in error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lorafast.nn.adapter_layer import AdapterLayer
from lorafast.nn.expert_parameter import CONTAINER

# Name parts that torch.compile, checkpoint wrappers and FSDP add, and that of the child with
# experts' adapters: an adapter there has the name of its Parameter.
_WRAPPER_PARTS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", CONTAINER)
# The longest name that an error message shows in full.
_MAX_SHOWN_LENGTH = 200


def require_module(model: object) -> None:
    """Raise TypeError if model is not a torch.nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DDP, DataParallel and torch.compile. TypeError if it is no module."""
    require_module(model)
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]
        else:
            return model


def is_pretrained_model(module: nn.Module) -> bool:
    """True if the module is a transformers PreTrainedModel. Does not import transformers."""
    return any(
        (base.__module__, base.__name__) == ("transformers.modeling_utils", "PreTrainedModel")
        for base in type(module).__mro__
    )


def canonical_name(name: str) -> str:
    """Return the module name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def adapter_layers(
    model: nn.Module, required: bool = True, require_enabled: bool = False
) -> dict[str, AdapterLayer]:
    """Return every adapted layer of the model by its first canonical name.

    Args:
        required: raise ValueError if there is none.
        require_enabled: raise RuntimeError inside disable_adapter, where modules and biases that
            train hold their initial values.
    """
    inner = unwrap(model)
    layers = {
        canonical_name(name): module
        for name, module in inner.named_modules()
        if isinstance(module, AdapterLayer)
    }
    if required and not layers:
        raise ValueError(
            f"model {type(inner).__name__} has no adapted layer: lorafast.adapt(model, ...) first"
        )
    if require_enabled and any(layer.disabled for layer in layers.values()):
        raise RuntimeError("the adapters are disabled: leave disable_adapter() first")
    return layers


def names_by_layer(model: nn.Module) -> dict[AdapterLayer, list[str]]:
    """Return every adapted layer of the model with all its names there."""
    layers: dict[AdapterLayer, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, AdapterLayer):
            layers.setdefault(module, []).append(name)
    return layers


def ends_with(name: str, target: str) -> bool:
    """True if target is the whole name or its end after a dot."""
    return name == target or name.endswith(f".{target}")


def endings(name: str) -> Iterator[str]:
    """Yield the name, and each of its ends after a dot, longest first."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def similar_names(target: str, names: Iterable[str]) -> str:
    """Return the end of an error message about an unknown name: the similar names that exist."""
    names = list(names)
    candidates = {name.rpartition(".")[2]: None for name in names} | dict.fromkeys(names)
    words = [candidate for candidate in candidates if not candidate.isdigit()]
    similar = difflib.get_close_matches(target, words, n=5, cutoff=0.4)
    return f"; near it: {', '.join(similar)}" if similar else ""


def format_names(names: Iterable[str], limit: int = 5) -> str:
    """Return the first names, and how many more there are, for an error message."""
    names = [
        name if len(name) <= _MAX_SHOWN_LENGTH else f"{name[:_MAX_SHOWN_LENGTH]}…" for name in names
    ]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
