"""The linear layers of experts without an adapter: StackedLinear, and its product."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from lorafast.engine.grouped import torch_product
from lorafast.engine.grouped.groups import Groups
from lorafast.engine.precision import activation_dtype


class StackedLinear(nn.Module):
    """The linear layers of experts, y = x W_eᵀ + bias_e, as one Parameter.

    Args:
        num_experts: E.
        in_features: K.
        out_features: N.
        bias: True for biases [E,N].
        device: device of all tensors.
        dtype: dtype of weight and bias.
        transposed: True for a weight [E,K,N]; False for [E,N,K].
    """

    weight: torch.Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        shape = (in_features, out_features) if transposed else (out_features, in_features)
        weight = torch.empty(num_experts, *shape, device=device, dtype=dtype)
        biases = torch.empty(num_experts, out_features, device=device, dtype=dtype)
        self._set_tensors(nn.Parameter(weight), nn.Parameter(biases) if bias else None, transposed)
        self.reset_parameters()

    def _set_tensors(
        self, weight: nn.Parameter, bias: nn.Parameter | None, transposed: bool
    ) -> None:
        self.transposed = transposed
        self.num_experts, self.out_features, self.in_features = weight.shape
        if transposed:
            self.in_features, self.out_features = weight.shape[1:]
        self.weight = weight
        self.register_parameter("bias", bias)

    def reset_parameters(self) -> None:
        """Set every weight and bias as torch.nn.Linear does: from U(-1/√K, 1/√K)."""
        bound = 1 / math.sqrt(max(self.in_features, 1))
        for tensor in (self.weight, self.bias):
            if tensor is not None:
                nn.init.uniform_(tensor, -bound, bound)

    def _W(self) -> torch.Tensor:
        """Return the weight as [E,N,K]: itself, or a view of it."""
        return self.weight.transpose(1, 2) if self.transposed else self.weight

    def forward(
        self, x: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return y [S,N] for x [S,K], its rows sorted by expert.

        Args:
            x: activation [S,K].
            offsets: int32 [E+1]: the rows of expert e are offsets[e] to offsets[e+1].
            rows: not used; lorafast.Experts takes it.

        Returns:
            y [S,N].
        """
        return product(x, Groups(offsets, rows), self._W(), self.bias)

    def extra_repr(self) -> str:
        """Return the line of repr()."""
        sizes = (
            f"num_experts={self.num_experts}, in_features={self.in_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}"
        )
        return f"{sizes}, transposed=True" if self.transposed else sizes


def product(
    x: torch.Tensor, groups: Groups, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return x W_eᵀ + bias_e of each row's expert, on plain autograd.

    torch's grouped product computes it on a GPU, without reading an offset on the host, where it
    takes the dtype and the sizes; a loop over experts elsewhere.

    Args:
        x: activation [S,K]. Under autocast it is cast.
        groups: the rows of each expert.
        weight: weights [E,N,K], of any strides.
        bias: biases [E,N], or None.
    """
    x = x.to(activation_dtype(x))
    weight = weight.to(x.dtype)
    if not x.is_cuda or torch_product.why_not(x, weight.transpose(1, 2)):
        groups.check(x.shape[0])
        parts = [
            F.linear(x[rows], weight[e], None if bias is None else bias[e].to(x.dtype))
            for e, rows in groups.slices()
        ]
        return torch.cat(parts) if parts else x.new_empty(0, weight.shape[1])
    y = torch_product.product(groups, x, weight.transpose(1, 2))
    return y if bias is None else y + groups.of_rows(bias.to(x.dtype), x.shape[0])
