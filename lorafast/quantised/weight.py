"""A quantised weight: gives W [N,K], whole or in blocks of rows, in the dtype that is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn


class QuantisedWeight(ABC):
    """The weight of a module of another library, which holds it in few bits.

    It reads the module's tensors when it is asked, so it stays right when the module moves to
    another device. A format is a subclass in a file of its own.

    Attributes:
        module: the quantised layer.
        kind: what it is, in words, such as "bitsandbytes nf4, double quantisation".
    """

    kind: str

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @classmethod
    @abstractmethod
    def matches(cls, module: nn.Module) -> bool:
        """Return True if the module holds a weight of this format. Imports no library."""

    @abstractmethod
    def why_not(self) -> str | None:
        """Return why this weight cannot be read, or None.

        Such as an absmax of the wrong shape or a missing code, with both shapes in words. Without
        a reason, the other functions work.
        """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """N and K."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weight is."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype in which the layer computes, or that the weight had before."""

    @abstractmethod
    def whole(self, out: torch.Tensor) -> torch.Tensor:
        """Write W into out and return it.  out [N,K], dense, fp32, bf16 or fp16"""

    @abstractmethod
    def rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Return rows start .. stop of W, a new tensor.  -> [stop - start, K]"""

    def why_not_requantised(self) -> str | None:
        """Return why requantise does not work, or None."""
        return f"{self.kind} cannot be quantised again"

    def requantise(self, weight: torch.Tensor) -> None:
        """Quantise W [N,K] in this format, with this format's options, into the module in place."""
        raise NotImplementedError(self.why_not_requantised())
