"""lorafast-bench linear: every row of a small run, planted faults, rows that cannot be, and what an interruption keeps."""

import json

import pytest
import torch

from lorafast.backends import eager
from lorafast.bench import commands, contender, linear, peers, record
from lorafast.bench import impl as impls
from lorafast.bench.contender import Problem
from lorafast.bench.record import Results

K, N, R = 24, 40, 4
SMALL = ["linear", "--shape", f"{K}x{N}", "--rank", str(R), "--tokens", "8,3", "--rounds", "2", "--warmup", "1", "--device", "cpu"]


def run(tmp_path, *more):
    """The exit status, the rows and the JSON of a small run."""
    out = tmp_path / "out.json"
    status = commands.main([*SMALL, "--json", str(out), *more])
    return status, (Results.read(out).records if out.exists() else []), out


def by_label(rows, **fields):
    return {r.label: r for r in rows if all(getattr(r, name) == value for name, value in fields.items())}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_contender_is_measured_beside_the_frozen_layer(dtype, tmp_path, capsys):
    status, rows, out = run(tmp_path, "--dropout", "0,0.3", "--dtype", dtype, "--impl", "full,lorafast,peft,peft-bf16")
    assert status == 0
    assert record.faults(json.loads(out.read_text())) == []
    assert [r.label for r in rows[:5]] == ["frozen", "full", "lorafast lora", "lorafast dora", "lorafast lamda"]
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
    assert by_label(rows, M=8, dropout=0.0)["frozen"].ratio_to_frozen == 1
    printed = capsys.readouterr().out
    assert "PEFT has no LaMDA" in printed
    assert "lorafast" in printed


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bytes_are_those_of_the_contract(dtype, tmp_path):
    _, rows, _ = run(tmp_path, "--dropout", "0,0.3", "--dtype", dtype, "--impl", "frozen,full,lorafast")
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
    _, rows, _ = run(tmp_path, "--dropout", "0.3", "--impl", "lorafast,peft", "--methods", "dora", "--tokens", "64")
    found = by_label(rows)
    assert (found["lorafast dora"].dropout_on, found["peft dora"].dropout_on) == ("adapter", "both")
    assert found["peft dora"].error_ratio <= 2
    _, rows, _ = run(tmp_path, "--dropout", "0.3", "--impl", "lorafast", "--methods", "dora", "--dropout-on", "both")
    assert by_label(rows)["lorafast dora"].dropout_on == "both"


def test_the_peer_that_is_timed_drops_for_itself():
    problem = Problem(K, N, R, 8, 0.3, torch.float32, torch.device("cpu"))
    adapter = impls.adapter("lora", R, 0.3)
    built = [
        contender.build(impls.parse("peft"), "lora", adapter, problem, torch.randn(N, K), None, mask) for mask in (True, False)
    ]
    kinds = [type(one.layer.lora_dropout["default"]) for one in built]
    assert kinds == [peers.Masked, torch.nn.Dropout]


def spoil(monkeypatch, primitive, scale):
    """Plant a fault: the primitive's first result is off by a factor."""
    right = getattr(eager, primitive)

    def wrong(*args, **kwargs):
        found = right(*args, **kwargs)
        return [part * scale for part in found] if isinstance(found, list) else found * scale

    monkeypatch.setattr(eager, primitive, wrong)


@pytest.mark.parametrize(
    ("primitive", "scale", "name"), [("grad_project", 1.001, "lora_A"), ("grad_project", float("nan"), "lora_A")]
)
def test_a_planted_fault_shows_no_speed_and_ends_in_an_error(primitive, scale, name, monkeypatch, tmp_path, capsys):
    spoil(monkeypatch, primitive, scale)
    status, rows, out = run(tmp_path, "--dropout", "0", "--impl", "frozen,lorafast,peft", "--html", str(tmp_path / "page.html"))
    assert status == commands.WRONG == 1
    said = capsys.readouterr()
    for r in rows:
        if r.label in ("lorafast lora", "lorafast dora"):
            assert (r.status, r.error_name) == ("wrong", name)
            assert all(getattr(r, speed) is None for speed in record.SPEEDS)
            assert f"WRONG {r.label}: {name} errs" in said.err
        elif r.status != "missing":
            assert r.status == "ok"
    (line, *_) = [line for line in said.out.splitlines() if "lorafast   lora" in line]
    assert "wrong" in line
    assert "class=bad>wrong" in (tmp_path / "page.html").read_text()
    assert commands.main(["report", str(out)]) == 1


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

        rounds += [1] * (one.impl.base == "full" and one.layer.weight.grad is None and len(rounds) == 0 and x.grad is None)
        return failing

    monkeypatch.setattr(linear, "_step", step)
    code, rows, _ = run(tmp_path, "--dropout", "0", "--impl", "full,lorafast", "--tokens", "8")
    assert code == 0
    assert by_label(rows)["full"].status == "oom"
    assert by_label(rows)["lorafast lora"].status == "ok"


@pytest.mark.parametrize(("impl", "error"), [("lorafast", TypeError), ("lorafast", RuntimeError), ("peft", AttributeError)])
def test_a_defect_is_no_row(impl, error, monkeypatch, tmp_path):
    fail_where(monkeypatch, impl, error("a slip"))
    with pytest.raises(error):
        run(tmp_path, "--impl", impl, "--methods", "lora")


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


def test_progress_is_plain_lines_in_a_pipe(tmp_path, capsys):
    run(tmp_path, "--dropout", "0", "--impl", "lorafast", "--methods", "lora")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"[1/6] {K}x{N} R={R} M=8 p=0 fp32: frozen"
    assert lines[-1] == f"[6/6] {K}x{N} R={R} M=3 p=0 fp32: rounds"
    assert len(lines) == 6


def test_the_error_of_a_problem_too_large_for_float64_is_taken_over_fewer_tokens(monkeypatch, tmp_path):
    from lorafast.bench import trust

    right = trust.Yardstick

    def yardstick(case, *args):
        if case.M > 2:
            raise torch.OutOfMemoryError("no room for float64")
        return right(case, *args)

    monkeypatch.setattr(trust, "Yardstick", yardstick)
    _, rows, _ = run(tmp_path, "--dropout", "0.3", "--impl", "lorafast,peft", "--tokens", "8")
    assert {(r.M, r.error_tokens, r.status) for r in rows if r.status != "missing"} == {(8, 2, "ok")}


def test_compiled_contenders_are_right_and_say_so(tmp_path):
    _, rows, _ = run(tmp_path, "--dropout", "0.3", "--impl", "lorafast+compile", "--methods", "lora", "--tokens", "8")
    r = by_label(rows)["lorafast+compile lora"]
    assert (r.status, r.compile, r.route) == ("ok", True, "inductor")
    assert r.saved_bytes >= 8 * R * 4


def test_a_rank_the_shape_has_no_room_for_is_a_row(tmp_path):
    code, rows, _ = run(
        tmp_path, "--dropout", "0", "--impl", "lorafast", "--methods", "lora,lamda", "--rank", "32", "--tokens", "8"
    )
    assert code == 0
    assert {r.label: r.status for r in rows} == {"frozen": "ok", "lorafast lora": "ok", "lorafast lamda": "unsupported"}
    assert "r=32 exceeds" in by_label(rows)["lorafast lamda"].reason
