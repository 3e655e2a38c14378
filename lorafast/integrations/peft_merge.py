"""PEFT's own merging of a layer, on the storages that its weights have, and back bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lorafast.integrations.peft_support import type_name
from lorafast.nn.merge_mixin import refuse_overflow
from lorafast.quantised import formats
from lorafast.runtime import extras
from lorafast.runtime.torch_internals import storage_key

with extras.required("peft"):
    from peft.tuners.lora.layer import LoraLayer, MultiheadAttention
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer


def refuse_merge(layer: Any) -> None:
    """Raise the reason why merging the layer could not be undone exactly, if there is one.

    Raises:
        NotImplementedError: the weight is quantised or sharded, or the layer is of another kind.
        RuntimeError: the weight is on the meta device, or computed from other tensors.
        ValueError: a lora_bias has no bias to be added to.
    """
    known = isinstance(layer, LoraLayer | TrainableTokensLayer)
    if not known or isinstance(layer, MultiheadAttention):
        raise NotImplementedError(
            f"is a {type_name(layer)}, and lorafast.merged(model) knows PEFT's LoRA layers on "
            "linears, embeddings, convolutions and parameters"
        )
    base = layer.get_base_layer()
    quantised = formats.of(base)
    if quantised is not None:
        raise NotImplementedError(
            f"its weight is {quantised.kind}, which merging would round: merge into a dequantised "
            "model"
        )
    for name, parameter in changed_parameters(layer).items():
        if name == "bias" and getattr(base, "bias", None) is None:
            raise ValueError("lora_bias cannot be merged into a layer without a bias")
        _refuse_parameter(name, parameter)


def _refuse_parameter(name: str, parameter: Any) -> None:
    if parameter is None:
        raise RuntimeError(
            f"the {name} of its base layer is no Parameter (a parametrization, pruning, a packed "
            "or flattened weight): remove that before lorafast.merged(model)"
        )
    shape = tuple(parameter.shape)
    if hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id"):
        raise NotImplementedError(f"{name} {shape} is sharded: merge on a model that is whole")
    if parameter.is_meta:
        raise RuntimeError(
            f"{name} {shape} is on the meta device (offloaded?): load it before "
            "lorafast.merged(model)"
        )
    if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
        raise NotImplementedError(
            f"{name} {shape} is a {type_name(parameter)} of {parameter.dtype}, which merging would "
            "replace or round"
        )


def changed_parameters(layer: Any) -> dict[str, Any]:
    """Return what merging the active adapters changes: Parameters of the base layer, by name.

    None for one that is no Parameter of it.
    """
    names = [getattr(layer, "parameter_name", "weight")]
    # lora_bias of a LoraLayer: {adapter: True if it has one}.
    if any(getattr(layer, "lora_bias", {}).values()):
        names.append("bias")
    own = layer.get_base_layer()._parameters
    return {name: own.get(name) for name in names}


def fold(
    layer: Any,
    tied: set[int],
    keep_on: torch.device | str | None,
    undo: contextlib.ExitStack,
) -> None:
    """Merge the active adapters of a layer, and add what undoes that.

    Args:
        layer: a layer that refuse_merge accepts.
        tied: the storages that another module holds too.
        keep_on: as in lorafast.merged.
        undo: what is to be called to undo it.
    """
    base = layer.get_base_layer()
    changes = []
    for name, parameter in changed_parameters(layer).items():
        if storage_key(parameter) in tied:
            undo.callback(base._parameters.__setitem__, name, parameter)
            kept = parameter
            parameter = nn.Parameter(kept.detach().clone(), requires_grad=kept.requires_grad)
            base._parameters[name] = parameter
        else:
            kept = parameter.detach().to(keep_on or parameter.device, copy=True)
            undo.callback(parameter.copy_, kept)
        changes.append((name, parameter, parameter.data, kept))
    undo.callback(_forget_merge(layer))
    try:
        layer.merge()
    finally:
        # PEFT gives some Parameters another storage.
        for _, parameter, data, _ in changes:
            if storage_key(parameter) != storage_key(data):
                parameter.data = data.copy_(parameter)
    for name, parameter, _, kept in changes:
        refuse_overflow(name, kept, parameter)


def _forget_merge(layer: Any) -> Callable[[], None]:
    """Return a function that puts PEFT's record of what is merged back to what it is now."""
    merged, caches = list(layer.merged_adapters), dict(getattr(layer, "_caches", {}))

    def forget() -> None:
        layer.merged_adapters[:] = merged
        if hasattr(layer, "_caches"):
            layer._caches.clear()
            layer._caches.update(caches)

    return forget
