"""What the primitives launch for 8192 tokens through 4096 → 4096 in bf16, recorded and not run."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from emulator import recorder
from triton import knobs

from helpers import sass_loops
from helpers.emulated_device import nvidia
from lorafast.engine.kernels.drop import drop
from lorafast.engine.kernels.grad_output import grad_output
from lorafast.engine.kernels.grad_project import grad_project
from lorafast.engine.kernels.low_rank_add import low_rank_add
from lorafast.engine.kernels.project import project
from lorafast.engine.kernels.row_norm import row_norm
from lorafast.engine.problem import DownProj, LowRankTerm, UpProjGradSpec

M, N, K = 8192, 4096, 4096
MULTIPROCESSORS = 132
# The kernels of which a program computes one tile, without a loop over the large operand.
WITHOUT_LOOP = ("low_rank_add_kernel", "drop_kernel")
SEED, P = torch.tensor([7]), 0.05
BF16 = torch.bfloat16


def _project(R: int, p: float) -> None:
    project(torch.empty(M, K, dtype=BF16), [DownProj(torch.empty(R, K), None, SEED, p)])


def _grad_output(R: int, kept: bool = False, bias: bool = False) -> None:
    dy, h = torch.empty(M, N, dtype=BF16), torch.empty(M, R, dtype=BF16)
    gain = torch.empty(N) if kept else None
    spec = UpProjGradSpec(torch.empty(N, R), 1.7, h=h, want_B=True)
    grad_output(dy, [spec], gain, torch.empty(M, N, dtype=BF16) if kept else None, bias)


def _grad_project(R: int, p: float) -> None:
    x, v = torch.empty(M, K, dtype=BF16), torch.empty(M, R, dtype=BF16)
    grad_project(x, LowRankTerm(v, torch.empty(R, K), SEED, p))


def _low_rank_add(R: int, accumulate: bool) -> None:
    dx, v = torch.empty(M, K, dtype=BF16), torch.empty(M, R, dtype=BF16)
    low_rank_add(dx, LowRankTerm(v, torch.empty(R, K), SEED, P), accumulate)


def _drop(accumulate: bool) -> None:
    x, out = torch.empty(M, K, dtype=BF16), torch.empty(M, K, dtype=BF16)
    drop(out, x, SEED, P, accumulate=accumulate)


def _row_norm(R: int, axis: str) -> None:
    row_norm(torch.empty(N, K, dtype=BF16), torch.empty(R, K), torch.empty(N, R), 1.7, axis)


# The kernel that a call is about, and the call, given R.
CALLS: dict[str, tuple[str, Callable[[int], None]]] = {
    "project": ("project_kernel", lambda R: _project(R, 0.0)),
    "project, dropout": ("project_kernel", lambda R: _project(R, P)),
    "grad_output": ("grad_output_kernel", _grad_output),
    "grad_output, bias": ("grad_output_kernel", lambda R: _grad_output(R, bias=True)),
    "grad_output, kept": ("grad_output_kernel", lambda R: _grad_output(R, kept=True)),
    "grad_project": ("grad_project_kernel", lambda R: _grad_project(R, 0.0)),
    "grad_project, dropout": ("grad_project_kernel", lambda R: _grad_project(R, P)),
    "low_rank_add": ("low_rank_add_kernel", lambda R: _low_rank_add(R, False)),
    "low_rank_add, accumulated": ("low_rank_add_kernel", lambda R: _low_rank_add(R, True)),
    "drop": ("drop_kernel", lambda R: _drop(False)),
    "drop, accumulated": ("drop_kernel", lambda R: _drop(True)),
    "row_norm, rows": ("row_norm_kernel", lambda R: _row_norm(R, "out")),
    "row_norm, columns": ("row_norm_kernel", lambda R: _row_norm(R, "in")),
}


@functools.cache
def launch_of(call: str, R: int, capability: int) -> recorder.Launch:
    """Return the launch of the kernel that a call is about."""
    kernel, run = CALLS[call]
    # Apart from the emulator's, which have no machine code.
    folder = Path(knobs.cache.dir) / "recorded"
    with nvidia(capability), recorder.recording(capability, folder) as launches:
        run(R)
    return next(launch for launch in launches if launch.kernel.name == kernel)


def figures_of(call: str, R: int, capability: int) -> sass_loops.Figures:
    """Return the figures of the kernel that a call is about."""
    launch = launch_of(call, R, capability)
    kernel, blocks = launch.kernel, launch.kernel.constants
    rows = "BLOCK_N" if kernel.name == "row_norm_kernel" else "BLOCK_M"
    columns = "BLOCK_N" if kernel.name == "grad_output_kernel" else "BLOCK_K"
    programs = launch.grid[0] * launch.grid[1] / MULTIPROCESSORS
    return sass_loops.of_kernel(
        kernel.files, capability, blocks[rows] * blocks[columns], kernel.name not in WITHOUT_LOOP,
        launch.warps, kernel.shared, programs,
    )  # fmt: skip
