"""An adapter's tensors under PEFT's keys, and back."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
from torch import nn

from lorafast.methods.adalora import AdaLoRA
from lorafast.methods.vera import VeRA
from lorafast.models import adalora_format, extra_trainables
from lorafast.models.module_names import adapted
from lorafast.nn.adapter_layer import NAMES, AdapterLayer
from lorafast.nn.embedding import Embedding

PREFIX = "base_model.model."
# What PEFT calls each part of a layer's adapter, after the layer's name.
_LINEAR = {
    "lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_bias": "lora_B.bias",
    "lora_magnitude": "lora_magnitude_vector", "lora_core": "lora_core", "lora_out_scale": "lora_out_scale",
}  # fmt: skip
_EMBEDDING = _LINEAR | {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
_VERA = {"lora_core": "vera_lambda_d", "lora_out_scale": "vera_lambda_b"}
# What all layers of a VeRA model cut their factors from.
VERA_SHARED = {"lora_A": "base_model.vera_A", "lora_B": "base_model.vera_B"}
_PARTS = {
    word: part
    for words in (_LINEAR, _EMBEDDING, _VERA, adalora_format.WORDS)
    for part, word in words.items()
}
_PARTS["lora_magnitude_vector.weight"] = "lora_magnitude"  # before PEFT 0.11
# PEFT with bias="all" writes a bias of a module to save three times.
_AGAIN = (".original_module.", ".modules_to_save.default.", ".modules_to_save.")


class Sorted(NamedTuple):
    """Keys of a file by what they are: layers {name: {part: key}}; shared {part: key}; saved and biases {name of a tensor: key};
    bases {name of a layer: key of its own base weight}.
    """

    layers: dict[str, dict[str, str]]
    shared: dict[str, str]
    rest: dict[str, str]
    bases: dict[str, str]


def adapter_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the keys PEFT saves them by: factors, and what trains besides (modules_to_save, biases).

    Detached, on their device, sharing memory with the model; gathered if sharded, which every rank must then call. Where a start
    changed the weight (LaMDA residual, PiSSA, LoRA-GA) these are the factors beside that weight: save_adapter writes what fits the
    untouched one. ValueError if the model has no adapted layer.
    """
    layers = adapted(model, awake=True)
    found: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        found |= of_layer(
            name,
            layer,
            {part: held for part in NAMES if (held := getattr(layer, part)) is not None},
        )
    if isinstance(next(iter(layers.values())).adapter, VeRA):
        found |= _projections(layers.values())
    found |= of_rest(model)
    return {key: whole(tensor) for key, tensor in found.items()}


def of_layer(
    name: str, layer: AdapterLayer, values: dict[str, torch.Tensor], plain: bool = False
) -> dict[str, torch.Tensor]:
    """One layer's parts under PEFT's keys; those it shares with others are left out. plain: as a LoRA, whatever its method."""
    words = _EMBEDDING if isinstance(layer, Embedding) else _LINEAR
    if isinstance(layer.adapter, VeRA) and not plain:
        words = _VERA
    elif isinstance(layer.adapter, AdaLoRA) and not plain:
        words, values = (
            adalora_format.WORDS,
            {part: adalora_format.filed(part, tensor) for part, tensor in values.items()},
        )
    return {
        f"{PREFIX}{name}.{words[part]}": tensor for part, tensor in values.items() if part in words
    }


def of_rest(model: nn.Module) -> dict[str, torch.Tensor]:
    """What trains besides adapters, under PEFT's keys."""
    found = {}
    for name, module in extra_trainables.saved(model).items():
        for key, tensor in module.state_dict().items():
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(
                    f"{name}.{key} of a module to save is a {type(tensor).__name__}; only tensors can be saved"
                )
            found[f"{PREFIX}{name}.{key}"] = tensor
    for name, module in extra_trainables.biases(model).items():
        found[f"{PREFIX}{name}{'.base_layer' if isinstance(module, AdapterLayer) else ''}.bias"] = (
            module.bias
        )
    return found


def sorted_keys(keys: Iterable[str]) -> Sorted:
    """A file's keys by what they are, with or without PEFT's prefix."""
    keys, found = set(keys), Sorted({}, {}, {}, {})
    shared = {key: part for part, key in VERA_SHARED.items()}
    for key in sorted(keys):
        if key in shared:
            found.shared[shared[key]] = key
            continue
        name = key.removeprefix(PREFIX)
        if any(again in key and key.replace(again, ".") in keys for again in _AGAIN):
            continue
        word = next((word for word in _PARTS if name.endswith(f".{word}")), None)
        if word is not None:
            parts = found.layers.setdefault(name.removesuffix(f".{word}"), {})
            if _PARTS[word] in parts:
                raise ValueError(f"{parts[_PARTS[word]]} and {key} are the same part of one layer")
            parts[_PARTS[word]] = key
        elif name.endswith(".base_layer.weight"):
            found.bases[name.removesuffix(".base_layer.weight")] = key
        else:
            found.rest[
                name.removesuffix(".base_layer.bias") + ".bias"
                if name.endswith(".base_layer.bias")
                else name
            ] = key
    return found


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without its graph, gathered if it is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _projections(layers: Collection[AdapterLayer]) -> dict[str, torch.Tensor]:
    """The pair that all layers cut their A and B from: the largest of each, which is whole where adapt made them."""
    largest = {
        "lora_A": max((layer.lora_A for layer in layers), key=lambda A: A.shape[1]),
        "lora_B": max((layer.lora_B for layer in layers), key=lambda B: B.shape[0]),
    }
    return {VERA_SHARED[part]: tensor for part, tensor in largest.items()}
