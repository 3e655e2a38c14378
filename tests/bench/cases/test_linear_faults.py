"""lorafast-bench linear: planted faults are found, and failures become rows."""

import os

import pytest
import torch
from helpers import bench_records
from helpers.bench_runs import by_label, run
from helpers.planted_faults import FAULTS

import lorafast
from lorafast.bench import cli, commands
from lorafast.bench.cases import candidate, linear
from lorafast.bench.report import fill_record, record

ONE_LORA = "--dropout 0 --impl lorafast --methods lora"


@pytest.mark.peft
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_in_its_methods_alone(
    fault, monkeypatch, tmp_path, few_tokens_by_op
):
    FAULTS[fault].plant(monkeypatch)
    status, rows, _ = run(tmp_path, "--dropout 0.3 --impl lorafast,peft --tokens 37 --rounds 1")
    assert status == commands.WRONG == 1
    for r in rows:
        names = FAULTS[fault].found.get(r.method, ()) if r.impl == "lorafast" else ()
        expected = "wrong" if names else "missing" if r.label == "peft lamda" else "ok"
        assert (r.label, r.status) == (r.label, expected)
        if names:
            assert r.error_name in names
            assert r.error_ratio is None or r.error_ratio > 2
            assert all(getattr(r, speed) is None for speed in record.SPEEDS)


@pytest.mark.peft
def test_a_fault_of_lorafast_is_found_in_accelerated_layers_too(
    monkeypatch, tmp_path, few_tokens_by_op
):
    FAULTS["dB"].plant(monkeypatch)
    options = "--dropout 0.3 --impl accelerated,peft --methods lora --tokens 8"
    status, rows, _ = run(tmp_path, options)
    assert status == 1
    found = {r.label: r.status for r in rows}
    assert found == {"frozen": "ok", "accelerated lora": "wrong", "peft lora": "ok"}


def test_a_wrong_row_is_reported_everywhere(monkeypatch, tmp_path, capsys, few_tokens_by_op):
    FAULTS["dA"].plant(monkeypatch)
    page = tmp_path / "page.html"
    _, _, out = run(tmp_path, f"{ONE_LORA} --tokens 8 --html {page}")
    said = capsys.readouterr()
    assert "WRONG lorafast lora: lora_A errs" in said.err
    (line, *_) = [line for line in said.out.splitlines() if "lorafast  lora" in line]
    assert "wrong" in line
    assert "class=bad>wrong" in page.read_text()
    assert cli.main(["report", str(out)]) == 1


@pytest.mark.parametrize(
    ("ratio", "status"), [(2.0, "ok"), (2.001, "wrong"), (float("inf"), "wrong")]
)
def test_twice_the_eager_error_is_the_limit(ratio, status):
    row = bench_records.linear()
    fill_record.set_error_ratio(row, ratio, "y", 8)
    assert row.status == status
    assert row.error_ratio == (None if ratio == float("inf") else ratio)


def set_requires_grad(monkeypatch, name, value):
    """Let every new lorafast.Linear have a parameter that wrongly trains, or does not."""
    right = lorafast.Linear.from_linear

    def from_linear(*args):
        layer = right(*args)
        getattr(layer, name).requires_grad_(value)
        return layer

    monkeypatch.setattr(lorafast.Linear, "from_linear", from_linear)


@pytest.mark.parametrize(
    ("method", "name"), [("lora", "lora_A"), ("dora", "lora_magnitude"), ("lamda", "lora_core")]
)
def test_a_parameter_that_does_not_train_is_wrong(method, name, monkeypatch, tmp_path):
    set_requires_grad(monkeypatch, name, False)
    options = f"--dropout 0 --impl lorafast --methods {method} --tokens 8"
    status, rows, _ = run(tmp_path, options)
    assert status == 1
    r = by_label(rows)[f"lorafast {method}"]
    expected = ("wrong", None, candidate.ARGUMENTS[name])
    assert (r.status, r.error_ratio, r.error_name) == expected


def test_a_parameter_that_must_not_train_is_wrong(monkeypatch, tmp_path):
    set_requires_grad(monkeypatch, "lora_A", True)
    options = "--dropout 0 --impl lorafast --methods lora,lamda --tokens 8"
    status, rows, _ = run(tmp_path, options)
    assert status == 1
    assert by_label(rows)["lorafast lora"].status == "ok"
    reason = by_label(rows)["lorafast lamda"].reason
    assert reason.startswith("lora_A, which must not train, errs inf times")


def fail_where(monkeypatch, impl, error):
    """Let the construction of an implementation raise."""
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
def test_a_failure_is_a_row_with_one_line_of_reason(error, status, monkeypatch, tmp_path):
    fail_where(monkeypatch, "full", error)
    code, rows, _ = run(tmp_path, "--dropout 0 --impl full,lorafast --methods lora --tokens 8")
    assert code == 0
    expected = {"frozen": "ok", "full": status, "lorafast lora": "ok"}
    assert {r.label: r.status for r in rows} == expected
    assert len(by_label(rows)["full"].reason.splitlines()) == 1


def test_a_problem_without_memory_for_its_tensors_is_rows_too(monkeypatch, tmp_path):
    right = linear.testing.make

    def make(case, *args, **kwargs):
        if case.M == 8:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return right(case, *args, **kwargs)

    monkeypatch.setattr(linear.testing, "make", make)
    code, rows, _ = run(tmp_path, "--dropout 0 --impl lorafast")
    assert code == 0
    assert [r.status for r in rows] == ["oom"] * 4 + ["ok"] * 4


def test_out_of_memory_in_the_rounds_affects_one_row(monkeypatch, tmp_path):
    right, made = linear._step, []

    def step(one, x, dy):
        made.append(one.impl.base)
        # The first step of a candidate counts its bytes, and the second one is timed.
        fails = one.impl.base == "full" and made.count("full") == 2

        def failing(mark):
            if fails:
                raise torch.OutOfMemoryError("no room")
            right(one, x, dy)(mark)

        return failing

    monkeypatch.setattr(linear, "_step", step)
    options = "--dropout 0 --impl full,lorafast --methods lora --tokens 8"
    code, rows, _ = run(tmp_path, options)
    assert code == 0
    assert by_label(rows)["full"].status == "oom"
    assert by_label(rows)["lorafast lora"].status == "ok"


@pytest.mark.peft
@pytest.mark.parametrize(
    ("impl", "error"),
    [("lorafast", TypeError), ("lorafast", RuntimeError), ("peft", AttributeError)],
)
def test_a_defect_is_a_wrong_row_with_a_traceback(impl, error, monkeypatch, tmp_path, capsys):
    fail_where(monkeypatch, impl, error("first line\nsecond line"))
    options = "--dropout 0 --impl full,lorafast,peft --methods lora --tokens 8"
    status, rows, _ = run(tmp_path, options)
    assert status == 1
    expected = dict.fromkeys(("frozen", "full", "lorafast lora", "peft lora"), "ok")
    assert {r.label: r.status for r in rows} == expected | {f"{impl} lora": "wrong"}
    assert by_label(rows)[f"{impl} lora"].reason == f"raised {error.__name__}: first line"
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "second line" in said


def test_a_forced_backend_that_cannot_run_is_a_row(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAFAST_BACKEND", "cuda")
    code, rows, _ = run(tmp_path, ONE_LORA)
    assert code == 0
    assert by_label(rows)["lorafast lora"].status == "unsupported"
    assert "LORAFAST_BACKEND=cuda cannot" in by_label(rows)["lorafast lora"].reason


def test_a_rank_too_large_for_the_shape_is_a_row(tmp_path):
    options = "--dropout 0 --impl lorafast --methods lora,lamda --rank 32 --tokens 8"
    code, rows, _ = run(tmp_path, options)
    assert code == 0
    expected = {"frozen": "ok", "lorafast lora": "ok", "lorafast lamda": "unsupported"}
    assert {r.label: r.status for r in rows} == expected
    assert "r=32 exceeds" in by_label(rows)["lorafast lamda"].reason


def test_an_interruption_keeps_finished_rows(monkeypatch, tmp_path, capsys):
    right = linear._ProblemRun.measure

    def measure(problem_run):
        if problem_run.problem.M == 3:
            raise KeyboardInterrupt
        return right(problem_run)

    monkeypatch.setattr(linear._ProblemRun, "measure", measure)
    page = tmp_path / "page.html"
    status, rows, _ = run(tmp_path, f"{ONE_LORA} --html {page}")
    assert status == 130
    assert [r.M for r in rows] == [8] * 2
    said = capsys.readouterr()
    assert "interrupted; 2 finished rows are kept" in said.err
    assert "lorafast" in said.out
    assert page.exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_loses_no_table(tmp_path, capsys):
    options = f"{ONE_LORA} --json /dev/full --html /dev/full"
    assert run(tmp_path, options)[0] == 2
    said = capsys.readouterr()
    assert "--json: /dev/full is not written: No space left on device" in said.err
    assert "--html: /dev/full is not written: No space left on device" in said.err
    assert "lorafast  lora" in said.out
