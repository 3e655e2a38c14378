"""CPU tensors that lorafast takes for tensors of a GPU, for the emulator and the recorder."""

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

from emulator import driver

from lorafast.engine import host
from lorafast.engine.kernels import gemm_routing
from lorafast.runtime import devices


@contextlib.contextmanager
def nvidia(capability: int) -> Iterator[None]:
    """Return a context in which every device has an architecture, such as 90 for sm_90."""
    arch = devices.Arch("nvidia", f"sm_{capability}")
    # The host path tells a CPU by its tensors.
    by_python = mock.patch.object(host, "linear", host._declined)
    with mock.patch.object(devices, "of", return_value=arch), by_python:
        yield


@contextlib.contextmanager
def emulated(capability: int, fused: bool = True) -> Iterator[None]:
    """Return a context in which the Triton backend runs on the emulator.

    fused: products take our GEMM wherever it can, and not where the model says that it is faster.
    """
    pick = gemm_routing.pick

    def fused_first(query: gemm_routing.RouteQuery) -> gemm_routing.Route:
        first = gemm_routing.candidates(query)[0]
        return first if first.fused else pick(query)

    with contextlib.ExitStack() as stubs:
        stubs.enter_context(mock.patch.dict(os.environ, {"LORAFAST_BACKEND": "triton"}))
        stubs.enter_context(nvidia(capability))
        stubs.enter_context(driver.emulating(capability))
        if fused:
            stubs.enter_context(mock.patch.object(gemm_routing, "pick", fused_first))
        yield
