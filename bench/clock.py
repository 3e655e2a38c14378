"""Time steps against each other: rounds of A B C, A B C, …, so that whatever the machine does meanwhile falls on all alike."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch

# A step calls mark() where a phase begins and where the last one ends; what comes before the first mark is not timed.
Mark = Callable[[], None]
Step = Callable[[Mark], None]


class Quantiles(NamedTuple):
    """Median, 20th and 80th percentile."""

    p50: float
    p20: float
    p80: float


def quantiles(values: list[float]) -> Quantiles:
    """Linear between order statistics."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return Quantiles(statistics.median(ordered), at(0.2), at(0.8))


# Of the median's interval.
CONFIDENCE = 0.95


def interval(values: list[float]) -> tuple[float, float] | None:
    """The median's interval by order statistics: it encloses the true median in at least 95 % of runs, whatever the values'
    distribution. None of fewer than 6, whose smallest and largest do not.
    """
    ordered, count, below, outside = sorted(values), len(values), 0, 0.0
    # The true median is below the k-th smallest as often as fewer than k of so many fair coins show heads.
    while (outside := outside + math.comb(count, below) / 2**count) <= (1 - CONFIDENCE) / 2:
        below += 1
    return (ordered[below - 1], ordered[-below]) if below else None


class Clock:
    """Milliseconds of each phase of a step on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flushed: torch.Tensor | None = None

    def time(self, step: Step) -> tuple[float, ...]:
        """Run the step once."""
        return self._on_gpu(step) if self.device.type == "cuda" else self._on_cpu(step)

    def _on_cpu(self, step: Step) -> tuple[float, ...]:
        marks: list[int] = []
        step(lambda: marks.append(time.perf_counter_ns()))
        return tuple((b - a) / 1e6 for a, b in itertools.pairwise(marks))

    def _on_gpu(self, step: Step) -> tuple[float, ...]:
        marks: list[torch.cuda.Event] = []

        def mark() -> None:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            marks.append(event)

        # While the flush runs, the host gets ahead: what is timed is the device, launch gaps of a busy stream included.
        self._flush()
        step(mark)
        torch.cuda.synchronize(self.device)
        return tuple(a.elapsed_time(b) for a, b in itertools.pairwise(marks))

    def _flush(self) -> None:
        # Made with the first step, so that where it has no room it is that step's failure.
        if self._flushed is None:
            # Twice the cache: what the last step left in it is gone before the next begins.
            size = max(2 * torch.cuda.get_device_properties(self.device).L2_cache_size, 1 << 20)
            self._flushed = torch.empty(size, dtype=torch.int8, device=self.device)
        self._flushed.zero_()

    def repeat(self, step: Step, times: int) -> tuple[float, ...]:
        """The mean of each phase over a few runs: one sample of a step too short to be timed alone."""
        runs = [self.time(step) for _ in range(times)]
        return tuple(statistics.fmean(phase) for phase in zip(*runs, strict=True))


# One sample lasts at least this long, so that a clock's tick and an interrupt are small beside it.
LEAST_MS = 2.0
MAX_REPEATS = 50


def interleave(
    steps: dict[Hashable, Step],
    clock: Clock,
    rounds: int,
    warmup: int,
    failed: Callable[[Hashable, Exception], None],
    seconds: float = math.inf,
    least: int = 1,
) -> dict[Hashable, list[tuple[float, ...]]]:
    """`rounds` samples of every step, phase by phase, after `warmup` runs; fewer, but `least`, once `seconds` are over.

    Samples of a short step are means of several runs, as many for every step as the shortest needs: a step runs faster after
    itself than after others, and all must have that alike. A step that raises is handed to `failed` and left out.
    """
    shortest, samples = math.inf, {}
    for key, step in steps.items():
        try:
            for _ in range(warmup):
                shortest = min(shortest, sum(clock.time(step)))
            samples[key] = []
        except Exception as error:
            failed(key, error)
    repeats = min(max(1, math.ceil(LEAST_MS / max(shortest, 1e-6))), MAX_REPEATS)
    begin = time.monotonic()
    for done in range(rounds):
        if done >= least and time.monotonic() - begin > seconds:
            break
        for key in tuple(samples):
            try:
                samples[key].append(clock.repeat(steps[key], repeats))
            except Exception as error:
                failed(key, error)
                del samples[key]
    return samples
