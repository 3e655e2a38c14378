"""What is known of GPUs by their architecture's name: how many multiprocessors, how fast, and who has descriptors for TMA."""

from __future__ import annotations

from typing import NamedTuple


class Device(NamedTuple):
    """Multiprocessors, flop/s of half- and full-precision products, bytes/s of memory. tma: in the way our kernels use it."""

    multiprocessors: int
    half: float
    full: float
    memory: float
    tma: bool = False


# Published peaks, taken down to what large products and copies reach. sm_120 has TMA, but not the shared memory our tiles want.
DEVICES = {
    "sm_80": Device(108, 260e12, 17e12, 1.7e12),
    "sm_86": Device(82, 130e12, 30e12, 0.80e12),
    "sm_89": Device(128, 150e12, 70e12, 0.90e12),
    "sm_90": Device(132, 700e12, 50e12, 4.0e12, tma=True),
    "sm_100": Device(148, 1500e12, 65e12, 7.0e12, tma=True),
    "sm_103": Device(148, 1500e12, 65e12, 7.0e12, tma=True),
    "sm_120": Device(170, 200e12, 90e12, 1.6e12),
}


def device(arch: str) -> Device:
    """The facts about an architecture; one that is not listed, Triton's interpreter among them, is taken for sm_80."""
    return DEVICES.get(arch, DEVICES["sm_80"])
