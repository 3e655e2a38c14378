"""Specifications of GPUs by architecture: multiprocessors, peak rates, and support of TMA."""

from __future__ import annotations

from typing import NamedTuple


class Device(NamedTuple):
    """The specification of one architecture.

    multiprocessors: their number. half_flops, full_flops: flop/s of half- and full-precision
    products. bandwidth: bytes/s of memory. tma: True if the TMA form of the GEMM runs on it.
    """

    multiprocessors: int
    half_flops: float
    full_flops: float
    bandwidth: float
    tma: bool = False


# Published peaks, reduced to what large products and copies reach. sm_120 has TMA, but less shared
# memory than the tiles of the TMA form need.
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
    """Return the specification of an architecture, or sm_80's if it is unknown (as "cpu" is)."""
    return DEVICES.get(arch, DEVICES["sm_80"])
