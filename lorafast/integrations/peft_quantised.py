"""PEFT's LoRA layers on quantised weights, run on lorafast's ops."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from lorafast import functional
from lorafast.engine.precision import activation_dtype
from lorafast.engine.problem import CallOptions, LayerTensors, Scaling
from lorafast.integrations import peft_calls, peft_support
from lorafast.models.explain import LayerCall
from lorafast.quantised import formats
from lorafast.runtime import extras, torch_internals

with extras.required("peft"):
    from peft.tuners.lora.layer import LoraLayer

_TENSOR_TYPES = (torch.Tensor, nn.Parameter)


class QuantisedMixin:
    """The forward of a PEFT layer on a quantised weight by lorafast's ops.

    One active LoRA or DoRA adapter, not merged, called with x alone; everything else is PEFT's.
    The base product is that of the dequantised weight: of an 8-bit layer, too, whose own forward
    also rounds x.
    """

    lorafast_dropout_on = peft_calls.DROPOUT_ON
    lorafast_keep = peft_calls.KEEP

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Return the output [...,N] for x [...,K]."""
        layer: Any = self
        why = peft_support.why_not_arguments(args, kwargs) or why_not_state(layer)
        if why or _why_not_input(layer, x):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]  # PEFT's class
        (name,) = peft_support.active_adapters(layer)
        tensors, options = _call_of(layer, name)
        y = functional.by_quantised(x, formats.of(layer.base_layer), tensors, options)
        return y.to(x.dtype)

    def lorafast_calls(self, tokens: int = 0) -> list[LayerCall]:
        """Return the calls that lorafast.explain describes: the active adapters', else all."""
        layer: Any = self
        names = peft_support.active_adapters(layer) or list(layer.lora_A)
        return [_explained_call(layer, name) for name in names]


def _variants() -> dict[type, type]:
    """Return the class for each of PEFT's classes that this PEFT has: bitsandbytes', torchao's."""
    found = {}
    for module, names in (
        ("bnb", ("Linear4bit", "Linear8bitLt")),
        ("torchao", ("TorchaoLoraLinear",)),
    ):
        try:
            there = importlib.import_module(f"peft.tuners.lora.{module}")
        except ImportError:
            continue
        for name in names:
            if (theirs := getattr(there, name, None)) is not None:
                found[theirs] = type(name, (QuantisedMixin, theirs), {"__module__": __name__})
    return found


# PEFT's classes, each with ours.
CLASSES = _variants()
globals().update({ours.__name__: ours for ours in CLASSES.values()})
PEFTS = {ours: theirs for theirs, ours in CLASSES.items()}


def why_not_layer(layer: Any, dropout_on: str, keep: str) -> str | None:
    """Return why the ops cannot serve a layer of one of these classes in any state, or None."""
    if "forward" in vars(layer):
        return "has a forward of its own, which somebody else put there"
    names = peft_support.active_adapters(layer) or list(layer.lora_A)
    return _why_not_adapters(layer, names, dropout_on, keep)


def why_not_state(layer: Any) -> str | None:
    """Return why the ops cannot serve the layer in its present state, or None."""
    if torch.compiler.is_compiling():
        return "a compiled graph would keep the dequantised weight"
    if why := peft_support.why_not_active(layer):
        return why
    names = peft_support.active_adapters(layer)
    return _why_not_adapters(layer, names, layer.lorafast_dropout_on, layer.lorafast_keep)


def _why_not_adapters(layer: Any, names: list[str], dropout_on: str, keep: str) -> str | None:
    base = layer.base_layer
    weight = formats.of(base)
    if weight is None:
        return f"its base layer is a {peft_support.type_name(base)} of no known format"
    if why := weight.why_not():
        return f"its base layer's weight {why}"
    if why := peft_support.why_not_skippable(base):
        return f"its base layer {why}"
    if len(names) != 1:
        return "several active adapters on a quantised weight"
    drops = peft_support.can_drop(layer.lora_dropout[names[0]])
    is_dora = peft_support.method_name(layer, names[0]) == "DoRA"
    if is_dora and drops and keep == "output" and dropout_on == "both":
        return "keep='output' cannot serve dropout_on='both'"
    return peft_support.why_not_adapter(layer, names[0])


def _why_not_input(layer: Any, x: torch.Tensor) -> str | None:
    if type(x) not in _TENSOR_TYPES or x.layout is not torch.strided:
        return f"x is a {peft_support.type_name(x)}, {x.layout}"
    if x.dim() < 2 or x.dtype not in formats.of(layer.base_layer).DTYPES:
        return f"x is {x.dtype} of {x.dim()} dimensions"
    computes_in = formats.of(layer.base_layer).compute_dtype or x.dtype
    if computes_in.itemsize < x.dtype.itemsize and activation_dtype(x) == x.dtype:
        return f"x is {x.dtype} and its base layer computes in {computes_in}, its adapter not"
    if x.device != layer.base_layer.weight.device or x.shape[-1] != layer.in_features:
        return "x does not fit its base layer"
    return (
        "torch.func or forward-mode AD is at work" if torch_internals.transforms_active() else None
    )


def _call_of(layer: Any, name: str) -> tuple[LayerTensors, CallOptions]:
    factors = peft_calls.adapter_factors(layer, name)
    magnitude = peft_calls.magnitude_of(layer, name)
    tensors = LayerTensors(
        None, getattr(layer.base_layer, "bias", None), factors.lora_A, factors.lora_B,
        magnitude=magnitude, lora_bias=factors.lora_bias,
    )  # fmt: skip
    scaling: Scaling = factors.s
    if magnitude is None:
        return tensors, CallOptions(scaling, factors.dropout, keep="auto")
    return tensors, CallOptions(
        scaling, factors.dropout, "out", layer.lorafast_dropout_on, layer.lorafast_keep
    )


def _explained_call(layer: Any, name: str) -> LayerCall:
    tensors, options = _call_of(layer, name)
    quantised = formats.of(layer.base_layer)
    why = why_not_state(layer)
    return LayerCall(
        f"{peft_support.method_name(layer, name)} of PEFT ({name})",
        tensors._replace(weight=quantised.stand_in()),
        options._replace(scaling=2.0),
        layer.lorafast_keep,
        merged=layer.merged,
        bypass=why and f"PEFT's own forward: {why}",
        quantised=quantised.kind,
    )


def is_quantised(layer: nn.Module) -> bool:
    """Return True for a layer of PEFT's, or ours, on a quantised weight."""
    return type(layer) in CLASSES or type(layer) in PEFTS


def convert(layer: LoraLayer, dropout_on: str, keep: str) -> None:
    """Change a layer of PEFT's to the class here."""
    layer.__class__ = CLASSES.get(type(layer), type(layer))
    layer.lorafast_dropout_on, layer.lorafast_keep = dropout_on, keep


def restore(layer: LoraLayer) -> None:
    """Undo convert."""
    layer.__class__ = PEFTS[type(layer)]
