"""The arguments of a PEFT layer's call on lorafast's ops: its tensors and options, as they are now.

Nothing is computed but views of a transposed weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from lorafast.engine import checks, philox, plain_products
from lorafast.engine.multi_adapter import Factors
from lorafast.engine.problem import CallOptions, LayerTensors, Scaling, split_scaling, tokens
from lorafast.integrations import peft_cost, peft_lamda_variant, peft_support
from lorafast.runtime import extras, torch_internals

with extras.required("peft"):
    from peft.tuners.lora.layer import Linear as PeftLinear

# What a layer that accelerate has not changed is asked about with: PEFT's reading of DoRA, and
# accelerate's default.
DROPOUT_ON = "both"
KEEP = "inner"
# Of a usual call: the base layer and the factors, a base layer that holds [K,N], and the dropout.
CLASSES = (nn.Linear, peft_support.Conv1D, nn.Dropout, nn.Identity)


class AdapterCall(NamedTuple):
    """The arguments of a call of one adapter."""

    tensors: LayerTensors
    options: CallOptions


class UsualCall(NamedTuple):
    """The arguments of a call of one LoRA."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    lora_bias: torch.Tensor | None
    scaling: Scaling
    p: float

    def as_call(self) -> AdapterCall:
        """Return them as those of any adapter."""
        weight, bias, A, B, lora_bias, scaling, p = self
        tensors = LayerTensors(weight, bias, A, B, lora_bias=lora_bias)
        return AdapterCall(tensors, CallOptions(scaling, p, keep="auto"))


def usual_call(layer: PeftLinear) -> UsualCall | None:
    """Return the arguments of a call now, if the layer has one active LoRA and nothing unusual.

    None is no refusal: peft_support.why_not_call decides then. What that asks of a layer is asked
    here in the quickest order, because every call comes here that the host path does not serve;
    csrc/host/peft_layer.cpp asks the same. Not to be called while torch.compile traces.
    """
    if layer.lora_variant or layer._disable_adapters or layer.merged_adapters:
        return None
    names = peft_support.active_adapters(layer)
    if len(names) != 1 or not layer.cast_input_dtype_enabled:
        return None
    base, transposed = layer._modules["base_layer"], layer.fan_in_fan_out
    A, B, dropout = modules = peft_support.adapter_modules(layer, names[0])
    if type(base) is not (peft_support.Conv1D if transposed else nn.Linear):
        return None
    if not type(A) is type(B) is nn.Linear or type(dropout) not in (nn.Identity, nn.Dropout):
        return None
    for module in (base, *modules):
        # peft_support.why_not_skippable, without its call.
        attributes = module.__dict__
        if (
            attributes["_forward_hooks"]
            or attributes["_forward_pre_hooks"]
            or attributes["_backward_hooks"]
            or attributes["_backward_pre_hooks"]
            or "forward" in attributes
            or "_hf_hook" in attributes
        ):
            return None
    p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
    # Reading _parameters takes a tenth of the time of nn.Module's attributes; what a library has
    # put elsewhere is unusual.
    own, down, up = base._parameters, A._parameters, B._parameters
    try:
        weight, bias, lora_A, lora_B = own["weight"], own["bias"], down["weight"], up["weight"]
        lora_bias, scaling = up["bias"], layer.scaling[names[0]]
    except KeyError:
        return None
    plain = type(weight) is type(lora_A) is type(lora_B) is nn.Parameter
    if not plain or down.get("bias") is not None or weight.requires_grad:
        return None
    matrix = weight.t() if transposed else weight
    return UsualCall(matrix, bias, lora_A, lora_B, lora_bias, scaling, p)


def fits_ops(x: torch.Tensor, usual: UsualCall) -> bool:
    """True if the ops can serve a usual call on x, which plain products have left to them.

    False is no refusal either. fp16 throughout and dropout without a kernel for its mask are left
    to the checks in words, by which few tokens and GPUs run PEFT's own forward.
    """
    weight, _, A, B, lora_bias, scaling, p = usual
    others = [A, B] if lora_bias is None else [A, B, lora_bias]
    return (
        type(x) is torch.Tensor
        and torch_internals.nothing_casts_or_traces()
        and not torch_internals.transforms_active()
        and type(scaling) is float
        and scaling - scaling == 0  # neither inf nor nan
        and x.dtype is weight.dtype
        and x.dtype in checks.DTYPES
        and x.layout is weight.layout is torch.strided
        and not x.is_nested
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]
        and x.device == weight.device
        and all(_is_usual(factor, x) for factor in others)
        and not x.dtype is A.dtype is B.dtype is torch.float16
        and (p == 0 or _drops_well(p, x))
        and (x.is_cpu or peft_cost.why_peft(tokens(x), x.dtype, *usual.as_call()) is None)
    )


def _is_usual(factor: torch.Tensor, x: torch.Tensor) -> bool:
    return (
        type(factor) is nn.Parameter and factor.dtype in checks.DTYPES and factor.device == x.device
    )


def _drops_well(p: float, x: torch.Tensor) -> bool:
    """True if p is something in 16 bits and, on a CPU, the mask is made by a kernel."""
    if not 0 < round(p * philox.STEPS) < philox.STEPS:
        return False
    return not x.is_cpu or plain_products.makes_masks()


def call_of(layer: PeftLinear, name: str, p: float) -> AdapterCall:
    """Return the arguments of a call of one adapter that drops with p, whatever the layer's class.

    The scaling is left out.
    """
    A, B, _ = peft_support.adapter_modules(layer, name)
    base = layer.get_base_layer()
    tensors = LayerTensors(
        weight_matrix(layer, base),
        base.bias,
        A.weight,
        B.weight,
        peft_lamda_variant.core(layer, name),
        magnitude_of(layer, name),
        lora_bias=B.bias,
    )
    dropout_on = getattr(layer, "lorafast_dropout_on", DROPOUT_ON)
    keep = getattr(layer, "lorafast_keep", KEEP)
    frozen_columns = getattr(B, "frozen_columns", 0)
    options = CallOptions(2.0, p, "out", dropout_on, keep, frozen_columns)
    return AdapterCall(tensors, options)


def adapter_factors(layer: PeftLinear, name: str) -> Factors:
    """Return one adapter's tensors, scaling and dropout, as they are now."""
    A, B, dropout = peft_support.adapter_modules(layer, name)
    # PEFT's DoRA reads the training flag of the layer, its LoRA that of the dropout module.
    trains = layer.training or name not in layer.lora_magnitude_vector
    drops = peft_support.can_drop(dropout) and dropout.training and trains
    scaling, scale = split_scaling(layer.scaling[name])
    return Factors(A.weight, B.weight, B.bias, None, scale, scaling, dropout.p if drops else 0.0)


def weight_matrix(layer: PeftLinear, base: nn.Module) -> torch.Tensor:
    """Return the base weight as [N,K]: a view where the base layer holds [K,N]."""
    return base.weight.t() if layer.fan_in_fan_out else base.weight


def magnitude_of(layer: PeftLinear, name: str) -> torch.Tensor | None:
    """Return the magnitude of a DoRA adapter, None of any other."""
    return layer.lora_magnitude_vector[name].weight if name in layer.lora_magnitude_vector else None
