"""Matrix products in half precision on CPUs for which torch has no quick one: by panels in fp32.

Without bf16 or fp16 instructions torch multiplies half-precision matrices by loops of its own. On
two cores with AVX2 they take 8 times as long as MKL takes in fp32 where W is read along the rows in
which it lies in memory, as in x Wᵀ, and 150 times as long where it is not, as in dy W. Here a panel
of W's rows and a block of rows of x are converted to fp32, multiplied in fp32, and the sum is
rounded once. No temporary has the size of an operand.
"""

from __future__ import annotations

import functools
import platform

import torch

from lorafast.engine.problem import Problem
from lorafast.runtime import torch_internals

# Elements of a panel of W, and of a block of x or of y: 2 and 4 MiB in fp32, which stay in the
# last cache. Measured on two cores with AVX2, from 768x768 to 4096x1024.
_PANEL = 1 << 19
_BLOCK = 1 << 20
# The fewest rows of either, however long one is, and the most rows of a panel: MKL is slow on fewer
# and a panel of very many short rows would leave room for few rows of x.
_FEWEST_ROWS = 64
_MOST_PANEL_ROWS = 1024
# Tokens up to which torch's loop along the rows is as quick as converting W for them, measured as
# above with one and two threads: the two cross between 3 and 7.
_FEW_TOKENS = 5
# Multiply-adds from which panels are quicker than torch's loops: below, the host's time for a few
# more calls of torch decides.
_FEWEST_ALONG_ROWS = 1 << 16
_FEWEST_ACROSS_ROWS = 1 << 14


@functools.cache
def _is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


def torch_is_slow(dtype: torch.dtype) -> bool:
    """True if torch multiplies CPU matrices of the dtype by loops of its own."""
    if dtype is not torch.bfloat16 and dtype is not torch.float16:
        return False
    return _is_x86() and torch_internals.onednn_multiplies(dtype) is False


def applies(dtype: torch.dtype, M: int, N: int, K: int, along_rows: bool) -> bool:
    """True if a product of CPU matrices [M,K] [K,N] is expected to be quicker by panels in fp32.

    along_rows: the numbers of the second matrix that are summed lie side by side in memory, as
        those of Wᵀ do in x Wᵀ.
    """
    work = M * N * K
    if along_rows:
        return work >= _FEWEST_ALONG_ROWS and M > _FEW_TOKENS and torch_is_slow(dtype)
    return work >= _FEWEST_ACROSS_ROWS and torch_is_slow(dtype)


def serves(M: int, b: torch.Tensor) -> bool:
    """True if the product of M tokens with this matrix [K,N] is to go by addmm."""
    K, N = b.shape
    return applies(b.dtype, M, N, K, _is_along_rows(b))


def _is_along_rows(b: torch.Tensor) -> bool:
    return b.stride(0) == 1 and b.stride(1) != 1


def describe_route(primitive: str, problem: Problem) -> str | None:
    """In words, that a primitive's base product goes by panels; None if it does not."""
    M, N, K, transposed = problem.M, sum(problem.N), problem.K, problem.transposed
    if problem.arch.vendor != "cpu":
        return None
    if primitive == "linear":
        panels = applies(problem.dtype, M, N, K, not transposed)
    else:
        panels = primitive == "grad_input" and applies(problem.dtype, M, K, N, transposed)
    return "the base product by panels in fp32" if panels else None


def addmm(
    start: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Write start + a b into out and return it; each element is summed in fp32 and rounded once.

    start is None, a row of biases [N], or out itself. a [M,K], b [K,N], out [M,N], of any strides.
    """
    (M, K), N = a.shape, b.shape[1]
    if N * K <= _PANEL and M * max(N, K) <= _BLOCK:
        # One panel and one block: for few tokens the loops below take longer than the product.
        a, b = a.to(torch.float32), b.to(torch.float32)
        return out.copy_(a.mm(b) if start is None else torch.addmm(start.to(torch.float32), a, b))
    if start is not None:
        start = start.expand(M, N)
    if _is_along_rows(b):
        _add_columns(start, a, b.t(), out)
    else:
        _add_terms(start, a, b, out)
    return out


def _steps(M: int, rows: int, length: int) -> tuple[int, int]:
    """The rows of a panel of W, which has rows of this length, and of a block of the M tokens."""
    length = max(1, length)
    panel = max(1, min(rows, _MOST_PANEL_ROWS, max(_FEWEST_ROWS, _PANEL // length)))
    return panel, max(1, min(M, max(_FEWEST_ROWS, _BLOCK // max(length, panel))))


def _add_columns(
    start: torch.Tensor | None, a: torch.Tensor, W: torch.Tensor, out: torch.Tensor
) -> None:
    """out = start + a Wᵀ, W [N,K]: a panel of W makes some columns of out."""
    (M, K), N = a.shape, W.shape[0]
    panel_rows, block_rows = _steps(M, N, K)
    panels, a_blocks = _fp32(panel_rows * K), _fp32(block_rows * K)
    sums = _fp32(block_rows * panel_rows)
    for m in range(0, M, block_rows):
        m_end = min(m + block_rows, M)
        a_block = _copied(a_blocks, a[m:m_end])
        for n in range(0, N, panel_rows):
            n_end = min(n + panel_rows, N)
            panel = _copied(panels, W[n:n_end]).t()
            part = sums[: (m_end - m) * (n_end - n)].view(m_end - m, n_end - n)
            if start is None:
                torch.mm(a_block, panel, out=part)
            else:
                part.copy_(start[m:m_end, n:n_end]).addmm_(a_block, panel)
            out[m:m_end, n:n_end].copy_(part)


def _add_terms(
    start: torch.Tensor | None, a: torch.Tensor, W: torch.Tensor, out: torch.Tensor
) -> None:
    """out = start + a W, W [N,K]: a panel of W makes some terms of each sum over N."""
    (M, N), K = a.shape, W.shape[1]
    panel_rows, block_rows = _steps(M, N, K)
    panels, a_blocks = _fp32(panel_rows * K), _fp32(block_rows * panel_rows)
    sums = _fp32(block_rows * K)
    for m in range(0, M, block_rows):
        m_end = min(m + block_rows, M)
        part = sums[: (m_end - m) * K].view(m_end - m, K)
        if start is not None:
            part.copy_(start[m:m_end])
        elif N == 0:
            part.zero_()
        for n in range(0, N, panel_rows):
            n_end = min(n + panel_rows, N)
            panel = _copied(panels, W[n:n_end])
            a_block = _copied(a_blocks, a[m:m_end, n:n_end])
            if n or start is not None:
                part.addmm_(a_block, panel)
            else:
                torch.mm(a_block, panel, out=part)
        out[m:m_end].copy_(part)


def _fp32(elements: int) -> torch.Tensor:
    return torch.empty(elements, dtype=torch.float32)


def _copied(buffer: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """The matrix in fp32, dense, at the start of the buffer."""
    return buffer[: matrix.numel()].view(matrix.shape).copy_(matrix)
