"""The backend of a grouped call: the same kinds, asked in the same order, as those of a layer."""

from __future__ import annotations

import functools
import importlib
from collections import defaultdict
from types import ModuleType
from typing import cast

import torch

from lorafast.engine import dispatch
from lorafast.engine.dispatch import Routes
from lorafast.engine.grouped import cpu, device, eager
from lorafast.engine.grouped.groups import Groups
from lorafast.engine.problem import CallOptions, LayerTensors, Problem
from lorafast.runtime import devices, env

_MODULES: dict[str, ModuleType] = {"cpu": cpu, "eager": eager}
# Imported where it serves: it needs Triton.
_TRITON = "lorafast.engine.grouped.triton"
# What computes `eager` where the host would have to wait for the offsets.
_EAGER_ON_DEVICES: ModuleType = device


class _OfGroups:
    """A module of grouped primitives, whose functions get the groups as their first argument."""

    def __init__(self, module: ModuleType, groups: Groups) -> None:
        self._module, self._groups = module, groups

    def __getattr__(self, name: str):
        return functools.partial(getattr(self._module, name), self._groups)


def of(x: torch.Tensor, tensors: LayerTensors, options: CallOptions, groups: Groups) -> Routes:
    """Return the backend of each primitive, which is the same one. x may be dy, in backward.

    RuntimeError if a forced backend cannot.
    """
    backend, refusals = _choice(problem_of(x, tensors, options), env.backend())
    if backend == "none":
        (asked, reasons), *_ = refusals.items()
        raise RuntimeError(f"{env.BACKEND.name}={asked} cannot serve experts: {'; '.join(reasons)}")
    module = importlib.import_module(_TRITON) if backend == "triton" else _MODULES[backend]
    if backend == "eager" and not x.is_cpu:
        module = _EAGER_ON_DEVICES
    bound = _OfGroups(module, groups)
    return cast(Routes, defaultdict(lambda: bound))


def problem_of(x: torch.Tensor, tensors: LayerTensors, options: CallOptions) -> Problem:
    """The problem of a layer with all experts' rows and one expert's weight and factors."""
    weight, A, core = tensors.weight, tensors.lora_A, tensors.core
    _, N, K = weight.shape
    return Problem(
        devices.of(x.device),
        x.dtype,
        x.shape[0],
        K,
        (N,),
        (A.shape[-2],),
        weight.dtype,
        A.dtype,
        weight.stride(1) == 1 and N != 1 and K != 1,
        "none" if core is None else "diagonal" if core.dim() == 2 else "full",
        options.dropout,
        options.dropout_on,
        "none" if tensors.magnitude is None else options.axis,
        options.keep,
        tensors.out_scale is not None,
    )


def choice(problem: Problem) -> tuple[str, dict[str, tuple[str, ...]]]:
    """The name of a problem's backend, "none" if a forced one refuses, and the others' reasons."""
    return _choice(problem, env.backend())


@functools.lru_cache(maxsize=1024)
def _choice(problem: Problem, asked: str) -> tuple[str, dict[str, tuple[str, ...]]]:
    refusals: dict[str, tuple[str, ...]] = {}
    for backend in dispatch.candidates(asked):
        reasons = why_not(backend, problem, forced=backend == asked)
        if not reasons:
            return backend, refusals
        refusals[backend] = reasons
    return "none", refusals


def why_not(backend: str, problem: Problem, forced: bool = False) -> tuple[str, ...]:
    """Every reason why a backend cannot compute a grouped call; empty if it can.

    forced: LORAFAST_BACKEND asks for it.
    """
    if backend == "triton" and not forced:
        # None has run on a GPU, so where a trial would stand, nothing does.
        return ("no trial covers its grouped kernels; LORAFAST_BACKEND=triton asks for them",)
    if backend not in (*_MODULES, "triton"):
        return ("has no grouped kernels",)
    return dispatch.why_not(backend, "project", problem)
