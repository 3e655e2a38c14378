"""The triplets of an AdaLoRA layer: their tensors, their removal, and their saved averages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lorafast.engine.precision import accumulator
from lorafast.nn.linear import AdapterLinearBase

# One row of A, one entry of E (the core) and one column of B make a triplet.
TRIPLET_TENSORS = ("lora_A", "lora_core", "lora_B")

# The averages of one layer, by the names in TRIPLET_TENSORS.
Averages = dict[str, torch.Tensor]


def core_of(layer: AdapterLinearBase) -> nn.Parameter:
    """Return E, the core of an AdaLoRA layer."""
    assert layer.core is not None
    return layer.core


def select_triplets(
    layer: AdapterLinearBase, indices: torch.Tensor, optimizer: torch.optim.Optimizer | None
) -> None:
    """Reduce a layer to the triplets of these indices, and an optimizer's state of them too."""
    for name in TRIPLET_TENSORS:
        old, axis = getattr(layer, name), 1 if name == "lora_B" else 0
        new = nn.Parameter(
            old.detach().index_select(axis, indices), requires_grad=old.requires_grad
        )
        setattr(layer, name, new)
        if optimizer is None:
            continue
        for group in optimizer.param_groups:
            group["params"] = [
                new if parameter is old else parameter for parameter in group["params"]
            ]
        optimizer.state[new] = {
            key: value.index_select(axis, indices)
            if isinstance(value, torch.Tensor) and value.shape == old.shape
            else value
            for key, value in optimizer.state.pop(old, {}).items()
        }
    layer.adapter = replace(layer.adapter, r=len(indices))


def load_layer(
    name: str, layer: AdapterLinearBase, state: dict[str, Any], step: int, final_step: int
) -> tuple[Averages, Averages, torch.Tensor | None]:
    """Return the averages and flags of one layer from a state, on the devices of its tensors.

    Raises:
        ValueError: they cannot be those of this layer after this step.
    """
    if step == 0:
        return {}, {}, None
    sensitivity, uncertainty = (
        _load_averages(name, layer, state, kind, step, final_step)
        for kind in ("sensitivity", "uncertainty")
    )
    kept = state["kept"]
    if kept is None and step >= final_step:
        raise ValueError(
            f"state: {name} has not what it keeps, which is fixed after step {final_step}, "
            f"and this is step {step}"
        )
    if kept is not None:
        core = core_of(layer)
        _check_shape(f"{name}: kept", kept, core)
        kept = kept.to(core.device, torch.bool, copy=True)
    return sensitivity, uncertainty, kept


def _load_averages(
    name: str,
    layer: AdapterLinearBase,
    state: dict[str, Any],
    kind: str,
    step: int,
    final_step: int,
) -> Averages:
    saved = state[kind]
    if saved.keys() != (set(TRIPLET_TENSORS) if step < final_step else set()):
        raise ValueError(
            f"state: {name} has the {kind} of {sorted(saved) or 'nothing'} "
            f"after step {step} of {final_step}"
        )
    averages = {}
    for key, average in saved.items():
        tensor = getattr(layer, key)
        _check_shape(f"{name}: {kind} of {key}", average, tensor)
        dtype = accumulator(tensor.dtype)
        averages[key] = average.detach().to(tensor.device, dtype, copy=True)
    return averages


def _check_shape(name: str, value: torch.Tensor, tensor: torch.Tensor) -> None:
    if value.shape != tensor.shape:
        raise ValueError(
            f"state: {name} {tuple(value.shape)} must be {tuple(tensor.shape)} for this model"
        )


def all_averages(averages: list[Averages], values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the averages of all layers as one list, in the order of values; zeros at first."""
    if not averages[0]:
        size = len(TRIPLET_TENSORS)
        for i in range(len(averages)):
            of_layer = zip(TRIPLET_TENSORS, values[i * size : (i + 1) * size], strict=True)
            averages[i] = {name: torch.zeros_like(value) for name, value in of_layer}
    return [of_layer[name] for of_layer in averages for name in TRIPLET_TENSORS]


def clone_averages(averages: Averages) -> Averages:
    """Return copies of the averages of one layer."""
    return {name: tensor.clone() for name, tensor in averages.items()}
