"""lorafast.merge_quantised: adapters on quantised weights merged into dense or requantised ones."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from lorafast.engine import weight_buffers
from lorafast.models import adapt_record, extra_trainables, observers
from lorafast.models.adapt import replace_module
from lorafast.models.merge import collect_layers
from lorafast.models.module_names import canonical_name
from lorafast.nn.merge_mixin import MergeResult
from lorafast.nn.quantised_linear import QuantisedLinear
from lorafast.quantised import formats
from lorafast.quantised.weight import QuantisedWeight
from lorafast.runtime.torch_internals import CALL_HOOKS, share_call_hooks

WAYS = ("dequantise", "requantise")


@torch.no_grad()
def merge_quantised(
    model: nn.Module, into: str, dtype: torch.dtype | None = None
) -> dict[str, float]:
    """Merge the adapters on quantised weights, in place, and return each layer's error.

    All checks and all arithmetic come before the first change of the model, which for that time
    holds both the old weights and the new. Adapters on dense weights stay: lorafast.merge(model)
    merges those afterwards.

    Args:
        model: a model that lorafast.adapt adapted, with quantised layers.
        into: "dequantise" puts an nn.Linear in the place of each layer; "requantise" keeps the
            quantised module and quantises the merged weight with its options.
        dtype: dtype of the dense weights, fp32, bf16 or fp16; None is the one that the layer
            computes in.

    Returns:
        {name of a layer: ‖stored − W'‖ / ‖W'‖}, where W' is the merged weight in fp32.

    Raises:
        ValueError: into is no such word, dtype is given with "requantise", no layer of the model is
            quantised, a format cannot be quantised again, a merged weight is not finite, or a
            lora_bias has no bias to be added to.
        RuntimeError: the adapters are disabled.
        TypeError: model is no module, or dtype is another.

    Example:
        import bitsandbytes, torch, lorafast

        layer = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu")
        model = lorafast.adapt(torch.nn.Sequential(layer), lorafast.LoRA(r=2))
        print(lorafast.merge_quantised(model, "dequantise", torch.bfloat16))  # {'0': 0.0016…}
    """
    if into not in WAYS:
        raise ValueError(f"into={into!r} must be one of {', '.join(map(repr, WAYS))}")
    if dtype is not None and into == "requantise":
        raise ValueError(f"dtype={dtype} is of dense weights: leave it out with 'requantise'")
    if dtype not in (None, *QuantisedWeight.DTYPES):
        allowed = ", ".join(map(str, QuantisedWeight.DTYPES))
        raise TypeError(f"dtype={dtype} must be one of {allowed}")
    layers = collect_layers(model)
    quantised = {one: names for one, names in layers.items() if isinstance(one, QuantisedLinear)}
    if not quantised:
        raise ValueError(
            f"no adapted layer of model {type(model).__name__} is quantised: use lorafast.merge"
        )
    for layer, names in quantised.items():
        why = layer.quantised.why_not_requantised() if into == "requantise" else None
        if why:
            raise ValueError(f"{names[0]}: {why}; use into='dequantise'")
    made, errors = {}, {}
    for layer, names in quantised.items():
        merged = layer.merge_parts()
        module = _dense(layer, dtype, merged) if into == "dequantise" else _packed(layer, merged)
        share_call_hooks(layer, module)
        made[layer], errors[canonical_name(names[0])] = module, _error(module, merged.weight)
    for layer, names in quantised.items():
        replace_module(model, names, made[layer])
    if len(quantised) == len(layers):
        extra_trainables.stop_training(model, restore=False)
        adapt_record.forget(model)
        observers.tell_plain(model)
    weight_buffers.release()
    return errors


def _dense(layer: QuantisedLinear, dtype: torch.dtype | None, merged: MergeResult) -> nn.Linear:
    """Return an nn.Linear with the merged weight, and the layer's bias."""
    N, K = merged.weight.shape
    module = nn.Linear(K, N, bias=layer.bias is not None, device="meta")
    weight = merged.weight.to(dtype or layer.quantised.dtype)
    module.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        module.bias = _bias(layer, merged, weight.dtype)
    return module.train(layer.training)


def _packed(layer: QuantisedLinear, merged: MergeResult) -> nn.Module:
    """Return a copy of the quantised module with the merged weight."""
    base = layer.base_layer
    # Hooks stay the same objects: the copy of a bound method would be of a copy of its owner.
    hooks = [vars(base)[name] for name in CALL_HOOKS if name in vars(base)]
    module: Any = copy.deepcopy(base, {id(one): one for one in hooks})
    formats.of(module).requantise(merged.weight)
    if layer.bias is not None:
        module.bias = _bias(layer, merged, layer.bias.dtype)
    return module.train(layer.training)


def _bias(layer: QuantisedLinear, merged: MergeResult, dtype: torch.dtype) -> nn.Parameter:
    bias = layer.bias.detach() if merged.bias is None else merged.bias
    return nn.Parameter(bias.to(dtype), requires_grad=False)


def _error(module: Any, weight: torch.Tensor) -> float:
    """Return how far the module's weight is from W', by their norms."""
    quantised = formats.of(module)
    stored = module.weight.float() if quantised is None else quantised.dense(weight.dtype)
    return ((stored - weight).norm() / weight.norm().clamp_min(1e-30)).item()
