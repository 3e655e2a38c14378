"""A quantised weight: gives W [N,K], whole or in blocks of rows, in the dtype that is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from lorafast.engine.row_blocks import row_blocks

# Why a weight that has no memory cannot be read.
ON_META = "its weight is on the meta device: load it first"


class QuantisedWeight(ABC):
    """The weight of another library's module, which holds it in few bits.

    It keeps no tensor: it reads the module's tensors at each call, and so stays right when they
    move, are loaded or are packed differently. A format is a subclass in a file of its own.

    W is what the library's own dequantisation gives, in its dtype, then cast to the dtype that is
    asked for.

    Attributes:
        module: the quantised layer.
    """

    # What W can be dequantised into.
    DTYPES = (torch.float32, torch.bfloat16, torch.float16)

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @classmethod
    @abstractmethod
    def matches(cls, module: nn.Module) -> bool:
        """Return True if the module holds a weight of this format. Imports no library."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """What the weight is, in words, such as "bitsandbytes nf4, double quantisation"."""

    @abstractmethod
    def why_not(self) -> str | None:
        """Return why the weight cannot be read, or None.

        A tensor of the wrong shape is named with its shape and the right one. It reads no values
        from a device. Where it is None, `device`, `dtype`, `whole` and `rows` work.
        """

    def require_readable(self) -> None:
        """Raise RuntimeError, with the words of `why_not`, if the weight cannot be read."""
        if why := self.why_not():
            raise RuntimeError(f"the weight in {self.kind} cannot be read: {why}")

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.module.out_features, self.module.in_features

    @property
    def device(self) -> torch.device:
        """The device of the weight."""
        return self.packed.device

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype in which the layer computes where it says so, else that of its own W."""

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The dtype that the layer is told to compute in, whatever x's is; None: in x's."""
        return getattr(self.module, "compute_dtype", None)

    @property
    def packed(self) -> torch.Tensor:
        """The module's tensor of numbers in few bits."""
        return self.module.weight

    def whole(self, out: torch.Tensor) -> torch.Tensor:
        """Write W into out and return it.  out [N,K], dense, fp32, bf16 or fp16"""
        with torch.no_grad():
            for block in row_blocks(out):
                out[block] = self.rows(block.start, block.stop, out.dtype)
        return out

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return W [N,K], a new tensor in the dtype, None for this weight's.

        Without values where the weight is on the meta device.
        """
        out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.device)
        return out if out.is_meta else self.whole(out)

    def stand_in(self) -> torch.Tensor:
        """Return a tensor of W's shape, dtype and device without its values.

        It takes the memory of one row. Its dtype is fp32 where the weight cannot be read.
        """
        N, K = self.shape
        dtype = torch.float32 if self.why_not() else self.dtype
        return torch.empty(1, K, dtype=dtype, device=self.device).expand(N, K)

    @abstractmethod
    def rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Return rows start .. stop of W, no view of the module's tensors.  -> [stop - start, K]"""

    def why_not_requantised(self) -> str | None:
        """Return why `requantise` does not work, or None."""
        return f"{self.kind} cannot be quantised again"

    def requantise(self, weight: torch.Tensor) -> None:
        """Quantise W [N,K] with the options of this weight, and put it into the module in place.

        Raises:
            NotImplementedError: the format has no quantiser here, or the weight cannot be read.
        """
        if reason := self.why_not_requantised():
            raise NotImplementedError(reason)
        with torch.no_grad():
            self._put(weight.detach().to(self.device))

    def _put(self, weight: torch.Tensor) -> None:
        """Quantise W [N,K], which is on the weight's device, into the module."""
        raise NotImplementedError


def require_activation(x: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise TypeError unless a weight can be dequantised for a product with x in this dtype."""
    if dtype not in QuantisedWeight.DTYPES:
        allowed = ", ".join(map(str, QuantisedWeight.DTYPES))
        raise TypeError(f"x is {x.dtype}; beside a quantised weight it must be of {allowed}")


def inherits(module: nn.Module, package: str, name: str) -> bool:
    """True if the module's class is, or derives from, the named class of a top-level package."""
    return any(
        base.__name__ == name and base.__module__.partition(".")[0] == package
        for base in type(module).__mro__
    )


def wrong_shape(what: str, tensor: torch.Tensor | None, right: tuple[int, ...]) -> str | None:
    """Return what is wrong with the shape of a tensor, or None."""
    if tensor is None:
        return f"its {what} is missing; it should be {list(right)}"
    if tuple(tensor.shape) != right:
        return f"its {what} is {list(tensor.shape)} and should be {list(right)}"
    return None
