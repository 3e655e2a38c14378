"""An adapter's tensors under PEFT's keys, and the keys of a file by what they mean."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from lorafast.checkpoint import expert_files
from lorafast.checkpoint.tensor_values import TensorValues
from lorafast.methods.adalora import AdaLoRA
from lorafast.methods.vera import VeRA
from lorafast.models import adalora_format, extra_trainables, file_weights
from lorafast.models.module_names import adapter_layers, canonical_name, unwrap
from lorafast.nn.adapter_layer import NAMES, AdapterLayer
from lorafast.nn.embedding import Embedding

PREFIX = "base_model.model."
# PEFT's name of each tensor of a layer's adapter, after the layer's name.
_LINEAR = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_bias": "lora_B.bias",
    "lora_magnitude": "lora_magnitude_vector",
    "lora_core": "lora_core",
    "lora_out_scale": "lora_out_scale",
}
_EMBEDDING = _LINEAR | {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
_VERA = {"lora_core": "vera_lambda_d", "lora_out_scale": "vera_lambda_b"}
# Keys of the two projections that all layers of a VeRA model take slices of.
VERA_SHARED = {"lora_A": "base_model.vera_A", "lora_B": "base_model.vera_B"}
# Our name of each of PEFT's names.
_OWN_NAMES = {
    peft_name: name
    for table in (_LINEAR, _EMBEDDING, _VERA, adalora_format.KEY_NAMES)
    for name, peft_name in table.items()
}
_OWN_NAMES["lora_magnitude_vector.weight"] = "lora_magnitude"  # before PEFT 0.11
# With bias="all", PEFT writes a bias of a module to save again under keys with these parts.
_DUPLICATE_PARTS = (".original_module.", ".modules_to_save.default.", ".modules_to_save.")


class KeyGroups(NamedTuple):
    """The keys of an adapter file by what they mean.

    layers: {layer name: {adapter tensor name: key}}. shared: {adapter tensor name: key} of VeRA's
    projections. extra: {tensor name in the model: key} of modules to save and biases. bases: {layer
    name: key} of the layer's own base weight.
    """

    layers: dict[str, dict[str, str]]
    shared: dict[str, str]
    extra: dict[str, str]
    bases: dict[str, str]


def adapter_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors under PEFT's keys, modules to save and trained biases included.

    Where an init changed the weight (LaMDA residual, PiSSA, LoRA-GA) these are the factors for the
    changed weight. save_adapter writes factors for the original one.

    Args:
        model: a model that lorafast.adapt adapted. If its parameters are sharded (DTensors), every
            rank must call.

    Returns:
        {key: tensor}. Tensors are detached, stay on their device and share memory with the model;
        sharded ones are gathered.

    Raises:
        ValueError: the model has no adapted layer.
        RuntimeError: the adapters are disabled.

    Example:
        import torch, lorafast

        model = lorafast.adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)), lorafast.LoRA(r=2))
        tensors = lorafast.adapter_state_dict(model)
        assert tensors["base_model.model.0.lora_A.weight"].shape == (2, 8)
    """
    return state_dict_of(model, TensorValues(model))


def state_dict_of(model: nn.Module, values: TensorValues) -> dict[str, torch.Tensor]:
    """Return what adapter_state_dict returns, with tensors read from values."""
    layers = adapter_layers(model, require_enabled=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        tensors |= layer_tensors(name, layer, values.of_layer(name, own_tensors(layer)))
    if isinstance(next(iter(layers.values())).adapter, VeRA):
        tensors |= _shared_projections(layers, values)
    return tensors | extra_tensors(model, values)


def own_tensors(layer: AdapterLayer) -> dict[str, nn.Parameter]:
    """Return the Parameters of a layer's adapter by name."""
    parameters = {name: getattr(layer, name) for name in NAMES}
    return {name: parameter for name, parameter in parameters.items() if parameter is not None}


def trained_tensors(model: nn.Module) -> set[torch.Tensor]:
    """Return the model's tensors of adapters, of modules to save and of trained biases."""
    tensors: set[torch.Tensor] = set()
    for layer in adapter_layers(model).values():
        tensors.update(own_tensors(layer).values())
    for module in extra_trainables.saved_modules(model).values():
        tensors.update(module.state_dict(keep_vars=True).values())
    for module in extra_trainables.trained_biases(model).values():
        tensors.add(module.bias)
    return tensors


def left_out(model: nn.Module) -> list[str]:
    """Return the canonical names of the Parameters that train and that no key of a file covers."""
    covered = trained_tensors(model)
    covered.update(getattr(module, key) for _, module, key in file_weights.from_file(model))
    return [
        canonical_name(name)
        for name, parameter in unwrap(model).named_parameters()
        if parameter.requires_grad and parameter not in covered
    ]


def layer_tensors(
    name: str, layer: AdapterLayer, values: dict[str, torch.Tensor], plain: bool = False
) -> dict[str, torch.Tensor]:
    """Return one layer's adapter tensors under PEFT's keys, without those that layers share.

    Args:
        name: the layer's name.
        layer: the layer.
        values: its tensors, by the names of the layer's Parameters.
        plain: write them as a LoRA, whatever the method.
    """
    table = _EMBEDDING if isinstance(layer, Embedding) else _LINEAR
    if isinstance(layer.adapter, VeRA) and not plain:
        table = _VERA
    elif isinstance(layer.adapter, AdaLoRA) and not plain:
        table = adalora_format.KEY_NAMES
        values = {key: adalora_format.to_file(key, tensor) for key, tensor in values.items()}
    name = expert_files.file_name(name, layer)
    return {
        f"{PREFIX}{name}.{table[key]}": expert_files.to_file(key, tensor)
        for key, tensor in values.items()
        if key in table
    }


def extra_tensors(model: nn.Module, values: TensorValues) -> dict[str, torch.Tensor]:
    """Return the tensors of modules to save, trained biases and base weights that came from a file.

    Their keys are PEFT's.
    """
    tensors = {}
    for name, module in extra_trainables.saved_modules(model).items():
        for key, tensor in module.state_dict().items():
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(
                    f"{name}.{key} of a module to save is a {type(tensor).__name__}; only tensors "
                    "can be saved"
                )
            tensors[f"{PREFIX}{name}.{key}"] = values.read(f"{name}.{key}", tensor)
    for name, module in extra_trainables.trained_biases(model).items():
        base = ".base_layer" if isinstance(module, AdapterLayer) else ""
        tensors[f"{PREFIX}{name}{base}.bias"] = values.read(f"{name}.bias", module.bias)
    for name, module, key in file_weights.from_file(model):
        base = ".base_layer" if isinstance(module, AdapterLayer) else ""
        tensors[f"{PREFIX}{name}{base}.{key}"] = values.read(f"{name}.{key}", getattr(module, key))
    return tensors


def group_keys(keys: Iterable[str]) -> KeyGroups:
    """Return a file's keys by what they mean. They may lack PEFT's prefix.

    ValueError if two keys mean the same tensor.
    """
    keys = set(keys)
    groups = KeyGroups({}, {}, {}, {})
    shared = {key: name for name, key in VERA_SHARED.items()}
    for key in sorted(keys):
        # A model that was saved inside torch.compile or FSDP has their parts in its names.
        canonical = canonical_name(key)
        name = canonical.removeprefix(PREFIX)
        peft_name = next((end for end in _OWN_NAMES if name.endswith(f".{end}")), None)
        if canonical in shared:
            groups.shared[shared[canonical]] = key
        elif any(part in key and key.replace(part, ".") in keys for part in _DUPLICATE_PARTS):
            continue
        elif peft_name is not None:
            layer = groups.layers.setdefault(name.removesuffix(f".{peft_name}"), {})
            own_name = _OWN_NAMES[peft_name]
            if own_name in layer:
                raise ValueError(f"{layer[own_name]} and {key} are the same part of one layer")
            layer[own_name] = key
        elif name.endswith(".base_layer.weight"):
            groups.bases[name.removesuffix(".base_layer.weight")] = key
        elif name.endswith(".base_layer.bias"):
            groups.extra[name.removesuffix(".base_layer.bias") + ".bias"] = key
        elif name in groups.extra:
            raise ValueError(f"{groups.extra[name]} and {key} are the same tensor of the model")
        else:
            groups.extra[name] = key
    return groups


def _shared_projections(
    layers: dict[str, AdapterLayer], values: TensorValues
) -> dict[str, torch.Tensor]:
    """Return VeRA's two projections: the largest A and the largest B.

    Every layer holds a slice of them, and adapt makes them as large as the largest layer needs.
    """
    widest = max(layers, key=lambda name: layers[name].lora_A.shape[1])
    tallest = max(layers, key=lambda name: layers[name].lora_B.shape[0])
    return {
        VERA_SHARED["lora_A"]: values.read(f"{widest}.lora_A", layers[widest].lora_A),
        VERA_SHARED["lora_B"]: values.read(f"{tallest}.lora_B", layers[tallest].lora_B),
    }
