"""QuantisedLinear: an adapter beside a quantised layer of another library."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lorafast import functional
from lorafast.engine.problem import CallOptions, LayerTensors
from lorafast.methods.adapter import Adapter, TensorSpec
from lorafast.nn.linear import AdapterLinearBase, probability
from lorafast.nn.merge_mixin import MergeResult
from lorafast.quantised import formats
from lorafast.quantised.bitsandbytes_8bit import BitsAndBytes8Bit
from lorafast.quantised.weight import QuantisedWeight

_MERGE = (
    "lorafast.merge_quantised(model, 'dequantise') puts dense layers in their place, and "
    "'requantise' quantises the merged weights again"
)


class QuantisedLinear(AdapterLinearBase):
    """A quantised linear with an adapter: y = gain⊙(x Wᵀ + s·h' Bᵀ) + bias, made by adapt.

    The quantised module is the child base_layer, and stays as it is. In every call W [N,K] is
    dequantised into a buffer that the next layer uses again, in backward once more: autograd keeps
    what it keeps beside a dense weight. DoRA's norm is computed from that buffer in every call. A
    disabled layer runs base_layer. A state dict has its keys under base_layer, and the adapter's.

    Attributes:
        base_layer: the quantised module.
        quantised: its weight as a lorafast.quantised.weight.QuantisedWeight.
    """

    base_layer: nn.Module

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return y [...,N] for input x [...,K], in x's dtype or autocast's."""
        if self.disabled:
            # Not its call, whose hooks are this layer's: adapt shares them.
            return self.base_layer.forward(input)
        if torch.compiler.is_compiling():
            # Outside of the graph, which would keep the dequantised weight.
            return torch.compiler.disable(self._call)(input)
        return self._call(input)

    def _call(self, input: torch.Tensor) -> torch.Tensor:
        adapter, dropout, p = self.adapter, self.lora_dropout, 0.0
        if type(dropout) is not nn.Identity:
            p = probability(dropout)
        tensors = LayerTensors(
            None, self.bias, self.lora_A, self.lora_B, self.lora_core, self.lora_magnitude,
            None, self.lora_out_scale, self.lora_bias,
        )  # fmt: skip
        frozen = self.frozen_columns if self.freezing else 0
        options = CallOptions(
            self.scaling, p, adapter.axis, adapter.dropout_on, adapter.keep, frozen
        )
        return functional.by_quantised(input, self.quantised, tensors, options)

    def _has_weight(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Return False: the weight's keys are base_layer's, and none of them starts the adapter."""
        return False

    def _attach(
        self, adapter: Adapter | None, adapter_dtype: torch.dtype | None, start: bool = True
    ) -> None:
        if why := _why_not_adapter(adapter):
            raise ValueError(f"{adapter} beside a weight in {self.quantised.kind}: {why}")
        # Every part of the start reads W, which is dequantised once for all of them.
        self.__dict__["_start_weight"] = self.dequantised()
        try:
            super()._attach(adapter, adapter_dtype, start)
        finally:
            del self.__dict__["_start_weight"]

    def _adopt(self, base: Any) -> None:
        self.base_layer = base
        self.out_features, self.in_features = self.quantised.shape

    @property
    def quantised(self) -> QuantisedWeight:
        """The weight of base_layer. TypeError if another module without one has its place."""
        base = self._modules["base_layer"]
        weight: QuantisedWeight | None = self.__dict__.get("_quantised")
        if weight is None or weight.module is not base:
            weight = formats.of(base)
            if weight is None:
                raise TypeError(f"base_layer {type(base).__name__} has no weight of a known format")
            self.__dict__["_quantised"] = weight
        return weight

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]  # nobody sets it
        """The packed weight, as base_layer holds it."""
        return self.quantised.packed

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]  # nobody sets it
        """The bias [N] of base_layer, or None."""
        return getattr(self.base_layer, "bias", None)

    def _W(self) -> torch.Tensor:
        weight: torch.Tensor | None = self.__dict__.get("_start_weight")
        return self.dequantised() if weight is None else weight

    def _tensor_specs(self) -> dict[str, TensorSpec]:
        return self.adapter.tensor_specs(*self.quantised.shape)

    @torch.no_grad()
    def dequantised(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return W [N,K], a new tensor; dtype: None for the one that the layer computes in."""
        return self.quantised.dense(dtype)

    def extra_repr(self) -> str:
        """Return the line of repr()."""
        return f"{self.quantised.kind}{super().extra_repr()}"

    def plain(self) -> nn.Module:
        """Return the quantised module."""
        return self.base_layer

    def refuse_merge(self) -> None:
        """Refuse: a quantised weight holds no delta. lorafast.merge_quantised says what to do."""
        raise RuntimeError(f"the weight is {self.quantised.kind}, and merging rounds it: {_MERGE}")

    def merge_parts(self) -> MergeResult:
        """Return W' = gain⊙(W + sBA) [N,K] in fp32, and the bias if a lora_bias changes it."""
        return self._merged_parts(self._tensors(self.dequantised(torch.float32)), keep=True)

    def reset_parameters(self) -> None:
        """Refuse: a fresh weight would have to be quantised. reset_adapter() starts the adapter."""
        raise RuntimeError(
            f"the weight is {self.quantised.kind}, and a fresh one would have to be quantised: "
            "reset_adapter() starts the adapter anew on the weight that there is"
        )

    def refuse_computed_weight(self, action: str) -> None:
        """Accept: nothing is written into the weight."""


def why_not_quantised(module: nn.Module) -> str | None:
    """Return why a QuantisedLinear cannot replace this module of a known format, or None."""
    weight = formats.of(module)
    why = None if weight is None else weight.why_not()
    return None if why is None else f"has a quantised weight that cannot be read: {why}"


def why_not_trained(module: nn.Module) -> str | None:
    """Return why the module's own weight cannot train, or None if it is not quantised."""
    weight: Any = formats.of(module)
    if weight is None:
        return None
    if isinstance(weight, BitsAndBytes8Bit) and weight.module.state.has_fp16_weights:
        return None
    return f"its weight is {weight.kind}, and has no gradient"


def _why_not_adapter(adapter: Adapter | None) -> str | None:
    if adapter is None:
        return None
    if adapter.residual:
        return (
            "its start takes a delta out of the weight, which would have to be quantised again; "
            "take a start that leaves the weight alone, such as LoRA's or LaMDA(init='zero')"
        )
    if not adapter.detach_norm or adapter.cache_norm:
        return "its norm is computed in every call and has no gradient: detach_norm, no cache_norm"
    return None
