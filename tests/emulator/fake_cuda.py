"""Triton's own launcher, C included, above a libcuda that launches nothing and notes everything.

    with fake_cuda.launching(90) as cuda:
        kernel[grid](x, y, ...)
        cuda.noted()

Kernels are bound and specialized, and not compiled.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import triton
from triton.backends.nvidia import driver as nvidia
from triton.runtime.jit import JITFunction

from emulator.driver import Driver

_SOURCE = Path(__file__).with_suffix(".cpp")
_SIZES = {"i32": 4, "i64": 8, "fp32": 4, "nvTmaDesc": 128}
_functions = itertools.count(4096, 16)


# Grid, block, shared memory; the stream, the number of attributes, and the function.
_HEAD = struct.Struct("<7IQIQ")


class Launch(NamedTuple):
    """One launch. sizes: the grid, the block and the shared memory; values: the parameters."""

    function: int
    sizes: tuple[int, ...]
    values: list[bytes]


class Cuda:
    """The library, loaded."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        # The types of the parameters of a function, for `launches`.
        self.kinds: dict[int, list[str]] = {}

    def noted(self) -> bytes:
        """Return what has been launched since the last call: configurations and parameters."""
        # Without room it tells how many bytes there are.
        room = ctypes.create_string_buffer(self.library.fake_noted(None, 0))
        size = self.library.fake_noted(room, len(room))
        return room.raw[:size]

    def refuse(self, count: int) -> None:
        """Refuse the next launches."""
        self.library.fake_refuse(count)

    def tell_kinds(self, function: int, kinds: list[str]) -> None:
        """Tell the types of a function's parameters, such as i32, *bf16 and nvTmaDesc."""
        self.kinds[function] = kinds
        self.tell(function, [_SIZES.get(kind, 8) for kind in kinds])

    def launches(self) -> list[Launch]:
        """Return what has been launched since the last call, of functions of known types."""
        rest, found = self.noted(), []
        while rest:
            *sizes, _, _, function = _HEAD.unpack_from(rest)
            rest, values = rest[_HEAD.size :], []
            for kind in self.kinds[function]:
                size = _SIZES.get(kind, 8)
                values.append(rest[:size])
                rest = rest[size:]
            found.append(Launch(function, tuple(sizes), values))
        return found

    def tell(self, function: int, sizes: list[int]) -> None:
        """Tell the sizes of a function's parameters."""
        told = (ctypes.c_size_t * len(sizes))(*sizes)
        self.library.fake_sizes(ctypes.c_void_p(function), told, ctypes.c_size_t(len(sizes)))


class NotCompiled:
    """What stands for a compiled kernel: all that a launch by Triton's launcher asks of one."""

    def __init__(self, fn, signature, constants, options, cuda: Cuda):
        self.src = SimpleNamespace(fn=fn, signature=signature, constants=constants)
        kinds = [kind for kind in signature.values() if kind.startswith("tensordesc")]
        # Kernels differ in what they say about the same descriptor.
        swizzle = (options.num_warps + options.num_stages) % 4
        self.metadata = SimpleNamespace(
            num_ctas=1, global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0,
            profile_scratch_align=1, launch_cooperative_grid=False, launch_pdl=False,
            tensordesc_meta=[_meta(kind, swizzle) for kind in kinds],
        )  # fmt: skip
        self.packed_metadata = (options.num_warps, 1, 1024 * options.num_stages)
        self.function = next(_functions)
        self.run = nvidia.CudaLauncher(self.src, self.metadata)
        expanded = nvidia.expand_signature(signature.values(), self.metadata.tensordesc_meta)
        params = [kind for kind in expanded if kind != "constexpr"]
        cuda.tell_kinds(self.function, [*params, "scratch", "scratch"])

    def launch_metadata(self, grid, stream, *args) -> None:
        """Return nothing: no hook looks at launches."""


def _meta(kind: str, swizzle: int) -> dict[str, object]:
    """What a compiler may say about a descriptor, such as tensordesc<bf16[128,64]>."""
    dtype, block = kind.removeprefix("tensordesc<").rstrip(">]").split("[")
    return {
        "swizzle": swizzle, "elem_size": 4 if dtype.endswith("32") else 2, "elem_type": len(dtype),
        "block_size": [int(size) for size in block.split(",")], "fp4_padded": False,
    }  # fmt: skip


@functools.cache
def load() -> Cuda:
    """Return the library, compiled and loaded as libcuda.so.1."""
    folder = tempfile.mkdtemp(prefix="lorafast-fake-cuda-")
    path = Path(folder) / "libcuda.so.1"
    flags = ["-O1", "-shared", "-fPIC", "-std=c++17", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["c++", *flags, "-o", str(path), str(_SOURCE)], check=True)
    # Triton links its C functions with it, which it compiles when they are first needed.
    with mock.patch.dict(os.environ, {"TRITON_LIBCUDA_PATH": folder}):
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        nvidia.CudaUtils()
    return Cuda(library)


@contextlib.contextmanager
def launching(capability: int) -> Iterator[Cuda]:
    """Return a context in which launches reach the library, and nothing else."""
    cuda = load()

    def do_not_compile(self, key, signature, device, constexprs, options, attrs, warmup):
        kernel = NotCompiled(self, signature, constexprs, options, cuda)
        self.device_caches[device][0][key] = kernel
        return kernel

    stub = mock.patch.object(JITFunction, "_do_compile", do_not_compile)
    driver = Driver(capability, nvidia.CudaUtils())
    with stub, mock.patch.object(triton.runtime.driver, "_active", driver):
        yield cuda
        cuda.noted()
