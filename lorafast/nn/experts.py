"""lorafast.Experts: the linear layers of experts as one weight, with an adapter for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lorafast.engine import checks
from lorafast.engine.grouped import ops as grouped_ops
from lorafast.engine.grouped.call import grouped_linear, grouped_linear_checked
from lorafast.engine.grouped.groups import Groups
from lorafast.engine.problem import CallOptions, LayerTensors
from lorafast.engine.weight_norm import NormPolicy
from lorafast.methods.adapter import Adapter, TensorSpec
from lorafast.methods.lamda import LaMDA
from lorafast.methods.lora_ga import LoRAGA
from lorafast.nn.linear import AdapterLinearBase, probability
from lorafast.nn.size_warnings import warn_about_layer
from lorafast.nn.stacked_linear import StackedLinear, product

SHARED = (None, "A", "B")


class Experts(AdapterLinearBase, StackedLinear):
    """The linear layers of experts with an adapter each: y = gain_e⊙(x W_eᵀ + s·h' B_eᵀ) + bias_e.

    It is called with rows sorted by expert, and computes what lorafast.grouped_linear does.
    Parameters: weight [E,N,K] (transposed: [E,K,N]) and bias [E,N], frozen; lora_A [E,R,K], lora_B
    [E,N,R], and by method lora_core [E,R,R], lora_magnitude [E,N], lora_bias [E,N]. Adapters are
    LoRA, DoRA and LaMDA; each expert's starts as that of a lorafast.Linear. State dicts, the meta
    device, merge and unmerge are as in lorafast.Linear; an expert without rows gets gradients of
    zero.

    Args:
        num_experts: E.
        in_features: K.
        out_features: N.
        bias: True for biases [E,N].
        adapter: the adapter, such as lorafast.LoRA(r=16); None is lorafast.LoRA().
        device: device of all tensors.
        dtype: dtype of weight and bias: fp64, fp32, bf16 or fp16.
        adapter_dtype: dtype of the adapter's tensors; None is fp32 on a bf16 or fp16 base, else
            the base's dtype.
        transposed: True for a weight [E,K,N]; False for [E,N,K].
        shared: "A" or "B": all experts share this factor, [R,K] or [N,R]; None: none.

    Raises:
        TypeError: adapter is no adapter, or a dtype is not supported.
        ValueError: the adapter does not fit the weight, or experts cannot have it.

    Example:
        experts = lorafast.Experts(4, 32, 16, adapter=lorafast.LoRA(r=2, dropout=0.05))
        offsets = torch.tensor([0, 3, 3, 5, 9], dtype=torch.int32)
        y = experts(torch.randn(9, 32), offsets)
        y.sum().backward()

    Source:
        arXiv:2106.09685, arXiv:2402.09353, arXiv:2406.12832
    """

    shared: str | None = None

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        adapter: Adapter | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        transposed: bool = False,
        shared: str | None = None,
    ) -> None:
        StackedLinear.__init__(
            self, num_experts, in_features, out_features, bias, device, dtype, transposed
        )
        warn_about_layer(type(self), adapter, out_features, in_features)
        self.shared = shared
        self._attach(adapter, adapter_dtype)

    @classmethod
    def from_parameter(
        cls,
        weight: torch.Tensor,
        adapter: Adapter | None = None,
        transposed: bool = False,
        bias: torch.Tensor | None = None,
        adapter_dtype: torch.dtype | None = None,
        shared: str | None = None,
    ) -> Experts:
        """Return a layer on the memory of a weight, frozen, with an adapter.

        Args:
            weight: weights [E,N,K], or [E,K,N] with transposed=True. A Parameter becomes the
                layer's own, and is frozen; an init that leaves a residual rewrites it.
            adapter: the adapter; None is lorafast.LoRA().
            transposed: how the weight is laid out.
            bias: biases [E,N], or None.
            adapter_dtype: dtype of the adapter's tensors, as in the constructor.
            shared: the factor that all experts share, as in the constructor.

        Returns:
            The layer.

        Raises:
            TypeError: weight or bias is no floating tensor, or adapter no adapter.
            ValueError: a shape does not fit, or experts cannot have the adapter.

        Example:
            weight = torch.nn.Parameter(torch.randn(4, 16, 32))
            experts = lorafast.Experts.from_parameter(weight, lorafast.LoRA(r=2))
        """
        checks.floating("weight", weight)
        if weight.dim() != 3 or not weight.shape[0]:
            raise ValueError(f"weight {tuple(weight.shape)} must be [E>0, N, K] or [E>0, K, N]")
        N, K = weight.shape[1:] if not transposed else weight.shape[:0:-1]
        if bias is not None:
            checks.floating("bias", bias)
            if bias.shape != (weight.shape[0], N):
                shape = (weight.shape[0], N)
                raise ValueError(f"bias {tuple(bias.shape)} must be {shape} for N={N}")
        warn_about_layer(cls, adapter, N, K)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.shared = shared
        own_bias = None if bias is None else _as_parameter(bias)
        layer._set_tensors(_as_parameter(weight), own_bias, transposed)
        layer._attach(adapter, adapter_dtype)
        return layer

    def forward(  # type: ignore[override]  # rows are sorted by expert
        self, x: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return y [S,N] for x [S,K], its rows sorted by expert.

        Args:
            x: activation [S,K].
            offsets: int32 [E+1]: the rows of expert e are offsets[e] to offsets[e+1].
            rows: int64 [S], the index of each row before it was sorted, on which its dropout mask
                depends, as in lorafast.grouped_linear.

        Returns:
            y [S,N], a fresh tensor.

        Raises:
            ValueError: a shape does not fit; the message names the argument.

        Example:
            experts = lorafast.Experts(2, 32, 16)
            y = experts(torch.randn(5, 32), torch.tensor([0, 2, 5], dtype=torch.int32))
        """
        groups = Groups(offsets, rows)
        if self._merged is not None or self.disabled:
            return self._base_rows(x, groups)
        dropout, p, frozen_columns = self._modules["lora_dropout"], 0.0, 0
        if type(dropout) is not nn.Identity:
            p = probability(dropout)
        tensors, adapter = self._tensors(), self.adapter
        if self.freezing:
            B, frozen_columns = self._call_columns(tensors.lora_B)
            tensors = tensors._replace(lora_B=B)
        options = CallOptions(
            self.scaling, p, adapter.axis, adapter.dropout_on, adapter.keep, frozen_columns
        )
        return grouped_linear_checked(
            x, groups, tensors._replace(scale=None), options, detach_norm=adapter.detach_norm
        )

    @property
    def runs_as_base(self) -> bool:
        """True if the layer computes what its weight and bias alone do: merged, or disabled."""
        return (self._merged is not None or self.disabled) and self._removed_delta is None

    def _base_rows(self, x: torch.Tensor, groups: Groups) -> torch.Tensor:
        """Return the output of the merged or disabled layer."""
        if self._removed_delta is None:
            return product(x, groups, self._W(), self.bias)
        factors, options = self._removed_delta
        return grouped_linear(
            x, groups.offsets, self._W(), self.bias, factors.lora_A, factors.lora_B, factors.core,
            scaling=options.scaling if factors.scale is None else factors.scale,
        )  # fmt: skip

    def _check_base(self, weight: torch.Tensor, adapter: Adapter) -> None:
        if self.shared not in SHARED:
            raise ValueError(f"shared={self.shared!r} must be 'A', 'B' or None")
        shape = tuple(weight.shape)
        if weight.dim() != 3 or 0 in shape:
            raise ValueError(f"weight {shape} must be [E>0, N>0, K>0]")
        if why := why_not_adapter(adapter, self.shared):
            raise ValueError(f"{adapter} on experts {shape}: {why}")

    def _tensor_specs(self) -> dict[str, TensorSpec]:
        return stacked_specs(self.adapter, tuple(self._W().shape), self.shared)

    def _initial_values(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        experts = [self.adapter.init_tensors(own) for own in weight]
        shared = f"lora_{self.shared}"
        return {
            name: value if name == shared else torch.stack([own[name] for own in experts])
            for name, value in experts[0].items()
        }

    def _norm_of(self, tensors: LayerTensors, policy: NormPolicy | None = None) -> torch.Tensor:
        return grouped_ops.row_norm(tensors, float(self._options().scaling))

    def _W(self) -> torch.Tensor:
        return StackedLinear._W(self)

    def _new_base(self) -> nn.Module:
        sizes = (self.num_experts, self.in_features, self.out_features, self.bias is not None)
        return StackedLinear(*sizes, device="meta", transposed=self.transposed)

    def extra_repr(self) -> str:
        """Return the line of repr()."""
        shared = f", shared={self.shared!r}" if self.shared else ""
        return f"{super().extra_repr()}{shared}"


def why_not_adapter(adapter: Adapter, shared: str | None = None) -> str | None:
    """Return why experts cannot have an adapter, or None. shared: the factor that they share."""
    if not adapter.supports_experts:
        return f"{type(adapter).__name__} is made for single layers; take LoRA, DoRA or LaMDA"
    if adapter.axis == "in":
        return "axis='in' is not offered for experts; use axis='out'"
    if adapter.cache_norm:
        return "the norm of experts is computed in every call: no cache_norm"
    init: Any = getattr(adapter, "init", None)
    if isinstance(init, LoRAGA):
        return "LoRAGA has gradients of single layers; take PiSSA or 'kaiming'"
    from_weight = not isinstance(init, str) or (isinstance(adapter, LaMDA) and init != "repo")
    if shared and from_weight:
        return f"its start is made from each expert's weight, and all share {shared}"
    return None


def stacked_specs(
    adapter: Adapter, shape: tuple[int, ...], shared: str | None = None
) -> dict[str, TensorSpec]:
    """Return the specification of every adapter tensor of experts with a weight [E,N,K]."""
    E, N, K = shape
    return {
        name: spec if name == f"lora_{shared}" else spec._replace(shape=(E, *spec.shape))
        for name, spec in adapter.tensor_specs(N, K).items()
    }


def _as_parameter(tensor: torch.Tensor) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.detach(), requires_grad=False)
