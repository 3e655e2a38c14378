"""The GEMM of linear and grad_input: y = gain⊙(Σᵢ aᵢ bᵢᵀ) + bias, with every summand in one sum.

The base and the low-rank products of an adapted layer are segments of one sum, in steps of BLOCK_K,
so the low-rank part adds its own steps and nothing else. The segment of a step decides only which
addresses are loaded; the loads stand outside that choice, because inside it they would not be
pipelined. There are two forms. gemm_tma_kernel is persistent and loads by TMA descriptors.
gemm_kernel loads by pointers, one tile a program; it may split the sum among programs, whose sums
gemm_finish_kernel adds in order. No atomics.

Under dropout dx = mask⊙(v A) + dy W: with MASKED the last segment comes first, and its sum is
masked before the other segments are added.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lorafast.engine.kernels import configs, launch
from lorafast.engine.kernels.gemm_routing import Route
from lorafast.engine.kernels.philox import keep_tile


@triton.jit(do_not_specialize=["M", "has_gain", "has_bias", "has_inner"])
def gemm_tma_kernel(
    a0, b0, a1, b1, a2, b2, a3, b3, y, z, gain_ptr, bias_ptr, seed_ptr, M, N, K0, K1, K2, K3,
    has_gain, has_bias, has_inner, groups, threshold, scale,
    SEGMENTS: tl.constexpr, MASKED: tl.constexpr, BY_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = gain⊙(Σ aᵢ bᵢᵀ) + bias and z = Σ aᵢ bᵢᵀ.  Grid (programs,), each every programs-th tile.

    Descriptors: aᵢ [M,Kᵢ], bᵢ [N,Kᵢ] (BY_ROW) or [Kᵢ,N], y and z [M,N]. They read zeros outside
    their tensor. MASKED: a3 and b3 are the masked pair, and SEGMENTS counts the others.
    """
    end0, end1, end2, steps = _segment_ends(K0, K1, K2, K3, SEGMENTS, BLOCK_K)
    for tile in tl.range(
        tl.program_id(0),
        tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N),
        tl.num_programs(0),
        flatten=not MASKED,
    ):
        first_row, first_col = _tile_origin(tile, M, N, BLOCK_M, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if MASKED:
            for step in range(tl.cdiv(K3, BLOCK_K)):
                acc = _tma_step(a3, b3, acc, first_row, first_col, step * BLOCK_K, BY_ROW)
            acc = _mask_tile(
                acc, seed_ptr, first_row, first_col, groups, threshold, scale, BLOCK_M, BLOCK_N
            )
        for step in range(steps):
            a = a0
            b = b0
            local = step
            if SEGMENTS > 1:
                if step >= end0:
                    a = a1
                    b = b1
                    local = step - end0
            if SEGMENTS > 2:
                if step >= end1:
                    a = a2
                    b = b2
                    local = step - end1
            if SEGMENTS > 3:
                if step >= end2:
                    a = a3
                    b = b3
                    local = step - end2
            acc = _tma_step(a, b, acc, first_row, first_col, local * BLOCK_K, BY_ROW)
        # Stored in halves: a store stages its data in shared memory, which must leave room for the
        # loads of the next tile.
        low, high = _halves(acc, BLOCK_M, BLOCK_N)
        _tma_store(
            low, y, z, gain_ptr, bias_ptr, first_row, first_col, N,
            has_gain, has_bias, has_inner, BLOCK_N // 2,
        )  # fmt: skip
        _tma_store(
            high, y, z, gain_ptr, bias_ptr, first_row, first_col + BLOCK_N // 2, N,
            has_gain, has_bias, has_inner, BLOCK_N // 2,
        )  # fmt: skip


@triton.jit
def _segment_ends(K0, K1, K2, K3, SEGMENTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the steps at which the first three segments end, and the number of steps."""
    end0 = tl.cdiv(K0, BLOCK_K)
    end1 = end0 + tl.cdiv(K1, BLOCK_K)
    end2 = end1 + tl.cdiv(K2, BLOCK_K)
    steps = end0
    if SEGMENTS == 2:
        steps = end1
    if SEGMENTS == 3:
        steps = end2
    if SEGMENTS == 4:
        steps = end2 + tl.cdiv(K3, BLOCK_K)
    return end0, end1, end2, steps


@triton.jit
def _tile_origin(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr = 8):
    """Return a tile's first row and column.

    Consecutive tiles go down GROUP rows of tiles before the next column, so that the operands they
    share stay in the L2 cache.
    """
    tile_rows, tile_cols = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = tile // (GROUP * tile_cols) * GROUP
    group_rows = min(tile_rows - first, GROUP)
    within = tile % (GROUP * tile_cols)
    return (first + within % group_rows) * BLOCK_M, within // group_rows * BLOCK_N


@triton.jit
def _halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _tma_step(a, b, acc, first_row, first_col, start, BY_ROW: tl.constexpr):
    """Return acc plus one step of a bᵀ, loaded by descriptors."""
    left = a.load([first_row, start])
    if BY_ROW:
        right = b.load([first_col, start]).T
    else:
        right = b.load([start, first_col])
    return tl.dot(left, right, acc)


@triton.jit
def _mask_tile(
    acc, seed_ptr, first_row, first_col, groups, threshold, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return mask⊙acc·scale, in halves: the bits of a whole tile would take too many registers."""
    seed = tl.load(seed_ptr)
    rows = first_row + tl.arange(0, BLOCK_M).to(tl.int64)
    low, high = _halves(acc, BLOCK_M, BLOCK_N)
    low = _mask_columns(low, seed, rows, first_col, groups, threshold, scale, BLOCK_N // 2)
    high = _mask_columns(
        high, seed, rows, first_col + BLOCK_N // 2, groups, threshold, scale, BLOCK_N // 2
    )
    return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (BLOCK_M, BLOCK_N))


@triton.jit
def _mask_columns(acc, seed, rows, first_col, groups, threshold, scale, WIDTH: tl.constexpr):
    return tl.where(
        keep_tile(seed, rows, first_col // 8, groups, threshold, WIDTH // 8), acc * scale, 0.0
    )


@triton.jit
def _tma_store(
    acc, y, z, gain_ptr, bias_ptr, first_row, first_col, N, has_gain, has_bias, has_inner,
    WIDTH: tl.constexpr,
):  # fmt: skip
    if has_inner:
        z.store([first_row, first_col], acc.to(z.dtype))
    cols = first_col + tl.arange(0, WIDTH)
    y.store(
        [first_row, first_col],
        _epilogue(acc, gain_ptr, bias_ptr, cols, N, has_gain, has_bias).to(y.dtype),
    )


@triton.jit
def _epilogue(acc, gain_ptr, bias_ptr, cols, N, has_gain, has_bias):
    """Return gain⊙acc + bias in fp32.

    The flags are run-time arguments, which cost an epilogue next to nothing. In some versions of
    Triton's interpreter a flag is a plain number, and so is a mask that contains it; the outer
    "!= 0" makes it a mask again.
    """
    gain = tl.load(gain_ptr + cols, mask=((cols < N) & (has_gain != 0)) != 0, other=1.0).to(
        tl.float32
    )
    bias = tl.load(bias_ptr + cols, mask=((cols < N) & (has_bias != 0)) != 0, other=0.0).to(
        tl.float32
    )
    return acc * gain[None, :] + bias[None, :]


@triton.jit(do_not_specialize=["M", "has_gain", "has_bias", "has_inner", "steps_per_split"])
def gemm_kernel(
    a0_ptr, b0_ptr, a1_ptr, b1_ptr, a2_ptr, b2_ptr, a3_ptr, b3_ptr,
    gain_ptr, bias_ptr, seed_ptr, y_ptr, z_ptr, M, N, K0, K1, K2, K3,
    stride_a0, stride_b0, stride_a1, stride_b1, stride_a2, stride_b2, stride_a3, stride_b3,
    has_gain, has_bias, has_inner, groups, threshold, scale, steps_per_split,
    SEGMENTS: tl.constexpr, MASKED: tl.constexpr, BY_ROW: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = gain⊙(Σ aᵢ bᵢᵀ) + bias and z = Σ aᵢ bᵢᵀ.  Grid (tiles, splits).

    A program does steps_per_split steps of one tile. aᵢ [M,Kᵢ] and bᵢ [N,Kᵢ] (BY_ROW) or [Kᵢ,N] are
    dense along their rows, and stride_aᵢ and stride_bᵢ are those between rows; y and z [M,N] are
    contiguous. SPLIT, never with MASKED: y_ptr receives fp32 sums [splits,M,N].
    """
    first_row, first_col = _tile_origin(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    split = tl.program_id(1)
    rows = first_row + tl.arange(0, BLOCK_M).to(tl.int64)
    cols = first_col + tl.arange(0, BLOCK_N).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if MASKED:
        for step in range(tl.cdiv(K3, BLOCK_K)):
            acc = _pointer_step(
                a3_ptr, b3_ptr, stride_a3, stride_b3, K3, acc, rows, cols, step, M, N,
                BY_ROW, PRECISION, BLOCK_K,
            )  # fmt: skip
        acc = _mask_tile(
            acc, seed_ptr, first_row, first_col, groups, threshold, scale, BLOCK_M, BLOCK_N
        )
    end0, end1, end2, steps = _segment_ends(K0, K1, K2, K3, SEGMENTS, BLOCK_K)
    first_step = split * steps_per_split
    for step in range(first_step, min(steps, (split + 1) * steps_per_split)):
        a_ptr, b_ptr, stride_a, stride_b, K = a0_ptr, b0_ptr, stride_a0, stride_b0, K0
        local = step
        if SEGMENTS > 1:
            if step >= end0:
                a_ptr, b_ptr, stride_a, stride_b, K = a1_ptr, b1_ptr, stride_a1, stride_b1, K1
                local = step - end0
        if SEGMENTS > 2:
            if step >= end1:
                a_ptr, b_ptr, stride_a, stride_b, K = a2_ptr, b2_ptr, stride_a2, stride_b2, K2
                local = step - end1
        if SEGMENTS > 3:
            if step >= end2:
                a_ptr, b_ptr, stride_a, stride_b, K = a3_ptr, b3_ptr, stride_a3, stride_b3, K3
                local = step - end2
        acc = _pointer_step(
            a_ptr, b_ptr, stride_a, stride_b, K, acc, rows, cols, local, M, N,
            BY_ROW, PRECISION, BLOCK_K,
        )  # fmt: skip
    inside = (rows[:, None] < M) & (cols[None, :] < N)
    if SPLIT:
        tl.store(
            y_ptr + (split.to(tl.int64) * M + rows[:, None]) * N + cols[None, :], acc, mask=inside
        )
    else:
        _store(
            acc, y_ptr, z_ptr, gain_ptr, bias_ptr, rows, cols, M, N, has_gain, has_bias, has_inner
        )


@triton.jit
def _pointer_step(
    a_ptr, b_ptr, stride_a, stride_b, K, acc, rows, cols, step, M, N,
    BY_ROW: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return acc plus one step of a bᵀ, loaded by pointers."""
    ks = (step * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    a = tl.load(
        a_ptr + rows[:, None] * stride_a + ks[None, :],
        mask=(rows[:, None] < M) & (ks[None, :] < K),
        other=0.0,
    )
    if BY_ROW:
        b = tl.load(
            b_ptr + cols[:, None] * stride_b + ks[None, :],
            mask=(cols[:, None] < N) & (ks[None, :] < K),
            other=0.0,
        )
        b = tl.trans(b)
    else:
        b = tl.load(
            b_ptr + ks[:, None] * stride_b + cols[None, :],
            mask=(ks[:, None] < K) & (cols[None, :] < N),
            other=0.0,
        )
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _store(acc, y_ptr, z_ptr, gain_ptr, bias_ptr, rows, cols, M, N, has_gain, has_bias, has_inner):
    where = rows[:, None] * N + cols[None, :]
    inside = (rows[:, None] < M) & (cols[None, :] < N)
    tl.store(z_ptr + where, acc.to(z_ptr.dtype.element_ty), mask=(inside & (has_inner != 0)) != 0)
    tl.store(
        y_ptr + where,
        _epilogue(acc, gain_ptr, bias_ptr, cols, N, has_gain, has_bias).to(y_ptr.dtype.element_ty),
        mask=inside,
    )


@triton.jit(do_not_specialize=["M", "splits", "has_gain", "has_bias", "has_inner"])
def gemm_finish_kernel(
    sums_ptr, gain_ptr, bias_ptr, y_ptr, z_ptr, M, N, splits, has_gain, has_bias, has_inner,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = gain⊙z + bias and z = the sums [splits,M,N], added in order.

    Grid (⌈M/BLOCK_M⌉, ⌈N/BLOCK_N⌉).
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows[:, None] < M) & (cols[None, :] < N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for split in range(splits):
        acc += tl.load(
            sums_ptr + (split * M + rows[:, None]) * N + cols[None, :], mask=inside, other=0.0
        )
    _store(acc, y_ptr, z_ptr, gain_ptr, bias_ptr, rows, cols, M, N, has_gain, has_bias, has_inner)


class Summand(NamedTuple):
    """One segment a bᵀ of the sum.  a [M,K], b [N,K]

    seed and p: the dropout mask of the product's elements, for a masked summand.
    """

    a: torch.Tensor
    b: torch.Tensor
    seed: torch.Tensor | None = None
    p: float = 0.0


class _Call(NamedTuple):
    """The arguments of one call that both forms launch with."""

    out: torch.Tensor
    inner: torch.Tensor | None
    slots: list[Summand | None]
    lengths: list[int]
    vectors: tuple[torch.Tensor, torch.Tensor]
    seed: torch.Tensor
    has: tuple[int, int, int]
    dropout: tuple[int, int, float]
    flags: dict[str, int]


def gemm(
    out: torch.Tensor,
    summands: list[Summand],
    masked: Summand | None,
    route: Route,
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    inner: torch.Tensor | None = None,
) -> None:
    """Compute inner = Σ a bᵀ + mask⊙(a' b'ᵀ) and out = gain⊙inner + bias; inner may be None.

    a' and b' are the masked pair. out, inner [M,N] contiguous. Every b is dense along the same axis
    as the first. There are at most four summands, the masked one included.
    """
    # The masked summand comes last. The empty slots before it have no steps.
    empty = [None] * (4 - len(summands) - (masked is not None))
    slots = [*summands, *empty, *([masked] if masked else [])]
    # The kernels exist for a base with one low-rank summand, and for four summands.
    segments = 4 if is_many(len(summands), masked is not None) else 2
    drop = masked or summands[0]
    call = _Call(
        out,
        inner,
        slots,
        lengths=[0 if slot is None else slot.a.shape[1] for slot in slots],
        vectors=tuple(out if vector is None else vector.contiguous() for vector in (gain, bias)),
        seed=launch.seed_of(drop.seed, out),
        has=(int(gain is not None), int(bias is not None), int(inner is not None)),
        dropout=launch.dropout(out.shape[1], drop.p),
        flags={
            "SEGMENTS": segments - 1 if masked else segments,
            "MASKED": masked is not None,
            "BY_ROW": launch.dense(summands[0].b, 1),
        },
    )
    if route.form == "tma":
        _launch_tma(call, route)
    else:
        _launch_pointers(call, route)


def is_many(unmasked: int, masked: bool) -> bool:
    """True if the summands need more slots than a base and one low-rank summand."""
    return unmasked > (1 if masked else 2)


def _launch_tma(call: _Call, route: Route) -> None:
    (M, N), tile, flags = call.out.shape, route.tile, call.flags
    left, stored = (tile.BLOCK_M, tile.BLOCK_K), (tile.BLOCK_M, tile.BLOCK_N // 2)
    right = (tile.BLOCK_N, tile.BLOCK_K) if flags["BY_ROW"] else (tile.BLOCK_K, tile.BLOCK_N)
    operands = []
    for i, slot in enumerate(call.slots):
        if slot is not None:
            b = slot.b if flags["BY_ROW"] else slot.b.t()
            operands += [launch.descriptor(slot.a, left), launch.descriptor(b, right)]
        else:
            # An empty slot needs a descriptor if the kernel is compiled for it: that of the first.
            operands += operands[:2] if i < flags["SEGMENTS"] else [None, None]
    y = launch.descriptor(call.out, stored)
    z = y if call.inner is None else launch.descriptor(call.inner, stored)
    launch.run(
        gemm_tma_kernel, (route.programs,), tile,
        *operands, y, z, *call.vectors, call.seed, M, N, *call.lengths, *call.has, *call.dropout,
        **flags,
    )  # fmt: skip


def _launch_pointers(call: _Call, route: Route) -> None:
    (M, N), tile, out = call.out.shape, route.tile, call.out
    row_axis_of_b = 0 if call.flags["BY_ROW"] else 1
    operands: list[torch.Tensor] = []
    strides: list[int] = []
    for slot in call.slots:
        if slot is None:
            # An empty slot has no steps; the first one stands in for it.
            operands += operands[:2]
            strides += strides[:2]
        else:
            operands += slot[:2]
            strides += (slot.a.stride()[0], slot.b.stride()[row_axis_of_b])
    split = route.splits > 1
    sums = launch.empty(out, torch.float32, route.splits, M, N) if split else out
    z = out if call.inner is None else call.inner
    tiles = configs.ceil_div(M, tile.BLOCK_M) * configs.ceil_div(N, tile.BLOCK_N)
    launch.run(
        gemm_kernel, (tiles, route.splits), tile,
        *operands, *call.vectors, call.seed, sums, z, M, N,
        *call.lengths, *strides, *call.has, *call.dropout, route.steps_per_split,
        **call.flags, SPLIT=split, PRECISION=launch.precision(out),
    )  # fmt: skip
    if split:
        block = configs.GEMM_FINISH
        grid = configs.ceil_div(M, block.BLOCK_M), configs.ceil_div(N, block.BLOCK_N)
        launch.run(
            gemm_finish_kernel, grid, block,
            sums, *call.vectors, out, z, M, N, route.splits, *call.has,
        )  # fmt: skip
