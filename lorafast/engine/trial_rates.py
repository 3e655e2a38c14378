"""The constants that a trial measures on a device: the rate of a copy, torch's products, our GEMM
beside them, and each streaming kernel of a backend beside the eager backend.

kernels/measured.py says what they mean, and computes with them.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator

import torch

from lorafast.engine import trial
from lorafast.engine.kernel_cases import KernelCase, Sizes, kernel_cases
from lorafast.engine.kernel_variants import GAINED, INNER, KEPT
from lorafast.engine.kernels import gemm_routing, measured
from lorafast.engine.kernels.gemm_routing import Route
from lorafast.engine.kernels.measured import COPY, EAGER, KERNELS, PRODUCT, SMALL_PRODUCT
from lorafast.engine.trial_forms import CUDA, GEMMS, Form, Verdict

# M, K and N of a layer.
Shape = tuple[int, int, int]
# Called with seconds, it gives the device so much to do.
Busy = Callable[[float], None]

P = 0.05
# A layer that fills a GPU; one whose time is that of its launches; one of the usual small width.
LARGE, TINY, SMALL = (8192, 4096, 4096), (64, 64, 64), (8192, 1024, 1024)
_SAMPLES = 5
# The least seconds of a sample: short calls are repeated.
_LEAST = 1e-3
_MOST_REPEATS = 50
# The calls whose time the device's clock takes, and the most products that they wait behind.
_QUEUED, _MOST_PRODUCTS = 5, 200


def measure(
    right: list[Form],
    device: torch.device,
    mask: bool,
    large: Shape = LARGE,
    small: Shape = SMALL,
) -> dict[str, float]:
    """Return the constants of some right forms of one backend: those of the first dtype.

    mask: True if eager may drop by the mask's kernel. large, small: M, K and N of the layers that
    are measured.
    """
    by, dtype, R = right[0].by, right[0].dtype, 128 if right[0].wide else 16
    kernels = {form.kernel for form in right if form.dtype == dtype}
    # Memory that is not written would be filled with NaN, which takes time.
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        found = _products(dtype, device, large, small)
        entry, form = trial.entry_of("drop", dtype)
        with trial.assuming({entry: Verdict({str(form): "" if mask else "is wrong"})}):
            busy = _keeper(dtype, device, large, found[PRODUCT])
            for kernel, case in _streams(kernels, by, dtype, device, large, R):
                found |= _rates(
                    kernel, case, device, measured.CUDA if by == CUDA else KERNELS, busy
                )
            if by != CUDA:
                for kernel, case in _streams(kernels, by, dtype, device, TINY, R):
                    found |= _least(kernel, case, device)
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
    kernels: set[str], by: str, dtype: torch.dtype, device: torch.device, sizes: Shape, R: int
) -> Iterator[tuple[str, KernelCase]]:
    """Yield each streaming kernel of a backend with the cases that it is measured in."""
    M, K, N = sizes
    for p in (0.0, P):
        for case in kernel_cases(Sizes(M, K, N, R, p), dtype, device, 7, by):
            if (
                case.primitive in kernels
                and case.variant in ("", KEPT)
                and (not p or case.primitive in measured.DROPPED)
            ):
                yield case.primitive, case
    if "low_rank_add" not in kernels:
        return
    # With so few columns the base product costs little more than its launch.
    for p in (0.0, P) if by == CUDA else (P,):
        for case in kernel_cases(Sizes(M, K, 16, R, p), dtype, device, 7, by):
            if (case.primitive, case.variant) == ("grad_input", ""):
                yield ("grad_input" if by == CUDA else "low_rank_add"), case
    if by == CUDA:
        for case in kernel_cases(Sizes(M, 16, N, R, 0.0), dtype, device, 7, by):
            if case.primitive == "linear" and case.variant in ("", GAINED, INNER):
                yield "linear", case


def _rates(
    kernel: str, case: KernelCase, device: torch.device, ours: str, busy: Busy
) -> dict[str, float]:
    """Return the rates of a kernel and of eager on a large case."""
    name, moved = measured.stream(kernel, case.problem), measured.bytes_of(kernel, case.problem)
    with gemm_routing.forcing(Route("low first")):
        return {
            measured.rate(name, by): moved / _device_seconds(run, device, busy)
            for by, run in ((ours, case.run), (EAGER, case.eager))
        }


def _least(kernel: str, case: KernelCase, device: torch.device) -> dict[str, float]:
    """Return the least times of a kernel and of eager, on a tiny case."""
    name = measured.stream(kernel, case.problem)
    with gemm_routing.forcing(Route("low first")):
        return {
            measured.least(name, by): _seconds(run, device)
            for by, run in ((KERNELS, case.run), (EAGER, case.eager))
        }


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


def _keeper(dtype: torch.dtype, device: torch.device, sizes: Shape, flops: float) -> Busy:
    """Return what keeps a device busy, by torch's products at a rate in flop/s."""
    M, K, N = sizes
    a, b = (torch.ones(*shape, device=device, dtype=dtype) for shape in ((M, K), (K, N)))
    out, once = torch.empty(M, N, device=device, dtype=dtype), 2 * M * K * N / flops

    def busy(seconds: float) -> None:
        for _ in range(min(_MOST_PRODUCTS, math.ceil(seconds / once))):
            torch.mm(a, b, out=out)

    return busy


def _device_seconds(run: Callable[[], object], device: torch.device, busy: Busy) -> float:
    """Return the seconds of a call on the device alone, where it has a clock: the least of samples.

    The calls wait behind other work until the host has launched them all: a stream may take less
    time than Python takes to launch it.
    """
    if device.type != "cuda":
        return _seconds(run, device)
    module, least = torch.get_device_module(device), math.inf
    for _ in range(2):
        run()
    _wait(device)
    begin = time.perf_counter()
    run()
    host = time.perf_counter() - begin
    for _ in range(_SAMPLES):
        first, last = (module.Event(enable_timing=True) for _ in range(2))
        busy(2 * _QUEUED * host)
        first.record()
        for _ in range(_QUEUED):
            run()
        last.record()
        last.synchronize()
        least = min(least, first.elapsed_time(last) / (1e3 * _QUEUED))
    return least


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
