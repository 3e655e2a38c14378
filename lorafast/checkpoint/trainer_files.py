"""model.safetensors of a Trainer checkpoint: an adapter as transformers' Trainer resumes it.

Trainer resumes a model that is no PeftModel, and reloads its best one, from model.safetensors in a
checkpoint. Here that file holds the adapter's tensors and what else trains, each tensor once under
its name in the model; what inits took out of weights; and a description of the adapters. Hooks on
the model's load_state_dict check all of it before anything changes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lorafast.checkpoint.keys import own_tensors, trained_tensors
from lorafast.checkpoint.save_load import residual_init
from lorafast.checkpoint.tensor_values import TensorValues
from lorafast.models.module_names import adapter_layers, canonical_name
from lorafast.nn.adapter_layer import AdapterLayer

# The name of the file.
WEIGHTS = "model.safetensors"
# Keys beside the model's tensors: the description of the adapters, and the prefix of what their
# inits took out of weights.
_DESCRIPTION, _INIT_PREFIX = "lorafast.adapters", "lorafast.start."
# Attribute of a model: the handles of its hooks.
_HANDLES = "_lorafast_checkpoint_hooks"


def register_hooks(model: nn.Module) -> None:
    """Let the model's load_state_dict read the file."""
    if _HANDLES not in vars(model):
        vars(model)[_HANDLES] = (
            model.register_load_state_dict_pre_hook(_before_loading),
            model.register_load_state_dict_post_hook(_after_loading),
        )


def remove_hooks(model: nn.Module) -> None:
    """Undo register_hooks."""
    for handle in vars(model).pop(_HANDLES, ()):
        handle.remove()


def write_weights(
    model: nn.Module, folder: Path, state_dict: dict[str, torch.Tensor] | None = None
) -> None:
    """Write the file into a folder.

    Args:
        model: an adapted model.
        folder: where to write.
        state_dict: read values there, instead of in the model. If it is the state dict of a model
            that torch.compile wraps, so are the keys of the file.
    """
    values = TensorValues(model, state_dict)
    tensors = {
        key: values.read(key, tensor) for key, (tensor, _) in _checkpoint_tensors(model).items()
    }
    tensors |= _init_tensors(model)
    tensors = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    description = json.dumps(_describe_adapters(model)).encode()
    tensors[_DESCRIPTION] = torch.frombuffer(bytearray(description), dtype=torch.uint8)
    if any(key.startswith("_orig_mod.") for key in state_dict or ()):
        tensors = {f"_orig_mod.{key}": tensor for key, tensor in tensors.items()}
    temporary = folder / f".{WEIGHTS}.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / WEIGHTS)


def _checkpoint_tensors(model: nn.Module) -> dict[str, tuple[torch.Tensor, list[str]]]:
    """Return what an adapter's file holds and what else trains.

    Each tensor comes once, under its first canonical name, with all its names in the state dict.
    """
    wanted = trained_tensors(model)
    wanted.update(parameter for parameter in model.parameters() if parameter.requires_grad)
    names: dict[torch.Tensor, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor in wanted:
            names.setdefault(tensor, []).append(name)
    return {canonical_name(all_names[0]): (t, all_names) for t, all_names in names.items()}


def _init_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what residual inits took out of weights, by key."""
    return {
        f"{_INIT_PREFIX}{name}.{part}": tensor
        for name, layer in adapter_layers(model).items()
        for part, tensor in (residual_init(layer) or {}).items()
    }


def _describe_adapters(model: nn.Module) -> dict[str, str]:
    """Return what the tensors of an adapter do not tell, by layer name.

    Its dropout is left out: it may differ from run to run.
    """
    return {
        name: (
            f"{type(layer.adapter).__name__}, scaling {float(layer.scaling)}, "
            f"axis {layer.adapter.axis!r}"
        )
        for name, layer in adapter_layers(model).items()
    }


def _before_loading(
    model: nn.Module,
    state_dict: dict[str, torch.Tensor],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Check a checkpoint's model.safetensors, load inits, and put each tensor under all its names.

    Does nothing for any other state dict.
    """
    own = {
        canonical_name(key.removeprefix(prefix)): key
        for key in state_dict
        if key.startswith(prefix)
    }
    if _DESCRIPTION not in own:
        return
    description = json.loads(bytes(state_dict.pop(own.pop(_DESCRIPTION)).tolist()))
    _refuse_other(description, _describe_adapters(model))
    loaded = {name: state_dict.pop(key) for name, key in own.items()}
    tensors = _checkpoint_tensors(model)
    expected = {key: tensor for key, (tensor, _) in tensors.items()} | _init_tensors(model)
    _refuse_other(_describe_tensors(loaded), _describe_tensors(expected))
    for name, layer in adapter_layers(model).items():
        _load_init(name, layer, loaded)
    for key, (_, names) in tensors.items():
        state_dict.update({f"{prefix}{name}": loaded[key] for name in names})
    # For _after_loading: this is a checkpoint, and every base weight is missing from it.
    missing.append(_marker(model))


def _load_init(name: str, layer: AdapterLayer, loaded: dict[str, torch.Tensor]) -> None:
    """Give a layer the init of the checkpoint, unless its own is the same.

    If it is the same, the weight already is the run's, bit for bit.
    """
    present = residual_init(layer) or {}
    initial = {part: loaded[f"{_INIT_PREFIX}{name}.{part}"] for part in present}
    if not all(torch.equal(initial[part], tensor) for part, tensor in present.items()):
        layer.take({part: loaded[f"{name}.{part}"] for part in own_tensors(layer)}, initial)


def _after_loading(model: nn.Module, incompatible_keys: Any) -> None:
    """Drop the missing keys of a checkpoint: its base weights, which it never holds."""
    if _marker(model) in incompatible_keys.missing_keys:
        incompatible_keys.missing_keys.clear()


def _marker(model: nn.Module) -> str:
    """Return the missing key of a checkpoint of this model, and of none inside it."""
    return f"{_DESCRIPTION} {id(model)}"


def _describe_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {
        key: f"a {str(tensor.dtype).removeprefix('torch.')} tensor {tuple(tensor.shape)}"
        for key, tensor in tensors.items()
    }


def _refuse_other(in_checkpoint: dict[str, str], in_model: dict[str, str]) -> None:
    """Raise ValueError naming the first difference between a checkpoint's and a model's adapter."""
    differing = [
        name
        for name in in_checkpoint.keys() | in_model.keys()
        if in_checkpoint.get(name) != in_model.get(name)
    ]
    if differing:
        name = min(differing)
        raise ValueError(
            f"the checkpoint is of another adapter than the model's: {name} is "
            f"{in_checkpoint.get(name, 'absent')} there and {in_model.get(name, 'absent')} in "
            "the model"
        )
