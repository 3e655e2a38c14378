"""FP8 weights with the scales beside them, as transformers and compressed-tensors load them.

    W = weight · scale          one scale for the tensor, a row, a group of a row or a block

The scale is `weight_scale_inv` (transformers' FP8Linear) or `weight_scale` (its FbgemmFp8Linear,
compressed-tensors); W is the product in either case.
"""

from __future__ import annotations

import torch
from torch import nn

from lorafast.engine.row_blocks import row_blocks
from lorafast.quantised.weight import ON_META, QuantisedWeight

_FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
_SCALES = ("weight_scale_inv", "weight_scale")


class FP8(QuantisedWeight):
    """The FP8 weight [N,K] of a linear layer. W is computed in fp32 and rounded once."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Return True if the module is a linear layer whose weight is a plain FP8 tensor."""
        weight = getattr(module, "weight", None)
        return (
            type(weight) in (torch.Tensor, nn.Parameter)
            and weight.dtype in _FP8
            and hasattr(module, "in_features")
        )

    @property
    def kind(self) -> str:
        """The dtype, and the size of the blocks that have one scale each."""
        name = str(self.module.weight.dtype).removeprefix("torch.")
        scale = self._scale()
        block = None if scale is None else self._block(scale)
        if block is None:
            return name
        known = {(1, self.shape[1]): "a scale for each row", self.shape: "one scale"}
        return f"{name}, {known.get(block, f'a scale for each {block[0]} x {block[1]} block')}"

    def why_not(self) -> str | None:
        """Return why the weight cannot be read, or None."""
        weight, scale = self.module.weight, self._scale()
        if weight.is_meta:
            return ON_META
        if weight.dtype not in _FP8:
            return f"its weight was cast to {weight.dtype}, which rounds the scales beside it too"
        if tuple(weight.shape) != self.shape:
            return f"its weight is {list(weight.shape)} and should be {list(self.shape)}"
        if scale is None:
            return f"it has neither {' nor '.join(_SCALES)}"
        if self._block(scale) is None:
            declared = self._declared_block()
            blocks = f"blocks of {list(declared)}" if declared else "rows or groups of a row"
            return f"its scale is {list(scale.shape)}, no grid of {blocks} over {list(self.shape)}"
        return None

    @property
    def dtype(self) -> torch.dtype:
        """The module's dense_dtype; else the dtype of a bias of 16 or more bits; else bf16."""
        if dense := getattr(self.module, "dense_dtype", None):
            return dense
        bias = getattr(self.module, "bias", None)
        return torch.bfloat16 if bias is None or bias.itemsize < 2 else bias.dtype

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Return rows start .. stop of W, rounded once from fp32."""
        self.require_readable()
        with torch.no_grad():
            scale = self._scale()
            height, width = self._block(scale)
            values = self.module.weight.detach()[start:stop].float()
            first = start // height
            grid = _as_fp32(_grid(scale)[first : -(-stop // height)])
            grid = grid.repeat_interleave(height, dim=0)[start - first * height :][: stop - start]
            return _scale_columns(values, grid, width).to(dtype)

    def why_not_requantised(self) -> str | None:
        """Return why `requantise` does not work: scales that are powers of two."""
        if reason := self.why_not():
            return reason
        if self._scale().itemsize == 1:
            return f"{self.kind} cannot be quantised again: its scales are powers of two"
        return None

    def _put(self, weight: torch.Tensor) -> None:
        height = self._block(self._scale())[0]
        # The rows of whole blocks, so that no fp32 copy has the weight's size.
        step = max(1, next(row_blocks(weight), slice(0, 1)).stop // height) * height
        for start in range(0, self.shape[0], step):
            self._put_rows(weight[start : start + step], start)

    def _put_rows(self, rows: torch.Tensor, start: int) -> None:
        """Quantise rows that begin with row `start`, the first of a block."""
        held, scale = self.module.weight, self._scale()
        (N, K), (height, width) = rows.shape, self._block(scale)
        first, count, columns = start // height, -(-N // height), _grid(scale).shape[1]
        grid = _grid(scale)[first : first + count]
        padded = nn.functional.pad(
            rows.float(), (0, columns * width - K, 0, count * height - N)
        ).view(count, height, columns, width)
        # A block of zeros has any scale but 0.
        largest = padded.abs().amax(dim=(1, 3)).clamp_(min=1e-12)
        grid.copy_(largest / torch.finfo(held.dtype).max)
        # The scale as it was stored, perhaps rounded down; beyond the largest value FP8 has none.
        values = padded / grid.float()[:, None, :, None]
        values.clamp_(-torch.finfo(held.dtype).max, torch.finfo(held.dtype).max)
        held[start : start + N].copy_(values.view(count * height, columns * width)[:N, :K])

    def _scale(self) -> torch.Tensor | None:
        for name in _SCALES:
            if (scale := getattr(self.module, name, None)) is not None:
                return scale
        return None

    def _block(self, scale: torch.Tensor) -> tuple[int, int] | None:
        """Return how many rows and columns share a scale; None if the shapes do not fit.

        Blocks of several rows must be declared: the last may be short, which the grid hides.
        """
        N, K = self.shape
        if scale.numel() == 1:
            return N, K
        if scale.dim() > 2:
            return None
        rows, columns = _grid(scale).shape
        if (rows, columns) == (N, 1):
            return 1, K
        block = self._declared_block()
        if block is None:
            return (1, K // columns) if rows == N and columns and K % columns == 0 else None
        return block if (-(-N // block[0]), -(-K // block[1])) == (rows, columns) else None

    def _declared_block(self) -> tuple[int, int] | None:
        """Return the block of transformers' block_size or of compressed-tensors' scheme."""
        arguments = getattr(getattr(self.module, "quantization_scheme", None), "weights", None)
        block = getattr(self.module, "block_size", None)
        block = block or getattr(arguments, "block_structure", None)
        return None if block is None else (block[0], block[1])


def _grid(scale: torch.Tensor) -> torch.Tensor:
    """The scales as a matrix with a row for each row of blocks."""
    return scale.view(-1, 1) if scale.dim() < 2 else scale


def _as_fp32(scale: torch.Tensor) -> torch.Tensor:
    """Scales in fp32; bytes are the exponents of powers of two."""
    if scale.dtype == torch.uint8:
        return (scale.float() - 127.0).exp2()
    return scale.float()


def _scale_columns(values: torch.Tensor, grid: torch.Tensor, width: int) -> torch.Tensor:
    """Multiply each `width` columns by a column of the grid, in place; the last may be fewer."""
    blocks = values.shape[1] // width
    whole = values[:, : blocks * width].unflatten(1, (blocks, width))
    whole.mul_(grid[:, :blocks, None])
    values[:, blocks * width :].mul_(grid[:, blocks:])
    return values
