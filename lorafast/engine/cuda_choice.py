"""Whether the kernels of the `cuda` backend serve a GPU without being asked for: where a trial
found them right there, and its rates let them take less of the device's time than what would serve
otherwise, Triton's kernels or eager.

The choice is a pure function of the problem and of the verdicts (trial), never of a clock. Only
what the device does counts, not what it takes to launch it. LORAFAST_BACKEND=cuda asks none of
this. Imports no triton.
"""

from __future__ import annotations

import torch

from lorafast.engine import cuda_forms, kernel_choice, trial
from lorafast.engine.kernel_choice import PRODUCTS
from lorafast.engine.kernels import gemm_routing, measured
from lorafast.engine.kernels.gemm_routing import Route
from lorafast.engine.kernels.measured import CUDA, EAGER, KERNELS
from lorafast.engine.problem import Problem
from lorafast.engine.trial_forms import Verdict, speed_of
from lorafast.runtime import devices
from lorafast.runtime.fallback import Provisional

# The kernels that a primitive launches where that is not one of its own name: more ranks than one
# pass over dy takes are projections of it.
_LAUNCHED = {
    "linear": ("low_rank_add",),
    "grad_input": ("low_rank_add",),
    "grad_output": ("project", "grad_project", "grad_output"),
}
# A product may take as long as another's, within what measurements scatter by: where all primitives
# are this backend's, C++ makes the calls (host), in a fraction of the host's time.
_SAME = 1.005
# Several adapters take one pass each, but here.
_ONE_PASS = ("linear", "row_norm", "drop")


def why_not(primitive: str, problem: Problem) -> tuple[str, ...]:
    """Every reason why the kernels do not serve a GPU unasked; empty if they do.

    The first question about a GPU runs a trial. A Provisional holds for this call alone.
    """
    device, R = devices.seen(problem.arch), _ranks(primitive, problem)
    kernels = _LAUNCHED.get(primitive, (primitive,))
    if reasons := kernel_choice.refusals(kernels, problem.dtype, R, device, CUDA):
        return reasons
    if problem.dtype == torch.float32 and cuda_forms.in_tf32():
        return (Provisional("fp32 is to be multiplied in tf32, in which nothing is tried"),)
    entry, _ = trial.entry_of(kernels[-1], problem.dtype, R, CUDA)
    found = trial.verdict(device, entry)
    assert isinstance(found, Verdict), "it has just refused no kernel"
    ours, by_eager = (_seconds(primitive, problem, found.rates, by) for by in (CUDA, EAGER))
    if ours is None or by_eager is None:
        return (found.forms.get(speed_of(CUDA)) or "its speed on this GPU could not be measured",)
    name, theirs = "eager", by_eager
    refused = kernel_choice.why_not(primitive, problem)
    if any(isinstance(reason, Provisional) for reason in refused):
        return refused
    if not refused:
        name, theirs = "triton", _by_triton(primitive, problem, device, by_eager)
    limit, share = _SAME if primitive in PRODUCTS else measured.GAIN, ours / theirs
    if share <= limit:
        return ()
    taken = f"is expected to take {share:.3f} × {name}'s time here"
    return (f"{taken}; at most {limit:g} is worth it",)


def is_admitted(device: torch.device, dtype: torch.dtype) -> bool:
    """True if a trial has found kernels right on a device that hold an activation of this dtype.

    The first question about a GPU runs a trial.
    """
    if cuda_forms.why_not_architecture(devices.of(device).name) or dtype not in cuda_forms.DTYPES:
        return False
    return not kernel_choice.refusals(("project",), dtype, 1, device, CUDA)


def _ranks(primitive: str, problem: Problem) -> int:
    """The largest rank that a kernel gets; linear gets all adapters side by side."""
    return sum(problem.R) if primitive == "linear" else max(problem.R)


def _seconds(primitive: str, problem: Problem, rates: dict[str, float], by: str) -> float | None:
    """The seconds of a primitive by CUDA or by EAGER: both take torch's base products."""
    seconds = measured.seconds(primitive, problem, rates, by)
    if seconds is None:
        return None
    if by == CUDA and primitive not in _ONE_PASS:
        seconds *= len(problem.R)
    if primitive in PRODUCTS:
        seconds += _base(primitive, problem, rates)
    return seconds


def _base(primitive: str, problem: Problem, rates: dict[str, float]) -> float:
    """The modelled seconds of torch's base product, by its measured rate."""
    specs = measured.specs(problem.arch, problem.dtype, rates)
    query = kernel_choice.query_of(primitive, problem, specs)
    plain = query._replace(R=0, masked=False, epilogue_passes=0)
    return gemm_routing.modelled_seconds(plain, Route("base first"))


def _by_triton(
    primitive: str, problem: Problem, device: torch.device | None, by_eager: float
) -> float:
    """The seconds of a primitive that Triton's kernels would serve."""
    entry, _ = trial.entry_of("project", problem.dtype, sum(problem.R))
    rates: dict[str, float] = getattr(trial.verdict(device, entry), "rates", {})
    if primitive not in PRODUCTS:
        return measured.seconds(primitive, problem, rates, KERNELS) or by_eager
    specs = kernel_choice.measured_specs(device, problem.arch, problem.dtype)
    query = kernel_choice.query_of(primitive, problem, specs)
    route = gemm_routing.pick(query)
    if route.fused:
        return gemm_routing.modelled_seconds(query, route)
    added = measured.seconds("low_rank_add", problem, rates, KERNELS) if query.masked else None
    return by_eager if added is None else _base(primitive, problem, rates) + added
