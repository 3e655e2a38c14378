"""Facts about devices, asked only when a tensor on that device is at hand."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Arch(NamedTuple):
    """vendor: cpu, nvidia, amd or the device type; name: as the vendor's compilers spell it (sm_90, gfx942)."""

    vendor: str
    name: str


@functools.cache
def of(device: torch.device) -> Arch:
    """The architecture behind a device."""
    if device.type != "cuda":
        return Arch(device.type, device.type)
    facts = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Arch("amd", facts.gcnArchName.split(":")[0])
    return Arch("nvidia", f"sm_{facts.major}{facts.minor}")


def capturing(tensor: torch.Tensor) -> bool:
    """Whether a CUDA graph is being captured on the tensor's current stream."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def has_mixed_gemm(device: torch.device) -> bool:
    """Whether torch.mm takes half-precision operands and gives an fp32 result there."""
    return device.type == "cuda" and torch.version.hip is None


def has_fp64(device: torch.device) -> bool:
    """Whether the device computes in float64 at all."""
    return device.type not in ("mps", "xla")
