"""The lower bound, the bandwidth it is computed with, and the rows that have one."""

from dataclasses import replace

import pytest
import torch
from helpers import bench_runs

from lorafast.bench.cases import linear
from lorafast.bench.measure import bandwidth
from lorafast.bench.measure.lower_bound import LowerBound, added_passes, lower_bound
from lorafast.testing import Case, Form

M, N, K, R = 100, 30, 20, 2
LORA = Case(Form("lora"), M, N, K, R, torch.bfloat16)
DORA = replace(LORA, form=Form("dora", magnitude=True))
LAMDA = replace(LORA, form=Form("lamda", core="full"))
X, Y, W = 2 * M * K, 2 * M * N, 2 * N * K


def passes(case, trains_A=True):
    return added_passes(case, trains_A, "cpu")


def bound(case, frozen_ms, bytes_per_s):
    return lower_bound(case, True, "cpu", frozen_ms, bytes_per_s)


def test_lora_adds_five_passes():
    down, up = 2 * M * K * R, 2 * M * N * R
    assert passes(LORA) == [(down, X), (up, 2 * Y), (2 * up, Y), (down, 2 * X), (down, X)]


def test_a_frozen_A_has_no_gradient_pass():
    assert passes(LORA, trains_A=False) == passes(LORA)[:-1]


def test_a_core_is_applied_once_each_way_and_has_a_gradient():
    plain, core = (sum(one.flops for one in passes(case, False)) for case in (LORA, LAMDA))
    assert core - plain == (2 + 6) * M * R * R


@pytest.mark.parametrize(("tokens", "scaled"), [(M, 2 * W), (10, 2 * 10 * N)])
def test_dora_reads_y_and_w_and_scales_the_smaller_of_dy_and_w(tokens, scaled):
    plain, dora = passes(replace(LORA, M=tokens)), passes(replace(DORA, M=tokens))
    assert dora[2].bytes - plain[2].bytes == 2 * tokens * N + scaled
    assert dora[-1] == (2 * N * K * (R + 1), W)


def test_dropout_on_both_adds_two_products():
    both = replace(DORA, form=replace(DORA.form, dropout_on="both"))
    assert passes(both) == passes(DORA)
    dropping = bound(replace(both, dropout=0.1), 1.0, 1e9)
    assert dropping.fused == pytest.approx(1 + bound(DORA, 1.0, 1e9).fused)


def test_the_bound_is_the_sum_over_passes_of_the_longer_time():
    base, added = 4 * M * N * K, (3 * 2 * M * K + 3 * 2 * M * N) * R
    fused = 1 + added / base
    # With an infinite bandwidth only flops count.
    assert bound(LORA, 7.0, 1e30) == pytest.approx((fused, fused))
    # With a tiny one only bytes count, in a frozen step of 7 ms.
    expected = 1 + (4 * X + 3 * Y) / 1e3 / 7e-3
    assert bound(LORA, 7.0, 1e3) == pytest.approx((fused, expected))
    # Between them, a pass that moves 2Y is bound by bytes, and one that moves X by flops.
    rate, seconds = base / 7e-3, 7e-3
    slow = 2 * Y / (2 * 2 * M * N * R / rate)
    times = [max(one.flops / rate, one.bytes / slow) for one in passes(LORA)]
    assert bound(LORA, 7.0, slow).separate == pytest.approx(1 + sum(times) / seconds)
    assert times[1] == pytest.approx(2 * passes(LORA)[1].flops / rate)
    assert times[2] == pytest.approx(passes(LORA)[2].flops / rate)


def test_what_has_no_bound():
    assert bound(replace(LORA, M=0), 7.0, 1e9) is None
    assert bound(LORA, None, 1e9) is None
    assert bound(LORA, 0.0, 1e9) is None
    for unknown in (None, 0.0):
        assert bound(LORA, 7.0, unknown) == LowerBound(bound(LORA, 7.0, 1e9).fused, None)


@pytest.mark.parametrize(
    ("small", "large", "found"),
    [(3.0, 2.0, 3.0), (1.0, 2.0, 2.0), (None, 2.0, 2.0), (3.0, None, 3.0), (None, None, None)],
)
def test_the_bandwidth_is_that_of_the_faster_copy(small, large, found, monkeypatch):
    rates = {64: small, bandwidth.BEYOND_CACHE: large}
    monkeypatch.setattr(bandwidth, "_copy_rate", lambda device, size, threads: rates[size])
    assert bandwidth.copy_bandwidth(torch.device("cpu"), 64) == found


def test_a_copy_counts_bytes_read_and_written(monkeypatch):
    # The fastest of a few copies of 1000 bytes takes 2 ms.
    times = iter([9.0, 2.0, 5.0, 4.0, 3.0])

    def time(timer, step):
        marks = []
        step(lambda: marks.append(None))
        return (next(times),) * (len(marks) - 1)

    monkeypatch.setattr(bandwidth.Timer, "time", time)
    rate = bandwidth._copy_rate.__wrapped__(torch.device("cpu"), 1000, 1)
    assert rate == pytest.approx(2 * 1000 / 2e-3)


def test_without_memory_or_bytes_there_is_no_bandwidth(monkeypatch):
    assert not bandwidth._copy_rate.__wrapped__(torch.device("cpu"), 0, 1)

    def ones(*args, **kwargs):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(bandwidth.torch, "ones", ones)
    assert bandwidth._copy_rate.__wrapped__(torch.device("cpu"), 1000, 1) is None


@pytest.mark.peft
@pytest.mark.parametrize("known", [True, False])
def test_every_timed_adapter_has_a_bound(known, tmp_path, monkeypatch):
    def copy_bandwidth(device, size):
        return 1e9 + size if known else None

    monkeypatch.setattr(linear.bandwidth, "copy_bandwidth", copy_bandwidth)
    options = "--dropout 0 --impl full,lorafast,eager,peft --methods lora,lamda --rounds 6"
    _, rows, _ = bench_runs.run(tmp_path, options)
    for r in rows:
        assert (r.ratio_low is None) == (not r.ok)
        if r.method == "none" or not r.ok:
            assert (r.floor, r.fused_floor, r.bandwidth_bytes_per_s) == (None, None, None)
            continue
        assert r.fused_floor > 1
        assert r.ratio_low <= r.ratio_to_frozen <= r.ratio_high
        if known:
            assert r.bandwidth_bytes_per_s == 1e9 + 4 * r.M * bench_runs.N
            assert r.floor >= r.fused_floor
        else:
            assert (r.floor, r.bandwidth_bytes_per_s) == (None, None)
