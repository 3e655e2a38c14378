"""Count the instructions that a training step of one layer takes of the host on a GPU's backends.

    LORAFAST_CPU_ISA=avx2 python tools/host_instructions.py

A step is forward and backward of 8 tokens, 64 -> 64, R = 16, dropout 0.05, on a CPU in place of the
GPU, with a driver that launches nothing: torch's products are part of it, as they are of the frozen
layer's. The calls are made by the host path, or in Python, whose launches csrc/launch makes.
valgrind counts; it knows no AVX-512, so the kernels of an older instruction set have to be there
(`python -m lorafast build --isa avx2`).
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
# The layers, the backend of each, and what makes its calls.
ROWS = (
    ("frozen", "torch", ""),
    ("LoRA", "cuda", "host"), ("DoRA", "cuda", "host"),
    ("LoRA", "triton", "host"), ("DoRA", "triton", "host"),
    ("LoRA", "triton", "Python"), ("DoRA", "triton", "Python"),
)  # fmt: skip
TOKENS, SIZE, RANK, DROPOUT = 8, 64, 16, 0.05
# Steps that are taken first, and that are counted.
WARMUP, STEPS = 20, 100
# What C's qsort becomes. It calls a function of Python, and valgrind counts within it alone.
COUNTED_IN = "qsort_r"


def on_cuda(stubs: contextlib.ExitStack, nothing: int) -> None:
    """Let the host path serve by the cuda backend. nothing: the address of what launches."""
    from helpers.emulated_cuda import emulating

    from lorafast.engine import cuda_forms, host
    from lorafast.runtime import cuda_driver

    stubs.enter_context(emulating(90))
    stubs.enter_context(mock.patch.object(cuda_forms, "function", return_value=1))
    stubs.enter_context(mock.patch.object(cuda_driver, "launch_address", return_value=nothing))
    serves = host._load(on_cpu=False)
    if isinstance(serves, str):
        sys.exit(f"the host path does not serve: {serves}")
    stubs.enter_context(mock.patch.object(host, "linear", serves))


def on_triton(stubs: contextlib.ExitStack, nothing: int, maker: str) -> None:
    """Let the triton backend serve, by the host path or in Python."""
    from helpers import host_on_triton

    from lorafast.engine.kernels import triton_internals

    stubs.enter_context(mock.patch.object(triton_internals, "LAUNCHED_TENSORS", "cpu"))
    stubs.enter_context(host_on_triton.on_gpu(90))
    if maker == "host":
        stubs.enter_context(host_on_triton.served_by_host(nothing))


def take_steps(name: str, backend: str, maker: str) -> None:
    """Make a layer, train it, and take the steps that are counted."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    import torch
    from emulator import fake_cuda

    import lorafast

    torch.set_num_threads(1)
    # A function of C that returns at once, 0.
    nothing = ctypes.cast(fake_cuda.load().library.cuInit, ctypes.c_void_p).value or 0
    layer: torch.nn.Module = torch.nn.Linear(SIZE, SIZE, bias=False).requires_grad_(False)
    x, dy = torch.randn(TOKENS, SIZE, requires_grad=True), torch.randn(TOKENS, SIZE)
    with contextlib.ExitStack() as stubs:
        if name != "frozen":
            adapter = getattr(lorafast, name)(r=RANK, dropout=DROPOUT)
            layer = lorafast.Linear(SIZE, SIZE, bias=False, adapter=adapter)
        if backend == "cuda":
            on_cuda(stubs, nothing)
        elif backend == "triton":
            on_triton(stubs, nothing, maker)

        def steps(count: int) -> None:
            for _ in range(count):
                layer(x).backward(dy)
                x.grad = None
                layer.zero_grad()

        def compare(*_: int) -> int:
            steps(STEPS)
            return 0

        steps(WARMUP)
        pair = (ctypes.c_int * 2)()
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        # Of two elements it compares once.
        ctypes.CDLL(None).qsort(pair, 2, 4, kind(compare))


def instructions(row: tuple[str, ...]) -> float:
    """Return the instructions of a layer's step."""
    own = [sys.executable, __file__, *row]
    valgrind = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    within = ["--collect-atstart=no", f"--toggle-collect={COUNTED_IN}"]
    done = subprocess.run([*valgrind, *within, *own], capture_output=True, text=True)
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or not found or int(found[1]) < STEPS * 10_000:
        sys.exit(f"{' '.join(own)} fails under valgrind:\n{done.stderr[-2000:]}")
    return int(found[1]) / STEPS


def main(arguments: list[str]) -> None:
    """Count and print, or take the steps that are counted."""
    if arguments:
        take_steps(*arguments)
        return
    for row in ROWS:
        name, backend, maker = row
        print(f"{name:6} {backend:6} {maker:6} {instructions(row) / 1e6:.2f} M instructions a step")


if __name__ == "__main__":
    main(sys.argv[1:])
