"""A linear layer that holds its frozen weight in FP8 with one scale a row, in torch alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from lorafast.engine import weight_buffers
from lorafast.engine.precision import activation_dtype
from lorafast.quantised.fp8 import FP8
from lorafast.quantised.weight import require_activation
from lorafast.runtime.torch_internals import below_autocast

_DTYPE = torch.float8_e4m3fn


class FP8Linear(nn.Module):
    """y = x Wᵀ + bias, where W = weight · weight_scale is dequantised in forward and in backward.

    W is made in a buffer that the next layer uses again; autograd keeps neither W nor x. The values
    of weight and weight_scale are whatever memory held until a format's requantise sets them.
    Casts of the module (`model.to(torch.bfloat16)`) leave both as they are.

    Args:
        in_features: K.
        out_features: N.
        bias: a Parameter [N], or None.
        dense_dtype: the dtype that the weight had before it was quantised.
        device: the device of the weight.

    Attributes:
        weight: Parameter [N,K] in e4m3, which does not train.
        weight_scale: buffer [N,1] in fp32.
    """

    bias: nn.Parameter | None
    weight_scale: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None = None,
        dense_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.dense_dtype = dense_dtype
        weight = torch.empty(out_features, in_features, dtype=_DTYPE, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        scale = torch.empty(out_features, 1, dtype=torch.float32, device=device)
        self.register_buffer("weight_scale", scale)
        self.register_parameter("bias", bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return y [...,N] in x's dtype or autocast's, for input x [...,K] in fp32, bf16, fp16."""
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            # Outside of the graph, which would keep the dequantised weight.
            return torch.compiler.disable(self._product)(input)
        return self._product(input)

    def _product(self, input: torch.Tensor) -> torch.Tensor:
        dtype = activation_dtype(input)
        require_activation(input, dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        if not weight_buffers.is_observed():
            return _Product.apply(input.to(dtype), bias, FP8(self))
        # torch's own operations on a fresh tensor: what observes them may keep it.
        with weight_buffers.borrow(FP8(self), dtype) as weight:
            return nn.functional.linear(input.to(dtype), weight, bias)

    def extra_repr(self) -> str:
        """Return the line of repr()."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FP8Linear:
        """Move the tensors, and cast the bias alone."""
        integers = {self.weight: torch.uint8, self.weight_scale: torch.int32}

        def apply(tensor: torch.Tensor) -> torch.Tensor:
            # What casts floating-point tensors leaves integers as they are.
            integer = integers.get(tensor)
            return fn(tensor) if integer is None else fn(tensor.view(integer)).view(tensor.dtype)

        dtype = fn(torch.empty(0, dtype=self.dense_dtype)).dtype
        self.dense_dtype = dtype if dtype in FP8.DTYPES else self.dense_dtype
        return super()._apply(apply, recurse)


class _Product(torch.autograd.Function):
    """x Wᵀ + bias with W from a shared buffer."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, source: FP8) -> torch.Tensor:
        ctx.source, ctx.dtype = source, x.dtype
        with weight_buffers.borrow(source, x.dtype) as weight:
            return nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_x = grad_bias = None
        # In the dtypes of forward, whatever autocast is where backward runs.
        with below_autocast():
            if ctx.needs_input_grad[0]:
                with weight_buffers.borrow(ctx.source, ctx.dtype) as weight:
                    grad_x = grad @ weight
            if ctx.needs_input_grad[1]:
                grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, grad_bias, None
