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
    "`auto` walks the backends and may fall back; a name (`eager`, `triton`) forces that one, which raises with every reason if it "
    "cannot",
)
LOG = Variable("LORAFAST_LOG", "0", "`1` prints, once per problem and primitive, which backend was chosen and why not the others")

VARIABLES = (BACKEND, LOG)


def backend() -> str:
    """The backend asked for, `auto` unless set."""
    return os.environ.get(BACKEND.name, "").strip().lower() or BACKEND.default


def interprets() -> bool:
    """Whether Triton's kernels are asked for on CPU tensors: Triton's interpreter is on, and its backend is forced."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1" and backend() == "triton"


def log() -> bool:
    """Whether routes are printed."""
    return os.environ.get(LOG.name, LOG.default) not in ("", "0")


def hush_profiler() -> None:
    """Keep the lines torch's profiler writes about its own start and stop off the screen, unless its variable is set."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
