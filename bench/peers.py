"""PEFT's layers and models, built as its users build them."""

from __future__ import annotations

import importlib.util
import warnings

import torch
from torch import nn

import lorafast
from lorafast.bench.impl import Impl
from lorafast.bench.refusal import Unable
from lorafast.engine import philox
from lorafast.methods.adapter import Adapter

# How PEFT's config spells a method.
BUILT = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
# What PEFT has not.
_LACKS = (
    "dora-exact",
    "dora-magnitude",
    "lamda",
    "lamda++",
    "lora-pro",
    "aflora",
    "galore",
    "lora-as-optimizer",
    "lisa",
)
# PEFT's parameters by the names lorafast.linear gives them.
NAMES = {
    "lora_A": "lora_A.default.weight",
    "lora_B": "lora_B.default.weight",
    "magnitude": "lora_magnitude_vector.default.weight",
}
DROPOUT_ON = "both"  # PEFT drops x in the correction of DoRA's base term too


def check(impl: Impl, method: str, dtype: torch.dtype) -> None:
    """Raise Unable where there is nothing to compare with, or nothing that would be another thing than peft."""
    if importlib.util.find_spec("peft") is None:
        raise Unable("missing", "peft is not installed: pip install 'lorafast[bench]'")
    if method not in BUILT:
        raise Unable(
            "missing",
            f"PEFT has no {method}"
            if method in _LACKS
            else f"the bench does not build PEFT's {method}",
        )
    if impl.base == "peft-bf16" and dtype not in (torch.bfloat16, torch.float16):
        raise Unable(
            "unsupported",
            "peft-bf16 keeps the adapter in the base's half precision; in this dtype it is peft",
        )


def is_layer(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's LoRA linears."""
    # Not asked of PEFT, which takes seconds to import and is not there in every environment.
    return any(
        f"{kind.__module__}.{kind.__qualname__}" == "peft.tuners.lora.layer.Linear"
        for kind in type(module).__mro__
    )


def config(method: str, adapter: Adapter, target_modules: str | list[str]):
    """PEFT's config for one of our specs."""
    from peft import LoraConfig

    return LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=target_modules,
        bias="none",
        **BUILT[method],
    )


def model(
    base: nn.Module, impl: Impl, method: str, adapter: Adapter, target_modules: str | list[str]
) -> nn.Module:
    """get_peft_model; "peft" keeps PEFT's default, fp32 adapters on a half-precision base, and so does what is "accelerated"."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers
        made = get_peft_model(
            base,
            config(method, adapter, target_modules),
            autocast_adapter_dtype=impl.base != "peft-bf16",
        )
    if impl.base == "accelerated":
        lorafast.accelerate(made)
    return made


def layer(base: nn.Linear, impl: Impl, method: str, adapter: Adapter) -> nn.Module:
    """The one layer PEFT makes of a linear."""
    return model(nn.Sequential(base), impl, method, adapter, ["0"]).base_model.model[0]


class Masked(nn.Module):
    """Dropout by the mask that lorafast draws from the same seed: the only way to hold a layer with dropout against a truth."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return philox.drop(x, philox.draw(x.device), self.p) if self.training else x


def mask(layer: nn.Module) -> None:
    """Put Masked where the layer drops anything."""
    if isinstance(dropout := layer.lora_dropout["default"], nn.Dropout):
        layer.lora_dropout["default"] = Masked(dropout.p)
