"""lorafast-bench linear: the rows of short runs, their bytes, and what is timed."""

import json
import re

import pytest
import torch
from helpers.bench_runs import K, N, R, by_label, run

import lorafast
from lorafast.bench.cases import candidate, implementations, linear, peft_baseline, recipes
from lorafast.bench.cases.candidate import Problem
from lorafast.bench.measure import correctness
from lorafast.bench.report import record


@pytest.mark.peft
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_every_candidate_is_measured_next_to_the_frozen_layer(dtype, tmp_path, capsys):
    options = f"--dropout 0,0.3 --dtype {dtype} --impl full,lorafast,peft,peft-bf16"
    status, rows, out = run(tmp_path, options)
    assert status == 0
    assert record.faults(json.loads(out.read_text())) == []
    ours = ["lorafast lora", "lorafast dora", "lorafast lamda"]
    assert [r.label for r in rows[:5]] == ["frozen", "full", *ours]
    assert len(rows) == 4 * (2 + 3 * 3)
    for r in rows:
        expected = "ok"
        if r.impl.startswith("peft") and r.method == "lamda":
            expected = "missing"
        elif r.impl == "peft-bf16" and dtype == "fp32":
            expected = "unsupported"
        assert (r.label, r.status) == (r.label, expected)
        if r.ok:
            assert r.error_ratio <= 2
            assert r.ratio_to_frozen > 0
            assert r.step_ms >= r.step_ms_p20 > 0
            assert r.tokens_per_s == pytest.approx(r.M / r.step_ms * 1e3)
            assert (r.rounds, r.warmup, r.error_tokens) == (2, 1, r.M)
            if r.method != "none":
                assert r.adapter_dtype == (dtype if r.impl == "peft-bf16" else "fp32")
    assert by_label(rows, M=8, dropout=0.0)["frozen"].ratio_to_frozen == 1
    printed = capsys.readouterr().out
    assert "PEFT has no lamda" in printed
    assert "lorafast" in printed


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_saved_bytes_are_exact(dtype, tmp_path, few_tokens_by_op):
    options = f"--dropout 0,0.3 --dtype {dtype} --impl frozen,full,lorafast --rounds 1"
    _, rows, _ = run(tmp_path, options)
    e = 4 if dtype == "fp32" else 2
    for r in rows:
        seed, x, y = 8 * (r.dropout > 0), {"x": r.M * K * e}, {"y": r.M * N * e}
        own, by_reference = {
            "frozen": (0, {}),
            "full": (0, x),
            "lorafast lora": (r.M * R * e + seed, x),
            "lorafast lamda": (r.M * R * e + seed, {}),
            "lorafast dora": (r.M * R * e + seed + 4 * N, x | y),
        }[r.label]
        assert (r.saved_bytes, r.saved_by_reference) == (own, by_reference)
        # At the end of forward, y and the saved tensors are alive.
        assert r.activation_bytes == r.M * N * e + own
        assert r.peak_bytes >= r.activation_bytes + r.M * K * e


@pytest.mark.peft
def test_peft_is_compared_with_the_truth_of_its_own_dropout(tmp_path):
    options = "--dropout 0.3 --methods dora --tokens 64 --impl"
    _, rows, _ = run(tmp_path, f"{options} lorafast,peft")
    found = by_label(rows)
    assert (found["lorafast dora"].dropout_on, found["peft dora"].dropout_on) == ("adapter", "both")
    assert found["peft dora"].error_ratio <= 2
    _, rows, _ = run(tmp_path, f"{options} lorafast --dropout-on both")
    assert by_label(rows)["lorafast dora"].dropout_on == "both"


@pytest.mark.peft
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_accelerated_layers_are_pefts_on_lorafasts_operations(dtype, tmp_path, few_tokens_by_op):
    options = "--dropout 0,0.3 --dropout-on both --methods lora,dora --tokens 64 --rounds 1"
    status, rows, _ = run(tmp_path, f"{options} --dtype {dtype} --impl lorafast,accelerated,peft")
    assert status == 0
    e = 4 if dtype == "fp32" else 2
    for p in (0.0, 0.3):
        found = by_label(rows, dropout=p)
        for method in ("lora", "dora"):
            ours, accelerated, peft = (
                found[f"{impl} {method}"] for impl in ("lorafast", "accelerated", "peft")
            )
            assert accelerated.status == "ok"
            assert (accelerated.route, accelerated.adapter_dtype) == (ours.route, "fp32")
            expected = "both" if method == "dora" else None
            assert accelerated.dropout_on == peft.dropout_on == expected
            # accelerate saves z where lorafast saves y by reference, because the modules that
            # follow PEFT's layers may write into y.
            saves_z = method == "dora" and "y" in ours.saved_by_reference
            assert accelerated.saved_bytes == ours.saved_bytes + (64 * N * e if saves_z else 0)
            assert accelerated.saved_bytes <= peft.saved_bytes


@pytest.mark.peft
def test_peft_is_timed_with_its_own_dropout():
    problem = Problem(K, N, R, 8, 0.3, torch.float32, torch.device("cpu"))
    adapter = recipes.spec("lora", R, 0.3)
    kinds = []
    for for_checking in (True, False):
        built = candidate.build(
            implementations.parse("peft"),
            "lora",
            adapter,
            problem,
            torch.randn(N, K),
            None,
            for_checking,
        )
        kinds.append(type(built.layer.lora_dropout["default"]))
    assert kinds == [peft_baseline.SeededDropout, torch.nn.Dropout]


@pytest.mark.peft
def test_no_candidate_with_the_truths_mask_is_timed(monkeypatch, tmp_path):
    right, timed = linear._step, []

    def step(one, x, dy):
        timed.append(one)
        return right(one, x, dy)

    monkeypatch.setattr(linear, "_step", step)
    run(tmp_path, "--dropout 0.3 --impl peft,lorafast --methods lora --tokens 8")
    assert {one.impl.base for one in timed} == {"frozen", "lorafast", "peft"}
    assert not any(one.for_checking for one in timed)
    with_adapter = [one for one in timed if one.impl.has_adapter]
    assert all(one.parameters["lora_B"].abs().sum() > 0 for one in with_adapter)


@pytest.mark.peft
def test_where_float64_does_not_fit_the_error_is_taken_over_fewer_tokens(monkeypatch, tmp_path):
    right = correctness.Yardstick

    def yardstick(case, *args):
        if case.M > 2:
            raise torch.OutOfMemoryError("no room for float64")
        return right(case, *args)

    monkeypatch.setattr(correctness, "Yardstick", yardstick)
    options = "--dropout 0.3 --impl lorafast,peft --methods lora,lamda --tokens 8"
    _, rows, _ = run(tmp_path, options)
    measured = [r for r in rows if r.status != "missing"]
    assert {(r.M, r.error_tokens, r.status) for r in measured} == {(8, 2, "ok")}


@pytest.mark.slow
@pytest.mark.compile
def test_compiled_candidates_are_correct_and_marked(tmp_path):
    options = "--dropout 0.3 --impl lorafast+compile --methods lora --tokens 8"
    _, rows, _ = run(tmp_path, options)
    r = by_label(rows)["lorafast+compile lora"]
    assert (r.status, r.compile, r.route) == ("ok", True, "inductor")
    assert r.saved_bytes >= 8 * R * 4


@pytest.mark.peft
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_inference_is_a_forward_without_gradients(dtype, tmp_path, capsys):
    options = f"--pass train,inference --tokens 1,8 --dtype {dtype}"
    status, rows, out = run(
        tmp_path, f"{options} --impl full,lorafast,accelerated,peft --dropout 0,0.3"
    )
    assert status == 0
    assert record.faults(json.loads(out.read_text())) == []
    found = [r for r in rows if r.inference]
    # Inference drops nothing, so that its rows are there once.
    assert {(r.M, r.dropout) for r in found} == {(1, 0.0), (8, 0.0)}
    assert len(rows) == len(found) * 3
    for r in found:
        if r.impl == "full":
            assert (r.status, r.reason) == ("unsupported", "in inference it is the frozen layer")
        elif r.ok:
            assert (r.error_name, r.bwd_ms, r.floor) == ("y", None, None)
            assert r.fwd_ms == r.step_ms > 0
            assert (r.saved_bytes, r.saved_by_reference) == (0, {})
            assert r.activation_bytes == r.M * N * (4 if dtype == "fp32" else 2)
    printed = capsys.readouterr().out
    assert f"one layer {K} → {N}, R={R}, {dtype}, inference" in printed


def test_a_wrong_output_in_inference_is_found(monkeypatch, tmp_path):
    right = lorafast.Linear.forward
    monkeypatch.setattr(lorafast.Linear, "forward", lambda layer, x: right(layer, x) * 1.001)
    status, rows, _ = run(tmp_path, "--pass inference --impl lorafast --tokens 8 --rounds 1")
    assert status == 1
    assert {r.label: r.status for r in rows} == {
        "frozen": "ok",
        **dict.fromkeys(("lorafast lora", "lorafast dora", "lorafast lamda"), "wrong"),
    }


def test_progress_in_a_pipe_is_plain_lines(tmp_path, capsys):
    run(tmp_path, "--dropout 0 --impl lorafast --methods lora")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"[1/6] {K}x{N} R={R} M=8 p=0 fp32: frozen"
    last = re.escape(f"[6/6] {K}x{N} R={R} M=3 p=0 fp32: rounds")
    assert re.fullmatch(rf"{last} \(\d+ s so far, about \d+ s left\)", lines[-1])
    assert len(lines) == 6
