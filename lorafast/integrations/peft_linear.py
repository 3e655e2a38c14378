"""PEFT's lora.Linear on lorafast's ops: the class that accelerate and patch_peft put in place of PEFT's own.

Only forward differs, and only where the ops can serve the call, beside what a LaMDA needs; everything else is PEFT's, and so is its
forward where they cannot.
"""

from __future__ import annotations

import warnings

import torch
from peft.tuners.lora import dora
from peft.tuners.lora.layer import (
    Linear as PeftLinear,
)  # by name: patch_peft puts ours in the module's place
from peft.tuners.lora.model import LoraModel as PeftLoraModel
from torch import nn

from lorafast import functional
from lorafast.engine.multi_adapter import Factors
from lorafast.engine.problem import CallOptions, LayerTensors, split_scaling
from lorafast.integrations import peft_lamda_variant, peft_support
from lorafast.models.explain import Call

# The name our norm has among what PEFT caches of a DoRA layer.
_CACHED = "lorafast-norm"


class Linear(PeftLinear):
    """PEFT's lora.Linear: y = base(x) + Σ s·B(A(drop(x))), or DoRA's, in one op that saves x by reference and M·R.

    With an adapter of a LamdaConfig also y = base(x) + s·B(S(A(drop(x)))), A frozen, which no class of PEFT's knows.
    lorafast_dropout_on: "both", PEFT's reading of DoRA, drops x in the correction of the base term too, which costs a second base
    GEMM; "adapter" does not. lorafast_keep: what DoRA keeps for its magnitude, as in lorafast.DoRA.
    """

    lorafast_dropout_on = "both"
    lorafast_keep = "inner"

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        why = peft_support.why_not_call(self, x, args, kwargs, *_options(self))
        return fallback(self, why, x, *args, **kwargs) if why else fast(self, x)

    def update_layer(self, adapter_name: str, *args, **kwargs) -> None:
        """As PEFT's; an adapter whose start fails leaves nothing of itself behind."""
        try:
            super().update_layer(adapter_name, *args, **kwargs)
        except Exception:
            self.delete_adapter(adapter_name)
            raise

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """As PEFT's; a LaMDA becomes a variant, which PEFT starts right after this. Warns on a weight that is a residual."""
        if found := peft_lamda_variant.read(init_lora_weights):
            self.lora_variant[adapter_name] = found
            return
        if peft_lamda_variant.residual(self):
            warnings.warn(
                f"adapter {adapter_name!r} works on the residual weights a LaMDA left, not on the original",
                stacklevel=2,
            )
        super().reset_lora_parameters(adapter_name, init_lora_weights)

    def set_adapter(self, *args, **kwargs) -> None:
        """As PEFT's, with a LaMDA's A frozen."""
        super().set_adapter(*args, **kwargs)
        peft_lamda_variant.freeze(self)

    def set_requires_grad(self, *args, **kwargs) -> None:
        """As PEFT's, with a LaMDA's A frozen."""
        super().set_requires_grad(*args, **kwargs)
        peft_lamda_variant.freeze(self)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What the adapter adds to the base weight, laid out as that is."""
        # No super(): PEFT's ParamWrapper borrows this method for itself.
        return (
            PeftLinear.get_delta_weight(self, adapter)
            if peft_lamda_variant.core(self, adapter) is None
            else peft_lamda_variant.delta(self, adapter)
        )


def fallback(layer: Linear, why: str, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """PEFT's own forward, for the reason given."""
    return PeftLinear.forward(layer, x, *args, **kwargs)


def fast(layer: Linear, x: torch.Tensor) -> torch.Tensor:
    """The call on lorafast's ops. aside.why_not_call must have found nothing against it."""
    base, names = layer.base_layer, peft_support.active(layer)
    weight, bias = _weight(layer, base), base.bias
    if len(names) > 1:
        return functional.several(x, weight, bias, [factors(layer, name) for name in names])
    f, core, magnitude = (
        factors(layer, names[0]),
        peft_lamda_variant.core(layer, names[0]),
        _magnitude(layer, names[0]),
    )
    norm = None if magnitude is None else _norm(layer, names[0], weight, f)
    # Without a magnitude there is nothing to keep, and no correction to drop in.
    dropout_on, keep = ("adapter", "auto") if magnitude is None else _options(layer)
    return functional.linear(
        x,
        weight,
        bias,
        f.lora_A,
        f.lora_B,
        core,
        magnitude,
        norm,
        "out",
        None,
        f.lora_bias,
        f.s,
        f.dropout,
        dropout_on,
        keep,
    )


def factors(layer: PeftLinear, name: str) -> Factors:
    """One adapter's tensors and settings, read where they are now: nothing of a layer outlives a call."""
    A, B, dropout = peft_support.parts_of(layer, name)
    # DoRA's dropout asks the layer whether it trains, the others' ask the dropout.
    drops = (
        peft_support.drops(dropout)
        and dropout.training
        and (layer.training or name not in layer.lora_magnitude_vector)
    )
    scaling, scale = split_scaling(layer.scaling[name])
    return Factors(A.weight, B.weight, B.bias, None, scale, scaling, dropout.p if drops else 0.0)


def explained(layer: Linear) -> list[Call]:
    """What lorafast.explain tells: one call for every active adapter, or for every one where none is active."""
    told = []
    why = (
        "a forward of its own"
        if "forward" in vars(layer)
        else peft_support.why_not_now(layer, *_options(layer))
    )
    for name in peft_support.active(layer) or layer.lora_A:
        A, B, dropout, magnitude = (
            layer.lora_A[name],
            layer.lora_B[name],
            layer.lora_dropout[name],
            _magnitude(layer, name),
        )
        core, base = peft_lamda_variant.core(layer, name), layer.get_base_layer()
        t = LayerTensors(
            _weight(layer, base), base.bias, A.weight, B.weight, core, magnitude, lora_bias=B.bias
        )
        c = CallOptions(
            dropout=dropout.p if peft_support.drops(dropout) else 0.0,
            dropout_on=layer.lorafast_dropout_on,
        )
        method = f"{peft_support.method(layer, name)} of PEFT ({name})"
        told.append(
            Call(
                method,
                t,
                c,
                layer.lorafast_keep,
                merged=layer.merged,
                elsewhere=why and f"PEFT's own forward: {why}",
            )
        )
    return told


def _weight(layer: PeftLinear, base: nn.Module) -> torch.Tensor:
    """The base weight as [N,K]: a view where PEFT's layer holds [K,N]."""
    return base.weight.t() if layer.fan_in_fan_out else base.weight


def _magnitude(layer: PeftLinear, name: str) -> torch.Tensor | None:
    return layer.lora_magnitude_vector[name].weight if name in layer.lora_magnitude_vector else None


def _norm(layer: Linear, name: str, weight: torch.Tensor, f: Factors) -> torch.Tensor:
    """‖W + sBA‖ per row, kept where PEFT keeps its own, and forgotten when PEFT forgets: in training, and with its caching off."""
    held = layer.lora_magnitude_vector[name]
    # Older PEFTs cache nothing, and have no switch.
    caches = getattr(dora, "ENABLE_DORA_CACHING", None)
    found = held._cache_get(_CACHED, None) if caches and not held.training else None
    if found is None:
        found = functional.row_norm(weight, f.lora_A, f.lora_B, scaling=f.s)
        if caches and not held.training:
            held._cache_store(_CACHED, found)
        elif caches is not None:
            held._cache_clear()
    return found


def _options(layer: Linear) -> tuple[str, str]:
    return layer.lorafast_dropout_on, layer.lorafast_keep


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


def why_not_take(layer: nn.Module, dropout_on: str, keep: str) -> str | None:
    """Why a layer of PEFT's would not run on the ops, whatever it is called with, or None."""
    return peft_support.why_not_ever(layer, (PeftLinear, Linear), dropout_on, keep)


def give_back(model: nn.Module) -> int:
    """Undo take; how many layers became PEFT's again, which has no class for one with a LaMDA adapter.

    RuntimeError, and nothing is undone, if somebody made another class of one since.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    for name, layer in layers.items():
        if type(layer) is not Linear:
            raise RuntimeError(
                f"{name} has become a {peft_support.kind(layer)} since accelerate(): undo that first"
            )
    given = [
        layer
        for layer in layers.values()
        if not any(peft_support.method(layer, name) == "LaMDA" for name in layer.lora_A)
    ]
    for layer in layers.values():
        for name in ("lorafast_dropout_on", "lorafast_keep"):
            vars(layer).pop(name, None)
    for layer in given:
        layer.__class__ = PeftLinear
    for module in model.modules():
        if type(module) is LoraModel:
            module.__class__ = PeftLoraModel
            vars(module).pop("lorafast_options", None)
    return len(given)
