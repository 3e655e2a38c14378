"""Small kernels with known answers: an addition, column sums, products by pointers and by TMA."""

import triton
import triton.language as tl


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """out = x + y, computed in fp32."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n).to(tl.float32)
    y = tl.load(y_ptr + i, mask=i < n).to(tl.float32)
    tl.store(out_ptr + i, (x + y).to(out_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def column_sums_kernel(a_ptr, out_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """out [N] = Σ a [M,N] over the rows, in fp32.  Grid (⌈N/BLOCK_N⌉,)."""
    rows, cols = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, M, BLOCK_M):
        inside = ((first + rows)[:, None] < M) & (cols[None, :] < N)
        a = tl.load(a_ptr + (first + rows)[:, None] * N + cols[None, :], mask=inside, other=0.0)
        total += tl.sum(a.to(tl.float32), 0)
    tl.store(out_ptr + cols, total, mask=cols < N)


@triton.jit
def product_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """c [M,N] = a [M,K] b [K,N] by pointers.  Grid (⌈M/BLOCK_M⌉, ⌈N/BLOCK_N⌉)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, BLOCK_K):
        ks = first + tl.arange(0, BLOCK_K)
        inside = (rows[:, None] < M) & (ks[None, :] < K)
        a = tl.load(a_ptr + rows[:, None] * K + ks[None, :], mask=inside, other=0.0)
        inside = (ks[:, None] < K) & (cols[None, :] < N)
        b = tl.load(b_ptr + ks[:, None] * N + cols[None, :], mask=inside, other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    inside = (rows[:, None] < M) & (cols[None, :] < N)
    c_ptrs = c_ptr + rows[:, None] * N + cols[None, :]
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=inside)


@triton.jit
def tma_product_kernel(
    a, b, c, M, N, K, BY_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """c [M,N] = a [M,K] b by descriptors; b [N,K] (BY_ROW) or [K,N].  Grid (programs,)."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    for tile in tl.range(
        tl.program_id(0), tiles_m * tl.cdiv(N, BLOCK_N), tl.num_programs(0), flatten=True
    ):
        first_row, first_col = tile % tiles_m * BLOCK_M, tile // tiles_m * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(tl.cdiv(K, BLOCK_K)):
            left = a.load([first_row, step * BLOCK_K])
            if BY_ROW:
                right = b.load([first_col, step * BLOCK_K]).T
            else:
                right = b.load([step * BLOCK_K, first_col])
            acc = tl.dot(left, right, acc)
        c.store([first_row, first_col], acc.to(c.dtype))


@triton.jit
def product_and_sums_kernel(
    a_ptr, b_ptr, c_ptr, sums_ptr, M, N, R,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """c [N,R] = aᵀ b and sums [N] = Σ a of a [M,N], b [M,R], in one loop over rows.

    Triton 3.7 leaves the product in flight over the end of a step on sm_90, and a, which the sums
    read too, has one buffer, which the next step's copies overwrite.  Grid (⌈N/BLOCK_N⌉,).
    """
    cols, ranks = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, M, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        inside = (rows[:, None] < M) & (cols[None, :] < N)
        a = tl.load(a_ptr + rows[:, None] * N + cols[None, :], mask=inside, other=0.0)
        inside = (rows[:, None] < M) & (ranks[None, :] < R)
        b = tl.load(b_ptr + rows[:, None] * R + ranks[None, :], mask=inside, other=0.0)
        acc = tl.dot(tl.trans(a), b, acc)
        total += tl.sum(a.to(tl.float32), axis=0)
    inside = (cols[:, None] < N) & (ranks[None, :] < R)
    tl.store(c_ptr + cols[:, None] * R + ranks[None, :], acc, mask=inside)
    tl.store(sums_ptr + cols, total, mask=cols < N)
