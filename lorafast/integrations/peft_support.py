"""Why a call of a PEFT lora.Linear runs on PEFT's own forward instead of lorafast's ops.

Every function returns a reason in words, or None. Only attributes are read and nothing is computed,
so that torch.compile traces the checks without a graph break and a call stays cheap.
"""

from __future__ import annotations

import torch
from torch import nn

from lorafast.engine import checks, philox, plain_products
from lorafast.engine.precision import activation_dtype
from lorafast.engine.problem import tokens
from lorafast.integrations import peft_lamda_variant
from lorafast.runtime import env, extras, torch_internals

with extras.required("peft"):
    from peft.tuners.lora import dora
    from peft.tuners.lora.layer import Linear as PeftLinear
    from peft.tuners.lora.variants import DoraLinearVariant
    from transformers.pytorch_utils import Conv1D

_TENSOR_TYPES = ("Tensor", "Parameter", "FakeTensor")
# Arguments that PEFT passes with every call; None means that they are not used.
_UNUSED_IF_NONE = ("adapter_names", "alora_offsets")
# The reason for a call that is_small_call leaves to PEFT.
SMALL_CALL = "few tokens, for which PEFT's forward is quicker than the ops"


def active_adapters(layer: PeftLinear) -> list[str]:
    """Return the active adapters that this layer has."""
    existing = layer._modules["lora_A"]._modules
    return [name for name in layer.active_adapters if name in existing]


def adapter_modules(layer: PeftLinear, name: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return lora_A, lora_B and the dropout of an adapter of the layer."""
    # Reading _modules takes a tenth of the time of nn.Module's attributes; every call does it.
    modules = layer._modules
    return (
        modules["lora_A"]._modules[name],
        modules["lora_B"]._modules[name],
        modules["lora_dropout"]._modules[name],
    )


def method_name(layer: PeftLinear, name: str) -> str:
    """Return "LoRA", "DoRA" or "LaMDA" for an adapter that the ops serve."""
    if name in layer.lora_magnitude_vector:
        return "DoRA"
    return "LoRA" if peft_lamda_variant.core(layer, name) is None else "LaMDA"


def is_small_call(layer: PeftLinear, x: torch.Tensor) -> bool:
    """Return True if PEFT's own forward is expected to be quicker for a LoRA on this input.

    By the rule of lorafast's own layers; DoRA and LaMDA are always quicker on the ops.
    """
    # A variant is what PEFT calls an adapter other than a plain LoRA.
    if layer.lora_variant or torch.compiler.is_compiling() or not getattr(x, "is_cpu", False):
        return False
    names = active_adapters(layer)
    if not names or not plain_products.is_auto(env.raw_get(env.BACKEND_KEY)):
        return False
    A, _, dropout = adapter_modules(layer, names[0])
    copies_x = (dropout.training and can_drop(dropout)) or A.weight.dtype != x.dtype
    M = x.shape[0] if x.dim() == 2 else tokens(x)
    return plain_products.few_tokens(M, layer.out_features, layer.in_features, copies_x, x.dtype)


def why_not_call(
    layer: PeftLinear, x: torch.Tensor, args: tuple, kwargs: dict, dropout_on: str, keep: str
) -> str | None:
    """Return why the ops cannot serve this call, or None.

    Args:
        layer: the layer.
        x: its input.
        args: further positional arguments of the call.
        kwargs: keyword arguments of the call.
        dropout_on: DoRA's option, as in lorafast.DoRA.
        keep: DoRA's option, as in lorafast.DoRA.
    """
    why = why_not_arguments(args, kwargs) or why_not_state(layer, dropout_on, keep)
    return why or _why_not_input(layer, active_adapters(layer), x)


def why_not_arguments(args: tuple, kwargs: dict) -> str | None:
    """Return why the ops cannot serve a call with these arguments besides x, or None."""
    more = [
        name for name, value in kwargs.items() if value is not None or name not in _UNUSED_IF_NONE
    ]
    return f"is called with {', '.join(more) or 'more than x'}" if args or more else None


def why_not_state(layer: PeftLinear, dropout_on: str, keep: str) -> str | None:
    """Return why the ops cannot serve the layer in its present state, whatever x, or None."""
    names = active_adapters(layer)
    return why_not_active(layer) or _why_not_adapters(layer, names, dropout_on, keep)


def why_not_active(layer: PeftLinear) -> str | None:
    """Return why no adapter of the layer works now, or works unusually, or None."""
    if layer.disable_adapters:
        return "the adapters are disabled"
    if layer.merged:
        return "the adapters are merged"
    if not layer.cast_input_dtype_enabled:
        return "casting of its input is disabled"
    return None if active_adapters(layer) else "no adapter is active"


def why_not_layer(
    layer: nn.Module, classes: tuple[type, ...], dropout_on: str, keep: str
) -> str | None:
    """Return why the ops cannot serve a layer in any state, or None.

    It must be of one of the classes exactly; its state (merged, disabled) does not matter.
    """
    if type(layer) not in classes:
        return f"is a {type_name(layer)}"
    if "forward" in vars(layer):
        return "has a forward of its own, which somebody else put there"
    names = active_adapters(layer) or list(layer.lora_A)
    return _why_not_adapters(layer, names, dropout_on, keep)


def _why_not_adapters(
    layer: PeftLinear, names: list[str], dropout_on: str, keep: str
) -> str | None:
    """Return why the ops cannot serve these adapters of the layer together, or None."""
    if why := _why_not_base(layer):
        return why
    methods = [method_name(layer, name) for name in names]
    if len(names) > 1:
        other = next((method for method in methods if method != "LoRA"), None)
        if other is not None:
            return f"several active adapters of which one is {other}"
    drops_base = methods == ["DoRA"] and can_drop(layer.lora_dropout[names[0]])
    if drops_base and keep == "output" and dropout_on == "both":
        return "keep='output' cannot serve dropout_on='both'"
    for name in names:
        if why := why_not_adapter(layer, name):
            return why
    return None


def _why_not_base(layer: PeftLinear) -> str | None:
    base = layer.base_layer
    if type(base) is not (Conv1D if layer.fan_in_fan_out else nn.Linear):
        return f"its base layer is a {type_name(base)}"
    if why := why_not_skippable(base):
        return f"its base layer {why}"
    weight = base.weight
    if type(weight) is not nn.Parameter:
        return f"the weight of its base layer is a {type_name(weight)}"
    if weight.requires_grad:
        return "the weight of its base layer trains"
    if weight.dtype not in checks.DTYPES or weight.layout is not torch.strided:
        return f"the weight of its base layer is {weight.dtype}, {weight.layout}"
    return None


def why_not_adapter(layer: PeftLinear, name: str) -> str | None:
    """Return why the ops cannot serve one adapter of a layer, or None."""
    A, B, dropout = adapter_modules(layer, name)
    if type(A) is not nn.Linear or type(B) not in (nn.Linear, peft_lamda_variant.UpProjection):
        return f"its lora_A and lora_B are a {type_name(A)} and a {type_name(B)}"
    if A.bias is not None:
        return "its lora_A has a bias"
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"its dropout is a {type_name(dropout)}"
    if can_drop(dropout) and not 0 < round(dropout.p * philox.STEPS) < philox.STEPS:
        return f"its dropout of {dropout.p} is nothing or all in 16 bits"
    modules, bias = [A, B, dropout], B.bias
    tensors = [A.weight, B.weight] if bias is None else [A.weight, B.weight, bias]
    variant = layer.lora_variant.get(name)
    if type(variant) is peft_lamda_variant.LamdaVariant:
        tensors.append(layer.lora_core[name])
    elif variant is not None:
        if why := _why_not_dora(layer, name, variant, bias):
            return why
        magnitude = layer.lora_magnitude_vector[name]
        modules.append(magnitude)
        tensors.append(magnitude.weight)
    for module in modules:
        if why := why_not_skippable(module):
            return f"a part of its adapter {why}"
    weight = layer.base_layer.weight
    return why_not_tensors(tensors, weight) or why_not_scaling(layer.scaling[name], weight)


def _why_not_dora(
    layer: PeftLinear, name: str, variant: object, bias: torch.Tensor | None
) -> str | None:
    if type(variant) is not DoraLinearVariant:
        return f"its variant is {type_name(variant)}"
    if bias is not None:
        return "DoRA with lora_bias, which PEFT counts into the norm"
    magnitude = layer.lora_magnitude_vector[name]
    if type(magnitude) is not dora.DoraLinearLayer:
        return f"its magnitude is held by a {type_name(magnitude)}"
    return None


def why_not_tensors(tensors: list[torch.Tensor], weight: torch.Tensor) -> str | None:
    """Return why the ops cannot take these factors beside a weight, or None."""
    device = weight.device
    for tensor in tensors:
        if type(tensor) is not nn.Parameter:
            return f"a factor is a {type_name(tensor)}"
        if tensor.dtype not in checks.DTYPES:
            return f"a factor is {tensor.dtype}"
        if tensor.device != device:
            return "its adapter and its base layer are on different devices"
    return None


def why_not_scaling(scaling: float | torch.Tensor, weight: torch.Tensor) -> str | None:
    """Return why the ops cannot take this scaling beside a weight, or None."""
    if isinstance(scaling, torch.Tensor):
        if (
            scaling.numel() != 1
            or scaling.dtype not in checks.DTYPES
            or scaling.device != weight.device
            or scaling.requires_grad
        ):
            return "its scaling is no frozen floating tensor of one element on its device"
    elif not isinstance(scaling, int | float):
        return f"its scaling is a {type_name(scaling)}"
    elif scaling - scaling != 0:  # inf and nan; torch.compile does not trace math.isfinite
        return "its scaling is not finite"
    return None


def _why_not_input(layer: PeftLinear, names: list[str], x: torch.Tensor) -> str | None:
    if type(x).__name__ not in _TENSOR_TYPES or x.layout is not torch.strided or x.is_nested:
        return f"x is a {type_name(x)}, {x.layout}"
    if x.dim() == 0 or not x.is_floating_point():
        return "x is no floating activation"
    if x.dim() == 1 and any(name in layer.lora_magnitude_vector for name in names):
        return "x is a single row, which PEFT's DoRA returns as a batch"
    weight = layer.base_layer.weight
    if x.device != weight.device:
        return "x and its base layer are on different devices"
    if x.shape[-1] != layer.in_features:
        return "x does not end in the layer's in_features"
    dtype = activation_dtype(x)
    # Autocast casts x and the weight to one dtype, except for fp64.
    autocasts = (
        x.device.type != "meta"
        and torch.is_autocast_enabled(x.device.type)
        and torch.float64 not in (x.dtype, weight.dtype)
    )
    if dtype not in checks.DTYPES or (weight.dtype != dtype and not autocasts):
        return "x and its base layer have different dtypes"
    if len(names) > 1 and (torch.compiler.is_exporting() or torch.jit.is_tracing()):
        return "several active adapters where a program for other places is written"
    if torch_internals.transforms_active():
        return "torch.func or forward-mode AD is at work"
    return None


def can_drop(dropout: nn.Module) -> bool:
    """True if a layer's dropout module drops elements in training."""
    return isinstance(dropout, nn.Dropout) and dropout.p > 0


def why_not_skippable(module: nn.Module) -> str | None:
    """Return why the module itself must be called (hooks, offloading, own forward), or None."""
    # The hooks are listed one by one, because every call checks them on every part of the layer.
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "has hooks"
    attributes = vars(module)
    if "forward" in attributes or "_hf_hook" in attributes:
        return "has a forward of its own (offloading?)"
    return None


def type_name(value: object) -> str:
    """Return the full name of a value's type."""
    return f"{type(value).__module__}.{type(value).__qualname__}"
