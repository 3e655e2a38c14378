"""The backend of each primitive: the first that can, in order, or the forced one, which must."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import math
import sys
from typing import TYPE_CHECKING, cast

import torch

from lorafast.engine.backends import Backend
from lorafast.engine.problem import CallOptions, LayerTensors, Problem
from lorafast.runtime import devices, env, fallback, symlinks
from lorafast.runtime.fallback import Provisional, Remediable
from lorafast.runtime.spelling import did_you_mean

if TYPE_CHECKING:
    from lorafast.engine.backends import cpu, cuda, eager, triton

    # A module is a backend if it has the functions of the protocol, which the type checker checks.
    _BACKENDS: tuple[Backend, ...] = (eager, cpu, cuda, triton)

# Fastest first. A backend is a file in backends/; one that is missing or fails to load is a reason.
ORDER = ("cuda", "triton", "cpu", "eager")
_SOURCES = {"cuda": "csrc", "triton": "kernels", "cpu": "csrc"}


@functools.cache
def load(backend: str) -> Backend | str:
    """The backend's module, or the reason why there is none."""
    name = f"lorafast.engine.backends.{backend}"
    if importlib.util.find_spec(name) is None:
        return "not written yet (nothing is missing from this installation)"
    # An exception of a driver, a compiler or a broken file is a reason to take another backend,
    # never a crash in a forward pass.
    try:
        return cast(Backend, importlib.import_module(name))
    except Exception as error:
        missing = symlinks.why_missing(_SOURCES[backend]) if backend in _SOURCES else None
        reason = missing or f"cannot be loaded: {type(error).__name__}: {error}"
        return Remediable(reason) if backend == "cpu" else reason


def why_not(backend: str, primitive: str, problem: Problem) -> tuple[str, ...]:
    """Every reason why this backend cannot compute this primitive; empty if it can."""
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


def describe_route(backend: str, primitive: str, problem: Problem) -> str | None:
    """The route that a backend with several takes, in words; None for the others."""
    describe = getattr(load(backend), "describe_route", None)
    return describe and describe(primitive, problem)


def choice(primitive: str, problem: Problem) -> tuple[str, dict[str, tuple[str, ...]]]:
    """The name of a primitive's backend, and the reasons of those that were asked before it.

    The name is "none" if a forced backend refuses. Nothing is remembered.
    """
    refusals: dict[str, tuple[str, ...]] = {}
    for backend in candidates(env.backend()):
        reasons = why_not(backend, primitive, problem)
        if not reasons:
            return backend, refusals
        refusals[backend] = reasons
    return "none", refusals


def candidates(asked: str) -> tuple[str, ...]:
    """The backends to try, in order, for a value of LORAFAST_BACKEND. ValueError if unknown."""
    if asked == "auto":
        return ORDER
    if asked not in ORDER:
        known = ("auto", *ORDER)
        near = did_you_mean(asked, known)
        raise ValueError(f"{env.BACKEND.name}={asked} is not one of {', '.join(known)}{near}")
    return (asked,)


class Routes(dict[str, Backend]):
    """The backend of each primitive of one problem, chosen when it is first needed.

    ValueError for an unknown LORAFAST_BACKEND, RuntimeError if the forced backend cannot.
    """

    def __init__(self, problem: Problem, asked: str, log: bool) -> None:
        super().__init__()
        self._problem, self._asked, self._log = problem, asked, log

    def __missing__(self, primitive: str) -> Backend:
        chosen, refusals = _choose(primitive, self._problem, self._asked, self._log)
        # During a capture a backend may refuse what it will serve later.
        if not any(isinstance(reason, Provisional) for reason in refusals):
            self[primitive] = chosen
        return chosen


class _MetaRoutes(Routes):
    """The routes of meta tensors, which stand for those of a GPU while a step is modelled."""

    def __getitem__(self, primitive: str) -> Backend:
        modelled = devices.stand_in.get()
        return modelled.backend if modelled else super().__getitem__(primitive)


def routes(
    x: torch.Tensor,
    tensors: LayerTensors,
    options: CallOptions,
    ranks: tuple[int, ...] | None = None,
) -> Routes:
    """The backends for one layer's call; x may be any activation [...,K] or, in backward, dy.

    ranks: the rank of each adapter, where there are several.
    """
    # The fields of Problem, in order: as good a key, and quicker to make and to hash than one.
    weight, A, core, shape = tensors.weight, tensors.lora_A, tensors.core, x.shape
    N, K = weight.shape
    key = (
        devices.of(x.device),
        x.dtype,
        shape[0] if len(shape) == 2 else math.prod(shape[:-1]),
        K,
        (N,),
        ranks or (A.shape[0],),
        weight.dtype,
        A.dtype,
        weight.stride(0) == 1 and N != 1 and K != 1,
        "none" if core is None else "diagonal" if core.dim() == 1 else "full",
        options.dropout,
        options.dropout_on,
        "none" if tensors.magnitude is None else options.axis,
        options.keep,
        tensors.out_scale is not None,
    )
    return _routes(key, env.raw_get(env.BACKEND_KEY), env.raw_get(env.LOG_KEY))


def norm_routes(tensors: LayerTensors, options: CallOptions) -> Routes:
    """The backends for row_norm, which the weight alone decides."""
    weight, A = tensors.weight, tensors.lora_A
    N, K = weight.shape
    dtype, transposed = weight.dtype, weight.stride(0) == 1 and N != 1 and K != 1
    key = (
        devices.of(weight.device), dtype, 0, K, (N,), (A.shape[0],), dtype, A.dtype, transposed,
        "none", 0.0, "adapter", options.axis,
    )  # fmt: skip
    return _routes(key, env.raw_get(env.BACKEND_KEY), env.raw_get(env.LOG_KEY))


def problem_of(x: torch.Tensor, tensors: LayerTensors, options: CallOptions) -> Problem:
    """The problem of one layer's call."""
    return routes(x, tensors, options)._problem


def norm_problem_of(tensors: LayerTensors, options: CallOptions) -> Problem:
    """The problem of row_norm."""
    return norm_routes(tensors, options)._problem


def pick(primitive: str, problem: Problem) -> Backend:
    """The backend of this primitive. Raises as Routes does."""
    return _routes(problem, env.raw_get(env.BACKEND_KEY), env.raw_get(env.LOG_KEY))[primitive]


@functools.lru_cache(maxsize=4096)
def _routes(key: tuple | Problem, backend: str | bytes | None, log: str | bytes | None) -> Routes:
    """The routes of a problem under values of the two variables, as env.raw_get gives them."""
    problem = key if isinstance(key, Problem) else Problem(*key)
    kind = _MetaRoutes if problem.arch.vendor == "meta" else Routes
    return kind(problem, env.parse_backend(backend), env.parse_log(log))


def _choose(
    primitive: str, problem: Problem, asked: str, log: bool
) -> tuple[Backend, tuple[str, ...]]:
    """The backend of a primitive, and the reasons of those that were asked before it."""
    refusals: dict[str, tuple[str, ...]] = {}
    for backend in candidates(asked):
        refusals[backend] = why_not(backend, primitive, problem)
        if not refusals[backend]:
            if log:
                _announce(primitive, problem, backend, refusals)
            if problem.arch.vendor == "cpu":
                _warn_of_remediable(refusals)
            return cast(Backend, load(backend)), tuple(itertools.chain(*refusals.values()))
    raise RuntimeError(
        f"{env.BACKEND.name}={asked} cannot {primitive}: {'; '.join(refusals[asked])} "
        "(a forced backend serves all or nothing; auto falls back)"
    )


def _warn_of_remediable(refusals: dict[str, tuple[str, ...]]) -> None:
    for reason in itertools.chain(*refusals.values()):
        if isinstance(reason, Remediable):
            fallback.warn_of_eager(reason)


def _announce(
    primitive: str, problem: Problem, backend: str, refusals: dict[str, tuple[str, ...]]
) -> None:
    others = ", ".join(f"{name} ({'; '.join(why)})" for name, why in refusals.items() if why)
    route = describe_route(backend, primitive, problem)
    chosen = f"{backend} ({route})" if route else backend
    not_others = f"; not {others}" if others else ""
    announce(f"{primitive} -> {chosen}{not_others}; {problem}")


def announce(choice: str) -> None:
    """Print a choice, for LORAFAST_LOG."""
    print(f"lorafast: {choice}", file=sys.stderr)
