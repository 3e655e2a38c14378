"""LaMDA as a variant of PEFT's LoRA layer: its start, its forward in plain torch, and how it merges.

    y = base(x) + s·((drop(x) Aᵀ) Sᵀ) Bᵀ        A = lora_A [R,K] frozen, S = lora_core [R,R], B = lora_B [N,R]
The op serves the same formula where aside lets it; this forward is for all other calls.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraVariant
from peft.utils.integrations import gather_params_ctx
from torch import nn

from lorafast.engine.problem import CallOptions, LayerTensors, split_scaling
from lorafast.methods.lamda import INITS, LaMDA
from lorafast.nn import merge_math

_WORD = re.compile(rf"lamda_({'|'.join(INITS)})(?:_niter_(\d+))?")


def word(init: str, svd_niter: int | None) -> str:
    """How a start travels through PEFT: as init_lora_weights, the one field of a config that every PEFT hands to its layers."""
    return f"lamda_{init}" + ("" if svd_niter is None else f"_niter_{svd_niter}")


def read(init_lora_weights: object) -> LamdaVariant | None:
    """The variant that word() stands for, None for whatever is PEFT's own."""
    found = _WORD.fullmatch(init_lora_weights) if isinstance(init_lora_weights, str) else None
    return LamdaVariant(found[1], None if found[2] is None else int(found[2])) if found else None


def core(layer: PeftLinear, name: str) -> nn.Parameter | None:
    """S of an adapter of the layer [R,R], None where the adapter is no LaMDA."""
    return layer.lora_core[name] if type(layer.lora_variant.get(name)) is LamdaVariant else None


def residual(layer: PeftLinear) -> bool:
    """Whether a start has changed the layer's base weight, through this layer or another that shares it; nothing gives it back."""
    return hasattr(layer.get_base_layer().weight, "lorafast_residual")


def freeze(layer: PeftLinear) -> None:
    """A of every LaMDA adapter of the layer stops training."""
    for name in layer.lora_A:
        if core(layer, name) is not None:
            layer.lora_A[name].requires_grad_(False)


def delta(layer: PeftLinear, name: str) -> torch.Tensor:
    """s·B·S·A in the dtype of B, laid out as the base weight is, each element rounded once."""
    B = layer.lora_B[name].weight
    return folded(layer, name, B.new_zeros(layer.get_base_layer().weight.shape), merge_math.add)


@torch.no_grad()
def folded(layer: PeftLinear, name: str, weight: torch.Tensor, rule: Callable) -> torch.Tensor:
    """What fold.add or fold.subtract makes of a weight that lies as the base weight does, and the adapter's s·B·S·A."""
    number, scale = split_scaling(layer.scaling[name])
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    t = LayerTensors(
        _turned(layer, weight.detach()), lora_A=A, lora_B=B, core=core(layer, name), scale=scale
    )
    return _turned(layer, rule(t, CallOptions(number)))


class Cores(nn.ParameterDict):
    """S by adapter. A core that PEFT casts stays as frozen, or as trained, as it was: a cast Parameter is a mere tensor to PEFT."""

    def __setitem__(self, name: str, value: torch.Tensor) -> None:
        if name in self and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value.detach(), requires_grad=self[name].requires_grad)
        super().__setitem__(name, value)


class LamdaVariant(LoraVariant):
    """init and svd_niter as in lorafast.LaMDA. The methods are what PEFT asks of a variant."""

    def __init__(self, init: str, svd_niter: int | None = None) -> None:
        self.residual, self.options = init == "residual", {"init": init, "svd_niter": svd_niter}

    def supports_lora_conversion(self) -> bool:
        """Whether a LoRA could say the same to the model's original weights: a residual start has changed them."""
        return not self.residual

    @torch.no_grad()
    def init(self, module: PeftLinear, adapter_name: str, **kwargs: object) -> None:
        """lora_A, lora_B and a new lora_core start from the base weight, which gives up s·B·S·A to a residual start.

        ValueError where that would change the weight under other adapters, or a weight that is still on the meta device.
        """
        base = module.get_base_layer().weight
        if self.residual:
            _refuse_shared(module, adapter_name, base)
        if "lora_core" not in module.adapter_layer_names:
            module.lora_core = Cores()
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_core")
        A, B, r = (
            module.lora_A[adapter_name].weight,
            module.lora_B[adapter_name].weight,
            module.r[adapter_name],
        )
        module.lora_core[adapter_name] = nn.Parameter(A.new_empty(r, r))
        spec = LaMDA(
            r,
            module.lora_alpha[adapter_name],
            rslora=module.use_rslora[adapter_name],
            **self.options,
        )
        with gather_params_ctx(base):
            weight = _turned(module, base.detach())
            start = spec.init_tensors(weight)
            for name, held in (
                ("lora_A", A),
                ("lora_B", B),
                ("lora_core", module.lora_core[adapter_name]),
            ):
                held.copy_(start[name])
            if self.residual:
                # The start itself, whatever dtype PEFT rounds its factors to: the residual is then lorafast.Linear's, bit for bit.
                t = LayerTensors(
                    weight, lora_A=start["lora_A"], lora_B=start["lora_B"], core=start["lora_core"]
                )
                # Not in place: the tensor may be somebody's file.
                base.data = _turned(module, merge_math.subtract(t, CallOptions(spec.scaling)))
                base.lorafast_residual = True

    def forward(
        self,
        module: PeftLinear,
        active_adapter: str,
        x: torch.Tensor,
        result: torch.Tensor,
        **kwargs: object,
    ) -> torch.Tensor:
        """result + s·B(S(A(drop(x)))) in plain torch.  x [...,K], result [...,N]."""
        h = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        low = module.lora_B[active_adapter](F.linear(h, module.lora_core[active_adapter]))
        return result + low * module.scaling[active_adapter]

    def merge_safe(
        self, module: PeftLinear, active_adapter: str, orig_weight: torch.Tensor
    ) -> torch.Tensor:
        """The weight with the adapter in it, each element rounded once."""
        return folded(module, active_adapter, orig_weight, merge_math.add)

    def merge_unsafe(
        self, module: PeftLinear, active_adapter: str, orig_weight: torch.Tensor
    ) -> None:
        """The same, for the weight itself."""
        orig_weight.data = folded(module, active_adapter, orig_weight, merge_math.add)

    def unmerge(
        self, module: PeftLinear, active_adapter: str, orig_weight: torch.Tensor
    ) -> torch.Tensor:
        """The weight without the adapter, to within a rounding of each."""
        return folded(module, active_adapter, orig_weight, merge_math.subtract)


def _refuse_shared(layer: PeftLinear, name: str, weight: torch.Tensor) -> None:
    others, why = [other for other in layer.lora_A if other != name], None
    if others:
        why = f"on which {' and '.join(map(repr, others))} work: 'zero' and 'repo' leave it alone"
    elif residual(layer):
        why = "which an earlier start has changed: make the model anew from its original weights"
    elif weight.is_meta:
        why = "which is on the meta device: load it first"
    if why:
        raise ValueError(
            f"adapter {name!r}: lamda_init='residual' takes its start out of the weight {tuple(weight.shape)}, {why}"
        )


def _turned(layer: PeftLinear, weight: torch.Tensor) -> torch.Tensor:
    """The weight between PEFT's layout and [N,K], either way."""
    return weight.t() if layer.fan_in_fan_out else weight
