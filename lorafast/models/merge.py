"""lorafast.merge and lorafast.unload: from an adapted model back to a plain one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from lorafast.models import adapt_record, extra_trainables, file_weights, fused_mlp, observers
from lorafast.models.adapt import replace_module, weight_matrix
from lorafast.models.module_names import names_by_layer, require_module
from lorafast.models.target_modules import parameter_owners
from lorafast.nn.adapter_layer import AdapterLayer
from lorafast.runtime.torch_internals import storage_key

# Each adapted layer, with all its names in the model.
LayerNames = dict[AdapterLayer, list[str]]


@torch.no_grad()
def merge(model: nn.Module, untie: bool = False) -> nn.Module:
    """Add every adapter to its weight, in place, put plain modules back, and return the model.

    All of the result is frozen. Its weights are those of the adapted model, each rounded once.
    Modules and biases that trained keep their trained values. All checks run before the first
    change; running out of memory midway costs one rounding of the weights done so far.

    Args:
        model: a model that lorafast.adapt adapted.
        untie: give an adapted weight that is tied to another (an output head to its embedding) its
            own tensor first. Set the model's own mark of the tie (config.tie_word_embeddings)
            before saving it.

    Returns:
        The same model object, with plain nn.Linear, Conv1D and nn.Embedding modules.

    Raises:
        ValueError: the model has no adapted layer, an adapted weight is tied and untie is False, a
            merged weight would not be finite, or a layer has a lora_bias and no bias.
        RuntimeError: the adapters are disabled, a weight is on the meta device, or a weight or bias
            is computed from other tensors (a parametrization, pruning, weight norm).
        TypeError: model is no module, or is itself an adapted layer (use its merge() or plain()).

    Example:
        import torch, lorafast

        model = lorafast.adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)), lorafast.LoRA(r=2))
        model = lorafast.merge(model)
        assert type(model[0]) is torch.nn.Linear
    """
    layers = collect_layers(model)
    for layer in layers:
        layer.refuse_computed_weight("merge()")
    tied = _tied_weights(model, layers)
    if tied and not untie:
        names = next(iter(tied.values()))
        raise ValueError(
            f"merging would change {names}, which are one tensor: merge(model, untie=True) gives "
            "each its own"
        )
    for layer in layers:
        if not layer.merged:
            layer.merge_result(keep=True)  # raises what merge would raise
    done: list[tuple[AdapterLayer, torch.Tensor]] = []
    try:
        for layer in layers:
            if not layer.merged:
                done.append((layer, layer.weight))
                if storage_key(layer.weight) in tied:
                    layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
                layer.merge(keep=not layer.is_invertible())
    except BaseException:
        for layer, weight in done:
            layer.unmerge()
            layer.weight = weight
        raise
    extra_trainables.stop_training(model, restore=False)
    _put_plain_modules(model, layers)
    fused_mlp.ungroup(model)
    return model


# PEFT's name of merge.
merge_and_unload = merge


@torch.no_grad()
def unload(model: nn.Module) -> nn.Module:
    """Drop every adapter, in place, put plain modules back, and return the base model, frozen.

    A weight that an init changed is restored to within one rounding; modules and biases that
    trained get their initial values back, and so does an embedding or a head that load_adapter took
    from a file. A merged layer is unmerged first, as by unmerge(). All checks run before the first
    change.

    Args:
        model: a model that lorafast.adapt adapted.

    Returns:
        The same model object, with plain nn.Linear, Conv1D and nn.Embedding modules.

    Raises:
        ValueError: the model has no adapted layer.
        RuntimeError: the adapters are disabled, initial values are not known, or a weight or bias
            is computed from other tensors.
        TypeError: model is no module, or is itself an adapted layer (use its plain()).

    Example:
        import torch, lorafast

        model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        weight = model[0].weight.clone()
        model = lorafast.unload(lorafast.adapt(model, lorafast.LoRA(r=2)))
        assert torch.equal(model[0].weight, weight)
    """
    layers = collect_layers(model)
    for layer in layers:
        layer.refuse_computed_weight("unload()")
        layer.start_factors()  # raises if they are not known
    with extra_trainables.initial_values(model):  # raises if they are not known
        pass
    file_weights.refuse_sharded(model)
    for layer in layers:
        layer.unmerge()
        layer.restore_base()
    file_weights.restore(model)
    extra_trainables.stop_training(model, restore=True)
    _put_plain_modules(model, layers)
    fused_mlp.ungroup(model)
    return model


def collect_layers(model: nn.Module) -> LayerNames:
    """Return the adapted layers with their names. Raises what merge raises of a model."""
    require_module(model)
    if isinstance(model, AdapterLayer):
        raise TypeError(
            f"model is itself a {type(model).__name__} and cannot be replaced in place: "
            "model.merge(), or model.plain()"
        )
    layers = names_by_layer(model)
    if not layers:
        raise ValueError(f"model {type(model).__name__} has no adapted layer")
    if any(layer.disabled for layer in layers):
        raise RuntimeError("the adapters are disabled: leave disable_adapter() first")
    return layers


def _tied_weights(model: nn.Module, layers: LayerNames) -> dict[int, str]:
    """Return the storages of adapted weights that another module holds too, with all holders."""
    owners = parameter_owners(model)
    keys = {storage_key(layer.weight) for layer in layers if not layer.weight.is_meta}
    return {key: " and ".join(owners[key].values()) for key in keys if len(owners[key]) > 1}


def _put_plain_modules(model: nn.Module, layers: LayerNames) -> None:
    for layer, names in layers.items():
        replace_module(model, names, layer.plain())
    adapt_record.forget(model)
    observers.tell_plain(model)


@contextlib.contextmanager
def merged_copies(model: nn.Module) -> Iterator[bool]:
    """A context in which plain modules with merged weights replace the adapted layers.

    The weights are copies on the CPU, so that the layers come back on exit as they were. The value
    of the context is True if an adapted weight is tied to another, whose copies then differ.
    Raises what merge raises.
    """
    layers = collect_layers(model)
    tied = bool(_tied_weights(model, layers))
    copies = {layer: _merged_copy(layer) for layer in layers}
    # The weights of experts are in the module that keeps its place.
    kept = {layer: (layer.weight, layer.bias) for layer in layers}
    try:
        for layer, names in layers.items():
            replace_module(model, names, copies[layer])
        yield tied
    finally:
        for layer, names in layers.items():
            replace_module(model, names, layer)
            if layer.weight is not kept[layer][0]:
                layer.weight = kept[layer][0]
            if layer.bias is not kept[layer][1]:
                layer.bias = kept[layer][1]


@torch.no_grad()
def _merged_copy(layer: AdapterLayer) -> nn.Module:
    """Return a plain module whose weight, and bias if need be, are merged copies."""
    module = layer.plain()
    if layer.merged:
        return module
    result = layer.merge_result(keep=True)
    empty = torch.empty_like(layer.weight, device="cpu")
    module.weight = nn.Parameter(empty, requires_grad=False)
    weight_matrix(module).copy_(result.weight)
    if result.bias is not None:
        module.bias = nn.Parameter(result.bias.to("cpu", layer.bias.dtype), requires_grad=False)
    return module
