"""The modelled time of torch's operations and of our kernels' launches on a GPU. No measurement.

A kernel or an operation takes the time of its bytes or of its flops, whichever is longer. A
streaming kernel also takes the time in which a multiprocessor issues its instructions, counted in
the machine code of its loop (loop_counts), and reads no faster than the bytes allow that it keeps
on their way. Pure functions. Imports no triton.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from lorafast.engine.kernels import configs, gpu_specs
from lorafast.engine.kernels.gpu_specs import Device
from lorafast.engine.kernels.loop_counts import LOOPS, Counts
from lorafast.runtime.devices import Arch

# Seconds of the shortest operation, and from its end until the next one begins.
LEAST, GAP = 1.0e-6, 1.5e-6
# Seconds of an access to memory.
LATENCY = 0.65e-6
# Lanes that a multiprocessor issues in one cycle.
ISSUED = 128


class Machine(NamedTuple):
    """A GPU as the model knows it.

    arch: its architecture, which decides tiles. specs: its rates. routing: by which rates the
    kernels choose their routes there; None: by the published ones.
    """

    arch: Arch
    specs: Device
    routing: Device | None = None


class Work(NamedTuple):
    """One operation of torch, or one launch. seconds: without the gap behind it."""

    name: str
    bytes: int
    seconds: float


H200_ARCH = Arch("nvidia", "sm_90", 132)
H200 = Machine(
    H200_ARCH,
    gpu_specs.device(H200_ARCH)._replace(half_flops=790e12, full_flops=55e12, bandwidth=4.3e12),
)


def elements_of(tensor: torch.Tensor) -> int:
    """Return the number of elements in memory: those that an expanded dimension repeats are one."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in strides if stride)


def bytes_of(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's elements."""
    return elements_of(tensor) * tensor.element_size()


def operation(name: str, moved: int, flops: int, dtype: torch.dtype, specs: Device) -> Work:
    """Return the work of an operation of torch. flops, dtype: of a product, 0 for any other."""
    peak = specs.half_flops if dtype.itemsize == 2 else specs.full_flops
    return Work(name, moved, max(moved / specs.bandwidth, flops / peak, LEAST))


def stream(kernel: str, loop: str, R: int, elements: int, moved: int, specs: Device) -> Work:
    """Return the work of a kernel that passes over a large operand of 16-bit elements.

    loop: the name of its loop in LOOPS. R: its ranks; 0 where they do not matter.
    """
    return loop_of(kernel, LOOPS[loop, configs.block_r(R)], elements, moved, moved, specs)


def loop_of(
    kernel: str, counts: Counts, elements: int, moved: int, read: int, specs: Device
) -> Work:
    """Return the work of a kernel with a counted loop. read: the bytes that it waits for."""
    clocks = specs.multiprocessors * specs.clock
    in_flight = specs.multiprocessors * (counts.in_flight or math.inf) / LATENCY
    seconds = max(
        moved / specs.bandwidth,
        read / in_flight,
        elements * counts.instructions / (ISSUED * clocks),
        elements * counts.integer / specs.logic,
        LEAST,
    )
    return Work(kernel, moved, seconds)


def small(kernel: str, moved: int, specs: Device) -> Work:
    """Return the work of a kernel that passes over no large operand."""
    return Work(kernel, moved, max(moved / specs.bandwidth, LEAST))


def gemm(
    form: str, elements: int, depths: Sequence[int], moved: int, masked: bool, specs: Device
) -> Work:
    """Return the work of our GEMM.

    elements: of the result. depths: the length of each summand. masked: dropout masks one of them.
    """
    flops = sum(2 * elements * depth for depth in depths)
    seconds = max(flops / (specs.half_flops * specs.speed(form)), moved / specs.bandwidth, LEAST)
    if masked:
        block = configs.BLOCKS_R[0]
        dropped = LOOPS["project, dropout", block].integer - LOOPS["project", block].integer
        seconds += elements * dropped / specs.logic
    return Work(f"gemm {form}", moved, seconds)
