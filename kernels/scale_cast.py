"""A factor as a product wants it: s·row_scale⊙F in the activation's dtype, each element rounded once, padded with zeros.

It lives for one call only, so nothing cast or folded is ever saved.
"""

import torch
import triton
import triton.language as tl

from lorafast.engine.kernels import configs, launch
from lorafast.engine.problem import Scaling


@triton.jit(do_not_specialize=["scaled_rows", "scaled"])
def factor_kernel(
    factor_ptr, row_ptr, scale_ptr, out_ptr, rows, cols, width, stride_fi, stride_fj, stride_oi, stride_oj,
    scaled_rows, scaled, scaling, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (⌈rows/BLOCK_N⌉, ⌈width/BLOCK_K⌉). scaled: s is at scale_ptr, and scaling is 1."""
    i = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    j = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    inside = (i[:, None] < rows) & (j[None, :] < cols)
    value = tl.load(
        factor_ptr + i[:, None] * stride_fi + j[None, :] * stride_fj, mask=inside, other=0.0
    ).to(tl.float32)
    value *= scaling * tl.load(scale_ptr, mask=scaled != 0, other=1.0).to(tl.float32)
    value *= tl.load(row_ptr + i, mask=((i < rows) & (scaled_rows != 0)) != 0, other=1.0).to(
        tl.float32
    )[:, None]
    where = out_ptr + i[:, None] * stride_oi + j[None, :] * stride_oj
    tl.store(
        where, value.to(out_ptr.dtype.element_ty), mask=(i[:, None] < rows) & (j[None, :] < width)
    )


def scale_cast(
    F: torch.Tensor,
    dtype: torch.dtype,
    scaling: Scaling = 1.0,
    row_scale: torch.Tensor | None = None,
    by_row: bool = True,
    multiple: int = 1,
) -> torch.Tensor:
    """s·row_scale⊙F in dtype, dense along its rows (by_row) or columns.  F [I,J], row_scale [I] -> [I, J up to a multiple]."""
    I, J = F.shape  # noqa: E741
    width = configs.ceil_div(J, multiple) * multiple
    scaled = isinstance(scaling, torch.Tensor)
    unscaled = row_scale is None and not scaled and scaling == 1
    if unscaled and F.dtype == dtype and width == J and launch.dense(F, 1 if by_row else 0):
        return F
    out = F.new_empty(I, width, dtype=dtype) if by_row else F.new_empty(width, I, dtype=dtype).t()
    if out.numel():
        tile = configs.FACTOR
        with launch.on(F):
            factor_kernel[configs.ceil_div(I, tile.BLOCK_N), configs.ceil_div(width, tile.BLOCK_K)](
                F, F if row_scale is None else row_scale.contiguous(), scaling if scaled else F, out, I, J, width,
                *F.stride(), *out.stride(), int(row_scale is not None), int(scaled), 1.0 if scaled else float(scaling),
                **tile.edges("BLOCK_N", "BLOCK_K"), num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return out
