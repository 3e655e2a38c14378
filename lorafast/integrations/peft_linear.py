"""PEFT's lora.Linear on lorafast's ops: the class that accelerate and patch_peft use.

Only forward differs from PEFT's class, and what LaMDA needs. A call that the ops cannot serve runs
PEFT's own forward.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

from lorafast import functional
from lorafast.engine import host, plain_products
from lorafast.engine.multi_adapter import Factors
from lorafast.engine.problem import tokens
from lorafast.integrations import (
    peft_calls,
    peft_cost,
    peft_experts,
    peft_lamda_variant,
    peft_quantised,
    peft_support,
)
from lorafast.models.explain import LayerCall
from lorafast.runtime import extras

with extras.required("peft"):
    from peft.tuners.lora import dora

    # By name, because patch_peft replaces the name in PEFT's module.
    from peft.tuners.lora.layer import Linear as PeftLinear
    from peft.tuners.lora.model import LoraModel as PeftLoraModel

# The key of lorafast's norm in the cache of a PEFT DoRA layer.
_NORM_CACHE_KEY = "lorafast-norm"
# The tokens of a call by which accelerate reports, those of explain.
TOKENS = 2048


class Linear(PeftLinear):
    """PEFT's lora.Linear with a forward on lorafast's ops.

    y = base(x) + Σ s·B(A(drop(x))), DoRA's output, or, for an adapter of a LamdaConfig,
    y = base(x) + s·B(S(A(drop(x)))) with a frozen A. One op computes it and saves x by reference
    and M·R elements a LoRA. lorafast.accelerate changes PEFT's layers to this class; Parameters,
    names and the state dict are the same.

    Attributes:
        lorafast_dropout_on: "both", PEFT's reading of DoRA, drops x in the correction of the base
            term too, which costs a second base product; "adapter" does not.
        lorafast_keep: what DoRA saves for its magnitude, as keep of lorafast.DoRA.

    Example:
        import peft, torch, lorafast
        from lorafast.integrations import peft_linear

        model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
        lorafast.accelerate(model)
        assert type(model.base_model.model[0]) is peft_linear.Linear
    """

    lorafast_dropout_on = peft_calls.DROPOUT_ON
    lorafast_keep = peft_calls.KEEP

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Return the output [...,N] for x [...,K]. With further arguments PEFT's forward runs."""
        # Before the checks in words, which take longer than few tokens do.
        usual = None
        if not (args or kwargs or torch.compiler.is_compiling()):
            y = host_forward(self, x)
            if y is not None:
                return y
            usual = peft_calls.usual_call(self)
        if usual is not None:
            y = plain_products.linear(x, *usual)
            if y is not None:
                return y
            if peft_calls.fits_ops(x, usual):
                return op_forward(self, x, usual)
        if peft_support.is_small_call(self, x):
            return peft_forward(self, peft_support.SMALL_CALL, x, *args, **kwargs)
        why = peft_support.why_not_call(self, x, args, kwargs, *_dora_options(self))
        if why is None and not torch.compiler.is_compiling():
            # A compiler would have to trace the model and the trial that decide.
            why = why_quicker(self, tokens(x), x.dtype)
        return peft_forward(self, why, x, *args, **kwargs) if why else op_forward(self, x)

    def update_layer(self, adapter_name: str, *args, **kwargs) -> None:
        """Add an adapter, as PEFT does. If its init fails, the adapter is deleted again."""
        try:
            super().update_layer(adapter_name, *args, **kwargs)
        except Exception:
            self.delete_adapter(adapter_name)
            raise

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Initialise an adapter, as PEFT does.

        A LaMDA becomes a variant, which PEFT initialises next. Warns if the weight is the residual
        of a LaMDA.
        """
        if variant := peft_lamda_variant.decode(init_lora_weights):
            self.lora_variant[adapter_name] = variant
            return
        if peft_lamda_variant.has_residual(self):
            warnings.warn(
                f"adapter {adapter_name!r} works on the residual weights a LaMDA left, not on the "
                "original",
                stacklevel=2,
            )
        super().reset_lora_parameters(adapter_name, init_lora_weights)

    def set_adapter(self, *args, **kwargs) -> None:
        """Set the active adapters, as PEFT does. What of a LaMDA is frozen stays so."""
        super().set_adapter(*args, **kwargs)
        peft_lamda_variant.freeze(self)

    def set_requires_grad(self, *args, **kwargs) -> None:
        """Set requires_grad, as PEFT does. What of a LaMDA is frozen stays so."""
        super().set_requires_grad(*args, **kwargs)
        peft_lamda_variant.freeze(self)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return what the adapter adds to the base weight, in the layout of that weight."""
        if peft_lamda_variant.core(self, adapter) is not None:
            return peft_lamda_variant.delta(self, adapter)
        # Not super(): PEFT's ParamWrapper takes this function and calls it with itself.
        return PeftLinear.get_delta_weight(self, adapter)

    def lorafast_calls(self, tokens: int = TOKENS) -> list[LayerCall]:
        """Return the calls that lorafast.explain describes: the active adapters', else all."""
        names = peft_support.active_adapters(self) or self.lora_A
        return [_explained_call(self, name, tokens) for name in names]


def peft_forward(layer: Linear, why: str, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """Return the output of PEFT's own forward. why: the reason, for those who count calls."""
    return PeftLinear.forward(layer, x, *args, **kwargs)


def host_forward(layer: Linear, x: torch.Tensor) -> torch.Tensor | None:
    """Return the output by the host path; None where it does not serve the call."""
    return host.linear(x, layer, peft_calls.CLASSES)


def why_quicker(layer: PeftLinear, M: int, dtype: torch.dtype) -> str | None:
    """Return why PEFT's forward is expected to be quicker for M tokens of the dtype, or None.

    For adapters that the ops serve.
    """
    names = peft_support.active_adapters(layer)
    calls = (
        peft_calls.call_of(layer, name, peft_calls.adapter_factors(layer, name).dropout)
        for name in names
    )
    if len(names) == 1:
        return peft_cost.why_peft(M, dtype, *next(calls))
    reasons = (peft_cost.why_slow_mask(dtype, *call) for call in calls)
    return next((why for why in reasons if why), None)


def op_forward(
    layer: Linear, x: torch.Tensor, usual: peft_calls.UsualCall | None = None
) -> torch.Tensor:
    """Return the output by lorafast's ops.

    usual: the arguments; without them peft_support.why_not_call must have returned None.
    """
    if usual is not None:
        return functional._linear_checked(x, *usual.as_call())
    base, names = layer.base_layer, peft_support.active_adapters(layer)
    weight, bias = peft_calls.weight_matrix(layer, base), base.bias
    if len(names) > 1:
        adapters = [peft_calls.adapter_factors(layer, name) for name in names]
        return functional.several(x, weight, bias, adapters)
    name = names[0]
    factors = peft_calls.adapter_factors(layer, name)
    lora_B, frozen_columns = peft_lamda_variant.call_columns(layer, name)
    norm, dropout_on, keep = None, "adapter", "auto"
    magnitude = peft_calls.magnitude_of(layer, name)
    if magnitude is not None:
        norm = _peft_cached_norm(layer, name, weight, factors)
        dropout_on, keep = _dora_options(layer)
    return functional.linear(
        x,
        weight,
        bias,
        factors.lora_A,
        lora_B,
        peft_lamda_variant.core(layer, name),
        magnitude,
        norm,
        lora_bias=factors.lora_bias,
        scaling=factors.s,
        dropout=factors.dropout,
        dropout_on=dropout_on,
        keep=keep,
        frozen_columns=frozen_columns,
    )


def _explained_call(layer: Linear, name: str, tokens: int) -> LayerCall:
    dropout = layer.lora_dropout[name]
    p = dropout.p if peft_support.can_drop(dropout) else 0.0
    tensors, options = peft_calls.call_of(layer, name, p)
    active = peft_support.active_adapters(layer)
    why = peft_support.why_not_state(layer, *_dora_options(layer))
    dtype = tensors.weight.dtype
    if not why and len(active) == 1:
        why = peft_cost.why_peft(tokens, dtype, tensors, options)
    elif not why:
        why = peft_cost.why_slow_mask(dtype, tensors, options)
    if "forward" in vars(layer):
        why = "a forward of its own"
    return LayerCall(
        f"{peft_support.method_name(layer, name)} of PEFT ({name})",
        tensors,
        options,
        layer.lorafast_keep,
        merged=layer.merged,
        bypass=why and f"PEFT's own forward: {why}",
        few_tokens="plain torch products" if len(active) == 1 else "PEFT's own forward",
    )


def _peft_cached_norm(
    layer: Linear, name: str, weight: torch.Tensor, factors: Factors
) -> torch.Tensor | None:
    """Return ‖W + sBA‖ per row from PEFT's cache, where and as long as PEFT caches its own norm.

    PEFT caches in eval mode, if its switch is on. Elsewhere None: the call computes the norm.
    """
    magnitude = layer.lora_magnitude_vector[name]
    # Older PEFT versions have neither the cache nor the switch.
    switch = getattr(dora, "ENABLE_DORA_CACHING", None)
    if not switch or magnitude.training:
        if switch is not None:
            magnitude._cache_clear()
        return None
    norm = magnitude._cache_get(_NORM_CACHE_KEY, None)
    if norm is None:
        norm = functional.row_norm(weight, factors.lora_A, factors.lora_B, scaling=factors.s)
        magnitude._cache_store(_NORM_CACHE_KEY, norm)
    return norm


def _dora_options(layer: Linear) -> tuple[str, str]:
    """Return dropout_on and keep."""
    return layer.lorafast_dropout_on, layer.lorafast_keep


class LoraModel(PeftLoraModel):
    """PEFT's LoraModel. Layers of adapters that are added later run on lorafast's ops too."""

    def inject_adapter(self, model: nn.Module, *args, **kwargs) -> None:
        """Add an adapter, as PEFT does, and convert its new layers."""
        super().inject_adapter(model, *args, **kwargs)
        convert(model, **self.lorafast_options)


def convert(model: nn.Module, dropout_on: str, keep: str) -> None:
    """Change every PEFT lora.Linear, and the LoraModel that makes them, to lorafast's classes."""
    options = {"dropout_on": dropout_on, "keep": keep}
    for module in model.modules():
        if type(module) in (PeftLinear, Linear):
            module.__class__ = Linear
            module.lorafast_dropout_on, module.lorafast_keep = dropout_on, keep
        elif peft_quantised.is_quantised(module):
            peft_quantised.convert(module, dropout_on, keep)
        elif peft_experts.is_wrapper(module):
            peft_experts.convert(module)
        elif type(module) in (PeftLoraModel, LoraModel):
            module.__class__ = LoraModel
            module.lorafast_options = options


def why_not_convert(
    layer: nn.Module, dropout_on: str, keep: str, tokens: int = TOKENS
) -> str | None:
    """Return why a layer of PEFT's would not run on the ops in training, or None.

    tokens: of a call. That PEFT's forward is quicker is asked anew at each call.
    """
    if peft_quantised.is_quantised(layer):
        return peft_quantised.why_not_layer(layer, dropout_on, keep)
    if peft_experts.is_wrapper(layer):
        return peft_experts.why_not_layer(layer)
    if why := peft_support.why_not_layer(layer, (PeftLinear, Linear), dropout_on, keep):
        return why
    names = peft_support.active_adapters(layer)
    if len(names) != 1:
        return None
    dropout = layer.lora_dropout[names[0]]
    p = dropout.p if peft_support.can_drop(dropout) else 0.0
    tensors, options = peft_calls.call_of(layer, names[0], p)
    options = options._replace(dropout_on=dropout_on, keep=keep)
    return peft_cost.why_peft(tokens, tensors.weight.dtype, tensors, options)


def restore(model: nn.Module) -> int:
    """Undo convert, and return how many layers are PEFT's again.

    Layers with a LaMDA adapter stay, because PEFT has no class for them.

    Raises:
        RuntimeError: another library has changed a layer's class since; nothing is undone.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    for name, layer in layers.items():
        if type(layer) is not Linear:
            raise RuntimeError(
                f"{name} has become a {peft_support.type_name(layer)} since accelerate(): undo "
                "that first"
            )
    restored = [
        layer
        for layer in layers.values()
        if not any(peft_support.method_name(layer, name) == "LaMDA" for name in layer.lora_A)
    ]
    quantised = [module for module in model.modules() if type(module) in peft_quantised.PEFTS]
    for layer in (*layers.values(), *quantised):
        for name in ("lorafast_dropout_on", "lorafast_keep"):
            vars(layer).pop(name, None)
    for layer in restored:
        layer.__class__ = PeftLinear
    for layer in quantised:
        peft_quantised.restore(layer)
    for module in model.modules():
        if type(module) is LoraModel:
            module.__class__ = PeftLoraModel
            vars(module).pop("lorafast_options", None)
    return len(restored) + len(quantised) + peft_experts.restore(model)
