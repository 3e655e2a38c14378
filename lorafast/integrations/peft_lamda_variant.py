"""LaMDA as a variant of PEFT's LoRA layer: its init, its forward in plain torch, its merging.

    y = base(x) + s·((drop(x) Aᵀ) Sᵀ) Bᵀ

with A = lora_A [R,K] frozen, S = lora_core [R,R] and B = lora_B [N,R].
lorafast's op computes the same formula for calls that peft_support accepts; the forward here is for
all others.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from lorafast.engine.problem import CallOptions, LayerTensors, split_scaling
from lorafast.methods.lamda import INITS, LaMDA
from lorafast.nn import merge_math
from lorafast.nn.frozen_columns import FrozenColumns
from lorafast.runtime import extras

with extras.required("peft"):
    from peft.tuners.lora.layer import Linear as PeftLinear
    from peft.tuners.lora.layer import LoraVariant
    from peft.utils.integrations import gather_params_ctx

# merge_math.add_delta or subtract_delta.
MergeRule = Callable[[LayerTensors, CallOptions], torch.Tensor]

_INIT_WORD = re.compile(rf"lamda_({'|'.join(INITS)})(?:_niter_(\d+))?")


def encode(init: str, svd_niter: int | None) -> str:
    """Return the init_lora_weights that stands for an init of LaMDA.

    It is the one field of a config that every version of PEFT hands to its layers.
    """
    return f"lamda_{init}" + ("" if svd_niter is None else f"_niter_{svd_niter}")


def decode(init_lora_weights: object) -> LamdaVariant | None:
    """Return the variant that encode() stands for, or None for a value of PEFT's own."""
    if not isinstance(init_lora_weights, str):
        return None
    match = _INIT_WORD.fullmatch(init_lora_weights)
    return LamdaVariant(match[1], None if match[2] is None else int(match[2])) if match else None


def core(layer: PeftLinear, name: str) -> nn.Parameter | None:
    """Return S [R,R] of an adapter of the layer, or None if the adapter is no LaMDA."""
    return layer.lora_core[name] if type(layer.lora_variant.get(name)) is LamdaVariant else None


def call_columns(layer: PeftLinear, name: str) -> tuple[torch.Tensor, int]:
    """Return an adapter's B for a call, and how many of its first columns get no gradient."""
    B = layer._modules["lora_B"]._modules[name]
    if type(B) is UpProjection and B.freezing:
        return B._call_columns(B.weight)
    return B.weight, 0


def has_residual(layer: PeftLinear) -> bool:
    """True if an init has changed the base weight, through this layer or one that shares it."""
    return hasattr(layer.get_base_layer().weight, "lorafast_residual")


def freeze(layer: PeftLinear) -> None:
    """Freeze A of every LaMDA adapter of the layer, and a B whose columns are all frozen."""
    for name in layer.lora_A:
        if core(layer, name) is not None:
            layer.lora_A[name].requires_grad_(False)
            B = layer.lora_B[name]
            if type(B) is UpProjection and B._froze_B:
                B.requires_grad_(False)


def delta(layer: PeftLinear, name: str) -> torch.Tensor:
    """Return s·B·S·A in B's dtype and the base weight's layout, each element rounded once."""
    B = layer.lora_B[name].weight
    zeros = B.new_zeros(layer.get_base_layer().weight.shape)
    return combine(layer, name, zeros, merge_math.add_delta)


@torch.no_grad()
def combine(layer: PeftLinear, name: str, weight: torch.Tensor, rule: MergeRule) -> torch.Tensor:
    """Return a weight plus or minus the adapter's s·B·S·A.

    Args:
        layer: the layer.
        name: the adapter.
        weight: in the layout of the base weight.
        rule: merge_math.add_delta or merge_math.subtract_delta.
    """
    scaling, scale = split_scaling(layer.scaling[name])
    tensors = LayerTensors(
        _transposed(layer, weight.detach()),
        lora_A=layer.lora_A[name].weight,
        lora_B=layer.lora_B[name].weight,
        core=core(layer, name),
        scale=scale,
    )
    return _transposed(layer, rule(tensors, CallOptions(scaling)))


class Cores(nn.ParameterDict):
    """S by adapter name. A core keeps its requires_grad when PEFT casts it.

    PEFT assigns the cast Parameter, which is a plain tensor.
    """

    def __setitem__(self, name: str, value: torch.Tensor) -> None:
        if name in self and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value.detach(), requires_grad=self[name].requires_grad)
        super().__setitem__(name, value)


class UpProjection(FrozenColumns, nn.Linear):
    """The lora_B of a LaMDA: an nn.Linear whose first columns LaMDAFreeze can freeze.

    PEFT's nn.Linear becomes one by a change of its class, so that its weight is the same Parameter.
    """

    @classmethod
    def convert(cls, linear: nn.Linear) -> None:
        """Change the class of a plain nn.Linear."""
        linear.__class__ = cls
        linear._register_columns()
        linear._expect_schedule()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x Bᵀ [...,N], whose gradient for frozen columns is 0.  x [...,R]"""
        return F.linear(x, self._masked(self.weight) if self.freezing else self.weight, self.bias)

    def _factor_B(self) -> nn.Parameter:
        return self.weight

    def _needs_schedule(self) -> bool:
        return True

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        if self.frozen_B is not None:
            self.freeze_columns(self.frozen_columns)


class LamdaVariant(LoraVariant):
    """The methods that PEFT calls of a variant. init and svd_niter are those of lorafast.LaMDA."""

    def __init__(self, init: str, svd_niter: int | None = None) -> None:
        self.residual = init == "residual"
        self.options = {"init": init, "svd_niter": svd_niter}

    def supports_lora_conversion(self) -> bool:
        """True if a LoRA on the original weights can say the same.

        False for a residual init, which has changed them.
        """
        return not self.residual

    @torch.no_grad()
    def init(self, module: PeftLinear, adapter_name: str, **kwargs: object) -> None:
        """Initialise lora_A, lora_B and a new lora_core from the base weight.

        A residual init also subtracts s·B·S·A from the weight. ValueError if that would change the
        weight under other adapters, or if the weight is on the meta device.
        """
        base = module.get_base_layer().weight
        if self.residual:
            _refuse_shared(module, adapter_name, base)
        if "lora_core" not in module.adapter_layer_names:
            module.lora_core = Cores()
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_core")
        UpProjection.convert(module.lora_B[adapter_name])
        A, B = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
        r = module.r[adapter_name]
        module.lora_core[adapter_name] = nn.Parameter(A.new_empty(r, r))
        alpha, rslora = module.lora_alpha[adapter_name], module.use_rslora[adapter_name]
        adapter = LaMDA(r, alpha, rslora=rslora, **self.options)
        with gather_params_ctx(base):
            weight = _transposed(module, base.detach())
            initial = adapter.init_tensors(weight)
            A.copy_(initial["lora_A"])
            B.copy_(initial["lora_B"])
            module.lora_core[adapter_name].copy_(initial["lora_core"])
            if self.residual:
                # With the values before PEFT's factors round them to their dtype, so that the
                # residual is the same as lorafast.Linear's, bit for bit.
                tensors = LayerTensors(
                    weight,
                    lora_A=initial["lora_A"],
                    lora_B=initial["lora_B"],
                    core=initial["lora_core"],
                )
                residual = merge_math.subtract_delta(tensors, CallOptions(adapter.scaling))
                # Not in place: the tensor may be memory that is mapped from a file.
                base.data = _transposed(module, residual)
                base.lorafast_residual = True

    def forward(
        self,
        module: PeftLinear,
        active_adapter: str,
        x: torch.Tensor,
        result: torch.Tensor,
        **kwargs: object,
    ) -> torch.Tensor:
        """Return result + s·B(S(A(drop(x)))) in plain torch.  x [...,K], result [...,N]."""
        h = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        h_core = F.linear(h, module.lora_core[active_adapter])
        return result + module.lora_B[active_adapter](h_core) * module.scaling[active_adapter]

    def merge_safe(
        self, module: PeftLinear, active_adapter: str, orig_weight: torch.Tensor
    ) -> torch.Tensor:
        """Return the weight with the adapter added, each element rounded once."""
        return combine(module, active_adapter, orig_weight, merge_math.add_delta)

    def merge_unsafe(
        self, module: PeftLinear, active_adapter: str, orig_weight: torch.Tensor
    ) -> None:
        """Add the adapter to the weight in place."""
        orig_weight.data = combine(module, active_adapter, orig_weight, merge_math.add_delta)

    def unmerge(
        self, module: PeftLinear, active_adapter: str, orig_weight: torch.Tensor
    ) -> torch.Tensor:
        """Return the weight without the adapter, to within one rounding of each element."""
        return combine(module, active_adapter, orig_weight, merge_math.subtract_delta)


def _refuse_shared(layer: PeftLinear, name: str, weight: torch.Tensor) -> None:
    others, why = [other for other in layer.lora_A if other != name], None
    if others:
        why = f"on which {' and '.join(map(repr, others))} work: 'zero' and 'repo' leave it alone"
    elif has_residual(layer):
        why = "which an earlier start has changed: make the model anew from its original weights"
    elif weight.is_meta:
        why = "which is on the meta device: load it first"
    if why:
        raise ValueError(
            f"adapter {name!r}: lamda_init='residual' takes its start out of the weight "
            f"{tuple(weight.shape)}, {why}"
        )


def _transposed(layer: PeftLinear, weight: torch.Tensor) -> torch.Tensor:
    """Return the weight between PEFT's layout and [N,K], in either direction."""
    return weight.t() if layer.fan_in_fan_out else weight
