"""Rounds, percentiles, the interval of the median, and steps that fail."""

import itertools

import numpy
import pytest
import torch
from helpers import bench_records

from lorafast.bench.measure import timing
from lorafast.bench.measure.timing import (
    CONFIDENCE,
    Timer,
    interleave,
    median_interval,
    quantiles,
)
from lorafast.bench.report import fill_record

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10])
def test_quantiles_equal_those_of_numpy(count):
    values = torch.rand(count, dtype=torch.float64).tolist()
    expected = numpy.quantile(values, [0.5, 0.2, 0.8]).tolist()
    assert list(quantiles(values)) == pytest.approx(expected)


# The rank of the interval's ends among so many values, from tables of the sign test; 0: none.
@pytest.mark.parametrize(
    ("count", "place"),
    [(0, 0), (1, 0), (5, 0), (6, 1), (8, 1), (9, 2), (15, 4), (20, 6), (100, 40)],
)
def test_the_medians_interval_is_that_of_the_sign_test(count, place):
    values = torch.randperm(count).add(1).tolist()
    assert median_interval(values) == ((place, count + 1 - place) if place else None)


def test_the_interval_holds_the_true_median_at_the_stated_level():
    drawn = torch.randn(2000, 15, generator=torch.Generator().manual_seed(0)).exp().tolist()
    held = sum(low <= 1 <= high for low, high in map(median_interval, drawn))
    assert held / 2000 > CONFIDENCE


def test_min_rounds_are_the_fewest_with_an_interval():
    assert median_interval([1.0] * fill_record.MIN_ROUNDS) == (1.0, 1.0)
    assert median_interval([1.0] * (fill_record.MIN_ROUNDS - 1)) is None


def test_ratios_are_taken_round_by_round():
    # In every other round the machine is half as fast, for both steps; each has two phases.
    slow = [1.0, 2.0] * 3
    phases = [(s * r, s * r) for s, r in zip(slow, (3, 4, 5, 6, 7, 8), strict=True)]
    record = bench_records.linear(M=8)
    fill_record.set_times(record, phases, [(s, s) for s in slow], 1)
    assert (record.ratio_to_frozen, record.ratio_low, record.ratio_high) == (5.5, 3, 8)
    fill_record.set_times(record, [(1.0, 1.0)] * 6, None, 1)
    assert (record.ratio_low, record.ratio_high) == (None, None)


def recorder(calls, name, phases=2):
    """Return a step that records its calls."""

    def step(mark):
        calls.append(name)
        for _ in range(phases + 1):
            mark()

    return step


def unexpected(key, error):
    raise AssertionError(f"{key} failed") from error


@pytest.fixture
def no_repeats(monkeypatch):
    monkeypatch.setattr(timing, "MIN_SAMPLE_MS", 0.0)


@pytest.mark.usefixtures("no_repeats")
def test_rounds_are_interleaved():
    calls = []
    steps = {name: recorder(calls, name) for name in "ABC"}
    samples = interleave(steps, Timer(CPU), 3, 1, unexpected)
    assert calls == list("ABC" * 4)
    assert [len(found) for found in samples.values()] == [3, 3, 3]
    assert all(len(sample) == 2 for found in samples.values() for sample in found)


def test_a_short_step_is_repeated_within_one_sample():
    calls = []
    interleave({"A": recorder(calls, "A")}, Timer(CPU), 2, 1, unexpected)
    assert len(calls) == 1 + 2 * timing.MAX_REPEATS


def test_every_step_is_repeated_as_often_as_the_shortest_needs():
    calls, lasts = [], {"short": 0.4, "long": 3.0}

    class FixedTimes(Timer):
        def time(self, step):
            step(lambda: None)
            return (lasts[calls[-1]],)

    steps = {name: recorder(calls, name) for name in lasts}
    interleave(steps, FixedTimes(CPU), 2, 1, unexpected)
    assert calls == [*lasts, *(["short"] * 5 + ["long"] * 5) * 2]


def test_phases_end_at_their_marks(monkeypatch):
    times = iter([0, 5, 6])
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: next(times) * 1_000_000)
    assert Timer(CPU).time(recorder([], "A")) == (5.0, 1.0)


@pytest.mark.usefixtures("no_repeats")
def test_after_the_time_limit_only_the_least_rounds_are_run():
    steps = {"A": recorder([], "A")}
    samples = interleave(steps, Timer(CPU), 50, 1, unexpected, seconds=1e-9, min_rounds=4)
    assert len(samples["A"]) == 4


@pytest.mark.usefixtures("no_repeats")
@pytest.mark.parametrize(("seconds", "expected"), [(float("inf"), (9, 45.0)), (12.0, (3, 15.0))])
def test_the_time_of_the_rounds_is_announced_before_them(seconds, expected):
    class FixedTimes(Timer):
        def time(self, step):
            step(lambda: None)
            return (2000.0, 500.0)

    said, calls = [], []
    steps = {name: recorder(calls, name) for name in "AB"}

    def announce(*words):
        said.append((*words, len(calls)))

    interleave(steps, FixedTimes(CPU), 9, 1, unexpected, seconds, 2, announce)
    assert said == [(*expected, 2)]


def test_the_scatter_of_the_frozen_step_is_entered():
    record = bench_records.linear(M=8)
    fill_record.set_times(record, [(1.0, 1.0)] * 6, [(s, s) for s in (1, 1, 2, 2, 3, 3)], 1)
    assert record.frozen_spread == 3
    assert record.busy
    fill_record.set_times(record, [(1.0, 1.0)] * 6, [(s, s) for s in (2, 2, 2, 2, 3, 3)], 1)
    assert record.frozen_spread == 1.5
    assert not record.busy


@pytest.mark.parametrize("when", [1, 3])
@pytest.mark.usefixtures("no_repeats")
def test_a_step_that_fails_does_not_affect_the_others(when):
    count, failed = itertools.count(1), []

    def failing(mark):
        if next(count) == when:
            raise torch.OutOfMemoryError("no room")
        recorder([], "B")(mark)

    def record_failure(key, error):
        failed.append((key, str(error)))

    steps = {"A": recorder([], "A"), "B": failing}
    samples = interleave(steps, Timer(CPU), 4, 1, record_failure)
    assert failed == [("B", "no room")]
    assert list(samples) == ["A"]
    assert len(samples["A"]) == 4
