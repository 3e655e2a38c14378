"""Launches of the CUDA kernels on the emulator: what a launcher has to do, in Python.

The functions are those of a backend (lorafast.engine.backends.Backend), as far as kernels exist.
"""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Iterator

import torch
from emulator import driver, machine

from helpers import cuda_compiler
from helpers.cuda_compiler import ALIGNED, DROPS, Form
from lorafast.engine import philox
from lorafast.engine.kernels.configs import ceil_div
from lorafast.engine.precision import apply_core, scaled_to_fp16
from lorafast.engine.problem import DownProj, LowRankTerm, Scaling
from lorafast.engine.row_blocks import flatten_tokens

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TILES = (1, 2, 4, 8, 16)
_capability, _tf32 = 90, False
# The splits of a sum, of which a launcher takes as many as fill its GPU.
splits = 1


@contextlib.contextmanager
def emulating(capability: int, split: int = 1, tf32: bool = False) -> Iterator[None]:
    """Return a context in which kernels are compiled for a capability, and sums are split.

    tf32: fp32 is multiplied in tf32.
    """
    global _capability, _tf32, splits
    before = _capability, _tf32, splits
    _capability, _tf32, splits = capability, tf32, split
    try:
        yield
    finally:
        _capability, _tf32, splits = before


def form_of(stem: str, dtype: torch.dtype, tiles: int = 2, flags: int = 0) -> Form:
    """Return the form that a launch takes."""
    return Form(stem, NAMES[dtype], tiles, flags, _tf32 and dtype == torch.float32)


@functools.cache
def code(form: Form, capability: int) -> machine.Code:
    """Return a form, ready to run."""
    return machine.Code(cuda_compiler.ptx(form, capability))


def launch(form: Form, grid: tuple[int, ...], *arguments: object) -> None:
    """Run a form on the emulator. arguments: tensors, None, numbers, in the kernel's order."""
    program = code(form, _capability).program
    assert len(arguments) == len(program.params), (form, len(arguments), len(program.params))
    values = [
        _bits(value, bits) for value, (_, bits, _) in zip(arguments, program.params, strict=True)
    ]
    spans = [driver.span(value) for value in arguments if isinstance(value, torch.Tensor)]
    if all(grid):
        whole = (*grid, 1, 1)[:3]
        machine.launch(code(form, _capability), whole, values, program.static, spans)


def _bits(value: object, bits: int) -> int:
    if value is None:
        return 0
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        assert bits == 32
        return int.from_bytes(struct.pack("<f", value), "little")
    return int(value) & (1 << bits) - 1


def dtype_number(t: torch.Tensor | None) -> int:
    """Return the number by which kernels know a dtype."""
    return 0 if t is None else cuda_compiler.DTYPES.index(NAMES[t.dtype])


def is_aligned(*matrices: torch.Tensor) -> bool:
    """True if rows are dense, 16 bytes aligned, and a multiple of eight numbers long."""
    return all(
        t.shape[1] % 8 == 0
        and t.data_ptr() % 16 == 0
        and (t.stride(1) == 1 or t.shape[1] == 1)
        and (t.stride(0) * t.itemsize % 16 == 0 or t.shape[0] == 1)
        for t in matrices
    )


def dropout(K: int, p: float) -> tuple[int, int, float]:
    """Return groups, the threshold in both halves of a word, and the scale."""
    return ceil_div(K, 8), philox.threshold(p) * 0x10001, philox.scale(p)


def tiles_of(R: int) -> int:
    """Return the tiles of eight ranks of a form; 16 of them are a block of several."""
    return next((tiles for tiles in TILES if 8 * tiles >= R), TILES[-1])


def up_to(n: int, multiple: int) -> int:
    """Return n rounded up to a multiple."""
    return ceil_div(n, multiple) * multiple


def scale(
    F: torch.Tensor,
    dtype: torch.dtype,
    rows: int | None = None,
    width: int | None = None,
    scaling: Scaling = 1.0,
    row_scale: torch.Tensor | None = None,
    column_scale: torch.Tensor | None = None,
    tf32: bool = False,
) -> torch.Tensor:
    """Return s·row_scale⊙F·column_scale [rows,width] in dtype, padded with zeros."""
    rows, width = F.shape[0] if rows is None else rows, F.shape[1] if width is None else width
    out = torch.empty(rows, up_to(width, 8), dtype=dtype)[:, :width]
    tensor = scaling if isinstance(scaling, torch.Tensor) else None
    aligned = F.dtype == dtype and F.shape[1] == width and is_aligned(F, out)
    launch(
        Form("scale", NAMES[dtype], flags=aligned * ALIGNED, tf32=tf32),
        (ceil_div(rows * ceil_div(width, 8), 256),),
        F, row_scale, column_scale, tensor, out, F.shape[0], rows, *F.stride(), out.stride(0),
        F.shape[1], width, *map(dtype_number, (F, row_scale, column_scale, tensor)),
        1.0 if tensor is not None else float(scaling),
    )  # fmt: skip
    return out


def factor_of(A: torch.Tensor, dtype: torch.dtype, ranks: int, width: int) -> torch.Tensor:
    """Return a factor [ranks,width] as kernels read it: in dtype, aligned, padded with zeros.

    A itself if it is that already.
    """
    if A.dtype == dtype and A.shape == (ranks, width) and is_aligned(A):
        return A
    return scale(A, dtype, ranks, width)


def drop(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """Return drop(x)."""
    x2, out = flatten_tokens(x), torch.empty(x.shape, dtype=x.dtype)
    drop_into(out.view(x2.shape), x2, seed, p)
    return out


def drop_into(out, x2, seed, p, first_row=0, scaled=True, accumulate=False) -> None:
    """Compute out = (out if accumulate) + mask⊙x·scale in place."""
    (M, K), (groups, threshold, factor) = x2.shape, dropout(x2.shape[1], p)
    flags = is_aligned(x2, out) * ALIGNED + 4 * accumulate
    launch(
        Form("drop", NAMES[out.dtype], flags=flags), (ceil_div(M * groups, 256),),
        x2, seed, out, first_row, M, *x2.stride(), out.stride(0), groups, K, threshold,
        factor if scaled else 1.0,
    )  # fmt: skip


def project(x: torch.Tensor, downs: list[DownProj]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return h and h' of every down projection."""
    return [project_one(flatten_tokens(x), down) for down in downs]


def project_one(
    x2: torch.Tensor, down: DownProj, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return h and h' of one down projection in dtype, which is x's if not given."""
    (M, K), R, dtype = x2.shape, down.A.shape[0], dtype or x2.dtype
    tiles, core = min(tiles_of(R), 16 if x2.itemsize < 4 else 8), down.core
    blocks = ceil_div(R, 8 * tiles)
    A = factor_of(down.A, x2.dtype, blocks * 8 * tiles, up_to(K, 8))
    groups, threshold, factor = dropout(K, down.p)
    parts = splits > 1 or blocks > 1 or dtype != x2.dtype or core_by_product(R, core)
    out = torch.empty(splits, M, R) if parts else torch.empty(M, R, dtype=dtype)
    h_core = torch.empty_like(out) if core is not None and not parts else None
    flags = (down.p > 0) * DROPS + is_aligned(x2) * ALIGNED + parts * 4
    own_core = None if parts else core
    launch(
        form_of("project", x2.dtype, tiles, flags),
        (ceil_div(M, 32 if tiles <= 4 else 16), splits, blocks),
        x2, A, down.seed if down.p else None, out, h_core, own_core, M, *x2.stride(), A.stride(0),
        *core_strides(own_core), groups, K, R, ceil_div(ceil_div(K, 32), splits), threshold,
        factor, 0 if own_core is None else core.dim(), dtype_number(own_core),
    )  # fmt: skip
    if parts:
        return finish(out, core, factor, dtype)
    return out, out if core is None else h_core


def core_by_product(R: int, core: torch.Tensor | None) -> bool:
    """True for a full core that is too wide for registers: project multiplies by it."""
    return core is not None and core.dim() == 2 and R > 64


def core_strides(core: torch.Tensor | None) -> tuple[int, int]:
    """Return the strides of a core, the same twice for a diagonal."""
    return (0, 0) if core is None else (core.stride(0), core.stride(-1))


def finish(
    parts: torch.Tensor, core: torch.Tensor | None, factor: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return h = factor·Σ parts in dtype, and h' = core(h).  parts [splits,M,R]"""
    count, M, R = parts.shape
    tiles, by_product = tiles_of(R), core_by_product(R, core)
    own_core = None if by_product else core
    h = torch.empty(M, R, dtype=dtype)
    h_core = None if own_core is None else torch.empty_like(h)
    launch(
        form_of("project_finish", dtype, tiles), (ceil_div(M, 16), ceil_div(R, 8 * tiles)),
        parts, h, h_core, own_core, M, *core_strides(own_core), R, R, count, factor,
        0 if own_core is None else core.dim(), dtype_number(own_core),
    )  # fmt: skip
    if by_product:
        return h, apply_core(h, core)
    return h, h if core is None else h_core


def sum_parts(parts: torch.Tensor, factor: float = 1.0, root: bool = False) -> torch.Tensor:
    """Return factor times the sum of parts [splits,·], or its root."""
    if len(parts) == 1 and factor == 1 and not root:
        return parts[0]
    out = torch.empty(parts.shape[1:])
    launch(
        Form("sum_parts", "fp32", flags=int(root)), (ceil_div(out.numel(), 256),),
        parts, out, out.numel(), len(parts), factor,
    )  # fmt: skip
    return out


def grad_project(x: torch.Tensor, low_ranks: list[LowRankTerm]) -> list[torch.Tensor]:
    """Return dA of every term."""
    return [sum_over_tokens(flatten_tokens(x), term.v, term.seed, term.p) for term in low_ranks]


def sum_over_tokens(
    x2: torch.Tensor, v: torch.Tensor, seed: torch.Tensor | None = None, p: float = 0.0
) -> torch.Tensor:
    """Return vᵀ drop(x) in fp32."""
    inverse = None
    if v.dtype != x2.dtype and x2.dtype == torch.float16:
        v, inverse = scaled_to_fp16(v)
    (M, K), R, aligned = x2.shape, v.shape[1], is_aligned(x2)
    tiles = min(tiles_of(R), 8 if aligned and x2.itemsize < 4 else 4)
    v = token_factor(v, x2.dtype, tiles)
    ranks = v.shape[1]
    groups, threshold, factor = dropout(K, p)
    out = torch.empty(splits, ranks, K)
    launch(
        form_of("grad_project", x2.dtype, tiles, (p > 0) * DROPS + aligned * ALIGNED),
        (ceil_div(K, 64), splits, ceil_div(ranks, 8 * tiles)),
        x2, v, seed if p else None, out, M, *x2.stride(), v.stride(0), groups,
        ceil_div(ceil_div(M, 16), splits), K, ranks, threshold, 1.0 if splits > 1 else factor,
    )  # fmt: skip
    total = sum_parts(out, factor if splits > 1 else 1.0)[:R]
    return total if inverse is None else total.mul_(inverse)


def token_factor(v: torch.Tensor, dtype: torch.dtype, tiles: int) -> torch.Tensor:
    """Return v [M,·] as grad_project reads it: ranks that a lane holds lie side by side."""
    count = min(tiles, 8)
    width = min(16, count * dtype.itemsize)
    fits = v.shape[1] % count == 0 and (v.stride(1) == 1 or v.shape[1] == 1)
    fits &= v.data_ptr() % width == 0 and v.stride(0) * dtype.itemsize % width == 0
    return v if fits and v.dtype == dtype else scale(v, dtype, width=up_to(v.shape[1], count))


def low_rank_add(
    out: torch.Tensor,
    h: torch.Tensor,
    factor: torch.Tensor,
    seed: torch.Tensor | None = None,
    p: float = 0.0,
    accumulate: bool = True,
    scaling: Scaling = 1.0,
    row_scale: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    inner: torch.Tensor | None = None,
) -> None:
    """Compute out = gain⊙((out if accumulate) + mask⊙(h (s·row_scale⊙factor)ᵀ)) + bias in place.

    out and inner [M,N] dense, h [M,R], factor [N,R]. inner receives what gain is applied to.
    """
    (M, N), R = out.shape, factor.shape[1]
    tiles = max(2, tiles_of(R))
    F = scale(
        factor, out.dtype, up_to(N, 32), up_to(R, min(8 * tiles, 64)), scaling, row_scale
    )  # fmt: skip
    h = token_factor(h, out.dtype, 4)
    gain, bias = (
        None if one is None else scale(one[None], torch.float32)[0] for one in (gain, bias)
    )
    gains, aligned = gain is not None or bias is not None, is_aligned(out)
    flags = (p > 0) * DROPS + aligned * ALIGNED + 4 * accumulate + 8 * gains
    groups, threshold, times = dropout(N, p)
    launch(
        form_of("low_rank_add", out.dtype, tiles, flags + 16 * (inner is not None)),
        (ceil_div(M, 128), splits),
        h, F, seed if p else None, gain, bias, out, inner, M, h.stride(0), F.stride(0), groups, N,
        h.shape[1], ceil_div(ceil_div(N, 32), splits), threshold, times,
    )  # fmt: skip


def row_norm(
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: Scaling = 1.0,
    axis: str = "out",
) -> torch.Tensor:
    """Return ‖W + sBA‖ in fp32, per row (axis="out") or per column (axis="in")."""
    (N, K), R, by_row = weight.shape, A.shape[0], axis == "out"
    tiles = max(2, tiles_of(R))
    width, wide = up_to(R, min(8 * tiles, 64)), torch.float32
    rounds = _tf32 or weight.itemsize < 4
    rows = scale(B, wide, up_to(N, 32), width, scaling, tf32=rounds)
    columns = scale(A.t(), wide, up_to(K, 32), width, tf32=rounds)
    length, along = (N, K) if by_row else (K, N)
    squares = torch.empty(splits, length)
    launch(
        form_of("row_norm", weight.dtype, tiles, by_row + is_aligned(weight) * ALIGNED),
        (ceil_div(length, 128), splits),
        weight, rows, columns, squares, *weight.stride(), rows.stride(0), columns.stride(0),
        N, K, R, ceil_div(ceil_div(along, 32), splits),
    )  # fmt: skip
    return sum_parts(squares, root=True)
