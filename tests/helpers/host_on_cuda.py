"""The host path over the `cuda` backend, on CPU tensors: every launch goes to a function."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from emulator import machine

from helpers.emulated_cuda import code
from lorafast.engine import cuda_forms, host
from lorafast.engine.cuda_forms import Form
from lorafast.runtime import cuda_driver, extension

# Takes a form, a grid and the bits of each parameter.
Run = Callable[[Form, tuple[int, ...], list[int]], None]


class _Config(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3)]


_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(_Config), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
)  # fmt: skip
_SIZES = {"p": ctypes.c_uint64, "q": ctypes.c_uint64, "i": ctypes.c_uint32, "f": ctypes.c_uint32}


@contextlib.contextmanager
def launching(run: Run) -> Iterator[list[bool]]:
    """Return a context in which C++ makes the calls; it gives whether each was served.

    Within a context in which LORAFAST_BACKEND=cuda serves CPU tensors. What run raises fails the
    launch.
    """
    module = extension.host()
    if isinstance(module, str):
        pytest.skip(module)
    forms: list[Form] = []
    failures: list[BaseException] = []

    def launch(config, number, params, _):
        try:
            form = forms[(number or 0) - 1]
            kernel = cuda_forms.KERNELS[form.stem]
            assert tuple(config.contents.block) == (form.threads, 1, 1)
            bits = [
                ctypes.cast(params[i], ctypes.POINTER(_SIZES[letter])).contents.value
                for i, letter in enumerate(kernel.parameters)
            ]
            run(form, tuple(config.contents.grid), bits)
        except BaseException as failure:
            failures.append(failure)
            return 719
        return 0

    callback = _LAUNCH(launch)
    address = ctypes.cast(callback, ctypes.c_void_p).value

    def number_of(form: Form, device: torch.device) -> int:
        assert device.type == "cpu"
        forms.append(form)
        return len(forms)

    served: list[bool] = []

    def counted(*arguments):
        y = linear(*arguments)
        served.append(y is not None)
        return y

    linear = host._load(on_cpu=False)
    try:
        with (
            mock.patch.object(host, "linear", counted),
            mock.patch.object(cuda_forms, "function", number_of),
            mock.patch.object(cuda_driver, "launch_address", return_value=address),
        ):
            yield served
        if failures:
            raise failures[0]
    finally:
        # Everything that was planned and loaded is forgotten.
        host._load(on_cpu=False)


def on_emulator(capability: int) -> Run:
    """Return a function that runs a launch on the emulator.

    C++ gives no extents of its tensors: accesses are not checked for bounds.
    """

    def run(form: Form, grid: tuple[int, ...], bits: list[int]) -> None:
        found, letters = code(form, capability), cuda_forms.KERNELS[form.stem].parameters
        pointers = [word for word, letter in zip(bits, letters, strict=True) if letter == "p"]
        known = [pointer for pointer in pointers if pointer]
        span = (min(known), max(known) + (1 << 26))
        machine.launch(found, grid, bits, found.program.static, [span])

    return run
