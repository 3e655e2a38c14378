"""The floor: planted numbers, what has none, the bandwidth it is reckoned with, and where it stands."""

from dataclasses import replace

import pytest
import torch
from helpers import bench_runs

from lorafast.bench import bandwidth, linear
from lorafast.bench.floor import Floor, floor, passes
from lorafast.testing import Case, Form

M, N, K, R = 100, 30, 20, 2
LORA = Case(Form("lora"), M, N, K, R, torch.bfloat16)
DORA = replace(LORA, form=Form("dora", magnitude=True))
LAMDA = replace(LORA, form=Form("lamda", core="full"))
X, Y, W = 2 * M * K, 2 * M * N, 2 * N * K


def test_lora_adds_five_passes():
    down, up = 2 * M * K * R, 2 * M * N * R
    assert passes(LORA, True, "cpu") == [
        (down, X),
        (up, 2 * Y),
        (2 * up, Y),
        (down, 2 * X),
        (down, X),
    ]


def test_what_a_method_does_not_train_it_does_not_pay():
    assert passes(LORA, False, "cpu") == passes(LORA, True, "cpu")[:-1]


def test_a_core_mixes_once_each_way_and_makes_its_gradient():
    plain, mixed = (sum(one.flops for one in passes(case, False, "cpu")) for case in (LORA, LAMDA))
    assert mixed - plain == (2 + 6) * M * R * R


@pytest.mark.parametrize(("tokens", "scaled"), [(M, 2 * W), (10, 2 * 10 * N)])
def test_dora_reads_y_and_w_and_scales_the_lesser_of_dy_and_w(tokens, scaled):
    case = replace(DORA, M=tokens)
    plain, gained = passes(replace(LORA, M=tokens), True, "cpu"), passes(case, True, "cpu")
    assert gained[2].bytes - plain[2].bytes == 2 * tokens * N + scaled
    assert gained[-1] == (2 * N * K * (R + 1), W)


def test_dropout_on_both_is_two_products_more():
    both = replace(DORA, form=replace(DORA.form, dropout_on="both"))
    assert passes(both, True, "cpu") == passes(DORA, True, "cpu")
    assert floor(replace(both, dropout=0.1), True, "cpu", 1.0, 1e9).fused == pytest.approx(
        1 + floor(DORA, True, "cpu", 1.0, 1e9).fused
    )


def test_planted_numbers():
    base, extra = 4 * M * N * K, (3 * 2 * M * K + 3 * 2 * M * N) * R
    fused = 1 + extra / base
    # A memory that is as good as infinite leaves the flops.
    found = floor(LORA, True, "cpu", 7.0, 1e30)
    assert found == pytest.approx((fused, fused))
    # One so slow that nothing else counts: all bytes, in a frozen step of 7 ms.
    found = floor(LORA, True, "cpu", 7.0, 1e3)
    assert found == pytest.approx((fused, 1 + (4 * X + 3 * Y) / 1e3 / 7e-3))
    # Between them a pass takes the longer of its two: here one that moves 2Y is bound by them, and one that moves X is not.
    rate, seconds = base / 7e-3, 7e-3
    slow = 2 * Y / (2 * 2 * M * N * R / rate)
    times = [max(one.flops / rate, one.bytes / slow) for one in passes(LORA, True, "cpu")]
    assert floor(LORA, True, "cpu", 7.0, slow).beside == pytest.approx(1 + sum(times) / seconds)
    assert times[1] == pytest.approx(2 * passes(LORA, True, "cpu")[1].flops / rate)
    assert times[2] == pytest.approx(passes(LORA, True, "cpu")[2].flops / rate)


def test_what_there_is_no_floor_of():
    assert floor(replace(LORA, M=0), True, "cpu", 7.0, 1e9) is None
    assert floor(LORA, True, "cpu", None, 1e9) is None
    assert floor(LORA, True, "cpu", 0.0, 1e9) is None
    for unknown in (None, 0.0):
        assert floor(LORA, True, "cpu", 7.0, unknown) == Floor(
            floor(LORA, True, "cpu", 7.0, 1e9).fused, None
        )


@pytest.mark.parametrize(
    ("small", "large", "found"),
    [(3.0, 2.0, 3.0), (1.0, 2.0, 2.0), (None, 2.0, 2.0), (3.0, None, 3.0), (None, None, None)],
)
def test_the_faster_copy_counts(small, large, found, monkeypatch):
    monkeypatch.setattr(
        bandwidth, "_rate", lambda device, size, threads: small if size == 64 else large
    )
    assert bandwidth.measured(torch.device("cpu"), 64) == found


def test_a_copy_reads_and_writes(monkeypatch):
    # The fastest of a few copies of 1000 bytes takes 2 ms.
    times = iter([9.0, 2.0, 5.0, 4.0, 3.0])

    def time(clock, step):
        marks = []
        step(lambda: marks.append(None))
        return (next(times),) * (len(marks) - 1)

    monkeypatch.setattr(bandwidth.Clock, "time", time)
    assert bandwidth._rate.__wrapped__(torch.device("cpu"), 1000, 1) == pytest.approx(
        2 * 1000 / 2e-3
    )


def test_no_room_and_nothing_to_copy_are_no_bandwidth(monkeypatch):
    assert not bandwidth._rate.__wrapped__(torch.device("cpu"), 0, 1)

    def ones(*args, **kwargs):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(bandwidth.torch, "ones", ones)
    assert bandwidth._rate.__wrapped__(torch.device("cpu"), 1000, 1) is None


@pytest.mark.parametrize("room", [True, False])
def test_the_floor_stands_beside_every_adapter_that_was_timed(room, tmp_path, monkeypatch):
    monkeypatch.setattr(
        linear.bandwidth, "measured", lambda device, size: 1e9 + size if room else None
    )
    _, rows, _ = bench_runs.run(
        tmp_path, "--dropout", "0", "--impl", "full,lorafast,eager,peft", "--rounds", "6"
    )
    for r in rows:
        assert (r.ratio_low is None) == (r.status != "ok")
        if r.method == "none" or r.status != "ok":
            assert (r.floor, r.fused_floor, r.bandwidth_bytes_per_s) == (None, None, None)
            continue
        assert r.fused_floor > 1
        assert r.ratio_low <= r.ratio_to_frozen <= r.ratio_high
        if room:
            assert r.bandwidth_bytes_per_s == 1e9 + 4 * r.M * bench_runs.N
            assert r.floor >= r.fused_floor
        else:
            assert (r.floor, r.bandwidth_bytes_per_s) == (None, None)
