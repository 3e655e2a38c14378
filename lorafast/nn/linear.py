"""lorafast.Linear: torch.nn.Linear with an adapter; and the same for transformers' Conv1D."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lorafast import functional
from lorafast.engine import host, plain_products, weight_norm
from lorafast.engine.problem import CallOptions, LayerTensors
from lorafast.methods.adapter import Adapter
from lorafast.nn.adapter_layer import AdapterLayer
from lorafast.nn.size_warnings import warn_about_layer

# The modules and names of classes with a forward of their own that is a linear's. Falcon's adds the
# bias in a second step.
_PLAIN_FORWARDS = (("modeling_falcon", "FalconLinear"),)
# The norm is computed, and no gradient flows through it.
_COMPUTE = weight_norm.NormPolicy()


class AdapterLinearBase(AdapterLayer):
    """A layer whose output is y = gain⊙(x Wᵀ + s·h' Bᵀ) + bias.

    Attributes:
        lora_dropout: an nn.Dropout, or an nn.Identity if the adapter has no dropout. It is never
            called, but its p and its training flag decide: tools turn dropout off and on by walking
            modules.
    """

    lora_dropout: nn.Module

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return y [...,N] for input x [...,K], by lorafast.functional."""
        if self._merged is not None or self.disabled:
            return self._base_forward(input)
        # Reading the dict takes a tenth of the time of nn.Module's attributes, at every call.
        # Instead of an entry there may be a property (a parametrization) or a view (a flattened
        # parameter), and a sharding library's dict may gather an entry when it is read.
        parameters: dict[str, Any] = self._parameters
        weight = self._W()
        try:
            bias, A, B = parameters["bias"], parameters["lora_A"], parameters["lora_B"]
            core, magnitude = parameters["lora_core"], parameters["lora_magnitude"]
            out_scale, lora_bias = parameters["lora_out_scale"], parameters["lora_bias"]
        except KeyError:
            _, bias, A, B, core, magnitude, _, out_scale, lora_bias, *_ = self._tensors()
        dropout, p, frozen_columns = self._modules["lora_dropout"], 0.0, 0
        if type(dropout) is not nn.Identity:
            p = probability(dropout)
        adapter, scaling, policy = self.adapter, self.scaling, None
        if self.freezing:
            B, frozen_columns = self._call_columns(B)
        if magnitude is not None:
            policy = weight_norm.policy_of(adapter.detach_norm, adapter.cache_norm)
        if not torch.compiler.is_compiling():
            y = host.linear(
                input, weight, bias, A, B, core, magnitude, None, out_scale, lora_bias, None,
                scaling, p, adapter.axis, adapter.dropout_on, adapter.keep, frozen_columns,
                policy is None or policy == _COMPUTE,
            )  # fmt: skip
            if y is not None:
                return y
        if core is magnitude is out_scale is None and not self.freezing:
            y = plain_products.linear(input, weight, bias, A, B, lora_bias, scaling, p)
            if y is not None:
                return y
        tensors = LayerTensors(weight, bias, A, B, core, magnitude, None, out_scale, lora_bias)
        options = CallOptions(
            scaling, p, adapter.axis, adapter.dropout_on, adapter.keep, frozen_columns
        )
        if policy is None:
            return functional._linear_checked(input, tensors, options)
        return functional._linear_checked(input, tensors, options, norm_policy=policy)

    def _attach(
        self, adapter: Adapter | None, adapter_dtype: torch.dtype | None, start: bool = True
    ) -> None:
        super()._attach(adapter, adapter_dtype, start)
        self.lora_dropout = _dropout_module(self.adapter).train(self.training)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        # A layer pickled by version 0.1.
        if "bias" in self.__dict__:
            self.register_parameter("bias", self.__dict__.pop("bias"))
        if "lora_dropout" not in self._modules:
            self.lora_dropout = _dropout_module(self.adapter).train(self.training)

    def _base_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output of the merged or disabled layer."""
        if self._removed_delta is None:
            return F.linear(x, self._W(), self.bias)
        factors, options = self._removed_delta
        scaling = options.scaling if factors.scale is None else factors.scale
        return functional.linear(
            x, self._W(), self.bias, factors.lora_A, factors.lora_B, factors.core,
            out_scale=factors.out_scale, scaling=scaling,
        )  # fmt: skip


class Linear(AdapterLinearBase, nn.Linear):
    """torch.nn.Linear with an adapter: y = gain⊙(x Wᵀ + s·h' Bᵀ) + bias, as lorafast.linear.

    Parameters: weight [N,K] and bias [N], frozen; lora_A [R,K], lora_B [N,R], and by method
    lora_core [R,R] or [R], lora_magnitude [N] or [K], lora_out_scale [N], lora_bias [N]. A state
    dict without adapter keys loads under strict and starts the adapter anew; one with some of them
    is an error. On the meta device the adapter starts when a plain state dict arrives. eval() never
    merges.

    Args:
        in_features: K.
        out_features: N.
        bias: True for a bias [N].
        adapter: the adapter, such as lorafast.DoRA(r=16); None is lorafast.LoRA().
        device: device of all tensors.
        dtype: dtype of weight and bias: fp64, fp32, bf16 or fp16.
        adapter_dtype: dtype of the adapter's tensors; None is fp32 on a bf16 or fp16 base, else
            the base's dtype.

    Raises:
        TypeError: adapter is no adapter, or a dtype is not supported.
        ValueError: the adapter does not fit the weight.

    Example:
        layer = lorafast.Linear(64, 32, adapter=lorafast.DoRA(r=8, alpha=16, dropout=0.05))
        y = layer(torch.randn(4, 10, 64))
        y.sum().backward()

    Source:
        arXiv:2106.09685, arXiv:2402.09353, arXiv:2406.12832
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
        warn_about_layer(type(self), adapter, out_features, in_features)
        self._attach(adapter, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        adapter: Adapter | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> Linear:
        """Return a layer on the linear's own weight and bias Parameters, frozen, with an adapter.

        Args:
            linear: a plain torch.nn.Linear. An init that changes the weight warns: it is shared.
            adapter: the adapter; None is lorafast.LoRA().
            adapter_dtype: dtype of the adapter's tensors, as in the constructor.

        Returns:
            The layer. linear stays a module of its own; its Parameters are frozen, and an init that
            leaves a residual rewrites its weight.

        Raises:
            TypeError: linear has a forward of its own or a parametrized weight, neither of which
                would survive.

        Example:
            linear = torch.nn.Linear(64, 32)
            layer = lorafast.Linear.from_linear(linear, lorafast.LoRA(r=8))
        """
        if why := why_not_plain(linear):
            raise TypeError(
                f"linear must be a plain torch.nn.Linear without an adapter; this one {why}"
            )
        # First, so that a warning that is an error leaves the linear as it was.
        warn_about_layer(cls, adapter, linear.out_features, linear.in_features)
        layer = cls._from(linear, adapter, adapter_dtype)
        if layer.adapter.residual:
            shape = tuple(layer.weight.shape)
            warnings.warn(
                f"{layer.adapter}: the weight {shape} shared with the linear now holds the "
                "residual",
                stacklevel=2,
            )
        return layer

    def _adopt(self, base: Any) -> None:
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)

    def _W(self) -> torch.Tensor:
        try:
            return self._parameters["weight"]
        except KeyError:
            return self.weight

    def _new_base(self) -> nn.Linear:
        has_bias = self.bias is not None
        return nn.Linear(self.in_features, self.out_features, has_bias, device="meta")


class Conv1D(AdapterLinearBase):
    """transformers' Conv1D (GPT-2's linear, its weight [K,N]) with an adapter, made by adapt."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y [...,N] for x [...,K]."""
        return super().forward(x)

    def _adopt(self, base: Any) -> None:
        self.nx, self.nf = base.weight.shape
        self.weight = base.weight
        self.register_parameter("bias", base.bias)

    def _W(self) -> torch.Tensor:
        return self.weight.t()

    def extra_repr(self) -> str:
        """Return the line of repr()."""
        return f"nx={self.nx}, nf={self.nf}{super().extra_repr()}"


def _dropout_module(adapter: Adapter) -> nn.Module:
    return nn.Dropout(adapter.dropout) if adapter.dropout else nn.Identity()


def probability(dropout: nn.Module) -> float:
    """The probability that a layer's lora_dropout drops with now."""
    if not isinstance(dropout, nn.Dropout):
        kind = f"{type(dropout).__module__}.{type(dropout).__qualname__}"
        raise TypeError(f"lora_dropout must be an nn.Dropout or an nn.Identity, not a {kind}")
    return dropout.p if dropout.training else 0.0


def why_not_plain(linear: nn.Module) -> str | None:
    """Return why a lorafast.Linear cannot replace this module, or None."""
    kind = f"{type(linear).__module__}.{type(linear).__qualname__}"
    if not isinstance(linear, nn.Linear) or not _has_plain_forward(type(linear)):
        return f"is a {kind}"
    if isinstance(linear, NonDynamicallyQuantizableLinear):
        return f"is a {kind}, whose weight nn.MultiheadAttention reads without calling it"
    for name in ("weight", "bias"):
        if not isinstance(getattr(linear, name), nn.Parameter | None):
            return f"is a {kind} whose {name} is no Parameter"
    return None


def _has_plain_forward(kind: type[nn.Linear]) -> bool:
    """True if the forward of a class computes x Wᵀ + bias, and nothing else."""
    names = (kind.__module__.rpartition(".")[2], kind.__qualname__)
    return kind.forward is nn.Linear.forward or names in _PLAIN_FORWARDS
