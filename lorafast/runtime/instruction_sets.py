"""The instruction sets that the C++ kernels are compiled for, and those of this machine."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from lorafast.runtime import env
from lorafast.runtime.spelling import did_you_mean

_AVX2 = ("avx2", "fma", "f16c", "bmi2")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq")
# The features that an instruction set needs, by their names in /proc/cpuinfo; fastest first.
FEATURES = {"avx512bf16": (*_AVX512, "avx512_bf16"), "avx512": _AVX512, "avx2": _AVX2, "scalar": ()}
ISAS = tuple(FEATURES)


@functools.cache
def available(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """The names in ISAS that this machine runs, fastest first; `scalar` alone if it is unknown."""
    features: frozenset[str] = frozenset()
    try:
        with cpuinfo.open() as lines:
            features = next(
                (frozenset(line.split()) for line in lines if line.startswith("flags")), features
            )
    except OSError:
        pass
    return tuple(isa for isa, needed in FEATURES.items() if features.issuperset(needed))


def compiler_flags(isa: str) -> tuple[str, ...]:
    """Return the compiler's flags for an instruction set."""
    return tuple(f"-m{feature.replace('_', '')}" for feature in FEATURES[isa])


def candidates(asked: str) -> tuple[str, ...]:
    """The instruction sets to try, in order, for a value of LORAFAST_CPU_ISA.

    ValueError if it is unknown, RuntimeError if this machine lacks it: as for LORAFAST_BACKEND,
    what is forced is never replaced in silence.
    """
    here = available()
    if asked == "auto":
        return here
    if asked not in ISAS:
        near = did_you_mean(asked, ("auto", *ISAS))
        raise ValueError(f"{env.CPU_ISA.name}={asked} is not one of auto, {', '.join(ISAS)}{near}")
    # Elsewhere no kernel is built, and the machine's features are unknown.
    if asked not in here and sys.platform == "linux":
        raise RuntimeError(
            f"{env.CPU_ISA.name}={asked} cannot run: this machine has {', '.join(here)} "
            "(auto takes the first)"
        )
    return (asked,)
