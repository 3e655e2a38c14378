"""Times of several steps, measured in interleaved rounds A B C, A B C, ….

Whatever else the machine does during the run then affects all of them alike.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch

# A step calls mark() where a phase begins and where the last one ends. What runs before the first
# mark is not timed.
Mark = Callable[[], None]
Step = Callable[[Mark], None]

# The level of the median's interval.
CONFIDENCE = 0.95
# The shortest duration of one sample, so that the clock's resolution and an interrupt are small
# next to it.
MIN_SAMPLE_MS = 2.0
MAX_REPEATS = 50


class Quantiles(NamedTuple):
    """Median, 20th and 80th percentile."""

    p50: float
    p20: float
    p80: float


def quantiles(values: list[float]) -> Quantiles:
    """Return the quantiles, interpolated linearly between order statistics."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return Quantiles(statistics.median(ordered), at(0.2), at(0.8))


def median_interval(values: list[float]) -> tuple[float, float] | None:
    """Return a 95 % confidence interval of the median, by order statistics.

    It holds for any distribution of the values. None for fewer than 6 values, whose minimum and
    maximum enclose the true median less often than that.
    """
    ordered, count, below, outside = sorted(values), len(values), 0, 0.0
    # The true median is below the k-th smallest value with the probability that fewer than k of
    # `count` fair coins show heads.
    while (outside := outside + math.comb(count, below) / 2**count) <= (1 - CONFIDENCE) / 2:
        below += 1
    return (ordered[below - 1], ordered[-below]) if below else None


class Timer:
    """Milliseconds of each phase of a step on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush_buffer: torch.Tensor | None = None

    def time(self, step: Step) -> tuple[float, ...]:
        """Run the step once and return the time of each phase."""
        return self._on_gpu(step) if self.device.type == "cuda" else self._on_cpu(step)

    def repeat(self, step: Step, times: int) -> tuple[float, ...]:
        """Return the mean of each phase over `times` runs: one sample of a short step."""
        runs = [self.time(step) for _ in range(times)]
        return tuple(statistics.fmean(phase) for phase in zip(*runs, strict=True))

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

        # The host launches kernels while the flush runs, so that the events time the device,
        # including the gaps between launches on a busy stream.
        self._flush_l2()
        step(mark)
        torch.cuda.synchronize(self.device)
        return tuple(a.elapsed_time(b) for a, b in itertools.pairwise(marks))

    def _flush_l2(self) -> None:
        # Allocated by the first step, so that an out-of-memory error here counts as that step's.
        if self._flush_buffer is None:
            # Twice the cache, so that nothing of the last step is left in it.
            size = max(2 * torch.cuda.get_device_properties(self.device).L2_cache_size, 1 << 20)
            self._flush_buffer = torch.empty(size, dtype=torch.int8, device=self.device)
        self._flush_buffer.zero_()


def interleave(
    steps: dict[Hashable, Step],
    timer: Timer,
    rounds: int,
    warmup: int,
    on_failure: Callable[[Hashable, Exception], None],
    seconds: float = math.inf,
    min_rounds: int = 1,
    announce: Callable[[int, float], None] | None = None,
) -> dict[Hashable, list[tuple[float, ...]]]:
    """Return `rounds` samples of every step after `warmup` runs; a sample has a time per phase.

    After `seconds` no further round begins, except to reach `min_rounds`. A sample of a short step
    is the mean of several runs. The shortest step decides how many, and all steps get the same
    number, because a step runs faster after itself than after others. A step that raises is passed
    to `on_failure` and left out. Before the rounds, `announce` is told how many there will be and
    how many seconds they will take, by the time of the last warm-up runs.
    """
    shortest, all_steps, samples = math.inf, 0.0, {}
    for key, step in steps.items():
        try:
            last = 0.0
            for _ in range(warmup):
                last = sum(timer.time(step))
                shortest = min(shortest, last)
            all_steps += last
            samples[key] = []
        except Exception as error:
            on_failure(key, error)
    repeats = min(max(1, math.ceil(MIN_SAMPLE_MS / max(shortest, 1e-6))), MAX_REPEATS)
    if announce is not None and all_steps:
        announce(*_expected(repeats * all_steps / 1e3, rounds, seconds, min_rounds))
    begin = time.monotonic()
    for done in range(rounds):
        if done >= min_rounds and time.monotonic() - begin > seconds:
            break
        for key in tuple(samples):
            try:
                samples[key].append(timer.repeat(steps[key], repeats))
            except Exception as error:
                on_failure(key, error)
                del samples[key]
    return samples


def _expected(one: float, rounds: int, seconds: float, min_rounds: int) -> tuple[int, float]:
    """Return how many rounds of `one` seconds each will be run, and their time."""
    within = rounds if math.isinf(seconds) else math.floor(seconds / one) + 1
    count = min(rounds, max(within, min_rounds))
    return count, count * one
