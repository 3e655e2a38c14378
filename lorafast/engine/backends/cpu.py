"""The C++ backend for CPU tensors: torch's own GEMM for the base, and csrc/cpu for all that is added to it, one pass each.

Results do not depend on the number of threads, which is torch's. Python runs slowly right after a GEMM that has emptied the
caches, so little of it stands between the calls.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from lorafast.engine import philox
from lorafast.engine.backends import eager
from lorafast.engine.problem import (
    BaseTerm,
    DownProj,
    LowRankTerm,
    OutputGrads,
    Problem,
    Scaling,
    UpProj,
    UpProjGrads,
    UpProjGradSpec,
    tokens,
)
from lorafast.engine.reference import mix
from lorafast.engine.row_blocks import flatten_tokens
from lorafast.runtime import extension, onednn

# As csrc/cpu/types.h numbers and bounds them.
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MAX_RANK = 256
# Multiply-adds below which waking a second thread costs more than it brings.
_ONE_THREAD = 1 << 18
# Multiply-adds of a GEMM below which the caches outlive it, and every call of torch's saved is worth more than its place.
_SMALL = 1 << 22


@functools.cache
def library() -> ModuleType | str:
    """The compiled kernels, or why there are none. Asked once: the first call may compile them."""
    return extension.cpu()


def why_not(primitive: str, problem: Problem) -> tuple[str, ...]:
    """Every reason the kernels cannot serve it."""
    if problem.arch.vendor != "cpu":
        return (f"runs on CPU tensors; this is {problem.arch.vendor} {problem.arch.name}",)
    reasons = [
        f"{what} is {dtype}; the kernels compute in {', '.join(map(str, _TYPES))}"
        for what, dtype in (
            ("x", problem.dtype),
            ("weight", problem.weight_dtype),
            ("a factor", problem.factor_dtype),
        )
        if dtype not in _TYPES
    ]
    if sum(problem.R) > _MAX_RANK:
        reasons.append(
            f"R={' + '.join(map(str, problem.R))} exceeds {_MAX_RANK}, the largest rank of one call"
        )
    if not reasons and isinstance(library(), str):
        reasons.append(library())
    return tuple(reasons)


def how(primitive: str, problem: Problem) -> str | None:
    """The instruction set it was compiled for."""
    return None if isinstance(library(), str) else library().ISA


def workspace() -> int:
    """Bytes of the largest workspace a kernel has had since this was last asked: torch's allocator sees none of them."""
    asked = library.cache_info().currsize
    return library().largest_workspace() if asked and not isinstance(library(), str) else 0


def project(x: torch.Tensor, downs: list[DownProj]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """h = drop(x) Aᵀ rounded to x's dtype, and h' = core(h).  x [...,K] -> h, h' [M,R] for each way down."""
    x2, found = _rows(x), []
    # No comprehension, which before Python 3.12 is a call of its own.
    for A, core, seed, p in downs:
        found.append(_down(x2, A, seed, p, core))
    return found


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    ups: list[UpProj],
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    keep_inner: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """z = x Wᵀ + Σ h' (s·out_scale⊙B)ᵀ and y = gain⊙z + bias.  x [...,K], weight [N,K] -> y [...,N], z [M,N] or None.

    keep_inner, which needs a gain, returns z beside y.
    """
    (N, K), M, dtype = weight.shape, tokens(x), x.dtype
    weight = _as(weight, dtype)
    # Without a gain the bias goes where the frozen layer adds it, so that an adapter at its start changes no bit.
    early, late = (bias, None) if gain is None else (None, bias)
    if early is not None:
        early = _as(early, dtype)
    large = M * N * K >= _SMALL
    if large and early is not None and onednn.serves(x, weight):
        product, operands = onednn.linear, (x, weight, early)
    elif large or x.dim() != 2:
        product, operands = (
            _product,
            (_flat(x), weight.t(), early, torch.empty(*x.shape[:-1], N, dtype=dtype)),
        )
    else:
        # Of more dims torch's result would be a view.
        product, operands = torch._C._nn.linear, (x, weight, early)
    z = torch.empty(M, N, dtype=dtype) if keep_inner else None
    arguments = _held = None
    if ups or gain is not None:
        mixed, B, scaling, scale = ups[0] if len(ups) == 1 else _joined(ups, x, N)
        arguments, _held = _added(mixed, B, scaling, scale, None, 0.0, gain, late, z)
    y = product(*operands)
    if arguments:
        library().low_rank_add(*arguments, y.data_ptr())
    return y, z


def grad_output(
    dy: torch.Tensor,
    returns: list[UpProjGradSpec],
    gain: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    want_bias: bool = False,
) -> OutputGrads:
    """u = s(gain⊙out_scale⊙dy)B, v = u·core, d_core = uᵀh, dB = out_scale⊙P with P = s(gain⊙dy)ᵀh', Σdy and Σdy⊙kept.

    dy [...,N], kept [...,N] or None. Columns of dB before frozen_columns are zero and cost nothing.
    """
    dy2, gain = _rows(dy), _wide(gain)
    N = dy2.shape[1]
    d_bias = torch.empty(N, dtype=torch.float32) if want_bias else None
    dot = None if kept is None else torch.empty(N, dtype=torch.float32)
    # The sums that are no adapter's come with the first, or with one that asks for nothing.
    first, *more = returns or [UpProjGradSpec(torch.empty(N, 1), want_v=False)]
    adapters = [_returned(dy2, first, gain, d_bias, None if kept is None else _rows(kept), dot)]
    adapters += [_returned(dy2, back, gain) for back in more]
    return OutputGrads(adapters[: len(returns)], d_bias, dot)


def grad_input(segments: list[BaseTerm], low_ranks: list[LowRankTerm]) -> torch.Tensor:
    """dx = Σ (gain⊙dy) W + Σ mask⊙(v A).  dy [...,N] -> dx [...,K]."""
    first, *more = segments
    dx = torch.empty(*first.dy.shape[:-1], first.weight.shape[1], dtype=first.dy.dtype)
    dx2 = _flat(dx)
    added = [_added(v, A.t(), seed=seed, p=p) for v, A, seed, p in low_ranks]
    torch.mm(*_operands(first), out=dx2)
    for segment in more:
        dx2.addmm_(*_operands(segment))
    for arguments, _ in added:
        library().low_rank_add(*arguments, dx.data_ptr())
    return dx


def grad_project(x: torch.Tensor, low_ranks: list[LowRankTerm]) -> list[torch.Tensor]:
    """dA = vᵀ drop(x), in fp32.  x [...,K], v [M,R] -> [R,K] each."""
    x2 = _rows(x)
    return [_outer(x2, v, seed, p) for v, _, seed, p in low_ranks]


def row_norm(
    weight: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    scaling: Scaling = 1.0,
    axis: str = "out",
) -> torch.Tensor:
    """‖W + sBA‖ per row (axis="out", [N]) or per column (axis="in", [K]), in fp32."""
    by_row, down, up, given = axis == "out", _known(A), _known(B).t(), weight
    if _lies_across(weight):
        # ‖Wᵀ + sAᵀBᵀ‖ along the other axis: a transposed weight is read as it lies.
        weight, down, up, by_row = weight.t(), up, down, not by_row
    weight = _rows(weight)
    (N, K), R = weight.shape, A.shape[0]
    out = torch.empty(N if by_row else K, dtype=torch.float32)
    adapted = library().row_norm(
        _TYPES[weight.dtype], weight.data_ptr(), N, K, weight.stride(0), R, *_factor(down), *_factor(up), float(scaling), by_row,
        out.data_ptr(), _threads(N * K * R),
    )  # fmt: skip
    # Where BA is nothing yet, torch's own norm, by which PEFT starts its magnitudes: the gain is then exactly 1.
    return out if adapted else eager.row_norm(given, A, B, scaling, axis)


def dropped(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """drop(x) itself, for DoRA with dropout on both terms.  x [...,K] -> fresh, dense"""
    out, x2 = torch.empty(x.shape, dtype=x.dtype), _rows(x)
    library().drop(
        _TYPES[x.dtype],
        x2.data_ptr(),
        *x2.shape,
        x2.stride(0),
        *_dropout(seed, p),
        0,
        out.data_ptr(),
        _threads(16 * x.numel()),
    )
    return out


def _flat(x: torch.Tensor) -> torch.Tensor:
    """panels.flat, which takes its time to find that there is nothing to do."""
    return x if x.dim() == 2 else flatten_tokens(x)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """The activation as [M, width] with its rows dense: a view where strides allow, else a transient copy."""
    x2 = _flat(x)
    return x2 if x2.stride(1) == 1 or x2.shape[1] == 1 else x2.contiguous()


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """tensor.to(dtype), which takes its time to find that there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _lies_across(weight: torch.Tensor) -> bool:
    """Whether it lies in memory as its transpose."""
    return weight.stride(1) != 1 and weight.stride(0) == 1


def _wide(vector: torch.Tensor | None) -> torch.Tensor | None:
    """As the kernels read gains and biases: dense, in fp32."""
    return None if vector is None else _as(vector, torch.float32).contiguous()


def _known(F: torch.Tensor) -> torch.Tensor:
    """A factor in a dtype the kernels read: the problem tells lora_A's, and another may be wider."""
    return F if F.dtype in _TYPES else F.float()


def _at(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _factor(F: torch.Tensor) -> tuple[int, ...]:
    """A factor [R, length] as the kernels read it, of any strides."""
    along_R, along_length = F.stride()
    return F.data_ptr(), _TYPES[F.dtype], along_R, along_length


def _turned(F: torch.Tensor) -> tuple[int, ...]:
    """A factor [length, R] as the kernels read it."""
    along_length, along_R = F.stride()
    return F.data_ptr(), _TYPES[F.dtype], along_R, along_length


def _dropout(seed: torch.Tensor | None, p: float) -> tuple[int, int]:
    return (seed.data_ptr(), philox.threshold(p)) if p else (0, 0)


def _threads(work: int) -> int:
    return 1 if work < _ONE_THREAD else torch.get_num_threads()


def _down(
    x2: torch.Tensor,
    F: torch.Tensor,
    seed: torch.Tensor | None = None,
    p: float = 0.0,
    core: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h = drop(x) Fᵀ, F [R,K], and h' = core(h), both rounded once -> [M,R]"""
    # Here and in _added the helpers below stand written out: on a small layer their calls cost more than the kernel.
    (M, K), R, dtype = x2.shape, F.shape[0], x2.dtype
    if F.dtype not in _TYPES:
        F = F.float()
    along_R, along_K = F.stride()
    h = mixed = x2.new_empty(M, R)
    mixing = (0, 0, 0, 0, 0)
    if core is not None and core.dim() == 2:
        if core.dtype not in _TYPES:
            core = core.float()
        along_out, along_in = core.stride()
        mixed = x2.new_empty(M, R)
        mixing = (core.data_ptr(), _TYPES[core.dtype], along_out, along_in, mixed.data_ptr())
    library().project(
        _TYPES[dtype], x2.data_ptr(), M, K, x2.stride(0), R, F.data_ptr(), _TYPES[F.dtype], along_R, along_K, *_dropout(seed, p),
        h.data_ptr(), *mixing, _threads(M * K * R),
    )  # fmt: skip
    return h, mix(h, core) if mixed is h and core is not None else mixed


def _added(
    h: torch.Tensor,
    F: torch.Tensor,
    scaling: Scaling = 1.0,
    scale: torch.Tensor | None = None,
    seed: torch.Tensor | None = None,
    p: float = 0.0,
    gain: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    inner: torch.Tensor | None = None,
) -> tuple[tuple, tuple]:
    """For library().up: out = gain⊙(out + mask⊙(h (scaling·scale⊙F)ᵀ)) + bias, the sum before gain and bias into inner.

    h [M,R], F [N,R]; inner [M,N] is dense, as out has to be, whose address is the last argument and not among these. They are made
    before the GEMM that fills out, after which the call alone is left; beside them the tensors whose addresses they hold, which
    have to live that long.
    """
    (M, R), N = h.shape, F.shape[0]
    if h.stride(1) != 1:
        h = h.contiguous()
    if F.dtype not in _TYPES:
        F = F.float()
    if scale is not None:
        scale = _wide(scale)
    if gain is not None:
        gain = _wide(gain)
    if bias is not None:
        bias = _wide(bias)
    along_N, along_R = F.stride()
    arguments = (
        _TYPES[h.dtype], h.data_ptr(), M, h.stride(0), N, R, F.data_ptr(), _TYPES[F.dtype], along_R, along_N, float(scaling),
        0 if scale is None else scale.data_ptr(), *_dropout(seed, p), 0 if gain is None else gain.data_ptr(),
        0 if bias is None else bias.data_ptr(), 0 if inner is None else inner.data_ptr(), _threads(M * N * R),
    )  # fmt: skip
    return arguments, (h, F, scale, seed, gain, bias)


def _outer(
    x2: torch.Tensor, v: torch.Tensor, seed: torch.Tensor | None = None, p: float = 0.0
) -> torch.Tensor:
    """vᵀ drop(x) in fp32, v [M,R] -> [R,K]"""
    (M, K), R, v = x2.shape, v.shape[1], _rows(v)
    out = torch.empty(R, K, dtype=torch.float32)
    library().grad_project(
        _TYPES[x2.dtype], x2.data_ptr(), M, K, x2.stride(0), v.data_ptr(), R, v.stride(0), *_dropout(seed, p), out.data_ptr(),
        _threads(M * K * R),
    )  # fmt: skip
    return out


def _product(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    """out [...,N] = a b + bias, bit for bit what torch.nn.functional.linear computes."""
    if bias is None:
        torch.mm(a, b, out=_flat(out))
    else:
        torch.addmm(bias, a, b, out=_flat(out))
    return out


def _operands(segment: BaseTerm) -> tuple[torch.Tensor, torch.Tensor]:
    """The two operands of (gain⊙dy) W, the gain in the smaller one."""
    dy2, weight = _flat(segment.dy), _as(segment.weight, segment.dy.dtype)
    if segment.gain is None:
        return dy2, weight
    gain = _wide(segment.gain)
    if dy2.shape[0] < weight.shape[1]:
        return _scaled(dy2, gain, by_row=False), weight
    if _lies_across(weight):
        return dy2, _scaled(weight.t(), gain, by_row=False).t()
    return dy2, _scaled(weight, gain, by_row=True)


def _scaled(x: torch.Tensor, gain: torch.Tensor, by_row: bool) -> torch.Tensor:
    """gain⊙x, with one gain for each row or each column."""
    x = _rows(x)
    out = torch.empty(x.shape, dtype=x.dtype)
    library().scale(
        _TYPES[x.dtype],
        x.data_ptr(),
        *x.shape,
        x.stride(0),
        gain.data_ptr(),
        by_row,
        out.data_ptr(),
        _threads(16 * x.numel()),
    )
    return out


def _mixed(h: torch.Tensor, core: torch.Tensor | None) -> torch.Tensor:
    """h' = core(h), rounded once."""
    return mix(h, core) if core is None or core.dim() == 1 else _down(_rows(h), core)[0]


def _joined(ups: list[UpProj], x: torch.Tensor, N: int) -> UpProj:
    """Several ways up side by side as one; none is one of rank 1 that adds nothing."""
    if not ups:
        return UpProj(x.new_zeros(tokens(x), 1), x.new_zeros(N, 1))
    scaled = [
        up.B.float() * up.scaling * (1 if up.out_scale is None else up.out_scale.float()[:, None])
        for up in ups
    ]
    return UpProj(torch.cat([up.mixed for up in ups], 1), torch.cat(scaled, 1))


def _returned(
    dy2: torch.Tensor,
    back: UpProjGradSpec,
    gain: torch.Tensor | None,
    d_bias: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    dot: torch.Tensor | None = None,
) -> UpProjGrads:
    """What one adapter asked of dy, and the sums that are no adapter's where there is a place for them."""
    (M, N), R = dy2.shape, back.B.shape[1]
    u = torch.empty(M, R, dtype=dy2.dtype) if back.want_v or back.want_core else None
    P, mixed, live = None, None, 0
    if back.want_B or back.want_out_scale:
        frozen = 0 if back.want_out_scale else back.frozen_columns
        live = R - frozen
        P = (
            torch.zeros(N, R, dtype=torch.float32)
            if frozen
            else torch.empty(N, R, dtype=torch.float32)
        )
        mixed = _rows(_mixed(back.h, back.core))
    B, scale = _known(back.B), _wide(back.out_scale)
    library().grad_output(
        _TYPES[dy2.dtype], dy2.data_ptr(), M, N, dy2.stride(0), R, *_turned(B), float(back.scaling), _at(gain), _at(scale),
        _at(u), _at(mixed), mixed.stride(0) if live else 0, live, _at(P), _at(d_bias), _at(kept),
        0 if kept is None else kept.stride(0), _at(dot), _threads(M * N * R),
    )  # fmt: skip
    v = None
    if back.want_v:
        v = u if back.core is None else _by_core(u, back.core)
    d_core = _d_core(u, back) if back.want_core else None
    d_out_scale = (P * back.B).sum(1) if back.want_out_scale else None
    return UpProjGrads(v, _dB(P, back) if back.want_B else None, d_core, d_out_scale)


def _by_core(u: torch.Tensor, core: torch.Tensor) -> torch.Tensor:
    """v = u·core"""
    return u * core.to(u.dtype) if core.dim() == 1 else _down(u, core.t())[0]


def _d_core(u: torch.Tensor, back: UpProjGradSpec) -> torch.Tensor:
    """s uᵀh, or its diagonal."""
    return (u.float() * back.h).sum(0) if back.core.dim() == 1 else _outer(_rows(back.h), u)


def _dB(P: torch.Tensor, back: UpProjGradSpec) -> torch.Tensor:
    """out_scale⊙P, its frozen columns zero."""
    dB = P if back.out_scale is None else P * back.out_scale[:, None]
    if back.want_out_scale and back.frozen_columns:
        dB[:, : back.frozen_columns] = 0
    return dB
