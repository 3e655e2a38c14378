"""Specifications of GPUs: multiprocessors, peak rates, and support of TMA. Imports no triton."""

from __future__ import annotations

import functools
import importlib.metadata
from typing import NamedTuple

from lorafast.runtime.devices import Arch


class Device(NamedTuple):
    """The specification of one GPU: published, or measured.

    multiprocessors: their number. half_flops, full_flops: flop/s of half- and full-precision
    products. bandwidth: bytes/s of memory. clock: Hz. tma: True if the TMA form of the GEMM runs on
    it. tma_speed, pointers_speed: the speed of our GEMM's forms by that of torch's, assumed unless
    measured; 0 for a form that may not serve.
    """

    multiprocessors: int
    half_flops: float
    full_flops: float
    bandwidth: float
    clock: float
    tma: bool = False
    tma_speed: float = 0.93
    pointers_speed: float = 0.85

    def speed(self, form: str) -> float:
        """Return the speed of a form of our GEMM, "tma" or "pointers"."""
        return self.tma_speed if form == "tma" else self.pointers_speed

    @property
    def logic(self) -> float:
        """Integer and bit operations a second: 64 in every clock of a multiprocessor."""
        return 64 * self.multiprocessors * self.clock


# The largest GPU of each architecture: published peaks, reduced to what large products and copies
# reach. sm_120 has TMA, but less shared memory than the tiles of the TMA form need.
DEVICES = {
    "sm_80": Device(108, 260e12, 17e12, 1.7e12, 1.41e9),
    "sm_86": Device(82, 130e12, 30e12, 0.80e12, 1.69e9),
    "sm_89": Device(128, 150e12, 70e12, 0.90e12, 2.52e9),
    "sm_90": Device(132, 700e12, 50e12, 4.0e12, 1.755e9, tma=True),
    "sm_100": Device(148, 1500e12, 65e12, 7.0e12, 1.85e9, tma=True),
    "sm_103": Device(148, 1500e12, 65e12, 7.0e12, 1.85e9, tma=True),
    "sm_120": Device(170, 200e12, 90e12, 1.6e12, 2.41e9),
}
# Seconds per launch.
LAUNCH = 3e-6
# The bandwidth of the L2 cache by that of memory. Small tiles load the same operands often.
CACHE = 2.4
# The first Triton whose descriptors are right for small tensors on sm_100 and later: earlier ones
# may fail there on tensors with gaps in less than 128 KB.
_SMALL_DESCRIPTORS = (3, 7)
# The names under which Triton is distributed.
_PACKAGES = ("triton", "pytorch-triton", "triton-windows")


@functools.cache
def device(arch: Arch) -> Device:
    """Return the specification of a GPU, or sm_80's if its architecture is unknown.

    The number of multiprocessors is the GPU's own where it is known, and the peak rates of products
    are in proportion to it.
    """
    published = DEVICES.get(arch.name, DEVICES["sm_80"])
    own = arch.multiprocessors or published.multiprocessors
    share = own / published.multiprocessors
    return published._replace(
        multiprocessors=own,
        half_flops=published.half_flops * share,
        full_flops=published.full_flops * share,
        tma=published.tma and (arch.name == "sm_90" or _triton_version() >= _SMALL_DESCRIPTORS),
    )


def _triton_version() -> tuple[int, ...]:
    """Return the major and minor version of the installed Triton, (0, 0) without one."""
    for package in _PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        return tuple(int(part) for part in version.split(".")[:2])
    return 0, 0
