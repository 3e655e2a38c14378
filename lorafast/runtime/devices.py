"""Facts about devices, looked up only for the device of a tensor that exists."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import torch

_AVX2 = ("avx2", "fma", "f16c", "bmi2")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq")
# The features that an instruction set needs, by their names in /proc/cpuinfo; fastest first.
ISAS = {"avx512bf16": (*_AVX512, "avx512_bf16"), "avx512": _AVX512, "avx2": _AVX2, "scalar": ()}


class Arch(NamedTuple):
    """An architecture.

    vendor: cpu, nvidia, amd or the device type. name: as the vendor's compilers spell it, such as
    sm_90 or gfx942.
    """

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
    """True if a CUDA graph is being captured on the tensor's current stream."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def has_mixed_gemm(device: torch.device) -> bool:
    """True if torch.mm there multiplies half-precision operands into an fp32 result."""
    return device.type == "cuda" and torch.version.hip is None


def has_fp64(device: torch.device) -> bool:
    """True if the device computes in float64."""
    return device.type not in ("mps", "xla")


@functools.cache
def isas(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """The names in ISAS that this machine runs, fastest first; `scalar` alone if it is unknown."""
    features: frozenset[str] = frozenset()
    try:
        with cpuinfo.open() as lines:
            features = next(
                (frozenset(line.split()) for line in lines if line.startswith("flags")), features
            )
    except OSError:
        pass
    return tuple(isa for isa, needed in ISAS.items() if features.issuperset(needed))
