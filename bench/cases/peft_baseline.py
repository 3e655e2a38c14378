"""PEFT's layers and models, built in the way its users build them."""

from __future__ import annotations

import importlib.util
import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn

import lorafast
from lorafast.bench.cases.implementations import Impl
from lorafast.bench.errors import Unavailable
from lorafast.engine import philox
from lorafast.methods.adapter import Adapter
from lorafast.runtime import extras

if TYPE_CHECKING:
    from peft import LoraConfig

# The options of PEFT's LoraConfig that select a method.
METHOD_OPTIONS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
_NOT_IN_PEFT = (
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
# PEFT's parameter for each argument of lorafast.linear.
PARAMETER_NAMES = {
    "lora_A": "lora_A.default.weight",
    "lora_B": "lora_B.default.weight",
    "magnitude": "lora_magnitude_vector.default.weight",
}
# PEFT's LoRA linear layers: on a dense weight, and on bitsandbytes' weights.
_LINEARS = (
    "peft.tuners.lora.layer.Linear",
    "peft.tuners.lora.bnb.Linear4bit",
    "peft.tuners.lora.bnb.Linear8bitLt",
)
# PEFT applies DoRA's dropout in the correction of the base term too.
DROPOUT_ON = "both"


def check_available(impl: Impl, method: str, dtype: torch.dtype) -> None:
    """Raise Unavailable if PEFT lacks the method, or if the row would repeat that of "peft"."""
    if importlib.util.find_spec("peft") is None:
        hint = extras.how_to_install("bench")
        raise Unavailable("missing", f"peft is not installed: {hint}")
    if method in _NOT_IN_PEFT:
        raise Unavailable("missing", f"PEFT has no {method}")
    if method not in METHOD_OPTIONS:
        raise Unavailable("missing", f"the bench does not build PEFT's {method}")
    if impl.base == "peft-bf16" and dtype not in (torch.bfloat16, torch.float16):
        raise Unavailable(
            "unsupported",
            "peft-bf16 keeps the adapter in the base's half precision; in this dtype it is peft",
        )


def is_peft_linear(module: nn.Module) -> bool:
    """True if the module is one of PEFT's LoRA linear layers."""
    # Compared by name, because importing PEFT takes seconds and it may not be installed.
    return any(
        f"{kind.__module__}.{kind.__qualname__}" in _LINEARS for kind in type(module).__mro__
    )


def peft_config(
    method: str,
    adapter: Adapter,
    target_modules: str | list[str],
    task_type: str | None = None,
) -> LoraConfig:
    """Return PEFT's config for a spec of lorafast."""
    from peft import LoraConfig

    return LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=target_modules,
        bias="none",
        task_type=task_type,
        **METHOD_OPTIONS[method],
    )


def peft_model(
    base: nn.Module,
    impl: Impl,
    method: str,
    adapter: Adapter,
    target_modules: str | list[str],
    task_type: str | None = None,
) -> nn.Module:
    """Return the result of get_peft_model, accelerated if the implementation says so.

    "peft" and "accelerated" keep PEFT's default: fp32 adapters on a half-precision base.
    """
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's use of transformers
        made = get_peft_model(
            base,
            peft_config(method, adapter, target_modules, task_type),
            autocast_adapter_dtype=impl.base != "peft-bf16",
        )
    if impl.base == "accelerated":
        lorafast.accelerate(made)
    return made


def peft_layer(base: nn.Linear, impl: Impl, method: str, adapter: Adapter) -> nn.Module:
    """Return the layer that PEFT makes of a linear layer."""
    return peft_model(nn.Sequential(base), impl, method, adapter, ["0"]).base_model.model[0]


def runs_pefts_forward(layer: nn.Module, M: int, dtype: torch.dtype) -> bool:
    """True if an accelerated layer leaves a call of M tokens to PEFT's own forward."""
    from lorafast.integrations import peft_calls, peft_support

    # SeededDropout, which only PEFT's forward takes, may be in place already.
    if isinstance(layer.lora_dropout["default"], SeededDropout):
        return True
    x = torch.empty(M, layer.in_features, dtype=dtype)
    usual = peft_calls.usual_call(layer)
    served = usual is not None and peft_calls.fits_ops(x, usual)
    return not served and peft_support.is_small_call(layer, x)


class SeededDropout(nn.Module):
    """Dropout with the mask that lorafast draws from the same seed.

    A layer with dropout can be checked against a truth only if both use one mask.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return drop(x) in training mode, and x otherwise."""
        if not self.training:
            return x
        return philox.differentiable_drop(x, philox.draw_seed(x.device), self.p)


def use_seeded_dropout(layer: nn.Module) -> None:
    """Replace the dropout of PEFT's layer by SeededDropout."""
    if isinstance(dropout := layer.lora_dropout["default"], nn.Dropout):
        layer.lora_dropout["default"] = SeededDropout(dropout.p)
