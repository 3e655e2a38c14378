"""The constants that a trial measures on a device: the rate of a copy, torch's products, our GEMM
beside them, and each streaming kernel beside the eager backend.

kernels/measured.py says what they mean, and computes with them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator

import torch

from lorafast.engine import trial
from lorafast.engine.kernel_cases import KEPT, KernelCase, Sizes, kernel_cases
from lorafast.engine.kernels import gemm_routing, measured
from lorafast.engine.kernels.gemm_routing import Route
from lorafast.engine.kernels.measured import COPY, EAGER, KERNELS, PRODUCT, SMALL_PRODUCT
from lorafast.engine.trial import GEMMS, Form, Verdict

# M, K and N of a layer.
Shape = tuple[int, int, int]

P = 0.05
# A layer that fills a GPU; one whose time is that of its launches; one of the usual small width.
LARGE, TINY, SMALL = (8192, 4096, 4096), (64, 64, 64), (8192, 1024, 1024)
_SAMPLES = 5
# The least seconds of a sample: short calls are repeated.
_LEAST = 1e-3
_MOST_REPEATS = 50


def measure(
    right: list[Form],
    device: torch.device,
    mask: bool,
    large: Shape = LARGE,
    small: Shape = SMALL,
) -> dict[str, float]:
    """Return the constants of some right forms: those of the first dtype.

    mask: True if eager may drop by the mask's kernel. large, small: M, K and N of the layers that
    are measured.
    """
    dtype, R = right[0].dtype, 128 if right[0].wide else 16
    kernels = {form.kernel for form in right if form.dtype == dtype}
    # Memory that is not written would be filled with NaN, which takes time.
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        found = _products(dtype, device, large, small)
        entry, form = trial.entry_of("drop", dtype)
        with trial.assuming({entry: Verdict({str(form): "" if mask else "is wrong"})}):
            for sizes in (large, TINY):
                for kernel, case in _streams(kernels, dtype, device, sizes, R):
                    found |= _stream(kernel, case, device, sizes == TINY)
        for kernel in kernels & set(GEMMS):
            found[kernel] = min(_speed(kernel, dtype, device, sizes) for sizes in (large, small))
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
    return found


def _products(
    dtype: torch.dtype, device: torch.device, large: Shape, small: Shape
) -> dict[str, float]:
    """Return the rate of a copy, and flop/s of torch's product of two layers."""
    x = torch.ones(large[:2], device=device, dtype=dtype)
    y = torch.empty_like(x)
    found = {COPY: 2 * x.nbytes / _seconds(functools.partial(y.copy_, x), device)}
    del x, y
    for name, (M, K, N) in ((PRODUCT, large), (SMALL_PRODUCT, small)):
        a, b = (torch.ones(*shape, device=device, dtype=dtype) for shape in ((M, K), (K, N)))
        found[name] = 2 * M * K * N / _seconds(functools.partial(torch.mm, a, b), device)
    return found


def _streams(
    kernels: set[str], dtype: torch.dtype, device: torch.device, sizes: Shape, R: int
) -> Iterator[tuple[str, KernelCase]]:
    """Yield each streaming kernel with the cases that it is measured in."""
    M, K, N = sizes
    for p in (0.0, P):
        for case in kernel_cases(Sizes(M, K, N, R, p), dtype, device, seed=7):
            if (
                case.primitive in kernels
                and case.variant in ("", KEPT)
                and (not p or case.primitive in measured.DROPPED)
            ):
                yield case.primitive, case
    if "low_rank_add" in kernels:
        # With so few columns the base product costs little more than its launch.
        for case in kernel_cases(Sizes(M, K, 16, R, P), dtype, device, seed=7):
            if case.primitive == "grad_input":
                yield "low_rank_add", case


def _stream(kernel: str, case: KernelCase, device: torch.device, tiny: bool) -> dict[str, float]:
    """Return the rates of a kernel and of eager on a large case, the least times on a tiny one."""
    name, found = measured.stream(kernel, case.problem), {}
    for by, run in ((KERNELS, case.run), (EAGER, case.eager)):
        with gemm_routing.forcing(Route("low first")):
            seconds = _seconds(run, device)
        if tiny:
            found[measured.least(name, by)] = seconds
        else:
            found[measured.rate(name, by)] = measured.bytes_of(kernel, case.problem) / seconds
    return found


def _speed(kernel: str, dtype: torch.dtype, device: torch.device, sizes: Shape) -> float:
    """Return the speed of the fastest route of our GEMM by that of torch's base product."""
    case = kernel_cases(Sizes(*sizes, 16, 0.0), dtype, device, seed=7)[0]
    frozen, found = _seconds(case.frozen, device), 0.0
    for route in gemm_routing.candidates(case.query):
        if f"gemm_{route.form}" == kernel:
            with gemm_routing.forcing(route):
                ours = _seconds(case.run, device)
            # Our sum has a step more, which the low-rank part fills in part.
            found = max(found, frozen / ours * (1 + route.tile.BLOCK_K / sizes[1]))
    return found


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call among many, host and device together: the least of samples."""
    for _ in range(2):
        run()
    once = _sample(run, device, 1)
    repeats = min(_MOST_REPEATS, max(1, round(_LEAST / once)))
    return min(_sample(run, device, repeats) for _ in range(_SAMPLES)) / repeats


def _sample(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    _wait(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
