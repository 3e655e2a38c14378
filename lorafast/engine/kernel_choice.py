"""Whether the Triton kernels serve a GPU without being asked for: where a trial found them right
there, and what it measured lets them take less time than eager.

The choice is a pure function of the problem and of the verdict (trial), never of a clock, so all
processes with the same verdict choose alike. LORAFAST_BACKEND=triton asks none of this. Imports no
triton.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from lorafast.engine import trial
from lorafast.engine.kernels import gemm_routing, measured
from lorafast.engine.kernels.gemm_routing import Route, RouteQuery
from lorafast.engine.kernels.gpu_specs import Device
from lorafast.engine.kernels.measured import Expected
from lorafast.engine.problem import Problem
from lorafast.engine.trial_forms import GEMMS, SPEED, TRITON, Form, Verdict
from lorafast.runtime import devices, env
from lorafast.runtime.devices import Arch
from lorafast.runtime.fallback import Provisional

_Ask = Callable[[torch.device | None, str], Verdict | Provisional | None]

PRODUCTS = ("linear", "grad_input")
_NOTHING = Verdict()
# What else a primitive launches than the kernel of its name: u of many ranks is a projection of dy.
_LAUNCHED = {"grad_output": ("project", "grad_output")}
_SAME_DROP = "eager drops by the same kernel where that may serve"
_SAME = "torch's own products are expected to be as fast here, and eager runs the same"


def why_not(primitive: str, problem: Problem) -> tuple[str, ...]:
    """Every reason why the kernels do not serve a GPU unasked; empty if they do.

    The first question about a GPU runs a trial. A Provisional holds for this call alone.
    """
    if primitive == "drop":
        return (_SAME_DROP,)
    device = devices.seen(problem.arch)
    if primitive in PRODUCTS:
        return _why_not_product(primitive, problem, device)
    kernels = _LAUNCHED.get(primitive, (primitive,))
    reasons = refusals(kernels, problem.dtype, sum(problem.R), device)
    if reasons:
        return reasons
    return _why_not_time(_stream(primitive, problem, device))


def query_of(primitive: str, problem: Problem, specs: Device | None = None) -> RouteQuery:
    """The query of a product whose tensors have the usual strides.

    specs: what was measured on the device, if anything was.
    """
    K, N, e = problem.K, sum(problem.N), problem.dtype.itemsize
    columns, length = (N, K) if primitive == "linear" else (K, N)
    masked, passes = False, 0
    if primitive == "linear":
        passes = int(problem.gain == "out") + int(problem.keep == "inner")
    else:
        masked = problem.dropout > 0 and problem.dropout_on == "adapter"
    return RouteQuery(
        problem.M, columns, (length,), sum(problem.R), problem.dtype, problem.arch,
        by_row=problem.transposed == (primitive == "grad_input"),
        masked=masked,
        epilogue_passes=passes,
        aligned=not any(size * e % 16 for size in (K, *problem.N)),
        specs=specs,
    )  # fmt: skip


def measured_specs(device: torch.device | None, arch: Arch, dtype: torch.dtype) -> Device | None:
    """The specification by which a call that was not asked for chooses its route; None if it was.

    A form of the GEMM that has no verdict yet, or a bad one, has no speed there.
    """
    if arch.vendor == "cpu" or env.is_forced("triton"):
        return None
    return _specs(device, dtype, arch, trial.known)


def refusals(
    kernels: tuple[str, ...],
    dtype: torch.dtype,
    R: int,
    device: torch.device | None,
    by: str = TRITON,
) -> tuple[str, ...]:
    """Why these kernels of a backend may not serve; the first question runs a trial.

    R: the largest rank that one gets.
    """
    reasons = []
    for kernel in kernels:
        entry, form = trial.entry_of(kernel, dtype, R, by)
        found = trial.verdict(device, entry)
        if isinstance(found, Provisional):
            return (found,)
        if reason := found.why_not(form):
            tried = str(form) in found.forms
            reasons.append(f"{form} failed its trial here: {reason}" if tried else reason)
    return tuple(dict.fromkeys(reasons))


def _why_not_product(
    primitive: str, problem: Problem, device: torch.device | None
) -> tuple[str, ...]:
    streams = _verdict("drop", problem, device)
    if isinstance(streams, Provisional):
        return (streams,)
    if measured.PRODUCT not in streams.rates:
        if streams.forms:
            return (streams.forms.get(SPEED) or "its speed here could not be measured",)
        return (streams.reason,)
    hopeful = measured.specs(problem.arch, problem.dtype, streams.rates)
    query = query_of(primitive, problem, hopeful)
    low_rank = Expected(0.0, 0.0)
    if query.masked:
        # The route without a fused product may be taken at any call, where strides are unusual.
        if reasons := refusals(("low_rank_add",), problem.dtype, sum(problem.R), device):
            return reasons
        found = _stream("low_rank_add", problem, device)
        if found is None:
            return _why_not_time(None)
        low_rank = found
    by_torch = _by_torch(query, low_rank)
    best = _fused(query)
    hopeless = best is None or Expected(best, by_torch.eager).why_not
    if hopeless and not _in_table(query):
        # Not even the speed that is assumed of our GEMM would do.
        return _why_not_time(by_torch) if query.masked else (_SAME,)
    return _why_not_fused(query, by_torch, problem, device)


def _why_not_fused(
    query: RouteQuery, by_torch: Expected, problem: Problem, device: torch.device | None
) -> tuple[str, ...]:
    """Why neither a fused product nor torch's beside our low-rank kernel serves."""
    form = Form("gemm_pointers", problem.dtype)
    gemms = _verdict("gemm_pointers", problem, device)
    if isinstance(gemms, Provisional):
        return (gemms,)
    specs = _specs(device, problem.dtype, problem.arch, trial.verdict)
    query = query._replace(specs=specs)
    if _in_table(query):
        return ()
    best = _fused(query)
    if best is None:
        return _why_not_time(by_torch) if query.masked else (gemms.why_not(form) or _SAME,)
    return _why_not_time(Expected(min(best, by_torch.kernels), by_torch.eager))


def _in_table(query: RouteQuery) -> bool:
    """True if a measured row chooses a fused route that may serve."""
    row = gemm_routing.TABLE.get(gemm_routing.key(query))
    return any(route.fused and route.row == row for route in gemm_routing.candidates(query))


def _fused(query: RouteQuery) -> float | None:
    """The expected seconds of the best fused route; None if there is none."""
    seconds = [
        gemm_routing.modelled_seconds(query, route)
        for route in gemm_routing.candidates(query)
        if route.fused
    ]
    return min(seconds, default=None)


def _by_torch(query: RouteQuery, low_rank: Expected) -> Expected:
    """The expected seconds of torch's product with a low-rank part by our kernel and by eager."""
    if query.masked:
        base = gemm_routing.modelled_seconds(query._replace(R=0, masked=False), Route("base first"))
        return Expected(base + low_rank.kernels, base + low_rank.eager)
    order = "base first" if query.dtype == torch.float32 else "low first"
    seconds = gemm_routing.modelled_seconds(query, Route(order))
    return Expected(seconds, seconds)


def _specs(device: torch.device | None, dtype: torch.dtype, arch: Arch, ask: _Ask) -> Device:
    """The specification with what was measured; `ask` gives the verdicts."""
    entries = (trial.entry_of(kernel, dtype)[0] for kernel in ("drop", GEMMS[0]))
    base, gemm = (ask(device, entry) for entry in entries)
    return _combined(
        arch,
        dtype,
        base if isinstance(base, Verdict) else _NOTHING,
        gemm if isinstance(gemm, Verdict) else _NOTHING,
    )


@functools.lru_cache(maxsize=64)
def _combined(arch: Arch, dtype: torch.dtype, base: Verdict, gemm: Verdict) -> Device:
    speeds = {
        kernel: 0.0 if gemm.why_not(Form(kernel, dtype)) else gemm.rates.get(kernel, 0.0)
        for kernel in GEMMS
    }
    return measured.specs(arch, dtype, base.rates | speeds)


def _verdict(kernel: str, problem: Problem, device: torch.device | None) -> Verdict | Provisional:
    return trial.verdict(device, trial.entry_of(kernel, problem.dtype, sum(problem.R))[0])


def _stream(kernel: str, problem: Problem, device: torch.device | None) -> Expected | None:
    found = _verdict(kernel, problem, device)
    return measured.expected(kernel, problem, getattr(found, "rates", {}))


def _why_not_time(found: Expected | None) -> tuple[str, ...]:
    if found is None:
        return ("its speed on this GPU could not be measured",)
    return (found.why_not,) if found.why_not else ()
