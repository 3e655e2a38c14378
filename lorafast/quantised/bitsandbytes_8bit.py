"""bitsandbytes.nn.Linear8bitLt with int8 weights: W = CB · SCB / 127, one SCB a row.

The first forward moves CB and SCB from the weight to the layer's state; CB stays the weight's data.
"""

from __future__ import annotations

import torch
from torch import nn

from lorafast.quantised.weight import ON_META, QuantisedWeight, inherits, wrong_shape

# The number by which bitsandbytes multiplies instead of dividing by 127.
_STEP = 7.874015718698502e-3


class BitsAndBytes8Bit(QuantisedWeight):
    """The weight of a bitsandbytes Linear8bitLt with has_fp16_weights=False.

    W is computed in fp32, as `bitsandbytes.functional.int8_vectorwise_dequant` does, and rounded
    once. The threshold says how x is split, and has no part in W.
    """

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Return True for a Linear8bitLt, quantised already or not."""
        return inherits(module, "bitsandbytes", "Linear8bitLt")

    @property
    def kind(self) -> str:
        """What the weight is, in words."""
        return "bitsandbytes int8"

    def why_not(self) -> str | None:
        """Return why the weight cannot be read, or None."""
        weight = self.module.weight
        if weight.is_meta:
            return ON_META
        if self.module.state.has_fp16_weights:
            return "it has has_fp16_weights=True: its weight is not quantised, and may train"
        if weight.dtype != torch.int8:
            return "its weight is not quantised yet: move the layer to its device first"
        return wrong_shape("weight", weight, self.shape) or wrong_shape(
            "SCB", self._row_max(), self.shape[:1]
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the bias, or fp16, from which bitsandbytes quantises."""
        return torch.float16 if self.module.bias is None else self.module.bias.dtype

    def whole(self, out: torch.Tensor) -> torch.Tensor:
        """Write W into out, in fp32 without a temporary, and return it."""
        if out.dtype != torch.float32:
            return super().whole(out)
        self.require_readable()
        with torch.no_grad():
            # torch multiplies mixed dtypes slowly.
            return out.copy_(self.module.weight).mul_(self._row_max()[:, None]).mul_(_STEP)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Return rows start .. stop of W, rounded once from fp32."""
        self.require_readable()
        with torch.no_grad():
            row_max = self._row_max()[start:stop, None]
            block = self.module.weight.detach()[start:stop].float()
            return block.mul_(row_max).mul_(_STEP).to(dtype)

    def why_not_requantised(self) -> str | None:
        """Return why the weight cannot be read; None if it can."""
        return self.why_not()

    def _put(self, weight: torch.Tensor) -> None:
        from bitsandbytes.functional import int8_vectorwise_quant

        held, state = self.module.weight, self.module.state
        held.data, row_max, _ = int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        # As after the layer's first move to a device: its next forward takes them into the state.
        held.CB, held.SCB = held.data, row_max
        state.reset_grads()

    def _row_max(self) -> torch.Tensor | None:
        row_max = getattr(self.module.weight, "SCB", None)
        return self.module.state.SCB if row_max is None else row_max
