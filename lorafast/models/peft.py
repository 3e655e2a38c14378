"""PEFT's lora.Linear on lorafast's ops: the class that accelerate and patch_peft put in place of PEFT's own.

Only forward differs, and only where the ops can serve the call; everything else is PEFT's, and so is its forward where they cannot.
"""

from __future__ import annotations

import torch
from peft.tuners.lora import dora
from peft.tuners.lora.layer import Linear as PeftLinear  # by name: patch_peft puts ours in the module's place
from peft.tuners.lora.model import LoraModel as PeftLoraModel
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn
from torch.autograd import forward_ad
from transformers.pytorch_utils import Conv1D

from lorafast import checks, functional, philox
from lorafast.models.explain import Call
from lorafast.problem import Settings, Tensors, activation_dtype, split_scaling
from lorafast.several import Factors

# Whoever hangs one of these on a part of the layer expects that part to be called.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TENSORS = ("Tensor", "Parameter", "FakeTensor")


class Linear(PeftLinear):
    """PEFT's lora.Linear: y = base(x) + Σ s·B(A(drop(x))), or DoRA's, in one op that saves x by reference and M·R.

    lorafast_dropout_on: "both", PEFT's reading of DoRA, drops x in the correction of the base term too, which costs a second base
    GEMM; "adapter" does not. lorafast_keep: what DoRA keeps for its magnitude, as in lorafast.DoRA.
    """

    lorafast_dropout_on = "both"
    lorafast_keep = "inner"

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        why = why_not_call(self, x, args, kwargs)
        return fallback(self, why, x, *args, **kwargs) if why else fast(self, x)


def fallback(layer: Linear, why: str, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """PEFT's own forward, for the reason given."""
    return PeftLinear.forward(layer, x, *args, **kwargs)


def fast(layer: Linear, x: torch.Tensor) -> torch.Tensor:
    """The call on lorafast's ops. why_not_call must have found nothing against it."""
    weight, bias, names = _weight(layer), layer.base_layer.bias, active(layer)
    if len(names) > 1:
        return functional.several(x, weight, bias, [factors(layer, name) for name in names])
    f, norm, magnitude = factors(layer, names[0]), None, _magnitude(layer, names[0])
    if magnitude is not None:
        cache = dora.ENABLE_DORA_CACHING and not layer.training
        norm = functional.row_norm(weight, f.lora_A, f.lora_B, scaling=f.s, cache=cache)
    return functional.linear(
        x, weight, bias, f.lora_A, f.lora_B, None, magnitude, norm, "out", None, f.lora_bias, f.s, f.dropout,
        layer.lorafast_dropout_on, layer.lorafast_keep,
    )  # fmt: skip


def active(layer: PeftLinear) -> list[str]:
    """The active adapters this layer has."""
    return [name for name in layer.active_adapters if name in layer.lora_A]


def factors(layer: PeftLinear, name: str) -> Factors:
    """One adapter's tensors and settings, read where they are now: nothing of a layer outlives a call."""
    A, B, dropout, number = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name], layer.scaling[name]
    # DoRA's dropout asks the layer whether it trains, LoRA's asks the dropout.
    drops = _drops(dropout) and dropout.training and (layer.training or name not in layer.lora_variant)
    scaling, scale = split_scaling(number)
    return Factors(A.weight, B.weight, B.bias, None, scale, scaling, dropout.p if drops else 0.0)


def why_not_call(layer: PeftLinear, x: torch.Tensor, args: tuple, kwargs: dict) -> str | None:
    """Why the ops cannot serve this call, or None. Attributes alone are looked at, so that torch.compile can look too."""
    if layer.disable_adapters:
        return "the adapters are disabled"
    if layer.merged:
        return "the adapters are merged"
    if args or any(value is not None for value in kwargs.values()):
        return f"is called with {', '.join(kwargs) or 'more than x'}"
    names = active(layer)
    if not names:
        return "no adapter is active"
    return why_not_adapters(layer, names, layer.lorafast_dropout_on, layer.lorafast_keep) or _why_not_x(layer, x)


def why_not_take(layer: nn.Module, dropout_on: str, keep: str) -> str | None:
    """Why a layer of PEFT's stays on PEFT's forward whatever it is called with, or None."""
    if type(layer) not in (PeftLinear, Linear):
        return f"is a {_kind(layer)}"
    return why_not_adapters(layer, active(layer) or list(layer.lora_A), dropout_on, keep)


def why_not_adapters(layer: PeftLinear, names: list[str], dropout_on: str, keep: str) -> str | None:
    """Why the ops cannot serve these adapters of the layer together, with these options, whatever x, or None."""
    if why := _why_not_base(layer):
        return why
    if len(names) > 1 and any(name in layer.lora_variant for name in names):
        return "several active adapters of which one is DoRA"
    if keep == "output" and dropout_on == "both" and any(_drops(layer.lora_dropout[n]) for n in names if n in layer.lora_variant):
        return "keep='output' cannot serve dropout_on='both'"
    return next((why for name in names if (why := _why_not_adapter(layer, name))), None)


def _why_not_base(layer: PeftLinear) -> str | None:
    base = layer.base_layer
    if type(base) is not (Conv1D if layer.fan_in_fan_out else nn.Linear):
        return f"its base layer is a {_kind(base)}"
    if why := _taken_over(base):
        return f"its base layer {why}"
    if type(base.weight) is not nn.Parameter:
        return f"the weight of its base layer is a {_kind(base.weight)}"
    if base.weight.requires_grad:
        return "the weight of its base layer trains"
    if base.weight.dtype not in checks.DTYPES:
        return f"the weight of its base layer is {base.weight.dtype}"
    return None


def _why_not_adapter(layer: PeftLinear, name: str) -> str | None:
    A, B, dropout, variant = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name], layer.lora_variant.get(name)
    parts = [A, B, dropout]
    if type(A) is not nn.Linear or type(B) is not nn.Linear or A.bias is not None:
        return f"its lora_A and lora_B are a {_kind(A)} and a {_kind(B)}"
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"its dropout is a {_kind(dropout)}"
    if _drops(dropout) and not 0 < round(dropout.p * philox.STEPS) < philox.STEPS:
        return f"its dropout of {dropout.p} is nothing or all in 16 bits"
    tensors = [A.weight, B.weight] + ([] if B.bias is None else [B.bias])
    if variant is not None:
        if type(variant) is not DoraLinearVariant:
            return f"its variant is {_kind(variant)}"
        if B.bias is not None:
            return "DoRA with lora_bias, which PEFT counts into the norm"
        held = layer.lora_magnitude_vector[name]
        if type(held) is not dora.DoraLinearLayer:
            return f"its magnitude is held by a {_kind(held)}"
        parts.append(held)
        tensors.append(held.weight)
    if why := next((why for part in parts if (why := _taken_over(part))), None):
        return f"a part of its adapter {why}"
    weight, scaling = layer.base_layer.weight, layer.scaling[name]
    if foreign := next((one for one in tensors if type(one) is not nn.Parameter), None):
        return f"a factor is a {_kind(foreign)}"
    if any(one.dtype not in checks.DTYPES for one in tensors):
        return "a factor is of a dtype lorafast does not compute in"
    if isinstance(scaling, torch.Tensor):
        tensors.append(scaling)
    if any(one.device != weight.device for one in tensors):
        return "its adapter and its base layer are on different devices"
    return None


def _why_not_x(layer: PeftLinear, x: torch.Tensor) -> str | None:
    if type(x).__name__ not in _TENSORS:
        return f"x is a {_kind(x)}"
    if x.dim() == 0 or not x.is_floating_point():
        return "x is no floating activation"
    base = layer.base_layer.weight
    if x.device != base.device:
        return "x and its base layer are on different devices"
    if x.shape[-1] != layer.in_features:
        return "x does not end in the layer's in_features"
    runs_in = activation_dtype(x)
    # Autocast brings both together, but touches no fp64.
    cast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, base.dtype)
    if runs_in not in checks.DTYPES or (base.dtype != runs_in and not cast):
        return "x and its base layer have different dtypes"
    if not layer.cast_input_dtype_enabled:
        return "casting of its input is disabled"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "torch.func or forward-mode AD is at work"
    return None


def _drops(dropout: nn.Module) -> bool:
    return isinstance(dropout, nn.Dropout) and dropout.p > 0


def _taken_over(module: nn.Module) -> str | None:
    """Whether somebody expects the module to be called: hooks, offloading, a forward of its own."""
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "has hooks"
    return "has a forward of its own (offloading?)" if "forward" in vars(module) or "_hf_hook" in vars(module) else None


def _kind(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def explained(layer: Linear) -> list[Call]:
    """What lorafast.explain tells: one call for every active adapter."""
    names, told = active(layer), []
    why = why_not_adapters(layer, names, layer.lorafast_dropout_on, layer.lorafast_keep)
    for name in names:
        f, magnitude, dropout = factors(layer, name), _magnitude(layer, name), layer.lora_dropout[name]
        bias = layer.get_base_layer().bias
        t = Tensors(_weight(layer), bias, f.lora_A, f.lora_B, magnitude=magnitude, lora_bias=f.lora_bias, scale=f.scale)
        c = Settings(f.scaling, dropout.p if _drops(dropout) else 0.0, dropout_on=layer.lorafast_dropout_on)
        method = f"{'LoRA' if magnitude is None else 'DoRA'} of PEFT ({name})"
        told.append(Call(method, t, c, layer.lorafast_keep, merged=layer.merged, elsewhere=why))
    return told


def _weight(layer: PeftLinear) -> torch.Tensor:
    """The base weight as [N,K]: a view where PEFT's layer holds [K,N]."""
    weight = layer.get_base_layer().weight
    return weight.t() if layer.fan_in_fan_out else weight


def _magnitude(layer: PeftLinear, name: str) -> torch.Tensor | None:
    return layer.lora_magnitude_vector[name].weight if name in layer.lora_magnitude_vector else None


class LoraModel(PeftLoraModel):
    """PEFT's LoraModel, whose layers of later adapters run on lorafast's ops too."""

    def inject_adapter(self, model: nn.Module, *args, **kwargs) -> None:
        """As PEFT's; then whatever lora.Linear is new changes its class."""
        super().inject_adapter(model, *args, **kwargs)
        take(model, **self.lorafast_options)


def take(model: nn.Module, dropout_on: str, keep: str) -> None:
    """Every PEFT lora.Linear of the model, and the model that makes them, becomes ours."""
    options = {"dropout_on": dropout_on, "keep": keep}
    for module in model.modules():
        if type(module) in (PeftLinear, Linear):
            module.__class__ = Linear
            module.lorafast_dropout_on, module.lorafast_keep = dropout_on, keep
        elif type(module) in (PeftLoraModel, LoraModel):
            module.__class__ = LoraModel
            module.lorafast_options = options


def give_back(model: nn.Module) -> int:
    """Undo take; how many layers were ours."""
    count = 0
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = PeftLinear
            for name in ("lorafast_dropout_on", "lorafast_keep"):
                vars(module).pop(name, None)
            count += 1
        elif type(module) is LoraModel:
            module.__class__ = PeftLoraModel
            vars(module).pop("lorafast_options", None)
    return count
