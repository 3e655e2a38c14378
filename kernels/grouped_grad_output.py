"""grouped_grad_output: u, P, Σ dy and Σ dy⊙kept of each expert's rows, in one pass over dy.

A program computes BLOCK_N columns over one block of an expert's rows, as one of grad_output's does
over a split of all rows; a block is as long as such a split. The parts of P and of the sums are
added in order for each expert, without atomics.
"""

import torch
import triton
import triton.language as tl

from lorafast.engine.kernels import configs, launch
from lorafast.engine.kernels.expert_blocks import (
    add_blocks,
    blocks,
    blocks_of_expert,
    expert_of_block,
    experts_held,
    factor_strides,
)
from lorafast.engine.kernels.grad_output import (
    grad_output_finish_rows,
    grad_output_rows,
    live_columns,
    skipped_columns,
)
from lorafast.engine.problem import UpProjGradSpec


@triton.jit(do_not_specialize=["S", "experts", "steps"])
def grouped_grad_output_kernel(
    dy_ptr, kept_ptr, h_core_ptr, B_ptr, offsets_ptr, u_ptr, P_ptr, sums_ptr,
    S, N, R, live, experts, stride_dm, stride_dn, stride_km, stride_kn, stride_hm, stride_hr,
    stride_be, steps, one,
    U: tl.constexpr, P: tl.constexpr, SUMS: tl.constexpr, EXPERTS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """What grad_output_kernel computes, by block of steps·BLOCK_M rows of one expert e, with B_e.

    Grid (⌈N/BLOCK_N⌉, blocks). B [E,N,R] -> u [⌈N/BLOCK_N⌉,S,R], P [blocks,N,live],
    sums [blocks,SUMS,N].
    """
    block, block_rows = tl.program_id(1), steps * BLOCK_M
    expert, first, end = expert_of_block(offsets_ptr, experts, block, block_rows, EXPERTS)
    if first >= end:
        return
    own_steps = tl.minimum((end - first + BLOCK_M - 1) // BLOCK_M, steps).to(tl.int32)
    grad_output_rows(
        dy_ptr, kept_ptr, h_core_ptr, B_ptr + expert * stride_be, u_ptr, P_ptr, sums_ptr,
        tl.program_id(0), block.to(tl.int64), first, 0, end, S, N, R, live,
        stride_dm, stride_dn, stride_km, stride_kn, stride_hm, stride_hr, own_steps, one,
        U, P, SUMS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_R, LANES,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "skipped", "frozen", "rows", "has_gain", "has_out_scale",
        "wants_B", "wants_out_scale", "has_scale",
    ]
)  # fmt: skip
def grouped_grad_output_finish_kernel(
    P_ptr, gain_ptr, out_scale_ptr, B_ptr, scale_ptr, dB_ptr, d_out_scale_ptr, offsets_ptr,
    N, R, width, stride_be, stride_bn, stride_br, skipped, frozen, rows, has_gain, has_out_scale,
    wants_B, wants_out_scale, has_scale, scaling,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """What grad_output_finish_kernel computes, for each expert.  Grid (⌈N/BLOCK_N⌉, E).

    parts [blocks,N,width] of `rows` rows each, gain and out_scale [E,N], B [E,N,R] -> dB [E,N,R],
    d_out_scale [E,N].
    """
    first, count = blocks_of_expert(offsets_ptr, tl.program_id(1), rows)
    expert = tl.program_id(1).to(tl.int64)
    grad_output_finish_rows(
        P_ptr + first.to(tl.int64) * N * width, gain_ptr + expert * N, out_scale_ptr + expert * N,
        B_ptr + expert * stride_be, scale_ptr, dB_ptr + expert * N * R,
        d_out_scale_ptr + expert * N, N, R, width, stride_bn, stride_br, skipped, frozen, count,
        has_gain, has_out_scale, wants_B, wants_out_scale, has_scale, scaling, BLOCK_N, BLOCK_R,
    )  # fmt: skip


def grouped_grad_output(
    dy: torch.Tensor,
    offsets: torch.Tensor,
    spec: UpProjGradSpec | None = None,
    h_core: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    sums: int = 0,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return the parts of u, dB, d_out_scale and the sums of each expert's rows, None if not asked.

    dy, kept [S,N], h_core [S,R] if the spec wants P, factor [E,N,R] or [N,R] if it wants u, gain
    [E,N]; sums: 1 for Σ dy, 2 for Σ dy⊙kept too -> u [blocks of columns,S,R] = dy factor, dB
    [E,N,R], d_out_scale [E,N], sums [E,sums,N], all fp32.
    """
    (S, N), experts, dtype = dy.shape, offsets.shape[0] - 1, dy.dtype
    wants_P = spec is not None and (spec.want_B or spec.want_out_scale)
    h_core = live_columns(h_core, spec) if wants_P else None
    R, live = 0 if factor is None else factor.shape[-1], h_core.shape[1] if wants_P else 0
    split = configs.grad_output(S, N, max(1, R, live), dtype, launch.arch_of(dy), sums)
    tile, steps = split.tile, max(1, split.steps)
    rows = steps * tile.BLOCK_M
    numbers, columns = blocks(S, offsets, rows), configs.ceil_div(N, tile.BLOCK_N)
    u = None if factor is None else launch.empty(dy, torch.float32, columns, S, R)
    P = launch.empty(dy, torch.float32, numbers, N, live) if live else None
    parts = launch.empty(dy, torch.float32, numbers, sums, N) if sums else None
    if S and N and not (u is P is parts is None):
        # dy stands in for an absent tensor, whose argument is neither read nor written.
        kept, h_core, B, u_out, P_out, sums_out = (
            dy if one is None or not one.numel() else one
            for one in (kept, h_core, factor, u, P, parts)
        )
        launch.run(
            grouped_grad_output_kernel, (columns, numbers), tile,
            dy, kept, h_core, B.contiguous(), offsets, u_out, P_out, sums_out,
            S, N, R, live, experts, *dy.stride(), *kept.stride(), *h_core.stride(),
            N * R if B.dim() == 3 else 0, steps, 1.0,
            U=u is not None, P=P is not None, SUMS=sums, EXPERTS=experts_held(offsets),
            PRECISION=launch.precision(dy), LANES=configs.rows_at_once(tile, dtype),
        )  # fmt: skip
    dB = d_out_scale = None
    if wants_P:
        dB, d_out_scale = _finish(P, spec, gain, offsets, dy, rows)
    total = None
    if parts is not None:
        total = launch.empty(dy, torch.float32, experts, sums, N)
        add_blocks(parts, total, offsets, rows)
    return u, dB, d_out_scale, total


def _finish(
    P: torch.Tensor | None,
    spec: UpProjGradSpec,
    gain: torch.Tensor | None,
    offsets: torch.Tensor,
    dy: torch.Tensor,
    rows: int,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return dB and d_out_scale of each expert from the parts of P, blocks of so many rows."""
    (N, R), experts = spec.B.shape[-2:], offsets.shape[0] - 1
    has_scale = isinstance(spec.scaling, torch.Tensor)
    dB = launch.empty(dy, torch.float32, experts, N, R) if spec.want_B else None
    d_out_scale = launch.empty(dy, torch.float32, experts, N) if spec.want_out_scale else None
    if P is None:  # every column is frozen
        return dB.zero_(), d_out_scale
    tile = configs.grad_output_finish(R)
    # P stands in for an absent tensor, whose argument is not read.
    vectors = [P if one is None else one.contiguous() for one in (gain, spec.out_scale)]
    outputs = [P if one is None else one for one in (dB, d_out_scale)]
    if N:
        launch.run(
            grouped_grad_output_finish_kernel,
            (configs.ceil_div(N, tile.BLOCK_N), experts), tile,
            P, *vectors, spec.B, spec.scaling if has_scale else P, *outputs, offsets,
            N, R, P.shape[2], *factor_strides(spec.B), skipped_columns(spec), spec.frozen_columns,
            rows, int(gain is not None), int(spec.out_scale is not None),
            int(spec.want_B), int(spec.want_out_scale),
            int(has_scale), 1.0 if has_scale else float(spec.scaling),
        )  # fmt: skip
    return dB, d_out_scale
