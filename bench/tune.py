"""lorafast-bench tune: every Triton kernel checked and timed, on every route of a product.

It prints rows for the table in kernels/gemm_routing.py. A route that errs, or whose two runs
differ, shows no speed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from lorafast.bench.errors import BenchError
from lorafast.bench.measure.timing import Mark, Step, Timer, interleave, quantiles
from lorafast.bench.report.progress import Progress
from lorafast.bench.report.record import SCHEMA_VERSION
from lorafast.bench.report.tables import NOTHING, Table, number
from lorafast.engine import error_rule
from lorafast.engine.kernel_cases import CASES_PER_LAYER, KernelCase, Sizes, kernel_cases
from lorafast.engine.kernels import gemm_routing
from lorafast.engine.kernels.gemm_routing import Route, Row
from lorafast.runtime import env
from lorafast.testing import SHORT

# What is timed besides routes: the base product alone, and a kernel without routes.
FROZEN = "frozen"
STREAM = "kernel"
LEGEND = (
    "err ratio: RMS error against float64 ÷ stock torch's in the same dtype; above 2 a route is "
    "wrong and shows no speed.",
    "repeats: two runs agree bit for bit. modelled ms: the time by the roofline that chooses a "
    "route without a table.",
    "GB/s: the least bytes a streaming kernel must move, divided by its time.",
)
_HEADS = ("route", "× frozen", "ms", "err ratio", "repeats", "p20–p80", "modelled ms", "GB/s")


@dataclass
class Timing:
    """The time and the error of one route of one primitive.

    ms: the median over rounds, with its percentiles.
    modelled_ms: the time by the roofline.
    gb_per_s: the least bytes the primitive must move, divided by its time.
    repeats: True if two runs agree bit for bit.
    """

    primitive: str
    variant: str
    M: int
    K: int
    N: int
    R: int
    dropout: float
    dtype: str
    route: str
    status: str = "ok"
    reason: str | None = None
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    ratio_to_frozen: float | None = None
    modelled_ms: float | None = None
    gb_per_s: float | None = None
    error_ratio: float | None = None
    repeats: bool | None = None
    rounds: int = 0

    def fail(self, status: str, reason: str) -> None:
        """Set status and reason of a route that shows no speed."""
        self.status, self.reason = status, reason


class Pace(NamedTuple):
    """How often each route is timed.

    seconds: the limit of the rounds of one primitive.
    """

    rounds: int
    warmup: int
    seconds: float


def check_device(device: torch.device) -> None:
    """Raise BenchError if no Triton kernel can run on the device."""
    if device.type != "cuda" and not env.interprets():
        raise BenchError(
            "tune times Triton kernels, which need a GPU (or LORAFAST_BACKEND=triton "
            "TRITON_INTERPRET=1, to try the command)"
        )


def run(
    sizes: list[Sizes],
    dtype: torch.dtype,
    device: torch.device,
    pace: Pace,
    seed: int,
    progress: Progress,
) -> Iterator[tuple[list[Timing], dict[gemm_routing.Key, Row]]]:
    """Yield the timings of one primitive after another, and its rows for the table of routes."""
    timer = Timer(device)
    for one in sizes:
        for case in kernel_cases(one, dtype, device, seed):
            shape = f"{one.M}x{one.K}->{one.N} R={one.R} p={one.p:g} {SHORT[dtype]}"
            progress.begin(f"{case.primitive} {case.variant} {shape}")
            timings = _measure(case, dtype, timer, pace)
            yield list(timings.values()), _chosen(case, timings)


def progress_total(sizes: list[Sizes]) -> int:
    """Return how often a run calls progress.begin."""
    return CASES_PER_LAYER * len(sizes)


def _measure(
    case: KernelCase, dtype: torch.dtype, timer: Timer, pace: Pace
) -> dict[Route | str, Timing]:
    """Check and time every route of a case, next to its frozen product."""
    routes: list[Route | str] = [STREAM]
    if case.query is not None:
        routes = list(gemm_routing.candidates(case.query))
    timings = {route: _timing(case, dtype, route) for route in routes}
    truth, chain = case.chain(torch.float64), case.chain(dtype)
    steps: dict[Route | str, Step] = {}
    for route, timing in timings.items():
        try:
            _check(case, route, timing, truth, chain, dtype)
        except Exception as error:
            out_of_memory = isinstance(error, torch.cuda.OutOfMemoryError)
            status = "oom" if out_of_memory else "wrong"
            timing.fail(status, f"{type(error).__name__}: {error}")
        if timing.status == "ok":
            steps[route] = _step(case, route)
    del truth, chain
    if case.frozen:
        steps[FROZEN] = _marked(case.frozen)
        timings[FROZEN] = _timing(case, dtype, FROZEN)

    def failed(route: Route | str, error: Exception) -> None:
        timings[route].fail("wrong", f"{type(error).__name__}: {error}")

    samples = interleave(steps, timer, pace.rounds, pace.warmup, failed, pace.seconds)
    times = {route: [phases[0] for phases in found] for route, found in samples.items()}
    for route, found in times.items():
        _set_times(timings[route], case, route, found, times.get(FROZEN, []))
    return timings


def _timing(case: KernelCase, dtype: torch.dtype, route: Route | str) -> Timing:
    return Timing(case.primitive, case.variant, *case.sizes, SHORT[dtype], str(route))


def _check(
    case: KernelCase,
    route: Route | str,
    timing: Timing,
    truth: list[torch.Tensor],
    chain: list[torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """Apply the error rule to all outputs, and compare two runs bit for bit."""
    found = error_rule.compare(lambda: _run(case, route), truth, chain, dtype)
    timing.error_ratio, timing.repeats = found
    if found.why_wrong:
        timing.fail("wrong", found.why_wrong)


def _run(case: KernelCase, route: Route | str) -> list[torch.Tensor]:
    if isinstance(route, Route):
        with gemm_routing.forcing(route):
            return case.run()
    return case.run()


def _step(case: KernelCase, route: Route | str) -> Step:
    return _marked(lambda: _run(case, route))


def _marked(function: Callable[[], object]) -> Step:
    """Return a step of one phase."""

    def step(mark: Mark) -> None:
        mark()
        function()
        mark()

    return step


def _set_times(
    timing: Timing, case: KernelCase, route: Route | str, found: list[float], frozen: list[float]
) -> None:
    times = quantiles(found)
    timing.ms, timing.ms_p20, timing.ms_p80, timing.rounds = *times, len(found)
    if len(frozen) == len(found):
        ratios = [a / b for a, b in zip(found, frozen, strict=True)]
        timing.ratio_to_frozen = quantiles(ratios).p50
    if isinstance(route, Route):
        timing.modelled_ms = 1e3 * gemm_routing.modelled_seconds(case.query, route)
    elif route == STREAM:
        timing.gb_per_s = case.cost.bytes / times.p50 / 1e6


def _chosen(case: KernelCase, timings: dict[Route | str, Timing]) -> dict[gemm_routing.Key, Row]:
    """Return the fastest correct route as a row of the table of routes."""
    times = {
        route: timing.ms
        for route, timing in timings.items()
        if isinstance(route, Route) and timing.ms is not None
    }
    return {gemm_routing.key(case.query): min(times, key=times.get).row} if times else {}


def table(timings: list[Timing]) -> Table:
    """Return the table of one primitive, the fastest route first."""
    first = timings[0]
    named = f"{first.primitive} ({first.variant})" if first.variant else first.primitive
    title = f"{named}, {first.M} tokens, {first.K} → {first.N}, R = {first.R}"
    title += f", p = {first.dropout:g}, {first.dtype}"
    ordered = sorted(timings, key=lambda one: math.inf if one.ms is None else one.ms)
    failed = [one for one in ordered if one.status != "ok"]
    notes = tuple(f"{one.route}: {one.status}: {one.reason}" for one in failed)
    return Table(title, _HEADS, tuple(map(_cells, ordered)), frozenset(), notes)


def _cells(one: Timing) -> tuple[str, ...]:
    return (
        one.route,
        number(one.ratio_to_frozen, ".3f") if one.status == "ok" else one.status,
        number(one.ms, ".4f"),
        number(one.error_ratio, ".2f"),
        {True: "yes", False: "NO", None: NOTHING}[one.repeats],
        NOTHING if one.ms is None else f"{one.ms_p20:.4f}–{one.ms_p80:.4f}",
        number(one.modelled_ms, ".4f"),
        number(one.gb_per_s, ".0f"),
    )


def lines(chosen: dict[gemm_routing.Key, Row]) -> list[str]:
    """Return the rows as lines of kernels/gemm_routing.py."""
    return [f"    {key}: {row}," for key, row in chosen.items()]


def document(facts: dict, timings: list[Timing], chosen: dict[gemm_routing.Key, Row]) -> str:
    """Return everything as the text of a JSON file."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "env": facts,
        "timings": [asdict(one) for one in timings],
        "table": lines(chosen),
    }
    return json.dumps(content, indent=1) + "\n"
