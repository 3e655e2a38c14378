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
import struct
from collections.abc import Iterator
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
        self.text = ""

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return what the launcher asks of a device."""
        return {
            "max_shared_mem": SHARED[self.capability],
            "multiprocessor_count": PROCESSORS[self.capability],
            "warpSize": 32,
        }

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        """Return the module, function, registers, spills and most threads of the PTX just seen."""
        if self.text not in self.loaded:
            self.loaded[self.text] = machine.Code(self.text)
        return None, self.loaded[self.text], 0, 0, 1024

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
        values = list(_flattened(args, notes))
        if len(values) != len(signature) or scratch is not None or profile is not None:
            raise NotImplementedError("arguments that do not fit the signature, or scratch memory")
        params = [_bits(value, kind) for value, kind in zip(values, signature, strict=True)]
        params += [0, 0]
        if len(params) != len(code.program.params):
            raise ValueError(f"{len(params)} parameters for {len(code.program.params)}")
        spans = [span(value) for value in values if hasattr(value, "stride")]
        self.latest[code.program.name] = code
        machine.launch(code, (x, y, z), params, packed[2], spans)


class Driver(DriverBase):
    """Device 0, of one compute capability."""

    def __init__(self, capability: int):
        self.capability, self.utils = capability, Utils(capability)
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
        """Return a number for each capability, because Triton caches kernels by device."""
        return self.capability

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
    """Return the driver of a capability."""
    return Driver(capability)


@contextlib.contextmanager
def emulating(capability: int) -> Iterator[Driver]:
    """Return a context in which Triton's device is the emulator."""
    active, stubs = of(capability), contextlib.ExitStack()

    def note_ptx(module, function, name, group, digest) -> None:
        path = next(path for file, path in group.items() if file.endswith(".ptx"))
        active.utils.text = Path(path).read_text()

    constants = {"ARG_CONSTEXPR": CONSTEXPR, "ARG_KERNEL": KERNEL, "ARG_TUPLE": TUPLE}
    for name, value in {"PyKernelArg": Annotation, **constants}.items():
        stubs.enter_context(mock.patch.object(nvidia, name, value, create=True))
    no_cubin = mock.patch.object(compiler.CUDABackend, "make_cubin", return_value=b"")
    stubs.enter_context(no_cubin)
    stubs.enter_context(mock.patch.object(triton.runtime.driver, "_active", active))
    with stubs:
        knobs.runtime.kernel_load_start_hook.add(note_ptx)
        try:
            yield active
        finally:
            knobs.runtime.kernel_load_start_hook.remove(note_ptx)


def span(t: torch.Tensor) -> tuple[int, int]:
    """Return the bytes from a tensor's first element to its last: less than its storage."""
    if not t.numel():
        return t.data_ptr(), t.data_ptr()
    last = sum((size - 1) * apart for size, apart in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.itemsize


def _flattened(args, notes) -> Iterator[object]:
    for arg, note in zip(args, notes, strict=True):
        if note.type == TUPLE:
            yield from _flattened(arg, note.nested_tuple)
        elif note.type == KERNEL:
            yield arg


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
