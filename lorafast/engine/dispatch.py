"""Which backend serves a primitive: the first able one in order, or the forced one, which must be able."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from types import ModuleType

from lorafast.engine.problem import Problem
from lorafast.runtime import env, symlinks

# Fastest first. A backend is a file in backends/; one that is not there yet, or fails to load, is a reason.
ORDER = ("cuda", "triton", "cpu", "eager")
_SOURCES = {"cuda": "csrc", "triton": "kernels", "cpu": "csrc"}


@functools.cache
def load(backend: str) -> ModuleType | str:
    """The backend's module, or the reason there is none."""
    name = f"lorafast.engine.backends.{backend}"
    if importlib.util.find_spec(name) is None:
        return "not part of this version of lorafast"
    # Whatever a driver, a compiler or a half-written file throws is a reason, never a crash in somebody's forward pass.
    try:
        return importlib.import_module(name)
    except Exception as error:
        lost = symlinks.why_missing(_SOURCES[backend]) if backend in _SOURCES else None
        return lost or f"cannot be loaded: {type(error).__name__}: {error}"


def why_not(backend: str, primitive: str, problem: Problem) -> tuple[str, ...]:
    """Every reason this backend cannot serve this primitive of this problem; empty if it can."""
    module = load(backend)
    if isinstance(module, str):
        return (module,)
    if not hasattr(module, primitive):
        return (f"has no {primitive}",)
    reasons = module.why_not(primitive, problem)
    if not isinstance(reasons, tuple):
        raise TypeError(
            f"backends/{backend}.py: why_not must return a tuple of reasons, not {reasons!r}"
        )
    return reasons


def how(backend: str, primitive: str, problem: Problem) -> str | None:
    """Which of its ways a backend takes that has several."""
    told = getattr(load(backend), "how", None)
    return told and told(primitive, problem)


def candidates(asked: str) -> tuple[str, ...]:
    """The backends to ask, in order, for a value of LORAFAST_BACKEND. ValueError for one that is none."""
    if asked == "auto":
        return ORDER
    if asked not in ORDER:
        raise ValueError(f"{env.BACKEND.name}={asked} is not one of auto, {', '.join(ORDER)}")
    return (asked,)


class Routes(dict[str, ModuleType]):
    """The backend of each primitive of one problem, chosen when it is first asked for.

    ValueError for an unknown LORAFAST_BACKEND, RuntimeError if it cannot.
    """

    def __init__(self, problem: Problem, asked: str, log: bool) -> None:
        super().__init__()
        self._question = problem, asked, log

    def __missing__(self, primitive: str) -> ModuleType:
        self[primitive] = found = _choose(primitive, *self._question)
        return found


def routes(facts: tuple) -> Routes:
    """The backends of the problem with these facts, which is only made the first time."""
    return _pick(facts, env.backend(), env.log())


def pick(primitive: str, problem: Problem) -> ModuleType:
    """The backend that serves this primitive. ValueError for an unknown LORAFAST_BACKEND, RuntimeError if it cannot."""
    return _pick(problem, env.backend(), env.log())[primitive]


@functools.lru_cache(maxsize=4096)
def _pick(problem: Problem | tuple, asked: str, log: bool) -> Routes:
    return Routes(problem if isinstance(problem, Problem) else Problem(*problem), asked, log)


def _choose(primitive: str, problem: Problem, asked: str, log: bool) -> ModuleType:
    refusals = {}
    for backend in candidates(asked):
        refusals[backend] = why_not(backend, primitive, problem)
        if not refusals[backend]:
            if log:
                _announce(primitive, problem, backend, refusals)
            return load(backend)
    reasons = "; ".join(refusals[asked])
    raise RuntimeError(
        f"{env.BACKEND.name}={asked} cannot {primitive}: {reasons} (a forced backend serves all or nothing; auto falls back)"
    )


def _announce(
    primitive: str, problem: Problem, backend: str, refusals: dict[str, tuple[str, ...]]
) -> None:
    others = ", ".join(f"{name} ({'; '.join(why)})" for name, why in refusals.items() if why)
    way = how(backend, primitive, problem)
    chosen = f"{backend} ({way})" if way else backend
    print(
        f"lorafast: {primitive} -> {chosen}{others and f'; not {others}'}; {problem}",
        file=sys.stderr,
    )
