"""Triton up to the compiler: kernels are bound and specialized, and neither compiled nor run.

    with binder.binding(90) as launches:
        kernel[grid](x, y, ...)

Every launch is held against what its kernel would have been compiled for: types, sizes that are
constants, alignment. So a compiled kernel that is kept and called with other arguments is seen.
Descriptors are held against the rules of TMA.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from emulator.driver import Driver, active
from emulator.memory import Fault
from emulator.recorder import Utils
from emulator.tma import refusals

_NAMES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8",
    torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
# The most programs of a grid along x, y and z.
_GRID = (2**31 - 1, 65535, 65535)


class Launch(NamedTuple):
    """One launch: the kernel's name, the grid, the number of descriptors, warps and stages."""

    kernel: str
    grid: tuple[int, int, int]
    descriptors: int
    warps: int
    stages: int


class Uncompiled:
    """What stands for a compiled kernel, with what a launch asks of one."""

    def __init__(self, name, signature, constants, attributes, options, launches: list[Launch]):
        self.name, self.signature, self.constants = name, list(signature.values()), constants
        self.aligned = {place[0] for place, hints in attributes.items() if hints}
        self.options, self.launches = options, launches
        self.function, self.packed_metadata = 1, None

    def launch_metadata(self, grid, stream, *args) -> None:
        """Return nothing: no hook looks at launches."""

    def __getitem__(self, grid):
        """Return a function that launches on a grid."""
        return lambda *args, stream=None: self.run(*grid, stream, 1, None, None, None, None, *args)

    def run(self, x, y, z, stream, function, packed, metadata, enter, leave, *args) -> None:
        """Note a launch, and raise a Fault unless the kernel is compiled for the arguments."""
        grid = (x, y, z)
        if not all(0 < size <= most for size, most in zip(grid, _GRID, strict=True)):
            raise Fault(f"{self.name}: grid {grid}")
        for i, (arg, kind) in enumerate(zip(args, self.signature, strict=True)):
            if reason := self._mismatch(i, arg, kind):
                raise Fault(f"{self.name}: argument {i} {reason}")
        descriptors = [arg for arg in args if isinstance(arg, TensorDescriptor)]
        for descriptor in descriptors:
            _check_descriptor(self.name, descriptor)
        options = self.options
        self.launches.append(
            Launch(self.name, grid, len(descriptors), options.num_warps, options.num_stages)
        )

    def _mismatch(self, i: int, arg, kind: str) -> str | None:
        """Return what an argument is that the kernel was not compiled for."""
        if kind == "constexpr":
            constant = self.constants.get((i,))
            same = arg is constant or arg == constant
            return None if same else f"is {arg}, and was the constant {constant}"
        if kind.startswith("tensordesc"):
            dtype, block = _NAMES[arg.base.dtype], ",".join(map(str, arg.block_shape))
            made = f"tensordesc<{dtype}[{block}]>"
            return None if made == kind.replace(", ", ",") else f"is {made}, and was {kind}"
        if kind.startswith("*"):
            if _NAMES[arg.dtype] != kind.strip("*").removeprefix("k"):
                return f"is of {arg.dtype}, and was {kind}"
            number = arg.data_ptr()
        elif kind.startswith("i"):
            if not -(2 ** (int(kind[1:]) - 1)) <= arg < 2 ** (int(kind[1:]) - 1):
                return f"is {arg}, and was {kind}"
            number = arg
        else:
            return None
        return f"is {number:#x}, no multiple of 16" if i in self.aligned and number % 16 else None


def _check_descriptor(name: str, descriptor: TensorDescriptor) -> None:
    itemsize, box = descriptor.base.dtype.itemsize, list(descriptor.block_shape)
    # Triton cuts a box where its rows exceed a swizzle's 128 bytes.
    box[-1] = min(box[-1], 128 // itemsize)
    shape, strides = list(descriptor.shape), list(descriptor.strides)
    if reasons := refusals(descriptor.base.data_ptr(), 0, itemsize, box, shape, strides):
        raise Fault(f"{name}: cuTensorMapEncodeTiled would refuse: {'; '.join(reasons)}")


@contextlib.contextmanager
def binding(capability: int) -> Iterator[list[Launch]]:
    """Return a context in which launches are checked and noted."""
    launches: list[Launch] = []

    def do_not_compile(
        self, key, signature, device, constexprs, options, attrs, warmup
    ) -> Uncompiled:
        kernel = Uncompiled(self.fn.__name__, signature, constexprs, attrs, options, launches)
        self.device_caches[device][0][key] = kernel
        return kernel

    stub = mock.patch.object(JITFunction, "_do_compile", do_not_compile)
    with stub, active(Driver(capability, Utils(capability))):
        yield launches
