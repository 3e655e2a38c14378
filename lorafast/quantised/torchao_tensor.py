"""torchao's quantised weights: tensor subclasses that dequantise themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lorafast.quantised.weight import ON_META, QuantisedWeight, wrong_shape

# Classes with qdata [N,K], scale and block_size, whose rows are again a tensor of the class.
_BLOCKED = ("Float8Tensor", "Int8Tensor", "IntxUnpackedToInt8Tensor")


class TorchaoTensor(QuantisedWeight):
    """The weight of a layer that torchao quantised: W is what its own `dequantize` gives.

    Where torchao quantises x too (`act_quant_kwargs`), that is no part of W.
    """

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Return True if the module is a linear layer whose weight is one of torchao's tensors."""
        weight = getattr(module, "weight", None)
        is_torchao = type(weight).__module__.partition(".")[0] == "torchao"
        return is_torchao and hasattr(module, "in_features")

    @property
    def kind(self) -> str:
        """The tensor's class, and whether the activations are quantised too."""
        weight = self.module.weight
        quantises_x = any(
            getattr(weight, name, None) is not None
            for name in ("act_quant_kwargs", "activation_quantization")
        )
        return f"torchao {type(weight).__name__}{', activations too' if quantises_x else ''}"

    def why_not(self) -> str | None:
        """Return why the weight cannot be read, or None."""
        weight = self.module.weight
        if weight.is_meta:
            return ON_META
        if not _dequantises(weight):
            return f"torchao's {type(weight).__name__} has no function that dequantises it"
        if getattr(weight, "act_pre_scale", None) is not None:
            return "its act_pre_scale scales x before the product: W alone is not the layer"
        if reason := wrong_shape("weight", weight, self.shape):
            return reason
        if type(weight).__name__ not in _BLOCKED:
            return None
        grid = tuple(n // b for n, b in zip(self.shape, _block(weight), strict=True))
        return wrong_shape("qdata", weight.qdata, self.shape) or wrong_shape(
            "scale", weight.scale, grid
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weight had before."""
        return self.module.weight.dtype

    def whole(self, out: torch.Tensor) -> torch.Tensor:
        """Write W into out and return it. A class that gives no rows makes a copy of its size."""
        if _gives_rows(self.module.weight):
            return super().whole(out)
        with torch.no_grad():
            return out.copy_(_dequantised(self.module.weight.detach()))

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Return rows start .. stop of W. A class that gives no rows dequantises all of them."""
        weight = self.module.weight.detach()
        with torch.no_grad():
            if _gives_rows(weight):
                return weight[start:stop].dequantize().to(dtype)
            return _dequantised(weight)[start:stop].to(dtype, copy=True)

    def why_not_requantised(self) -> str | None:
        """Return why `requantise` does not work: only int8 and float8 keep all their options."""
        weight = self.module.weight
        if reason := self.why_not():
            return reason
        if type(weight).__name__ not in ("Float8Tensor", "Int8Tensor"):
            return super().why_not_requantised()
        block = _block(weight)
        if block[0] > 1 and block != self.shape:
            return f"{self.kind} in blocks {list(block)} cannot be quantised again"
        return None

    def _put(self, weight: torch.Tensor) -> None:
        from torchao.quantization import MappingType
        from torchao.quantization.granularity import PerGroup, PerRow, PerTensor

        held = self.module.weight
        block = _block(held)
        if block == (1, self.shape[1]):
            granularity = PerRow()
        else:
            granularity = PerTensor() if block == self.shape else PerGroup(block[1])
        weight = weight.to(held.dtype)
        if type(held).__name__ == "Float8Tensor":
            options = {
                name: getattr(held, name)
                for name in ("mm_config", "kernel_preference", "act_quant_kwargs")
            }
            new = type(held).from_hp(weight, held.qdata.dtype, granularity, **options)
        else:
            options = {
                name: getattr(held, name)
                for name in ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point")
            }
            is_affine = held.zero_point is not None and bool(held.zero_point.any())
            mapping = MappingType.ASYMMETRIC if is_affine else MappingType.SYMMETRIC
            new = type(held).from_hp(
                weight, granularity, mapping, reduce_range=held.reduce_range, **options
            )
        held.copy_(new)


def _dequantises(weight: torch.Tensor) -> bool:
    """True if the class has a function of its own; torch.Tensor's is for torch's own dtypes."""
    return hasattr(weight, "get_original_weight") or (
        type(weight).dequantize is not torch.Tensor.dequantize
    )


def _dequantised(weight: torch.Tensor) -> torch.Tensor:
    # NF4Tensor's function named dequantize looks up codes.
    return getattr(weight, "get_original_weight", weight.dequantize)()


def _block(weight: Any) -> tuple[int, ...]:
    """Return the rows and columns of a block of the weight, all numbers of which have one scale.

    Float8Tensor's block_size is empty where one scale serves the whole tensor.
    """
    return tuple(weight.block_size or weight.shape)


def _gives_rows(weight: Any) -> bool:
    return type(weight).__name__ in _BLOCKED and _block(weight)[0] in (1, weight.shape[0])
