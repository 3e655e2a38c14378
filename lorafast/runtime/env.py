"""Every environment variable that lorafast reads; no other module reads os.environ."""

from __future__ import annotations

import functools
import os
from typing import NamedTuple


class Variable(NamedTuple):
    """One environment variable and its line in the documentation."""

    name: str
    default: str
    meaning: str


BACKEND = Variable(
    "LORAFAST_BACKEND",
    "auto",
    "`auto` tries the backends in order and may fall back; a name (`eager`, `cpu`, `triton`, "
    "`cuda`) forces that one, which raises with every reason if it cannot",
)
LOG = Variable(
    "LORAFAST_LOG",
    "0",
    "`1` prints, once per problem and primitive, which backend was chosen and why not the others",
)
CPU_ISA = Variable(
    "LORAFAST_CPU_ISA",
    "auto",
    "the instruction set of the C++ kernels, read when they are first needed: `auto` takes the "
    "best that the machine runs; a name (`scalar`, `avx2`, `avx512`, `avx512bf16`) forces that "
    "one, which raises if the machine lacks it",
)
HOST = Variable(
    "LORAFAST_HOST",
    "1",
    "`0` keeps the calls of layers in Python, where `1` makes them by C++ that is compiled for the "
    "torch installed; and the launches of Triton's kernels on an NVIDIA GPU likewise, where the "
    "`cuda` backend then refuses. Read at the first call of a layer on a CPU, and at the first "
    "launch",
)
CACHE = Variable(
    "LORAFAST_CACHE",
    "~/.cache/lorafast",
    "the folder for compiled kernels; `XDG_CACHE_HOME` is honoured where this is not set. If it "
    "cannot be written, a private temporary folder takes its place",
)
TRIAL = Variable(
    "LORAFAST_TRIAL",
    "1",
    "`1` tries the Triton and the CUDA kernels once on a GPU that has no verdict yet, in a child "
    "process, and `auto` then uses those that are right and faster; `again` tries them anew; `0` "
    "tries and uses none. Read when a GPU's kernels are first needed",
)
CXXFLAGS = Variable(
    "LORAFAST_CXXFLAGS",
    "",
    "flags to compile and link the C++ kernels with, after our own; `CXX` names the compiler",
)

VARIABLES = (BACKEND, LOG, CPU_ISA, HOST, CACHE, TRIAL, CXXFLAGS)

# For what reads a variable at every call of a layer: raw_get(KEY) tells one value from another
# without encoding a name, and without the exception that os.environ raises inside for a name that
# is not set, which takes 20 times as long.
# RAW is the dict itself, for C++; None where there is none.
_data = getattr(os.environ, "_data", None)
RAW: dict | None = _data if isinstance(_data, dict) else None
raw_get = os.environ.get if RAW is None else RAW.get
_encode = str if RAW is None else os.environ.encodekey
BACKEND_KEY, LOG_KEY = _encode(BACKEND.name), _encode(LOG.name)


def backend() -> str:
    """The backend asked for, `auto` unless set."""
    return parse_backend(os.environ.get(BACKEND.name))


def is_forced(name: str) -> bool:
    """True if LORAFAST_BACKEND asks for this backend; quick, where it is not set."""
    raw = raw_get(BACKEND_KEY)
    return bool(raw) and parse_backend(raw) == name


@functools.lru_cache(maxsize=64)
def parse_backend(raw: str | bytes | None) -> str:
    """The backend that a value of LORAFAST_BACKEND asks for, as os.environ or raw_get gives it."""
    return (os.fsdecode(raw).strip().lower() if raw else "") or BACKEND.default


def interprets() -> bool:
    """True if Triton's kernels are to run on CPU tensors: interpreter on, backend forced."""
    return triton_interprets() and backend() == "triton"


def triton_interprets() -> bool:
    """True if Triton interprets its kernels, on CPU tensors, and compiles none."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def log() -> bool:
    """True if the choice of backends is printed."""
    return parse_log(os.environ.get(LOG.name))


def parse_log(raw: str | bytes | None) -> bool:
    """True if a value of LORAFAST_LOG asks for the print, as os.environ or raw_get gives it."""
    return (os.fsdecode(raw) if raw else "") not in ("", "0")


def cpu_isa() -> str:
    """The instruction set asked for, `auto` unless set."""
    return os.environ.get(CPU_ISA.name, "").strip().lower() or CPU_ISA.default


def host() -> bool:
    """True if calls of layers may be made by C++."""
    return os.environ.get(HOST.name, "").strip() != "0"


def cache() -> str:
    """The folder for compiled kernels. It begins with ~ where there is no home folder."""
    caches = os.environ.get("XDG_CACHE_HOME", "")
    return os.path.expanduser(
        os.environ.get(CACHE.name, "")
        or (caches and os.path.join(caches, "lorafast"))
        or CACHE.default
    )


def trial() -> str:
    """What is to be done on a GPU without a verdict: 0, 1 or again. ValueError for another word."""
    asked = os.environ.get(TRIAL.name, "").strip().lower() or TRIAL.default
    if asked not in ("0", "1", "again"):
        raise ValueError(f"{TRIAL.name}={asked} is not one of 0, 1, again")
    return asked


def cxx() -> str:
    """The C++ compiler asked for, arguments included; empty unless set."""
    return os.environ.get("CXX", "").strip()


def cxxflags() -> str:
    """The flags that the C++ kernels are compiled and linked with after lorafast's own."""
    return os.environ.get(CXXFLAGS.name, CXXFLAGS.default).strip()


def rank() -> int:
    """The rank of this process that torchrun and its like name; 0 without one."""
    named = os.environ.get("RANK", "").strip()
    return int(named) if named.isdecimal() else 0


def child(**variables: str) -> dict[str, str]:
    """The environment of a child process: this one's, with some variables set."""
    return os.environ | variables


def silence_profiler() -> None:
    """Silence the lines that torch's profiler prints about itself, unless its variable is set."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
