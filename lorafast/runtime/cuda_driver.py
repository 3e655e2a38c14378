"""CUDA's driver, as far as launches of lorafast's own kernels need it: libcuda, by dlopen."""

from __future__ import annotations

import ctypes
import functools

from lorafast.runtime.toolchain import Failure


@functools.cache
def _libcuda() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise Failure(f"CUDA's driver cannot be loaded: {error}") from error
    for name in ("cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernelEx"):
        if not hasattr(library, name):
            raise Failure(f"CUDA's driver has no {name}: a newer driver has it")
    return library


def load(cubin: bytes, entry: str) -> int:
    """Return the address of a kernel, loaded onto the current device for the life of the process.

    A Failure if the driver refuses it.
    """
    library = _libcuda()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    refused = library.cuModuleLoadData(ctypes.byref(module), cubin)
    if not refused:
        refused = library.cuModuleGetFunction(ctypes.byref(function), module, entry.encode())
    if refused:
        text = ctypes.c_char_p()
        library.cuGetErrorString(refused, ctypes.byref(text))
        why = text.value.decode() if text.value else f"error {refused}"
        raise Failure(f"CUDA's driver does not load the kernel {entry}: {why}")
    return function.value or 0


def launch_address() -> int:
    """Return the address of cuLaunchKernelEx."""
    return ctypes.cast(_libcuda().cuLaunchKernelEx, ctypes.c_void_p).value or 0
