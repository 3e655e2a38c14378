"""Layers of other packages that have a function which dequantises their weight: HQQ, GPTQ, AWQ.

A layer is known by the package of its class and called through its own function. Those packages
whose layers have none are named too, with the reason.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from lorafast.quantised.weight import ON_META, QuantisedWeight


def _awq_gemm(layer: Any) -> torch.Tensor:
    # The layer's class comes from this package, which is imported therefore.
    packing = sys.modules["awq.utils.packing_utils"]
    return packing.dequantize_gemm(
        layer.qweight, layer.qzeros, layer.scales, layer.w_bit, layer.group_size
    )


class _Function(NamedTuple):
    """How some of a package's layers dequantise their weight."""

    # The classes for which it is right; others of the package pack differently.
    classes: tuple[str, ...]
    call: Callable[[Any], torch.Tensor]
    # True if it gives W as [K,N], at times with more rows than K.
    k_major: bool


# Package -> its function, or None where its layers have none.
_PACKAGES: dict[str, _Function | None] = {
    "aqlm": None,
    "auto_gptq": None,
    "awq": _Function(("WQLinear_GEMM",), _awq_gemm, True),
    "compressed_tensors": _Function(
        ("CompressedLinear",), lambda layer: layer.compressor.decompress_module(layer), False
    ),
    "eetq": None,
    "gptqmodel": _Function(
        (
            "TorchInt8Linear",
            "TorchLinear",
            "TorchQuantLinear",
            "TritonV2Linear",
            "TritonV2QuantLinear",
        ),
        lambda layer: layer.dequantize_weight(),
        True,
    ),
    "hqq": _Function(("HQQLinear",), lambda layer: layer.dequantize(), False),
    "optimum": _Function(("QLinear",), lambda layer: layer.qweight.dequantize(), False),
}
# Names of the packed weight.
_TENSORS = ("qweight", "W_q", "weight_packed", "codes", "weight")


class DequantisingLayer(QuantisedWeight):
    """The weight of a layer through the layer's own function, which makes all of W each time.

    `rows` costs as much as `whole`. The function's result is cast once.
    """

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Return True for a linear layer of a package that is known here."""
        return _package(module) is not None and hasattr(module, "in_features")

    @property
    def kind(self) -> str:
        """The package and the class of the layer."""
        return f"{_package(self.module)} {type(self.module).__name__}"

    def why_not(self) -> str | None:
        """Return why the weight cannot be read, or None."""
        if _function(self.module) is None:
            return f"{self.kind} has no function that dequantises its weight"
        if (packed := self._find_packed()) is None:
            return f"{self.kind} holds no packed weight"
        return ON_META if packed.is_meta else None

    @property
    def packed(self) -> torch.Tensor:
        """The layer's tensor of numbers in few bits, under whichever name its package has for it.

        RuntimeError if there is none.
        """
        if (found := self._find_packed()) is None:
            raise RuntimeError(f"{self.kind} holds no packed weight")
        return found

    @property
    def dtype(self) -> torch.dtype:
        """The layer's compute_dtype, or that of its scales; else fp16."""
        found = getattr(self.module, "compute_dtype", None)
        scales = getattr(self.module, "scales", None)
        return found or (torch.float16 if scales is None else scales.dtype)

    def whole(self, out: torch.Tensor) -> torch.Tensor:
        """Write W into out and return it."""
        return out.copy_(self._dequantised())

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Return rows start .. stop of W."""
        return self._dequantised()[start:stop].to(dtype, copy=True).contiguous()

    def _dequantised(self) -> torch.Tensor:
        self.require_readable()
        function = _function(self.module)
        N, K = self.shape
        with torch.no_grad():
            found = function.call(self.module).detach()
            weight = found[:K].T if function.k_major else found
        if weight.shape != (N, K):
            layout = [K, N] if function.k_major else [N, K]
            raise ValueError(f"{self.kind} dequantised to {list(found.shape)}, not {layout}")
        return weight

    def _find_packed(self) -> torch.Tensor | None:
        for name in _TENSORS:
            if isinstance(found := getattr(self.module, name, None), torch.Tensor):
                return found
        return None


def _package(module: nn.Module) -> str | None:
    """Return the known package from which the module's class comes."""
    for base in type(module).__mro__:
        if (package := base.__module__.partition(".")[0]) in _PACKAGES:
            return package
    return None


def _function(module: nn.Module) -> _Function | None:
    function = _PACKAGES[_package(module)]
    names = {base.__name__ for base in type(module).__mro__}
    return function if function is not None and names & {*function.classes} else None
