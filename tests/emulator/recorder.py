"""A Triton driver that launches nothing, and notes what it was asked to launch.

    with recorder.recording(90) as launches:
        kernel[grid](x, y, ...)

Everything up to the driver is real: specialization, compilation (ptxas included), the launcher that
expands tensor descriptors. Tensor maps that CUDA would refuse are Faults.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

from triton import knobs
from triton.backends.nvidia import driver as nvidia

from emulator.driver import PROCESSORS, SHARED, Driver, active, flattened
from emulator.tma import TensorMap


class Kernel(NamedTuple):
    """A compiled kernel. files: its PTX, cubin and so on, by suffix; constants: by name."""

    name: str
    files: dict[str, Path]
    constants: dict[str, object]
    shared: int


class Launch(NamedTuple):
    """One launch. values: the arguments that the kernel takes, tensor maps among them."""

    kernel: Kernel
    grid: tuple[int, int, int]
    warps: int
    values: list[object]


class Launcher(nvidia.CudaLauncher):
    """Triton's own, which notes the constants of the kernel that it is made for."""

    # Those of the launcher made last: its kernel is loaded next.
    constants: ClassVar[dict[str, object]] = {}

    def __init__(self, src, metadata):
        super().__init__(src, metadata)
        names = src.fn.arg_names
        Launcher.constants = {names[place[0]]: value for place, value in src.constants.items()}


class Utils:
    """What stands for the functions that CudaUtils takes from C."""

    def __init__(self, capability: int):
        self.capability = capability
        self.files: dict[str, Path] = {}
        self.launches: list[Launch] = []

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return what the launcher asks of a device."""
        return {
            "max_shared_mem": SHARED.get(self.capability, SHARED[90]),
            "multiprocessor_count": PROCESSORS.get(self.capability, PROCESSORS[90]),
            "warpSize": 32,
        }

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        """Return the module, function, registers, spills and most threads of a kernel."""
        kernel = Kernel(name, self.files, Launcher.constants, shared)
        return None, kernel, 0, 0, 1024

    def build_signature_metadata(self, signature: list[str]) -> list[str]:
        """Return the types of the arguments."""
        return signature

    def fill_tma_descriptor_tiled(
        self, base, swizzle, itemsize, kind, box, shape, strides, padding
    ) -> TensorMap:
        """Return a tensor map."""
        return TensorMap(base, swizzle, itemsize, box, shape, strides)

    def launch(self, x, y, z, stream, kernel, *rest) -> None:
        """Note a launch."""
        packed, notes, args = rest[2], rest[8], rest[10]
        values = list(flattened(args, notes))
        self.launches.append(Launch(kernel, (x, y, z), packed[0], values))


@contextlib.contextmanager
def recording(capability: int, folder: Path) -> Iterator[list[Launch]]:
    """Return a context in which launches are noted. folder: where compiled kernels are put."""
    driver = Driver(capability, Utils(capability))
    driver.launcher_cls = Launcher
    with knobs.cache.scope(), active(driver):
        knobs.cache.dir = str(folder)
        yield driver.utils.launches
