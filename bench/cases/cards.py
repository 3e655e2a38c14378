"""GPUs by name: how much memory they have, and what they are modelled by. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple

MIB = 1 << 20


class Card(NamedTuple):
    """A GPU.

    memory_mib: what nvidia-smi calls its memory. arch, multiprocessors: as devices.Arch has them.
    bandwidth: published, in bytes per second.
    """

    memory_mib: int
    arch: str
    multiprocessors: int
    bandwidth: float

    @property
    def memory_bytes(self) -> int:
        """The bytes of its memory."""
        return self.memory_mib * MIB


CARDS = {
    "a10-24g": Card(23028, "sm_86", 72, 0.60e12),
    "a100-40g": Card(40960, "sm_80", 108, 1.555e12),
    "a100-80g": Card(81920, "sm_80", 108, 2.039e12),
    "b200-180g": Card(183359, "sm_100", 148, 8.0e12),
    "h100-80g": Card(81559, "sm_90", 132, 3.35e12),
    "h200-141g": Card(143771, "sm_90", 132, 4.8e12),
    "l4-24g": Card(23034, "sm_89", 58, 0.30e12),
    "l40s-48g": Card(46068, "sm_89", 142, 0.864e12),
    "rtx3090-24g": Card(24576, "sm_86", 82, 0.936e12),
    "rtx4090-24g": Card(24564, "sm_89", 128, 1.008e12),
    "rtx5090-32g": Card(32607, "sm_120", 170, 1.792e12),
}
# What a large copy reaches of the published bandwidth, as in kernels/gpu_specs.py.
COPY_SHARE = 0.83
# The device whose operations are those of torch on a CPU; it has no size.
CPU = "cpu"
