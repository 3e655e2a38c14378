"""The order of rounds, percentiles, what a failing step does, and bytes counted exactly."""

import itertools

import numpy
import pytest
import torch
from helpers import bench_records
from torch import nn

from lorafast import testing
from lorafast.bench import clock, memory, row
from lorafast.bench.clock import CONFIDENCE, Clock, interleave, interval, quantiles

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10])
def test_quantiles_are_those_of_numpy(count):
    values = torch.rand(count, dtype=torch.float64).tolist()
    assert list(quantiles(values)) == pytest.approx(
        numpy.quantile(values, [0.5, 0.2, 0.8]).tolist()
    )


# Of so many values, which from either end bounds the median's interval, as tables of the sign test print it; 0 is none.
@pytest.mark.parametrize(
    ("count", "place"),
    [(0, 0), (1, 0), (5, 0), (6, 1), (8, 1), (9, 2), (15, 4), (20, 6), (100, 40)],
)
def test_the_interval_of_the_median_is_that_of_the_sign_test(count, place):
    values = torch.randperm(count).add(1).tolist()
    assert interval(values) == ((place, count + 1 - place) if place else None)


def test_the_interval_holds_the_true_median_as_often_as_it_says():
    drawn = torch.randn(2000, 15, generator=torch.Generator().manual_seed(0)).exp().tolist()
    held = sum(low <= 1 <= high for low, high in map(interval, drawn))
    assert held / 2000 > CONFIDENCE


def test_the_least_rounds_are_the_fewest_with_an_interval():
    assert interval([1.0] * row.LEAST_ROUNDS) == (1.0, 1.0)
    assert interval([1.0] * (row.LEAST_ROUNDS - 1)) is None


def test_ratios_are_paired_round_by_round():
    # Every other round the machine is twice as slow, for both alike; forward and backward share a step.
    slow = [1.0, 2.0] * 3
    record = bench_records.linear(M=8)
    row.enter_times(
        record,
        [(s * r, s * r) for s, r in zip(slow, (3, 4, 5, 6, 7, 8), strict=True)],
        [(s, s) for s in slow],
        1,
    )
    assert (record.ratio_to_frozen, record.ratio_low, record.ratio_high) == (5.5, 3, 8)
    row.enter_times(record, [(1.0, 1.0)] * 6, None, 1)
    assert (record.ratio_low, record.ratio_high) == (None, None)


def recorder(calls, name, phases=2):
    def step(mark):
        calls.append(name)
        for _ in range(phases + 1):
            mark()

    return step


def refuse(key, error):
    raise AssertionError(f"{key} failed") from error


def test_rounds_are_interleaved(monkeypatch):
    monkeypatch.setattr(clock, "LEAST_MS", 0.0)
    calls = []
    samples = interleave({name: recorder(calls, name) for name in "ABC"}, Clock(CPU), 3, 1, refuse)
    assert calls == list("ABC" * 4)
    assert [len(found) for found in samples.values()] == [3, 3, 3]
    assert all(len(sample) == 2 for found in samples.values() for sample in found)


def test_a_short_step_is_repeated_within_one_sample():
    calls = []
    interleave({"A": recorder(calls, "A")}, Clock(CPU), 2, 1, refuse)
    assert len(calls) == 1 + 2 * clock.MAX_REPEATS


def test_every_step_is_repeated_as_often_as_the_shortest_needs():
    calls, lasts = [], {"short": 0.4, "long": 3.0}

    class Told(Clock):
        def time(self, step):
            step(lambda: None)
            return (lasts[calls[-1]],)

    interleave({name: recorder(calls, name) for name in lasts}, Told(CPU), 2, 1, refuse)
    assert calls == [*lasts, *(["short"] * 5 + ["long"] * 5) * 2]


def test_phases_end_where_they_are_marked():
    times = iter(itertools.chain([0, 5, 6], [0, 0, 0]))
    patched = pytest.MonkeyPatch()
    with patched.context() as patch:
        patch.setattr(clock.time, "perf_counter_ns", lambda: next(times) * 1_000_000)
        assert Clock(CPU).time(recorder([], "A")) == (5.0, 1.0)


def test_no_more_rounds_once_the_time_is_over_but_the_least(monkeypatch):
    monkeypatch.setattr(clock, "LEAST_MS", 0.0)
    samples = interleave({"A": recorder([], "A")}, Clock(CPU), 50, 1, refuse, seconds=1e-9, least=4)
    assert len(samples["A"]) == 4


@pytest.mark.parametrize("when", [1, 3])
def test_a_step_that_fails_leaves_the_others(when, monkeypatch):
    monkeypatch.setattr(clock, "LEAST_MS", 0.0)
    count, failed = itertools.count(1), []

    def failing(mark):
        if next(count) == when:
            raise torch.OutOfMemoryError("no room")
        recorder([], "B")(mark)

    samples = interleave(
        {"A": recorder([], "A"), "B": failing},
        Clock(CPU),
        4,
        1,
        lambda key, error: failed.append((key, str(error))),
    )
    assert failed == [("B", "no room")]
    assert list(samples) == ["A"]
    assert len(samples["A"]) == 4


def test_bytes_of_a_frozen_layer_are_counted_exactly():
    M, K, N = 64, 48, 96
    layer = nn.Linear(K, N).requires_grad_(False)
    x, dy = torch.randn(M, K, requires_grad=True), torch.randn(M, N)
    assert memory.measured(lambda: layer(x), CPU) == (M * N * 4, M * N * 4)

    def step():
        layer(x).backward(dy)

    found = memory.measured(step, CPU)
    assert found.held == M * K * 4  # dx
    assert found.peak == M * (N + K) * 4
    assert memory.measured(lambda: None, CPU) == (0, 0)


def test_what_was_there_before_is_not_counted():
    held = [torch.ones(1000)]

    def function():
        held.clear()
        return torch.ones(10)

    assert testing.allocated(function) == (40, 40)


def test_what_is_saved_is_counted_once_and_only_while_the_graph_holds_it():
    x, weight = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4)

    def function():
        (x.sigmoid() * 2).detach()  # a graph that is gone at the end
        wide = weight.sum().expand(8, 4)  # 4 bytes, whatever its shape says
        h = x.exp()  # kept once: exp's result, and what sin reads
        return h.sin() * wide

    kept = testing.saved(function, {"x": x}, [])
    assert kept.own == 4 + 8 * 4 * 4
    assert kept.referenced == frozenset()
