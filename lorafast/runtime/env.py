"""Every environment variable lorafast reads; nothing else in the project touches os.environ."""

from __future__ import annotations

import os
from typing import NamedTuple


class Variable(NamedTuple):
    name: str
    default: str
    meaning: str


BACKEND = Variable(
    "LORAFAST_BACKEND",
    "auto",
    "`auto` walks the backends and may fall back; a name (`eager`, `cpu`, `triton`) forces that one, which raises with every "
    "reason if it cannot",
)
LOG = Variable(
    "LORAFAST_LOG",
    "0",
    "`1` prints, once per problem and primitive, which backend was chosen and why not the others",
)
CPU_ISA = Variable(
    "LORAFAST_CPU_ISA",
    "auto",
    "the instruction set of the C++ kernels, read when they are first needed: `auto` takes the best the machine runs; a name "
    "(`scalar`, `avx2`, `avx512`, `avx512bf16`) forces that one",
)
CACHE = Variable(
    "LORAFAST_CACHE",
    "~/.cache/lorafast",
    "the folder that keeps what was compiled; `XDG_CACHE_HOME` is honoured where this is not set",
)
CXXFLAGS = Variable(
    "LORAFAST_CXXFLAGS",
    "",
    "flags to compile and link the C++ kernels with, after our own; `CXX` names the compiler",
)

VARIABLES = (BACKEND, LOG, CPU_ISA, CACHE, CXXFLAGS)
_KEYS = {variable: os.environ.encodekey(variable.name) for variable in VARIABLES}


def backend() -> str:
    """The backend asked for, `auto` unless set."""
    return _value(BACKEND).strip().lower() or BACKEND.default


def interprets() -> bool:
    """Whether Triton's kernels are asked for on CPU tensors: Triton's interpreter is on, and its backend is forced."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1" and backend() == "triton"


def log() -> bool:
    """Whether routes are printed."""
    return _value(LOG) not in ("", "0")


def _value(variable: Variable) -> str:
    # Read at every call of a layer: asking os.environ for what is not set encodes a name and raises inside, 20 times the price of
    # a look into the dict below it.
    try:
        found = os.environ._data.get(_KEYS[variable])
    except AttributeError:  # somebody put another mapping in its place
        return os.environ.get(variable.name, "")
    return "" if found is None else os.environ.decodevalue(found)


def cpu_isa() -> str:
    """The instruction set asked for, `auto` unless set."""
    return os.environ.get(CPU_ISA.name, "").strip().lower() or CPU_ISA.default


def cache() -> str:
    """The folder for what is compiled. It begins with ~ where there is no home folder."""
    caches = os.environ.get("XDG_CACHE_HOME", "")
    return os.path.expanduser(
        os.environ.get(CACHE.name, "")
        or (caches and os.path.join(caches, "lorafast"))
        or CACHE.default
    )


def cxx() -> str:
    """The C++ compiler asked for, arguments included; empty unless set."""
    return os.environ.get("CXX", "").strip()


def cxxflags() -> str:
    """What the C++ kernels are compiled and linked with beyond our own flags."""
    return os.environ.get(CXXFLAGS.name, CXXFLAGS.default).strip()


def hush_profiler() -> None:
    """Keep the lines torch's profiler writes about its own start and stop off the screen, unless its variable is set."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
