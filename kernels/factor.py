"""A factor as a product wants it: s·row_scale⊙F in the activation's dtype, each element rounded once, padded with zeros.

It lives for one call only, so nothing cast or folded is ever saved.
"""

import torch
import triton
import triton.language as tl

from lorafast.kernels import launch
from lorafast.problem import Scaling

BLOCK = 32


@triton.jit
def factor_kernel(
    factor_ptr, row_ptr, scale_ptr, out_ptr, rows, cols, width, stride_fi, stride_fj, stride_oi, stride_oj, scaled_rows, scaling,
    SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (⌈rows/BLOCK⌉, ⌈width/BLOCK⌉). SCALED: s is at scale_ptr, not in scaling."""
    i = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    j = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = (i[:, None] < rows) & (j[None, :] < cols)
    value = tl.load(factor_ptr + i[:, None] * stride_fi + j[None, :] * stride_fj, mask=inside, other=0.0).to(tl.float32)
    value *= tl.load(scale_ptr).to(tl.float32) if SCALED else scaling
    value *= tl.load(row_ptr + i, mask=(i < rows) & (scaled_rows != 0), other=1.0).to(tl.float32)[:, None]
    where = out_ptr + i[:, None] * stride_oi + j[None, :] * stride_oj
    tl.store(where, value.to(out_ptr.dtype.element_ty), mask=(i[:, None] < rows) & (j[None, :] < width))


def factor(
    F: torch.Tensor,
    dtype: torch.dtype,
    scaling: Scaling = 1.0,
    row_scale: torch.Tensor | None = None,
    by_row: bool = True,
    multiple: int = 1,
) -> torch.Tensor:
    """s·row_scale⊙F in dtype, dense along its rows (by_row) or columns.  F [I,J], row_scale [I] -> [I, J up to a multiple]."""
    I, J = F.shape  # noqa: E741
    width = -(-J // multiple) * multiple
    scaled = isinstance(scaling, torch.Tensor)
    unscaled = row_scale is None and not scaled and scaling == 1
    if unscaled and F.dtype == dtype and width == J and launch.dense(F, 1 if by_row else 0):
        return F
    out = F.new_empty(I, width, dtype=dtype) if by_row else F.new_empty(width, I, dtype=dtype).t()
    if out.numel():
        with launch.on(F):
            factor_kernel[triton.cdiv(I, BLOCK), triton.cdiv(width, BLOCK)](
                F, F if row_scale is None else row_scale, scaling if scaled else F, out, I, J, width, *F.stride(), *out.stride(),
                int(row_scale is not None), 0.0 if scaled else float(scaling), SCALED=scaled, BLOCK=BLOCK,
            )  # fmt: skip
    return out
