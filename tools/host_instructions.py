"""Count the instructions that a training step of one layer by the cuda backend takes of the host.

    LORAFAST_CPU_ISA=avx2 python tools/host_instructions.py

A step is forward and backward of 8 tokens, 64 -> 64, R = 16, dropout 0.05, on a CPU in place of the
GPU, with a driver that launches nothing: torch's products are part of it, as they are of the frozen
layer's. valgrind counts; it knows no AVX-512, so the kernels of an older instruction set have to be
there (`python -m lorafast build --isa avx2`).
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
LAYERS = ("frozen", "LoRA", "DoRA")
TOKENS, SIZE, RANK, DROPOUT = 8, 64, 16, 0.05
# Steps that are taken first, and that are counted.
WARMUP, STEPS = 20, 100
# What C's qsort becomes. It calls a function of Python, and valgrind counts within it alone.
COUNTED_IN = "qsort_r"


def take_steps(name: str) -> None:
    """Make a layer, train it, and take the steps that are counted."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    import torch
    from emulator import fake_cuda
    from helpers.emulated_cuda import emulating

    import lorafast
    from lorafast.engine import cuda_forms, host
    from lorafast.runtime import cuda_driver

    torch.set_num_threads(1)
    # A function of C that returns at once, 0.
    nothing = ctypes.cast(fake_cuda.load().library.cuInit, ctypes.c_void_p).value
    layer: torch.nn.Module = torch.nn.Linear(SIZE, SIZE, bias=False).requires_grad_(False)
    x, dy = torch.randn(TOKENS, SIZE, requires_grad=True), torch.randn(TOKENS, SIZE)
    with contextlib.ExitStack() as stubs:
        if name != "frozen":
            adapter = getattr(lorafast, name)(r=RANK, dropout=DROPOUT)
            layer = lorafast.Linear(SIZE, SIZE, bias=False, adapter=adapter)
            stubs.enter_context(emulating(90))
            stubs.enter_context(mock.patch.object(cuda_forms, "function", return_value=1))
            stubs.enter_context(
                mock.patch.object(cuda_driver, "launch_address", return_value=nothing)
            )
            serves = host._load(on_cpu=False)
            if isinstance(serves, str):
                sys.exit(f"the host path does not serve: {serves}")
            stubs.enter_context(mock.patch.object(host, "linear", serves))

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


def instructions(name: str) -> float:
    """Return the instructions of a layer's step."""
    own = [sys.executable, __file__, name]
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
        take_steps(arguments[0])
        return
    for name in LAYERS:
        print(f"{name:7} {instructions(name) / 1e6:.2f} M instructions a step")


if __name__ == "__main__":
    main(sys.argv[1:])
