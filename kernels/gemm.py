"""The GEMM behind linear and grad_input: y = gain⊙(Σᵢ aᵢ bᵢᵀ) + bias, every segment i in one accumulator.

An adapted layer's base and low-rank products are segments of one sum, so the low-rank part costs its own steps and nothing else.
The sum is walked in steps; which segment a step reads is a choice of addresses alone, and the loads stand outside that choice:
inside it they would not be pipelined. Two forms: gemm_tma_kernel, persistent, reads by TMA descriptors; gemm_kernel by pointers,
one tile a program, may split the sum among programs, and gemm_finish_kernel adds what these found. No atomics.

Under dropout dx = mask⊙(v A) + dy W: MASKED walks the last segment first and masks its sum before the others follow.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lorafast.engine import philox
from lorafast.engine.kernels import configs, launch
from lorafast.engine.kernels.gemm_routing import Route
from lorafast.engine.kernels.philox import keep_tile


@triton.jit(do_not_specialize=["M", "gains", "biased", "inner"])
def gemm_tma_kernel(
    a0, b0, a1, b1, a2, b2, a3, b3, y, z, gain_ptr, bias_ptr, seed_ptr, M, N, K0, K1, K2, K3,
    gains, biased, inner, groups, threshold, scale,
    SEGMENTS: tl.constexpr, MASKED: tl.constexpr, BY_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (programs,): each takes every programs-th tile. aᵢ [M,Kᵢ], bᵢ [N,Kᵢ] (BY_ROW) or [Kᵢ,N], y and z [M,N]: descriptors.

    MASKED: a3 and b3 are the masked pair, and SEGMENTS counts the others. Beyond its ends a descriptor reads zeros.
    """
    end0, end1, end2, steps = _ends(K0, K1, K2, K3, SEGMENTS, BLOCK_K)
    for tile in tl.range(
        tl.program_id(0),
        tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N),
        tl.num_programs(0),
        flatten=not MASKED,
    ):
        first_row, first_col = _place(tile, M, N, BLOCK_M, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if MASKED:
            for step in range(tl.cdiv(K3, BLOCK_K)):
                acc = _step(a3, b3, acc, first_row, first_col, step * BLOCK_K, BY_ROW)
            acc = _masked(
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
            acc = _step(a, b, acc, first_row, first_col, local * BLOCK_K, BY_ROW)
        # In halves, so that what a store stages in shared memory leaves room for the next tile's loads.
        low, high = _halves(acc, BLOCK_M, BLOCK_N)
        _store_tma(
            low,
            y,
            z,
            gain_ptr,
            bias_ptr,
            first_row,
            first_col,
            N,
            gains,
            biased,
            inner,
            BLOCK_N // 2,
        )
        _store_tma(
            high,
            y,
            z,
            gain_ptr,
            bias_ptr,
            first_row,
            first_col + BLOCK_N // 2,
            N,
            gains,
            biased,
            inner,
            BLOCK_N // 2,
        )


@triton.jit
def _ends(K0, K1, K2, K3, SEGMENTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The step behind the first, the second and the third segment, and behind the last that is walked."""
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
def _place(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr = 8):
    """A tile's first row and column. GROUP rows of tiles walk along the columns together: what they share stays in the L2 cache."""
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = tile // (GROUP * across) * GROUP
    tall = min(down - first, GROUP)
    within = tile % (GROUP * across)
    return (first + within % tall) * BLOCK_M, within // tall * BLOCK_N


@triton.jit
def _halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _step(a, b, acc, first_row, first_col, start, BY_ROW: tl.constexpr):
    left = a.load([first_row, start])
    if BY_ROW:
        right = b.load([first_col, start]).T
    else:
        right = b.load([start, first_col])
    return tl.dot(left, right, acc)


@triton.jit
def _masked(
    acc,
    seed_ptr,
    first_row,
    first_col,
    groups,
    threshold,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """mask⊙acc·scale, in halves: the bits of a whole tile would not fit beside its sums."""
    seed = tl.load(seed_ptr)
    rows = first_row + tl.arange(0, BLOCK_M).to(tl.int64)
    low, high = _halves(acc, BLOCK_M, BLOCK_N)
    low = _kept(low, seed, rows, first_col, groups, threshold, scale, BLOCK_N // 2)
    high = _kept(high, seed, rows, first_col + BLOCK_N // 2, groups, threshold, scale, BLOCK_N // 2)
    return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (BLOCK_M, BLOCK_N))


@triton.jit
def _kept(acc, seed, rows, first_col, groups, threshold, scale, WIDTH: tl.constexpr):
    return tl.where(
        keep_tile(seed, rows, first_col // 8, groups, threshold, WIDTH // 8), acc * scale, 0.0
    )


@triton.jit
def _store_tma(
    acc,
    y,
    z,
    gain_ptr,
    bias_ptr,
    first_row,
    first_col,
    N,
    gains,
    biased,
    inner,
    WIDTH: tl.constexpr,
):
    if inner:
        z.store([first_row, first_col], acc.to(z.dtype))
    cols = first_col + tl.arange(0, WIDTH)
    y.store(
        [first_row, first_col],
        _finished(acc, gain_ptr, bias_ptr, cols, N, gains, biased).to(y.dtype),
    )


@triton.jit
def _finished(acc, gain_ptr, bias_ptr, cols, N, gains, biased):
    """gain⊙acc + bias in fp32. Whether there is a gain or a bias is asked at run time: it costs an epilogue nothing.

    In some versions of Triton's interpreter a flag is a plain number, and so is a mask with it: "!= 0" makes it a mask again.
    """
    gain = tl.load(gain_ptr + cols, mask=((cols < N) & (gains != 0)) != 0, other=1.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=((cols < N) & (biased != 0)) != 0, other=0.0).to(
        tl.float32
    )
    return acc * gain[None, :] + bias[None, :]


@triton.jit(do_not_specialize=["M", "gains", "biased", "inner", "share"])
def gemm_kernel(
    a0_ptr, b0_ptr, a1_ptr, b1_ptr, a2_ptr, b2_ptr, a3_ptr, b3_ptr, gain_ptr, bias_ptr, seed_ptr, y_ptr, z_ptr,
    M, N, K0, K1, K2, K3, stride_a0, stride_b0, stride_a1, stride_b1, stride_a2, stride_b2, stride_a3, stride_b3,
    gains, biased, inner, groups, threshold, scale, share,
    SEGMENTS: tl.constexpr, MASKED: tl.constexpr, BY_ROW: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, splits): a program does `share` steps of one tile. aᵢ, bᵢ, y and z are dense along their rows, y and z all over.

    bᵢ [N,Kᵢ] (BY_ROW) or [Kᵢ,N]; a stride is that from one row to the next. SPLIT, never with MASKED: y_ptr takes fp32
    sums [splits,M,N].
    """
    first_row, first_col = _place(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    split = tl.program_id(1)
    rows = first_row + tl.arange(0, BLOCK_M).to(tl.int64)
    cols = first_col + tl.arange(0, BLOCK_N).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if MASKED:
        for step in range(tl.cdiv(K3, BLOCK_K)):
            acc = _step_at(
                a3_ptr,
                b3_ptr,
                stride_a3,
                stride_b3,
                K3,
                acc,
                rows,
                cols,
                step,
                M,
                N,
                BY_ROW,
                PRECISION,
                BLOCK_K,
            )
        acc = _masked(
            acc, seed_ptr, first_row, first_col, groups, threshold, scale, BLOCK_M, BLOCK_N
        )
    end0, end1, end2, steps = _ends(K0, K1, K2, K3, SEGMENTS, BLOCK_K)
    for step in range(split * share, min(steps, (split + 1) * share)):
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
        acc = _step_at(
            a_ptr,
            b_ptr,
            stride_a,
            stride_b,
            K,
            acc,
            rows,
            cols,
            local,
            M,
            N,
            BY_ROW,
            PRECISION,
            BLOCK_K,
        )
    inside = (rows[:, None] < M) & (cols[None, :] < N)
    if SPLIT:
        tl.store(
            y_ptr + (split.to(tl.int64) * M + rows[:, None]) * N + cols[None, :], acc, mask=inside
        )
    else:
        _store(acc, y_ptr, z_ptr, gain_ptr, bias_ptr, rows, cols, M, N, gains, biased, inner)


@triton.jit
def _step_at(
    a_ptr, b_ptr, stride_a, stride_b, K, acc, rows, cols, step, M, N,
    BY_ROW: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    along = (step * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    a = tl.load(
        a_ptr + rows[:, None] * stride_a + along[None, :],
        mask=(rows[:, None] < M) & (along[None, :] < K),
        other=0.0,
    )
    if BY_ROW:
        b = tl.load(
            b_ptr + cols[:, None] * stride_b + along[None, :],
            mask=(cols[:, None] < N) & (along[None, :] < K),
            other=0.0,
        )
        b = tl.trans(b)
    else:
        b = tl.load(
            b_ptr + along[:, None] * stride_b + cols[None, :],
            mask=(along[:, None] < K) & (cols[None, :] < N),
            other=0.0,
        )
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _store(acc, y_ptr, z_ptr, gain_ptr, bias_ptr, rows, cols, M, N, gains, biased, inner):
    where = rows[:, None] * N + cols[None, :]
    inside = (rows[:, None] < M) & (cols[None, :] < N)
    tl.store(z_ptr + where, acc.to(z_ptr.dtype.element_ty), mask=(inside & (inner != 0)) != 0)
    tl.store(
        y_ptr + where,
        _finished(acc, gain_ptr, bias_ptr, cols, N, gains, biased).to(y_ptr.dtype.element_ty),
        mask=inside,
    )


@triton.jit(do_not_specialize=["M", "splits", "gains", "biased", "inner"])
def gemm_finish_kernel(
    sums_ptr, gain_ptr, bias_ptr, y_ptr, z_ptr, M, N, splits, gains, biased, inner, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Grid (⌈M/BLOCK_M⌉, ⌈N/BLOCK_N⌉): the splits' sums added in order, then what gemm_kernel does with its own."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows[:, None] < M) & (cols[None, :] < N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for split in range(splits):
        acc += tl.load(
            sums_ptr + (split * M + rows[:, None]) * N + cols[None, :], mask=inside, other=0.0
        )
    _store(acc, y_ptr, z_ptr, gain_ptr, bias_ptr, rows, cols, M, N, gains, biased, inner)


class Summand(NamedTuple):
    """a bᵀ, one segment of the sum.  a [M,K], b [N,K]; of a masked one seed and p say which of the product's elements are kept."""

    a: torch.Tensor
    b: torch.Tensor
    seed: torch.Tensor | None = None
    p: float = 0.0


def gemm(
    out: torch.Tensor,
    summands: list[Summand],
    masked: Summand | None,
    route: Route,
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    inner: torch.Tensor | None = None,
) -> None:
    """out = gain⊙(Σ a bᵀ + mask⊙(a' b'ᵀ)) + bias, and inner the same without gain and bias.  out, inner [M,N] contiguous.

    Every b lies like the first: dense along its rows, or along its columns. At most four summands, the masked one among them.
    """
    by_row = launch.dense(summands[0].b, 1)
    # The masked one last, empty places between: those are walked in no steps.
    slots = [
        *summands,
        *[None] * (4 - len(summands) - (masked is not None)),
        *([masked] if masked else []),
    ]
    # Kernels exist for a base with one low-rank summand, and for as many as there can be.
    places = 4 if is_many(len(summands), masked is not None) else 2
    flags = {
        "SEGMENTS": places - 1 if masked else places,
        "MASKED": masked is not None,
        "BY_ROW": by_row,
    }
    drop = masked or summands[0]
    ends = gain is not None, bias is not None, inner is not None
    drops = launch.groups(out.shape[1]), philox.threshold(drop.p), philox.scale(drop.p)
    vectors = out if gain is None else gain.contiguous(), out if bias is None else bias.contiguous()
    lengths = [0 if one is None else one.a.shape[1] for one in slots]
    with launch.on(out):
        if route.form == "tma":
            _by_descriptors(out, inner, slots, lengths, vectors, drop, ends, drops, flags, route)
        else:
            _by_pointers(out, inner, slots, lengths, vectors, drop, ends, drops, flags, route)


def is_many(unmasked: int, masked: bool) -> bool:
    """Whether summands need more places than a base with one that is low-rank."""
    return unmasked > (1 if masked else 2)


def _by_descriptors(out, inner, slots, lengths, vectors, drop, ends, drops, flags, route) -> None:
    (M, N), tile = out.shape, route.tile
    left, stored = (tile.BLOCK_M, tile.BLOCK_K), (tile.BLOCK_M, tile.BLOCK_N // 2)
    right = (tile.BLOCK_N, tile.BLOCK_K) if flags["BY_ROW"] else (tile.BLOCK_K, tile.BLOCK_N)
    places = []
    for one in slots:
        a, b = (None, None) if one is None else (one.a, one.b if flags["BY_ROW"] else one.b.t())
        places += (
            [None, None]
            if one is None
            else [launch.descriptor(a, left), launch.descriptor(b, right)]
        )
    # An empty place within those that are walked still needs a descriptor, of anything.
    places = [
        places[i % 2] if place is None and i < 2 * flags["SEGMENTS"] else place
        for i, place in enumerate(places)
    ]
    y = launch.descriptor(out, stored)
    z = y if inner is None else launch.descriptor(inner, stored)
    gemm_tma_kernel[(route.programs,)](
        *places, y, z, *vectors, launch.seed_of(drop.seed, out), M, N, *lengths, *map(int, ends), *drops,
        **flags, **tile.edges("BLOCK_M", "BLOCK_N", "BLOCK_K"), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _by_pointers(out, inner, slots, lengths, vectors, drop, ends, drops, flags, route) -> None:
    (M, N), tile, first = out.shape, route.tile, slots[0]
    pairs = [(first if one is None else one)[:2] for one in slots]
    strides = [
        t.stride(0 if place == 0 or flags["BY_ROW"] else 1)
        for pair in pairs
        for place, t in enumerate(pair)
    ]
    split = route.splits > 1
    sums = out.new_empty(route.splits, M, N, dtype=torch.float32) if split else out
    z = out if inner is None else inner
    tiles = configs.ceil_div(M, tile.BLOCK_M) * configs.ceil_div(N, tile.BLOCK_N)
    gemm_kernel[tiles, route.splits](
        *(t for pair in pairs for t in pair), *vectors, launch.seed_of(drop.seed, out), sums, z, M, N, *lengths, *strides,
        *map(int, ends), *drops, route.share, **flags, SPLIT=split, PRECISION=launch.precision(out),
        **tile.edges("BLOCK_M", "BLOCK_N", "BLOCK_K"), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if split:
        block = configs.GEMM_FINISH
        gemm_finish_kernel[configs.ceil_div(M, block.BLOCK_M), configs.ceil_div(N, block.BLOCK_N)](
            sums, *vectors, out, z, M, N, route.splits, *map(int, ends), **block.edges("BLOCK_M", "BLOCK_N"),
            num_warps=block.warps, num_stages=block.stages,
        )  # fmt: skip
