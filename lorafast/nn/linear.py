"""lorafast.Linear: torch.nn.Linear with an adapter, its base frozen; and the same for transformers' Conv1D."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lorafast import functional
from lorafast.methods.adapter import Adapter
from lorafast.nn.adapter_layer import AdapterLayer


class AdapterLinearBase(AdapterLayer):
    """y = gain⊙(x Wᵀ + s·h' Bᵀ) + bias, the formula of lorafast.linear, with `adapter` saying what of it there is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._merged is not None or self.disabled:
            return self._base_product(x)
        a, t = self.adapter, self._tensors()
        # Any other norm functional.linear computes for itself, and need not check the factors twice for it.
        special = t.magnitude is not None and (
            any(self._norm_kind()) or t.weight.requires_grad or t.scale is not None
        )
        if special:
            t = t._replace(norm=self._norm())
        return functional.of(
            x,
            t,
            self.scaling,
            a.dropout,
            a.dropout_on,
            a.axis,
            a.keep,
            self.frozen_columns,
            self.training,
        )

    def _base_product(self, x: torch.Tensor) -> torch.Tensor:
        if self._away is None:
            return F.linear(x, self._W(), self.bias)
        f, c = self._away
        scaling = c.scaling if f.scale is None else f.scale
        return functional.linear(
            x,
            self._W(),
            self.bias,
            f.lora_A,
            f.lora_B,
            f.core,
            out_scale=f.out_scale,
            scaling=scaling,
        )


class Linear(AdapterLinearBase, nn.Linear):
    """torch.nn.Linear with an adapter: y = gain⊙(x Wᵀ + s·h' Bᵀ) + bias, as lorafast.linear.

    Parameters: weight [N,K] and bias [N], frozen; lora_A [R,K], lora_B [N,R], and by method lora_core [R,R] or [R],
    lora_magnitude [N] or [K], lora_out_scale [N], lora_bias [N]. adapter_dtype=None: fp32 factors on a bf16 or fp16 base, else the
    base's dtype. A state dict without adapter keys loads under strict and starts the adapter anew; one with some of them is an
    error. On the meta device the adapter starts when a plain state dict arrives. eval() never merges.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        adapter: Adapter | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._attach(adapter, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        adapter: Adapter | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> Linear:
        """The linear's own weight and bias Parameters, frozen, with an adapter. An init that changes W says so: W is shared.

        A subclass with a forward of its own, or a parametrized weight, is refused: neither would survive.
        """
        if why := why_not_plain(linear):
            raise TypeError(
                f"linear must be a plain torch.nn.Linear without an adapter; this one {why}"
            )
        layer = cls._from(linear, adapter, adapter_dtype)
        if layer.adapter.residual:
            warnings.warn(
                f"{layer.adapter}: the weight {tuple(layer.weight.shape)} shared with the linear now holds the residual",
                stacklevel=2,
            )
        return layer

    def _adopt(self, base: nn.Linear) -> None:
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias

    def _W(self) -> torch.Tensor:
        try:
            return self._parameters["weight"]
        except KeyError:
            return self.weight

    def _new_base(self) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")


class Conv1D(AdapterLinearBase):
    """transformers' Conv1D (GPT-2's linear, its weight [K,N]) with an adapter; made of one by lorafast.adapt."""

    def _adopt(self, base: nn.Module) -> None:
        self.nx, self.nf = base.weight.shape
        self.weight, self.bias = base.weight, base.bias

    def _W(self) -> torch.Tensor:
        return self.weight.t()

    def extra_repr(self) -> str:
        return f"nx={self.nx}, nf={self.nf}{super().extra_repr()}"


def why_not_plain(linear: nn.Module) -> str | None:
    """Why a lorafast.Linear cannot take this module's place, or None."""
    kind = f"{type(linear).__module__}.{type(linear).__qualname__}"
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        return f"is a {kind}"
    if isinstance(linear, NonDynamicallyQuantizableLinear):
        return f"is a {kind}, whose weight nn.MultiheadAttention reads without calling it"
    return (
        None
        if isinstance(linear.weight, nn.Parameter)
        else f"is a {kind} whose weight is no Parameter"
    )
