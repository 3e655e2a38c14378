"""lorafast.merge and lorafast.unload: from an adapted model back to a plain one."""

from __future__ import annotations

import torch
from torch import nn

from lorafast.models import extra_trainables
from lorafast.models.adapt import put
from lorafast.models.target_modules import owners, storage
from lorafast.nn.adapter_layer import AdapterLayer


@torch.no_grad()
def merge(model: nn.Module, untie: bool = False) -> nn.Module:
    """Fold every adapter into its weight, in place, and put plain modules back. Returns the model, all of it frozen.

    Modules and biases that trained stay as they trained. The result is the adapted model's to within a rounding of each weight.
    untie=True gives an adapted weight that is tied to another (an output head to its embedding) a tensor of its own first; set the
    model's own mark of it (config.tie_word_embeddings) before saving. Raises, and changes nothing, if a weight is tied and not to
    be untied, not loaded, or not finite with its adapter in; memory that runs out midway costs a rounding.
    """
    layers = _layers(model)
    tied = _tied(model, layers)
    if tied and not untie:
        told = next(iter(tied.values()))
        raise ValueError(
            f"merging would change {told}, which are one tensor: merge(model, untie=True) gives each its own"
        )
    for layer in layers:
        if not layer.merged:
            layer.folded_in(keep=True)
    done: list[tuple[AdapterLayer, nn.Parameter]] = []
    try:
        for layer in layers:
            if not layer.merged:
                done.append((layer, layer.weight))
                if storage(layer.weight) in tied:
                    layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
                layer.merge(keep=not layer.invertible())
    except BaseException:
        for layer, weight in done:
            layer.unmerge()
            layer.weight = weight
        raise
    extra_trainables.forget(model, restore=False)
    _put_plain_back(model, layers)
    return model


# PEFT's word for it.
merge_and_unload = merge


@torch.no_grad()
def unload(model: nn.Module) -> nn.Module:
    """Drop every adapter, in place, and put plain modules back. Returns the base model, all of it frozen.

    What an init took out of a weight is given back to within one rounding; modules and biases that trained get their first values
    back. Raises, and changes nothing, if those are not known. A merged layer is unmerged first, as unmerge() does it.
    """
    layers = _layers(model)
    for layer in layers:
        layer.start_factors()
    with extra_trainables.first_values(model):
        pass
    for layer in layers:
        layer.unmerge()
        layer.restore_base()
    extra_trainables.forget(model, restore=True)
    _put_plain_back(model, layers)
    return model


def _layers(model: nn.Module) -> dict[AdapterLayer, list[str]]:
    """Every adapted layer, with the names of its places."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, AdapterLayer):
        raise TypeError(
            f"model is itself a {type(model).__name__} and cannot be replaced in place: model.merge(), or model.plain()"
        )
    layers: dict[AdapterLayer, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, AdapterLayer):
            layers.setdefault(module, []).append(name)
    if not layers:
        raise ValueError(f"model {type(model).__name__} has no adapted layer")
    if any(layer.disabled for layer in layers):
        raise RuntimeError("the adapters are disabled: leave disable_adapter() first")
    return layers


def _tied(model: nn.Module, layers: dict[AdapterLayer, list[str]]) -> dict[int, str]:
    """The storages of adapted weights that somebody else holds too, and who."""
    held = owners(model)
    places = {storage(layer.weight) for layer in layers if not layer.weight.is_meta}
    return {place: " and ".join(held[place].values()) for place in places if len(held[place]) > 1}


def _put_plain_back(model: nn.Module, layers: dict[AdapterLayer, list[str]]) -> None:
    for layer, names in layers.items():
        put(model, names, layer.plain())
