"""lorafast-bench linear: every row of a small run, planted faults, rows that cannot be, and what an interruption keeps."""

import json
import os

import pytest
import torch
from helpers import bench_records
from helpers.bench_runs import SMALL, K, N, R, run
from helpers.planted_faults import FAULTS

import lorafast
from lorafast.bench import commands, contender, linear, peers, recipes, record, row
from lorafast.bench import impl as impls
from lorafast.bench.contender import Problem


def by_label(rows, **fields):
    return {
        r.label: r for r in rows if all(getattr(r, name) == value for name, value in fields.items())
    }


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_contender_is_measured_beside_the_frozen_layer(dtype, tmp_path, capsys):
    status, rows, out = run(
        tmp_path, "--dropout", "0,0.3", "--dtype", dtype, "--impl", "full,lorafast,peft,peft-bf16"
    )
    assert status == 0
    assert record.faults(json.loads(out.read_text())) == []
    assert [r.label for r in rows[:5]] == [
        "frozen",
        "full",
        "lorafast lora",
        "lorafast dora",
        "lorafast lamda",
    ]
    assert len(rows) == 4 * (2 + 3 * 3)
    half = dtype == "bf16"
    for r in rows:
        wanted = "ok"
        if r.impl.startswith("peft") and r.method == "lamda":
            wanted = "missing"
        elif r.impl == "peft-bf16" and not half:
            wanted = "unsupported"
        assert (r.label, r.status) == (r.label, wanted)
        if wanted == "ok":
            assert r.error_ratio <= 2
            assert r.ratio_to_frozen > 0
            assert r.step_ms >= r.step_ms_p20 > 0
            assert r.tokens_per_s == pytest.approx(r.M / r.step_ms * 1e3)
            assert (r.rounds, r.warmup, r.error_tokens) == (2, 1, r.M)
            if r.impl != "full" and r.method != "none":
                assert r.adapter_dtype == (dtype if r.impl == "peft-bf16" else "fp32")
    assert by_label(rows, M=8, dropout=0.0)["frozen"].ratio_to_frozen == 1
    printed = capsys.readouterr().out
    assert "PEFT has no lamda" in printed
    assert "lorafast" in printed


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bytes_are_those_of_the_contract(dtype, tmp_path):
    _, rows, _ = run(
        tmp_path, "--dropout", "0,0.3", "--dtype", dtype, "--impl", "frozen,full,lorafast"
    )
    e = 4 if dtype == "fp32" else 2
    for r in rows:
        seed, x, y = 8 * (r.dropout > 0), {"x": r.M * K * e}, {"y": r.M * N * e}
        own, referenced = {
            "frozen": (0, {}),
            "full": (0, x),
            "lorafast lora": (r.M * R * e + seed, x),
            "lorafast lamda": (r.M * R * e + seed, {}),
            "lorafast dora": (r.M * R * e + seed + 4 * N, x | y),
        }[r.label]
        assert (r.saved_bytes, r.saved_by_reference) == (own, referenced)
        # The allocator is asked for whole tensors, and y is alive at the end of forward.
        assert r.activation_bytes == r.M * N * e + own
        assert r.peak_bytes >= r.activation_bytes + r.M * K * e


def test_peft_is_held_against_its_own_reading_of_dropout(tmp_path):
    _, rows, _ = run(
        tmp_path,
        "--dropout",
        "0.3",
        "--impl",
        "lorafast,peft",
        "--methods",
        "dora",
        "--tokens",
        "64",
    )
    found = by_label(rows)
    assert (found["lorafast dora"].dropout_on, found["peft dora"].dropout_on) == ("adapter", "both")
    assert found["peft dora"].error_ratio <= 2
    _, rows, _ = run(
        tmp_path,
        "--dropout",
        "0.3",
        "--impl",
        "lorafast",
        "--methods",
        "dora",
        "--dropout-on",
        "both",
    )
    assert by_label(rows)["lorafast dora"].dropout_on == "both"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_accelerated_layers_are_pefts_on_our_ops(dtype, tmp_path):
    asked = [
        "--dropout",
        "0,0.3",
        "--dropout-on",
        "both",
        "--dtype",
        dtype,
        "--methods",
        "lora,dora",
        "--tokens",
        "64",
    ]
    status, rows, _ = run(tmp_path, "--impl", "lorafast,accelerated,peft", *asked)
    assert status == 0
    for p in (0.0, 0.3):
        found = by_label(rows, dropout=p)
        for method in ("lora", "dora"):
            ours, swapped, theirs = (
                found[f"{impl} {method}"] for impl in ("lorafast", "accelerated", "peft")
            )
            assert swapped.status == "ok"
            assert (swapped.route, swapped.adapter_dtype) == (ours.route, "fp32")
            assert swapped.dropout_on == theirs.dropout_on == ("both" if method == "dora" else None)
            # accelerate keeps z, since what follows PEFT's layers may write into y.
            more = (
                64
                * N
                * (4 if dtype == "fp32" else 2)
                * (method == "dora" and ours.saved_by_reference.get("y", 0) > 0)
            )
            assert swapped.saved_bytes == ours.saved_bytes + more
            assert swapped.saved_bytes <= theirs.saved_bytes


def test_a_fault_of_ours_is_found_in_accelerated_layers_too(monkeypatch, tmp_path):
    FAULTS["dB"].plant(monkeypatch)
    status, rows, _ = run(
        tmp_path,
        "--dropout",
        "0.3",
        "--impl",
        "accelerated,peft",
        "--methods",
        "lora",
        "--tokens",
        "8",
    )
    assert status == 1
    found = {r.label: r.status for r in rows}
    assert found == {"frozen": "ok", "accelerated lora": "wrong", "peft lora": "ok"}


def test_the_peer_that_is_timed_drops_for_itself():
    problem = Problem(K, N, R, 8, 0.3, torch.float32, torch.device("cpu"))
    adapter = recipes.spec("lora", R, 0.3)
    built = [
        contender.build(
            impls.parse("peft"), "lora", adapter, problem, torch.randn(N, K), None, mask
        )
        for mask in (True, False)
    ]
    kinds = [type(one.layer.lora_dropout["default"]) for one in built]
    assert kinds == [peers.Masked, torch.nn.Dropout]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_where_it_is_and_nowhere_else(fault, monkeypatch, tmp_path):
    FAULTS[fault].plant(monkeypatch)
    status, rows, _ = run(tmp_path, "--dropout", "0.3", "--impl", "lorafast,peft", "--tokens", "37")
    assert status == commands.WRONG == 1
    for r in rows:
        names = FAULTS[fault].found.get(r.method, ()) if r.impl == "lorafast" else ()
        assert (r.label, r.status) == (
            r.label,
            "wrong" if names else "missing" if r.label == "peft lamda" else "ok",
        )
        if names:
            assert r.error_name in names
            assert r.error_ratio is None or r.error_ratio > 2
            assert all(getattr(r, speed) is None for speed in record.SPEEDS)


def test_a_wrong_row_is_told_everywhere(monkeypatch, tmp_path, capsys):
    FAULTS["dA"].plant(monkeypatch)
    _, _, out = run(
        tmp_path,
        "--dropout",
        "0",
        "--impl",
        "lorafast",
        "--tokens",
        "8",
        "--html",
        str(tmp_path / "page.html"),
    )
    said = capsys.readouterr()
    assert "WRONG lorafast lora: lora_A errs" in said.err
    (line, *_) = [line for line in said.out.splitlines() if "lorafast   lora" in line]
    assert "wrong" in line
    assert "class=bad>wrong" in (tmp_path / "page.html").read_text()
    assert commands.main(["report", str(out)]) == 1


@pytest.mark.parametrize(
    ("ratio", "status"), [(2.0, "ok"), (2.001, "wrong"), (float("inf"), "wrong")]
)
def test_twice_the_eager_error_is_the_limit(ratio, status):
    judged = bench_records.linear()
    row.judge(judged, ratio, "y", 8)
    assert judged.status == status
    assert judged.error_ratio == (None if ratio == float("inf") else ratio)


@pytest.mark.parametrize(
    ("method", "name"), [("lora", "lora_A"), ("dora", "lora_magnitude"), ("lamda", "lora_core")]
)
def test_a_factor_that_does_not_train_is_wrong(method, name, monkeypatch, tmp_path):
    right = lorafast.Linear.from_linear

    def from_linear(*args):
        layer = right(*args)
        getattr(layer, name).requires_grad_(False)
        return layer

    monkeypatch.setattr(lorafast.Linear, "from_linear", from_linear)
    status, found, _ = run(
        tmp_path, "--dropout", "0", "--impl", "lorafast", "--methods", method, "--tokens", "8"
    )
    assert status == 1
    r = by_label(found)[f"lorafast {method}"]
    assert (r.status, r.error_ratio, r.error_name) == ("wrong", None, contender.PARTS[name])


def test_a_factor_that_trains_and_must_not_is_wrong(monkeypatch, tmp_path):
    right = lorafast.Linear.from_linear

    def from_linear(*args):
        layer = right(*args)
        layer.lora_A.requires_grad_(True)
        return layer

    monkeypatch.setattr(lorafast.Linear, "from_linear", from_linear)
    status, found, _ = run(
        tmp_path, "--dropout", "0", "--impl", "lorafast", "--methods", "lora,lamda", "--tokens", "8"
    )
    assert status == 1
    assert by_label(found)["lorafast lora"].status == "ok"
    assert by_label(found)["lorafast lamda"].reason.startswith(
        "lora_A, which must not train, errs inf times"
    )


def test_what_is_timed_is_no_stand_in(monkeypatch, tmp_path):
    right, timed = linear._step, []

    def step(one, x, dy):
        timed.append(one)
        return right(one, x, dy)

    monkeypatch.setattr(linear, "_step", step)
    run(
        tmp_path,
        "--dropout",
        "0.3",
        "--impl",
        "peft,lorafast",
        "--methods",
        "lora",
        "--tokens",
        "8",
    )
    assert {one.impl.base for one in timed} == {"frozen", "lorafast", "peft"}
    assert not any(one.stand_in for one in timed)
    assert all(one.parameters["lora_B"].abs().sum() > 0 for one in timed if one.impl.adapts)


def fail_where(monkeypatch, impl, error):
    """Building this implementation raises."""
    right = linear.build

    def build(one, *args, **kwargs):
        if str(one) == impl:
            raise error
        return right(one, *args, **kwargs)

    monkeypatch.setattr(linear, "build", build)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), "oom"),
        (NotImplementedError("no kernel for this\nmore"), "unsupported"),
    ],
)
def test_what_cannot_be_measured_is_a_row_of_its_own(error, status, monkeypatch, tmp_path):
    fail_where(monkeypatch, "full", error)
    code, rows, _ = run(tmp_path, "--dropout", "0", "--impl", "full,lorafast")
    assert code == 0
    assert {r.label: r.status for r in rows} == {
        "frozen": "ok", "full": status, "lorafast lora": "ok", "lorafast dora": "ok", "lorafast lamda": "ok",
    }  # fmt: skip
    assert by_label(rows)["full"].reason.splitlines() == [by_label(rows)["full"].reason]


def test_a_problem_with_no_room_at_all_is_rows_too(monkeypatch, tmp_path):
    right = linear.testing.make

    def make(case, *args, **kwargs):
        if case.M == 8:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return right(case, *args, **kwargs)

    monkeypatch.setattr(linear.testing, "make", make)
    code, rows, _ = run(tmp_path, "--dropout", "0", "--impl", "lorafast")
    assert code == 0
    assert [r.status for r in rows] == ["oom"] * 4 + ["ok"] * 4


def test_a_step_that_runs_out_of_memory_in_the_rounds_leaves_the_others(monkeypatch, tmp_path):
    right = linear._step

    def step(one, x, dy, rounds=[]):  # noqa: B006
        def failing(mark):
            if one.impl.base == "full" and one.module.weight.requires_grad and rounds:
                raise torch.OutOfMemoryError("no room")
            right(one, x, dy)(mark)

        rounds += [1] * (
            one.impl.base == "full"
            and one.layer.weight.grad is None
            and len(rounds) == 0
            and x.grad is None
        )
        return failing

    monkeypatch.setattr(linear, "_step", step)
    code, rows, _ = run(tmp_path, "--dropout", "0", "--impl", "full,lorafast", "--tokens", "8")
    assert code == 0
    assert by_label(rows)["full"].status == "oom"
    assert by_label(rows)["lorafast lora"].status == "ok"


@pytest.mark.parametrize(
    ("impl", "error"),
    [("lorafast", TypeError), ("lorafast", RuntimeError), ("peft", AttributeError)],
)
def test_a_defect_is_a_wrong_row_told_whole_and_the_others_are_kept(
    impl, error, monkeypatch, tmp_path, capsys
):
    fail_where(monkeypatch, impl, error("a slip\nof the pen"))
    status, found, _ = run(
        tmp_path,
        "--dropout",
        "0",
        "--impl",
        "full,lorafast,peft",
        "--methods",
        "lora",
        "--tokens",
        "8",
    )
    assert status == 1
    assert {r.label: r.status for r in found} == dict.fromkeys(
        ("frozen", "full", "lorafast lora", "peft lora"), "ok"
    ) | {f"{impl} lora": "wrong"}
    assert by_label(found)[f"{impl} lora"].reason == f"raised {error.__name__}: a slip"
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "of the pen" in said


def test_a_forced_backend_that_cannot_is_a_row(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAFAST_BACKEND", "cuda")
    code, rows, _ = run(tmp_path, "--dropout", "0", "--impl", "lorafast", "--methods", "lora")
    assert code == 0
    assert by_label(rows)["lorafast lora"].status == "unsupported"
    assert "LORAFAST_BACKEND=cuda cannot" in by_label(rows)["lorafast lora"].reason


def test_an_interruption_keeps_finished_rows(monkeypatch, tmp_path, capsys):
    right = linear._ProblemRun.measure

    def measure(group):
        if group.problem.M == 3:
            raise KeyboardInterrupt
        return right(group)

    monkeypatch.setattr(linear._ProblemRun, "measure", measure)
    page = tmp_path / "page.html"
    status, rows, _ = run(tmp_path, "--dropout", "0", "--impl", "lorafast", "--html", str(page))
    assert status == 130
    assert [r.M for r in rows] == [8] * 4
    said = capsys.readouterr()
    assert "interrupted; 4 finished rows are kept" in said.err
    assert "lorafast" in said.out
    assert page.exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_disk_that_is_full_loses_no_table(capsys):
    words = ["--dropout", "0", "--impl", "lorafast", "--methods", "lora"]
    assert commands.main([*SMALL, *words, "--json", "/dev/full", "--html", "/dev/full"]) == 2
    said = capsys.readouterr()
    assert "--json: /dev/full is not written: No space left on device" in said.err
    assert "--html: /dev/full is not written: No space left on device" in said.err
    assert "lorafast   lora" in said.out


def test_progress_is_plain_lines_in_a_pipe(tmp_path, capsys):
    run(tmp_path, "--dropout", "0", "--impl", "lorafast", "--methods", "lora")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"[1/6] {K}x{N} R={R} M=8 p=0 fp32: frozen"
    assert lines[-1] == f"[6/6] {K}x{N} R={R} M=3 p=0 fp32: rounds"
    assert len(lines) == 6


def test_the_error_of_a_problem_too_large_for_float64_is_taken_over_fewer_tokens(
    monkeypatch, tmp_path
):
    from lorafast.bench import trust

    right = trust.Yardstick

    def yardstick(case, *args):
        if case.M > 2:
            raise torch.OutOfMemoryError("no room for float64")
        return right(case, *args)

    monkeypatch.setattr(trust, "Yardstick", yardstick)
    _, rows, _ = run(tmp_path, "--dropout", "0.3", "--impl", "lorafast,peft", "--tokens", "8")
    assert {(r.M, r.error_tokens, r.status) for r in rows if r.status != "missing"} == {
        (8, 2, "ok")
    }


def test_compiled_contenders_are_right_and_say_so(tmp_path):
    _, rows, _ = run(
        tmp_path,
        "--dropout",
        "0.3",
        "--impl",
        "lorafast+compile",
        "--methods",
        "lora",
        "--tokens",
        "8",
    )
    r = by_label(rows)["lorafast+compile lora"]
    assert (r.status, r.compile, r.route) == ("ok", True, "inductor")
    assert r.saved_bytes >= 8 * R * 4


def test_a_rank_the_shape_has_no_room_for_is_a_row(tmp_path):
    code, rows, _ = run(
        tmp_path,
        "--dropout",
        "0",
        "--impl",
        "lorafast",
        "--methods",
        "lora,lamda",
        "--rank",
        "32",
        "--tokens",
        "8",
    )
    assert code == 0
    assert {r.label: r.status for r in rows} == {
        "frozen": "ok",
        "lorafast lora": "ok",
        "lorafast lamda": "unsupported",
    }
    assert "r=32 exceeds" in by_label(rows)["lorafast lamda"].reason
