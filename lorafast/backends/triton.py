"""The Triton backend: kernels/ launched on tensors, and torch's own matrix products where there is no kernel yet.

On a GPU through a driver, on CPU tensors through Triton's interpreter. Nothing here has run on a GPU yet: so it is never picked
unasked, and LORAFAST_BACKEND=triton asks for it.
"""

from __future__ import annotations

import contextlib

import torch
import triton

from lorafast import arch, env, philox
from lorafast.backends import eager
from lorafast.kernels import configs
from lorafast.kernels.grad_project import grad_project_kernel
from lorafast.kernels.project import finish_kernel, project_kernel
from lorafast.kernels.row_norm import row_norm_kernel
from lorafast.panels import flat
from lorafast.problem import Down, LowRank, Problem, Scaling
from lorafast.reference import mix

ARCHS = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# torch's matrix products with addmm_ for the low-rank part: a route like any other, and the only one here as yet.
linear, grad_output, grad_input = eager.linear, eager.grad_output, eager.grad_input


def why_not(primitive: str, problem: Problem) -> tuple[str, ...]:
    """Every reason the kernels cannot serve it."""
    vendor, name = problem.arch
    reasons = [] if env.backend() == "triton" else ["has not run on a GPU yet, and waits to be asked by LORAFAST_BACKEND=triton"]
    if vendor == "cpu" and not env.interprets():
        reasons.append("runs on CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1)")
    if vendor == "cpu" and torch.bfloat16 in (problem.dtype, problem.weight_dtype, problem.factor_dtype):
        reasons.append("Triton's interpreter computes bf16 wrongly")
    if vendor not in ("cpu", "nvidia"):
        reasons.append(f"is compiled for NVIDIA {', '.join(ARCHS)}; this is {vendor} {name}")
    if vendor == "nvidia" and name not in ARCHS:
        reasons.append(f"is compiled for {', '.join(ARCHS)}; this is {name}")
    if vendor == "nvidia" and triton.knobs.runtime.interpret:
        reasons.append("TRITON_INTERPRET=1 is set, and interprets kernels on CPU tensors alone")
    for what, dtype in (("x", problem.dtype), ("weight", problem.weight_dtype), ("a factor", problem.factor_dtype)):
        if dtype not in DTYPES:
            reasons.append(f"{what} is {dtype}; the kernels compute in {', '.join(map(str, DTYPES))}")
    if max(problem.R) > configs.MAX_RANK:
        reasons.append(f"R={max(problem.R)} exceeds {configs.MAX_RANK}, the largest rank a tile holds")
    return tuple(reasons)


def project(x: torch.Tensor, downs: list[Down]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """h = drop(x) Aᵀ rounded to x's dtype, and h' = core(h).  x [...,K] -> h, h' [M,R] for each way down."""
    x2 = flat(x)
    return [_project(x2, down) for down in downs]


def _project(x2: torch.Tensor, down: Down) -> tuple[torch.Tensor, torch.Tensor]:
    (M, K), R, core = x2.shape, down.A.shape[0], down.core
    h = x2.new_empty(M, R)
    # A core too wide for registers is a product of its own.
    inside = core is not None and configs.mixes(R, x2.dtype)
    mixed = x2.new_empty(M, R) if inside else h
    tile, splits, steps = configs.project(M, K, R, x2.dtype, _arch(x2))
    if M:
        sums = h if splits == 1 else x2.new_empty(splits, M, R, dtype=torch.float32)
        held, strides = (core, (core.stride(0), core.stride(-1))) if inside else (h, (0, 0))
        fixed = {"CORE": core.dim() if inside else 0, "PRECISION": _precision(x2)}
        launch = {"num_warps": tile.warps, "num_stages": tile.stages}
        grid, scale = triton.cdiv(M, tile.BLOCK_M), philox.scale(down.p)
        with _on(x2):
            project_kernel[grid, splits](
                x2, down.A, held, *_seed(down.seed, x2), sums, mixed, M, K, R, *x2.stride(), *down.A.stride(), *strides,
                _groups(K), philox.threshold(down.p), scale, steps,
                DROPS=down.p > 0, SPLIT=splits > 1, **fixed, **tile.blocks("BLOCK_M", "BLOCK_K"), **launch,
            )  # fmt: skip
            if splits > 1:
                finish_kernel[(grid,)](
                    sums, held, h, mixed, M, R, *strides, scale, splits, **fixed, **tile.blocks("BLOCK_M"), **launch
                )  # fmt: skip
    return h, mixed if inside else mix(h, core)


def grad_project(x: torch.Tensor, low_ranks: list[LowRank]) -> list[torch.Tensor]:
    """dA = vᵀ drop(x), in fp32.  x [...,K], v [M,R] -> [R,K] each."""
    x2 = flat(x)
    return [_grad_project(x2, low) for low in low_ranks]


def _grad_project(x2: torch.Tensor, low: LowRank) -> torch.Tensor:
    (M, K), R = x2.shape, low.A.shape[0]
    tile, splits, steps = configs.grad_project(M, K, R, x2.dtype, _arch(x2))
    out = x2.new_empty(splits, R, K, dtype=torch.float32)
    with _on(x2):
        grad_project_kernel[triton.cdiv(K, tile.BLOCK_K), splits](
            x2, low.v, *_seed(low.seed, x2), out, M, K, R, *x2.stride(), *low.v.stride(), _groups(K), philox.threshold(low.p),
            philox.scale(low.p), steps, DROPS=low.p > 0, PRECISION=_precision(x2),
            **tile.blocks("BLOCK_M", "BLOCK_K"), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0)


def row_norm(weight: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: Scaling = 1.0, axis: str = "out") -> torch.Tensor:
    """‖W + sBA‖ per row (axis="out", [N]) or per column (axis="in", [K]), in fp32."""
    (N, K), R, by_row = weight.shape, A.shape[0], axis == "out"
    tile = configs.row_norm(R, weight.dtype)
    out = weight.new_empty(N if by_row else K, dtype=torch.float32)
    scaled = isinstance(scaling, torch.Tensor)
    grid = triton.cdiv(N, tile.BLOCK_N) if by_row else triton.cdiv(K, tile.BLOCK_K)
    if grid:
        with _on(weight):
            row_norm_kernel[(grid,)](
                weight, A, B, scaling if scaled else out, out, N, K, R, *weight.stride(), *A.stride(), *B.stride(),
                0.0 if scaled else float(scaling), SCALED=scaled, BY_ROW=by_row,
                PRECISION=_precision(weight) if weight.dtype == torch.float32 else "tf32",
                **tile.blocks("BLOCK_N", "BLOCK_K"), num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return out


def _seed(seed: torch.Tensor | None, x2: torch.Tensor) -> tuple[torch.Tensor]:
    """The seed's pointer, or any other where nothing is dropped and none is read."""
    return (x2 if seed is None else seed,)


def _groups(K: int) -> int:
    return triton.cdiv(K, philox.GROUP)


def _precision(x: torch.Tensor) -> str:
    """tf32 only where torch's own matrix products use it."""
    return "tf32" if x.dtype == torch.float32 and x.is_cuda and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _arch(x: torch.Tensor) -> str:
    return arch.of(x.device).name


def _on(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Kernels launch on the current device, which need not be x's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
