"""A Triton driver whose device is the emulator.

    with driver.emulating(90):
        kernel[grid](...)

Triton's own launcher (triton.backends.nvidia.driver.CudaLauncher) stays in charge: it expands
tensor descriptors, leaves out constexprs, and asks for tensor maps as it would of CUDA. Only its C
functions are replaced. ptxas is left out, so a cache folder must not be shared with a real GPU.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia import compiler
from triton.backends.nvidia import driver as nvidia

from emulator import machine
from emulator.tma import TensorMap

CONSTEXPR, KERNEL, TUPLE = range(3)
# The bytes of shared memory of a block, and multiprocessors, by compute capability.
SHARED = {80: 166912, 90: 232448}
PROCESSORS = {80: 108, 90: 132}
_FLOATS = {"fp16": "<e", "fp32": "<f", "f32": "<f", "fp64": "<d"}


class Annotation:
    """What stands for the C class PyKernelArg: the kind of an argument."""

    def __init__(self, nested_tuple, type):
        self.nested_tuple, self.type = nested_tuple, type


class Utils:
    """What stands for the functions that CudaUtils takes from C.

    latest: the code of a kernel that was launched last, by its name.
    """

    def __init__(self, capability: int):
        self.capability = capability
        self.loaded: dict[str, machine.Code] = {}
        self.latest: dict[str, machine.Code] = {}
        self.files: dict[str, Path] = {}

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return what the launcher asks of a device."""
        return {
            "max_shared_mem": SHARED[self.capability],
            "multiprocessor_count": PROCESSORS[self.capability],
            "warpSize": 32,
        }

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        """Return the module, function, registers, spills and most threads of the PTX just seen."""
        text = self.files[".ptx"].read_text()
        if text not in self.loaded:
            self.loaded[text] = machine.Code(text)
        return None, self.loaded[text], 0, 0, 1024

    def build_signature_metadata(self, signature: list[str]) -> list[str]:
        """Return the types of the arguments."""
        return signature

    def fill_tma_descriptor_tiled(
        self, base, swizzle, itemsize, kind, box, shape, strides, padding
    ) -> TensorMap:
        """Return a tensor map."""
        if padding:
            raise NotImplementedError("padding with NaN")
        return TensorMap(base, swizzle, itemsize, box, shape, strides)

    def launch(self, x, y, z, stream, code, *rest) -> None:
        """Run a grid."""
        packed, scratch, profile = rest[2], rest[6], rest[7]
        notes, signature, args = rest[8:]
        values = list(flattened(args, notes))
        if len(values) != len(signature) or scratch is not None or profile is not None:
            raise NotImplementedError("arguments that do not fit the signature, or scratch memory")
        params = [_bits(value, kind) for value, kind in zip(values, signature, strict=True)]
        params += [0, 0]
        if len(params) != len(code.program.params):
            raise ValueError(f"{len(params)} parameters for {len(code.program.params)}")
        spans = [span(value) for value in values if hasattr(value, "stride")]
        self.latest[code.program.name] = code
        machine.launch(code, (x, y, z), params, packed[2], spans)


_numbers = itertools.count()


class Driver(DriverBase):
    """Device 0, of one compute capability. utils: what stands for its C functions."""

    def __init__(self, capability: int, utils: object):
        self.capability, self.utils, self.number = capability, utils, next(_numbers)
        self.launcher_cls = nvidia.CudaLauncher

    @classmethod
    def is_active(cls) -> bool:
        """Return True."""
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Return the C type of an argument."""
        return nvidia.ty_to_cpp(ty)

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """Return a number for each driver, because Triton caches kernels by device."""
        return self.number

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Return the device of the tensors."""
        return torch.device("cpu")

    def get_benchmarker(self):
        """Raise: nothing is timed here."""
        raise NotImplementedError


@functools.cache
def of(capability: int) -> Driver:
    """Return the emulator of a capability."""
    return Driver(capability, Utils(capability))


@contextlib.contextmanager
def emulating(capability: int) -> Iterator[Driver]:
    """Return a context in which Triton's device is the emulator."""
    no_cubin = mock.patch.object(compiler.CUDABackend, "make_cubin", return_value=b"")
    with no_cubin, active(of(capability)) as driver:
        yield driver


@contextlib.contextmanager
def active(driver: Driver) -> Iterator[Driver]:
    """Return a context in which Triton launches by a driver.

    Its utils.files are those of the kernel that is about to be loaded: PTX, cubin and so on.
    """

    def note_files(module, function, name, group, digest) -> None:
        driver.utils.files = {Path(path).suffix: Path(path) for path in group.values()}

    constants = {"ARG_CONSTEXPR": CONSTEXPR, "ARG_KERNEL": KERNEL, "ARG_TUPLE": TUPLE}
    with contextlib.ExitStack() as stubs:
        for name, value in {"PyKernelArg": Annotation, **constants}.items():
            stubs.enter_context(mock.patch.object(nvidia, name, value, create=True))
        stubs.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver))
        knobs.runtime.kernel_load_start_hook.add(note_files)
        stubs.callback(knobs.runtime.kernel_load_start_hook.remove, note_files)
        yield driver


def flattened(args: Iterable[object], notes: Iterable[Annotation]) -> Iterator[object]:
    """Yield the arguments of a launch that its kernel takes."""
    for arg, note in zip(args, notes, strict=True):
        if note.type == TUPLE:
            yield from flattened(arg, note.nested_tuple)
        elif note.type == KERNEL:
            yield arg


def span(t: torch.Tensor) -> tuple[int, int]:
    """Return the bytes from a tensor's first element to its last: less than its storage."""
    if not t.numel():
        return t.data_ptr(), t.data_ptr()
    last = sum((size - 1) * apart for size, apart in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.itemsize


def _bits(value, kind: str) -> int | TensorMap:
    """Return an argument as the bits of its parameter, or as a tensor map."""
    if kind == "nvTmaDesc":
        return value
    if kind[0] == "*":
        if value is None:
            return 0
        return value.data_ptr() if hasattr(value, "data_ptr") else int(value)
    if kind in _FLOATS:
        return int.from_bytes(struct.pack(_FLOATS[kind], value), "little")
    return int(value) & (1 << max(8, int(kind[1:]))) - 1
