"""lorafast-bench tune: every Triton kernel checked, then timed, and every route of a product beside the frozen product.

What it prints last are rows for the table in kernels/routes.py. A route that errs, or whose two runs differ, shows no speed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from lorafast import testing
from lorafast.bench.clock import Clock, Mark, Step, interleave, quantiles
from lorafast.bench.jobs import JOBS, Job, Sizes, jobs
from lorafast.bench.progress import Progress
from lorafast.bench.record import SCHEMA_VERSION
from lorafast.bench.refusal import Refused
from lorafast.bench.row import MAX_ERROR_RATIO
from lorafast.bench.tables import Table
from lorafast.engine.kernels import gemm_routing
from lorafast.engine.kernels.gemm_routing import Route, Row
from lorafast.runtime import env
from lorafast.testing import SHORT

FROZEN = "frozen"
STREAM = "kernel"
LEGEND = (
    "err ratio: RMS error against float64 ÷ stock torch's in the same dtype; above 2 a route is wrong and shows no speed.",
    "repeats: two runs agree bit for bit. modelled ms: what the roofline that chooses without a table expects.",
    "GB/s: the bytes a streaming kernel must at least move, by its time.",
)


@dataclass
class Timing:
    """One way of doing one primitive. ms: the median with its percentiles; modelled_ms: what the roofline expected.

    repeats: whether two runs agreed bit for bit. gb_per_s: the bytes it must move at least, by the time it took.
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
        """Without a speed."""
        self.status, self.reason = status, reason


def check_able(device: torch.device) -> None:
    """Refused where no Triton kernel can run."""
    if device.type != "cuda" and not env.interprets():
        raise Refused(
            "tune times Triton kernels, which need a GPU (or LORAFAST_BACKEND=triton TRITON_INTERPRET=1, to try the way)"
        )


class Pace(NamedTuple):
    """How often each way is timed. `seconds` bounds the rounds of one primitive."""

    rounds: int
    warmup: int
    seconds: float


def run(
    sizes: list[Sizes],
    dtype: torch.dtype,
    device: torch.device,
    pace: Pace,
    seed: int,
    progress: Progress,
) -> Iterator[tuple[list[Timing], dict[gemm_routing.Key, Row]]]:
    """The timings of one primitive after another, and what the table should say of it."""
    clock = Clock(device)
    for one in sizes:
        for job in jobs(one, dtype, device, seed):
            progress.begin(
                f"{job.primitive} {job.variant} {one.M}x{one.K}->{one.N} R={one.R} p={one.p:g} {SHORT[dtype]}"
            )
            timings = _measure(job, dtype, clock, pace)
            yield list(timings.values()), _chosen(job, timings)


def progress_total(sizes: list[Sizes]) -> int:
    """How often a run calls progress.begin."""
    return JOBS * len(sizes)


def _measure(job: Job, dtype: torch.dtype, clock: Clock, pace: Pace) -> dict[Route | str, Timing]:
    ways: list[Route | str] = (
        [STREAM] if job.asked is None else list(gemm_routing.candidates(job.asked))
    )
    timings = {
        way: Timing(job.primitive, job.variant, *job.sizes, SHORT[dtype], str(way)) for way in ways
    }
    truth, chain = job.chain(torch.float64), job.chain(dtype)
    steps: dict[Route | str, Step] = {}
    for way, timing in timings.items():
        try:
            _check(job, way, timing, truth, chain, dtype)
        except Exception as error:
            timing.fail(
                "oom" if isinstance(error, torch.cuda.OutOfMemoryError) else "wrong",
                f"{type(error).__name__}: {error}",
            )
        if timing.status == "ok":
            steps[way] = _step(job, way)
    del truth, chain
    if job.frozen:
        steps[FROZEN] = _marked(job.frozen)
        timings[FROZEN] = Timing(job.primitive, job.variant, *job.sizes, SHORT[dtype], FROZEN)

    def failed(way: Route | str, error: Exception) -> None:
        timings[way].fail("wrong", f"{type(error).__name__}: {error}")

    samples = interleave(steps, clock, pace.rounds, pace.warmup, failed, pace.seconds)
    for way, phases in samples.items():
        _enter(
            timings[way],
            job,
            way,
            [sample[0] for sample in phases],
            [sample[0] for sample in samples.get(FROZEN, ())],
        )
    return timings


def _check(
    job: Job,
    way: Route | str,
    timing: Timing,
    truth: list[torch.Tensor],
    chain: list[torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """The error rule over all the primitive gives, and whether a second run is the same."""
    first, second = _run(job, way), _run(job, way)
    timing.repeats = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    timing.error_ratio = max(
        testing.ratio(_rms(found - t), _rms(usual - t), _rms(t), torch.finfo(dtype).eps / 8)
        for found, usual, t in zip(first, chain, truth, strict=True)
    )
    if not timing.repeats:
        timing.fail("wrong", "two runs differ")
    if not timing.error_ratio <= MAX_ERROR_RATIO:
        timing.fail(
            "wrong",
            f"errs {timing.error_ratio:.3g} times what eager errs; at most {MAX_ERROR_RATIO:g} is right",
        )


def _rms(t: torch.Tensor) -> float:
    return float(t.square().mean().sqrt())


def _run(job: Job, way: Route | str) -> list[torch.Tensor]:
    if isinstance(way, Route):
        with gemm_routing.taking(way):
            return job.run()
    return job.run()


def _step(job: Job, way: Route | str) -> Step:
    return _marked(lambda: _run(job, way))


def _marked(function: Callable[[], object]) -> Step:
    def step(mark: Mark) -> None:
        mark()
        function()
        mark()

    return step


def _enter(
    timing: Timing, job: Job, way: Route | str, found: list[float], frozen: list[float]
) -> None:
    times = quantiles(found)
    timing.ms, timing.ms_p20, timing.ms_p80, timing.rounds = *times, len(found)
    if len(frozen) == len(found):
        timing.ratio_to_frozen = quantiles([a / b for a, b in zip(found, frozen, strict=True)]).p50
    if isinstance(way, Route):
        timing.modelled_ms = 1e3 * gemm_routing.seconds(job.asked, way)
    elif way == STREAM:
        timing.gb_per_s = job.cost.bytes / times.p50 / 1e6


def _chosen(job: Job, timings: dict[Route | str, Timing]) -> dict[gemm_routing.Key, Row]:
    """The fastest route that is right."""
    able = {
        way: timing.ms
        for way, timing in timings.items()
        if isinstance(way, Route) and timing.ms is not None
    }
    return {gemm_routing.key(job.asked): min(able, key=able.get).row} if able else {}


def table(timings: list[Timing]) -> Table:
    """The timings of one primitive, the fastest first."""
    first = timings[0]
    named = f"{first.primitive} ({first.variant})" if first.variant else first.primitive
    title = f"{named}, {first.M} tokens, {first.K} → {first.N}, R = {first.R}, p = {first.dropout:g}, {first.dtype}"
    heads = (
        "route",
        "err ratio",
        "repeats",
        "ms",
        "its p20–p80",
        "× frozen",
        "modelled ms",
        "GB/s",
    )
    ordered = sorted(timings, key=lambda one: math.inf if one.ms is None else one.ms)
    rows = tuple(
        (
            one.route, _told(one.error_ratio, ".2f"), {True: "yes", False: "NO", None: "–"}[one.repeats],
            _told(one.ms, ".4f") if one.status == "ok" else f"{one.status}: {one.reason}",
            "–" if one.ms is None else f"{one.ms_p20:.4f}–{one.ms_p80:.4f}", _told(one.ratio_to_frozen, ".3f"),
            _told(one.modelled_ms, ".4f"), _told(one.gb_per_s, ".0f"),
        )
        for one in ordered
    )  # fmt: skip
    return Table(title, heads, rows, frozenset(), ())


def _told(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def lines(chosen: dict[gemm_routing.Key, Row]) -> list[str]:
    """The rows as kernels/routes.py spells them."""
    return [f"    {key}: {row}," for key, row in chosen.items()]


def write(
    path: Path, facts: dict, timings: list[Timing], chosen: dict[gemm_routing.Key, Row]
) -> None:
    """Everything as JSON."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "env": facts,
        "timings": [asdict(one) for one in timings],
        "table": lines(chosen),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
