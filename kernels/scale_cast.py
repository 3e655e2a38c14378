"""scale_cast: s·row_scale⊙F in the activation's dtype or in tf32, rounded once, padded with zeros.

The result is an operand of one call; nothing that is cast or scaled is saved for backward.
"""

import torch
import triton
import triton.language as tl

from lorafast.engine.kernels import configs, launch
from lorafast.engine.problem import Scaling


@triton.jit(do_not_specialize=["has_row_scale", "has_scale"])
def scale_cast_kernel(
    factor_ptr, row_scale_ptr, scale_ptr, out_ptr, rows, cols, width,
    stride_fi, stride_fj, stride_oi, stride_oj, has_row_scale, has_scale, scaling,
    TF32: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [rows,width] = s·row_scale⊙F [rows,cols].  Grid (⌈rows/BLOCK_N⌉, ⌈width/BLOCK_K⌉).

    has_scale: s is read from scale_ptr, and scaling is 1. TF32: out is fp32, rounded to tf32.
    """
    i = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    j = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    inside = (i[:, None] < rows) & (j[None, :] < cols)
    value = tl.load(
        factor_ptr + i[:, None] * stride_fi + j[None, :] * stride_fj, mask=inside, other=0.0
    ).to(tl.float32)
    value *= scaling * tl.load(scale_ptr, mask=has_scale != 0, other=1.0).to(tl.float32)
    value *= tl.load(
        row_scale_ptr + i, mask=((i < rows) & (has_row_scale != 0)) != 0, other=1.0
    ).to(tl.float32)[:, None]
    if TF32:
        value = rounded_to_tf32(value)
    where = out_ptr + i[:, None] * stride_oi + j[None, :] * stride_oj
    tl.store(
        where, value.to(out_ptr.dtype.element_ty), mask=(i[:, None] < rows) & (j[None, :] < width)
    )


@triton.jit
def rounded_to_tf32(x):
    """Return fp32 numbers rounded to the 10 bits of tf32's mantissa."""
    bits = (x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
    # Not of a NaN: the sum could become a number.
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


def scale_cast(
    F: torch.Tensor,
    dtype: torch.dtype,
    scaling: Scaling = 1.0,
    row_scale: torch.Tensor | None = None,
    by_row: bool = True,
    multiple: int = 1,
    tf32: bool = False,
) -> torch.Tensor:
    """Return s·row_scale⊙F in dtype, dense along its rows (by_row) or its columns.

    F [I,J], row_scale [I] -> [I, J rounded up to `multiple`]. Returns F itself if there is nothing
    to change. tf32: dtype is fp32, and the result is rounded to tf32.
    """
    I, J = F.shape  # noqa: E741
    width = configs.ceil_div(J, multiple) * multiple
    has_scale = isinstance(scaling, torch.Tensor)
    unscaled = row_scale is None and not has_scale and scaling == 1
    if (
        unscaled
        and not tf32
        and F.dtype == dtype
        and width == J
        and launch.dense(F, 1 if by_row else 0)
    ):
        return F
    if by_row:
        out, strides = launch.empty(F, dtype, I, width), (width, 1)
    else:
        strides = (1, I)
        out = F.new_empty_strided((I, width), strides, dtype=dtype)
    if not I * width:
        return out
    tile = configs.SCALE_CAST
    grid = configs.ceil_div(I, tile.BLOCK_N), configs.ceil_div(width, tile.BLOCK_K)
    # A kernel argument that is not read still needs a pointer.
    rows = F if row_scale is None else row_scale.contiguous()
    launch.run(
        scale_cast_kernel, grid, tile,
        F, rows, scaling if has_scale else F, out, I, J, width, *F.stride(), *strides,
        int(row_scale is not None), int(has_scale), 1.0 if has_scale else float(scaling),
        TF32=tf32,
    )  # fmt: skip
    return out
