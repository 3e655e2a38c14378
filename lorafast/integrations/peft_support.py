"""When a PEFT lora.Linear steps aside, and PEFT's own forward runs: every reason in words.

Attributes alone are looked at, and nothing is computed, so that torch.compile can look too and a call stays cheap.
"""

from __future__ import annotations

import torch
from peft.tuners.lora import dora
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn
from torch.autograd import forward_ad
from transformers.pytorch_utils import Conv1D

from lorafast.engine import checks, philox
from lorafast.engine.problem import activation_dtype
from lorafast.integrations import peft_lamda_variant

_TENSORS = ("Tensor", "Parameter", "FakeTensor")
# Arguments PEFT hands on with every call, None where they are not used.
_IDLE = ("adapter_names", "alora_offsets")


def active(layer: PeftLinear) -> list[str]:
    """The active adapters this layer has."""
    held = layer._modules["lora_A"]._modules
    return [name for name in layer.active_adapters if name in held]


def parts_of(layer: PeftLinear, name: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """lora_A, lora_B and the dropout of an adapter of the layer."""
    # A tenth of the price of nn.Module's attributes, at every call.
    held = layer._modules
    return (
        held["lora_A"]._modules[name],
        held["lora_B"]._modules[name],
        held["lora_dropout"]._modules[name],
    )


def method(layer: PeftLinear, name: str) -> str:
    """What an adapter of the layer is, among what the ops can serve."""
    if name in layer.lora_magnitude_vector:
        return "DoRA"
    return "LoRA" if peft_lamda_variant.core(layer, name) is None else "LaMDA"


def why_not_call(
    layer: PeftLinear, x: torch.Tensor, args: tuple, kwargs: dict, dropout_on: str, keep: str
) -> str | None:
    """Why the ops cannot serve this call with these options of DoRA, or None."""
    more = [name for name, value in kwargs.items() if value is not None or name not in _IDLE]
    if args or more:
        return f"is called with {', '.join(more) or 'more than x'}"
    return why_not_now(layer, dropout_on, keep) or _why_not_x(layer, active(layer), x)


def why_not_now(layer: PeftLinear, dropout_on: str, keep: str) -> str | None:
    """Why the ops cannot serve the layer in the state it is in, whatever x, or None."""
    if layer.disable_adapters:
        return "the adapters are disabled"
    if layer.merged:
        return "the adapters are merged"
    if not layer.cast_input_dtype_enabled:
        return "casting of its input is disabled"
    names = active(layer)
    return why_not_adapters(layer, names, dropout_on, keep) if names else "no adapter is active"


def why_not_ever(
    layer: nn.Module, kinds: tuple[type, ...], dropout_on: str, keep: str
) -> str | None:
    """Why a layer of PEFT's, to be one of these kinds, stays on PEFT's forward whatever becomes of its state, or None."""
    if type(layer) not in kinds:
        return f"is a {kind(layer)}"
    if "forward" in vars(layer):
        return "has a forward of its own, which somebody else put there"
    return why_not_adapters(layer, active(layer) or list(layer.lora_A), dropout_on, keep)


def why_not_adapters(layer: PeftLinear, names: list[str], dropout_on: str, keep: str) -> str | None:
    """Why the ops cannot serve these adapters of the layer together, or None."""
    if why := _why_not_base(layer):
        return why
    methods = [method(layer, name) for name in names]
    if len(names) > 1 and (special := next((one for one in methods if one != "LoRA"), None)):
        return f"several active adapters of which one is {special}"
    if (
        keep == "output"
        and dropout_on == "both"
        and methods == ["DoRA"]
        and drops(layer.lora_dropout[names[0]])
    ):
        return "keep='output' cannot serve dropout_on='both'"
    for name in names:
        if why := _why_not_adapter(layer, name):
            return why
    return None


def _why_not_base(layer: PeftLinear) -> str | None:
    base = layer.base_layer
    if type(base) is not (Conv1D if layer.fan_in_fan_out else nn.Linear):
        return f"its base layer is a {kind(base)}"
    if why := _taken_over(base):
        return f"its base layer {why}"
    weight = base.weight
    if type(weight) is not nn.Parameter:
        return f"the weight of its base layer is a {kind(weight)}"
    if weight.requires_grad:
        return "the weight of its base layer trains"
    if weight.dtype not in checks.DTYPES or weight.layout is not torch.strided:
        return f"the weight of its base layer is {weight.dtype}, {weight.layout}"
    return None


def _why_not_adapter(layer: PeftLinear, name: str) -> str | None:
    A, B, dropout, made_by = (*parts_of(layer, name), layer.lora_variant.get(name))
    if type(A) is not nn.Linear or type(B) is not nn.Linear:
        return f"its lora_A and lora_B are a {kind(A)} and a {kind(B)}"
    if A.bias is not None:
        return "its lora_A has a bias"
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"its dropout is a {kind(dropout)}"
    if drops(dropout) and not 0 < round(dropout.p * philox.STEPS) < philox.STEPS:
        return f"its dropout of {dropout.p} is nothing or all in 16 bits"
    parts, bias = [A, B, dropout], B.bias
    tensors = [A.weight, B.weight] if bias is None else [A.weight, B.weight, bias]
    if type(made_by) is peft_lamda_variant.LamdaVariant:
        tensors.append(layer.lora_core[name])
    elif made_by is not None:
        if type(made_by) is not DoraLinearVariant:
            return f"its variant is {kind(made_by)}"
        if bias is not None:
            return "DoRA with lora_bias, which PEFT counts into the norm"
        held = layer.lora_magnitude_vector[name]
        if type(held) is not dora.DoraLinearLayer:
            return f"its magnitude is held by a {kind(held)}"
        parts.append(held)
        tensors.append(held.weight)
    for part in parts:
        if why := _taken_over(part):
            return f"a part of its adapter {why}"
    return _why_not_tensors(tensors, layer.base_layer.weight) or _why_not_scaling(
        layer.scaling[name], layer.base_layer.weight
    )


def _why_not_tensors(tensors: list[torch.Tensor], weight: torch.Tensor) -> str | None:
    device = weight.device
    for one in tensors:
        if type(one) is not nn.Parameter:
            return f"a factor is a {kind(one)}"
        if one.dtype not in checks.DTYPES:
            return f"a factor is {one.dtype}"
        if one.device != device:
            return "its adapter and its base layer are on different devices"
    return None


def _why_not_scaling(scaling: float | torch.Tensor, weight: torch.Tensor) -> str | None:
    if isinstance(scaling, torch.Tensor):
        if (
            scaling.numel() != 1
            or scaling.dtype not in checks.DTYPES
            or scaling.device != weight.device
            or scaling.requires_grad
        ):
            return "its scaling is no frozen floating tensor of one element on its device"
    elif not isinstance(scaling, int | float):
        return f"its scaling is a {kind(scaling)}"
    elif scaling - scaling != 0:  # inf and nan, in words that torch.compile can trace
        return "its scaling is not finite"
    return None


def _why_not_x(layer: PeftLinear, names: list[str], x: torch.Tensor) -> str | None:
    if type(x).__name__ not in _TENSORS or x.layout is not torch.strided or x.is_nested:
        return f"x is a {kind(x)}, {x.layout}"
    if x.dim() == 0 or not x.is_floating_point():
        return "x is no floating activation"
    if x.dim() == 1 and any(name in layer.lora_magnitude_vector for name in names):
        return "x is a single row, which PEFT's DoRA returns as a batch"
    weight = layer.base_layer.weight
    if x.device != weight.device:
        return "x and its base layer are on different devices"
    if x.shape[-1] != layer.in_features:
        return "x does not end in the layer's in_features"
    runs_in = activation_dtype(x)
    # Autocast brings both together, but touches no fp64.
    cast = (
        x.device.type != "meta"
        and torch.is_autocast_enabled(x.device.type)
        and torch.float64 not in (x.dtype, weight.dtype)
    )
    if runs_in not in checks.DTYPES or (weight.dtype != runs_in and not cast):
        return "x and its base layer have different dtypes"
    if (
        runs_in == torch.float16
        and not cast
        and any(layer.lora_A[name].weight.dtype != runs_in for name in names)
    ):
        return (
            "an fp16 base with wider adapters, whose products PEFT keeps from fp16's narrow range"
        )
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "torch.func or forward-mode AD is at work"
    return None


def drops(dropout: nn.Module) -> bool:
    """Whether a layer's dropout drops anything in training."""
    return isinstance(dropout, nn.Dropout) and dropout.p > 0


def _taken_over(module: nn.Module) -> str | None:
    """Whether somebody expects the module to be called: hooks, offloading, a forward of its own."""
    # Written out, because every call asks it of every part.
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "has hooks"
    own = vars(module)
    return (
        "has a forward of its own (offloading?)" if "forward" in own or "_hf_hook" in own else None
    )


def kind(thing: object) -> str:
    """The type of a thing, whole."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
