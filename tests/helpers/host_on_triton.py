"""The host path over the `triton` backend, on CPU tensors that are taken for those of a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from unittest import mock

import pytest
from emulator import driver, fake_cuda, machine
from triton.backends.nvidia import driver as nvidia_driver

from helpers.emulated_device import emulated, nvidia
from helpers.launch_arguments import cached_descriptor
from lorafast.engine import host, recipes
from lorafast.engine.backends import eager
from lorafast.engine.kernels import launch, triton_internals
from lorafast.runtime import cuda_driver, extension


class Served:
    """What became of the calls. calls: True for each that C++ made; computed: the primitives that
    Python computed for it, and if a recipe was made of each.
    """

    def __init__(self) -> None:
        self.calls: list[bool] = []
        self.computed: list[tuple[str, bool]] = []


@contextlib.contextmanager
def on_gpu(capability: int) -> Iterator[fake_cuda.Cuda]:
    """Return a context in which LORAFAST_BACKEND=triton serves CPU tensors, and nothing is run."""
    with contextlib.ExitStack() as stubs:
        stubs.enter_context(mock.patch.dict(os.environ, {"LORAFAST_BACKEND": "triton"}))
        stubs.enter_context(mock.patch.object(launch, "descriptor", cached_descriptor))
        stubs.enter_context(mock.patch.object(launch, "_arguments", {}))
        # On a GPU nobody waits for the answer.
        stubs.enter_context(mock.patch.object(eager, "_is_one", return_value=False))
        stubs.enter_context(nvidia(capability))
        yield stubs.enter_context(fake_cuda.launching(capability))


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint)
    ]  # fmt: skip


_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(_Config), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
)  # fmt: skip


@contextlib.contextmanager
def on_emulator(capability: int, fused: bool) -> Iterator[int]:
    """Return a context in which LORAFAST_BACKEND=triton runs on the emulator.

    It gives the address of a cuLaunchKernelEx that runs there too. C++ gives no extents of its
    tensors: its accesses are not checked for bounds. fused: as of emulated.
    """
    codes: list[machine.Code] = []
    maps: list[object] = []
    failures: list[BaseException] = []
    passed_to_driver, tensor_map = triton_internals._passed_to_driver, triton_internals._tensor_map

    def passed(form, count):
        codes.append(form.function)
        return passed_to_driver(form, count)._replace(function=len(codes))

    def map_bytes(descriptor, meta):
        maps.append(tensor_map(descriptor, meta))
        return len(maps).to_bytes(128, "little")

    def launched(config, number, params, _):
        try:
            code, values = codes[(number or 0) - 1], []
            for i, (_, bits, is_map) in enumerate(code.program.params):
                word = int.from_bytes(
                    ctypes.string_at(params[i], 16 if is_map else bits // 8), "little"
                )
                values.append(maps[word - 1] if is_map else word)
            pointers = [value for value in values if isinstance(value, int) and value > 1 << 32]
            span = min(pointers), max(pointers) + (1 << 26)
            given = config.contents
            assert given.block[0] == code.program.threads
            machine.launch(code, tuple(given.grid), values, given.shared, [span])
        except BaseException as failure:
            failures.append(failure)
            return 719
        return 0

    callback = _LAUNCH(launched)
    with contextlib.ExitStack() as stubs:
        for owner, name, value in (
            (triton_internals, "_passed_to_driver", passed),
            (triton_internals, "tensor_map_bytes", map_bytes),
            (nvidia_driver, "CudaUtils", driver.Utils),
            (launch, "_launcher", lambda: None),
            (launch, "_arguments", {}),
            (launch, "descriptor", cached_descriptor),
            (eager, "_is_one", lambda gain: False),
        ):
            stubs.enter_context(mock.patch.object(owner, name, value))
        stubs.enter_context(emulated(capability, fused))
        yield address_of(callback)
    if failures:
        raise failures[0]


@contextlib.contextmanager
def served_by_host(launcher: int) -> Iterator[Served]:
    """Return a context in which C++ makes the calls. launcher: the address of cuLaunchKernelEx."""
    module = extension.host()
    if isinstance(module, str):
        pytest.skip(module)
    served, compute = Served(), recipes.compute

    def computed(plan, primitive, tensors, numbers, noted):
        results, recipe = compute(plan, primitive, tensors, numbers, noted)
        served.computed.append((primitive, recipe is not None))
        return results, recipe

    def counted(*arguments):
        y = linear(*arguments)
        served.calls.append(y is not None)
        return y

    with mock.patch.object(recipes, "compute", computed):
        linear = host._load(on_cpu=False)
    try:
        with (
            mock.patch.object(host, "linear", counted),
            mock.patch.object(cuda_driver, "launch_address", return_value=launcher),
        ):
            yield served
    finally:
        # Everything that was planned and noted is forgotten.
        host._load(on_cpu=False)


def address_of(function: object) -> int:
    """Return the address of a function of ctypes."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0
