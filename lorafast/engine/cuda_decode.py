"""Launches of the CUDA kernel of decode: y of a few tokens in one launch, which reads W once."""

from __future__ import annotations

import torch

from lorafast.engine import cuda_forms, cuda_kernels
from lorafast.engine.cuda_forms import launch
from lorafast.engine.cuda_kernels import ceil_div, dtype_number, is_aligned, small, tiles_of
from lorafast.engine.problem import Gain, UpProj

# The most tokens, which are two tiles, and the most ranks: a warp of a block adds sixteen.
_TOKENS, _RANKS = 16, 64
# Rows of W of a block, and columns of W that its warps take in a step.
_ROWS, _COLUMNS = 32, 512
_HALVES = (torch.bfloat16, torch.float16)
# The flag of sums that decode_finish adds.
_PARTS = 4


def serves(x2: torch.Tensor, weight: torch.Tensor, up: UpProj) -> bool:
    """True if decode computes y; low_rank_add and torch's product do otherwise.

    Both read W as it lies, so that it has to have dense aligned rows. x2 [M,K], weight [N,K]
    """
    return (
        0 < x2.shape[0] <= _TOKENS
        and up.B.shape[1] <= _RANKS
        and weight.numel() > 0
        and x2.dtype in _HALVES
        and x2.dtype == weight.dtype == up.h_core.dtype
        and is_aligned(x2, weight)
    )


def decode(
    y2: torch.Tensor,
    x2: torch.Tensor,
    weight: torch.Tensor,
    up: UpProj,
    gain: torch.Tensor | Gain | None = None,
    bias: torch.Tensor | None = None,
    inner: torch.Tensor | None = None,
) -> None:
    """Compute y = gain⊙(x Wᵀ + h' (s·out_scale⊙B)ᵀ) + bias in place, of what it serves.

    y2 and inner [M,N] dense. inner receives what gain is applied to.
    """
    (M, K), N, tiles = x2.shape, weight.shape[0], tiles_of(x2.shape[0])
    h, B, scaling, row_scale = up
    tensor, number = (small(scaling), 1.0) if torch.is_tensor(scaling) else (None, float(scaling))
    B, row_scale, bias = map(small, (B, row_scale, bias))
    m, norm = cuda_kernels.gain_operands(gain)
    blocks = ceil_div(N, _ROWS)
    # A block keeps as much on its way as two of the other kernels.
    count, steps = cuda_kernels.split(2 * blocks, ceil_div(K, _COLUMNS), x2.device)
    parts = x2.new_empty(count, M, N, dtype=torch.float32) if count > 1 else None
    ends = (m, norm, bias) if parts is None else (None, None, None)
    launch(
        cuda_forms.of("decode", x2.dtype, tiles, 0 if parts is None else _PARTS), x2.device,
        (blocks, count),
        weight, x2, h, B, tensor, row_scale, *ends, y2 if parts is None else parts,
        inner if parts is None else None, M, N, weight.stride(0), x2.stride(0), *h.stride(),
        *B.stride(), K, B.shape[1], steps * _COLUMNS // 32,
        *map(dtype_number, (B, tensor, row_scale, *ends[::2])), number,
    )  # fmt: skip
    if parts is not None:
        launch(
            cuda_forms.of("decode_finish", x2.dtype), x2.device, (ceil_div(M * N, 256),),
            parts, m, norm, bias, y2, inner, M, N, count, *map(dtype_number, (m, bias)),
        )  # fmt: skip
