"""The child of a trial, in Triton's interpreter: right kernels pass, planted faults are found."""

import json
import re

import pytest
import torch

from lorafast.engine import philox, trial, trial_checks, trial_forms, trial_process, trial_rates
from lorafast.engine.backends import triton
from lorafast.engine.kernel_cases import Sizes
from lorafast.engine.kernels import measured
from lorafast.engine.trial_forms import SPEED, Form

CPU = torch.device("cpu")
SIZES = [Sizes(80, 48, 32, 16, 0.05), Sizes(45, 51, 37, 16, 0.0)]
FP16 = torch.float16


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setenv("LORAFAST_BACKEND", "triton")
    monkeypatch.setattr(trial_checks, "MASKS", ((7, 43), (16, 64)))


@pytest.mark.parametrize("kernel", trial_forms.STREAMS)
@pytest.mark.parametrize("dtype", [FP16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_a_right_stream_passes(kernel, dtype):
    assert trial_checks.check(Form(kernel, dtype), CPU, SIZES) == ""


@pytest.mark.parametrize("dtype", [pytest.param(FP16, marks=pytest.mark.slow), torch.float32])
def test_a_right_product_passes(dtype):
    sizes = [Sizes(48, 32, 48, 16, 0.05)]
    assert trial_checks.check(Form("gemm_pointers", dtype), CPU, sizes) == ""


def test_a_form_that_never_ran_is_not_right():
    reason = trial_checks.check(Form("gemm_tma", FP16), CPU, SIZES)
    assert reason == "does not run on this device"


@pytest.mark.slow
def test_right_kernels_of_wide_ranks_pass():
    for kernel in trial_forms.STREAMS[1:]:
        assert trial_checks.check(Form(kernel, FP16, wide=True), CPU, SIZES) == ""


def plant(monkeypatch, fault):
    """Let project's result have a fault."""
    right, calls = triton.project, []

    def wrong(x, downs):
        calls.append(x)
        (pair,) = right(x, downs)
        if fault == "errs" and len(x) % 16:
            # In the last row alone, as where a ragged end is masked wrongly.
            pair[0][-1] *= 1.5
        elif fault == "differs":
            pair[0][0, 0] *= 1 + (len(calls) % 2) * torch.finfo(x.dtype).eps
        elif fault == "holes":
            pair[0][3, 5] = x.new_empty(1)
        elif fault == "beside":
            outside = x.new_empty(8)
            outside.as_strided((1,), (1,), outside.storage_offset() + 8).fill_(0)
        elif fault == "raises":
            raise RuntimeError("no such kernel\nat 0x1")
        elif fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return [pair]

    monkeypatch.setattr(triton, "project", wrong)


FAULTS = {
    "errs": r"errs \S+ times what eager errs; at most 2 is right \(project  M=45 K=51 N=37 R=16",
    "differs": "two runs differ",
    "holes": "errs inf times",
    "beside": "writes beside its outputs",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(monkeypatch, fault):
    plant(monkeypatch, fault)
    assert re.search(FAULTS[fault], trial_checks.check(Form("project", FP16), CPU, SIZES))


@pytest.mark.parametrize("fault", ["bit", "nan", "scale"])
def test_a_wrong_mask_is_found(monkeypatch, fault):
    def wrong(x, seed, p):
        out = philox.drop(x, seed, p)
        if fault == "bit":
            out[5, 40] = 0 if out[5, 40] else 1
        elif fault == "nan":
            out = torch.where(out == 0, x * 0, out)
        else:
            out = out * (1 - p) if p > 0.01 else out
        return out

    monkeypatch.setattr(triton, "drop", wrong)
    reason = trial_checks.check(Form("drop", torch.bfloat16), CPU, SIZES)
    assert reason.startswith("drops other elements than philox (seed=1 p=")


def measure_little(monkeypatch):
    """Measure layers that the interpreter has done soon."""
    measure, sizes = trial_rates.measure, [(40, 32, 32)] * 2
    monkeypatch.setattr(trial_rates, "measure", lambda *asked: measure(*asked, *sizes))


def child(tmp_path, monkeypatch, forms, *written):
    """Run the child on CPU tensors and return its exit status and its report."""
    steps = [*map(str, forms), SPEED]
    path = tmp_path / "report.jsonl"
    path.touch()
    report = trial_process.Report(path)
    report.write(steps=steps)
    for line in written:
        report.write(**line)
    monkeypatch.setitem(trial_forms.ENTRIES, "streams", tuple(forms))
    monkeypatch.setattr(trial_checks, "find", lambda uuid: CPU)
    monkeypatch.setattr(trial_checks, "problems", lambda device: SIZES)
    arguments = ["--device", "GPU-1", "--entries", "streams", "--out", str(path)]
    return trial_checks.main(arguments), trial_process.Report(path)


def test_the_child_checks_then_measures(tmp_path, monkeypatch):
    forms = [Form(kernel, FP16) for kernel in ("drop", "grad_project")]
    measure, small = trial_rates.measure, (40, 32, 32)
    monkeypatch.setattr(
        trial_rates,
        "measure",
        lambda right, device, mask: measure(right, device, mask, small, small),
    )
    status, report = child(tmp_path, monkeypatch, forms)
    assert status == 0
    assert report.reasons == dict.fromkeys(report.steps, "")
    problem = next(iter(trial_checks.kernel_cases(SIZES[0], FP16, CPU, 0))).problem
    found = measured.expected("grad_project", problem, report.rates[SPEED])
    assert found.kernels > 0
    assert found.eager > 0
    assert measured.expected("project", problem, report.rates[SPEED]) is None
    assert all(isinstance(rate, float) and rate > 0 for rate in report.rates[SPEED].values())
    # What it writes before a step names the step.
    said = [json.loads(line) for line in report.path.read_text().splitlines() if line]
    assert [line.get("begin") for line in said[1::2]] == report.steps


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raises", "RuntimeError: no such kernel"),
        ("memory", "out of memory: OutOfMemoryError: CUDA out of memory. Tried to allocate"),
    ],
)
def test_an_error_is_the_forms_reason_and_the_child_goes_on(tmp_path, monkeypatch, fault, reason):
    plant(monkeypatch, fault)
    monkeypatch.setattr(trial_rates, "measure", lambda right, *_: {"right": float(len(right))})
    forms = [Form(kernel, FP16) for kernel in ("project", "drop")]
    status, report = child(tmp_path, monkeypatch, forms)
    assert (status, report.reasons[str(forms[0])]) == (0, reason)
    assert report.rates == {SPEED: {"right": 1.0}}


def test_a_child_whose_context_is_poisoned_ends_and_goes_on_in_the_next(tmp_path, monkeypatch):
    plant(monkeypatch, "raises")
    monkeypatch.setattr(trial_checks, "_still_computes", lambda device: False)
    forms = [Form(kernel, FP16) for kernel in ("project", "drop")]
    status, report = child(tmp_path, monkeypatch, forms)
    assert status == trial_checks.POISONED
    assert report.left == [str(forms[1]), SPEED]
    monkeypatch.setattr(trial_rates, "measure", lambda right, *_: {"right": float(len(right))})
    ended = {"end": str(forms[0]), "reason": "crashed"}
    status, report = child(tmp_path / "..", monkeypatch, forms, ended)
    assert status == 0
    assert report.reasons[str(forms[0])] == "crashed"
    assert report.rates == {SPEED: {"right": 1.0}}


def test_a_device_that_a_child_does_not_see_is_said(tmp_path):
    path = tmp_path / "report.jsonl"
    path.touch()
    trial_process.Report(path).write(steps=["project float16"])
    assert trial_checks.main(["--device", "GPU-1", "--entries", "streams", "--out", str(path)]) == 0
    report = trial_process.Report(path)
    assert report.unusable == "RuntimeError: a child process does not see the device GPU-1"
    assert report.left


@pytest.mark.parametrize(
    ("kernels", "reason", "served"),
    [
        (("drop", "row_norm"), "", True),
        (("row_norm",), "crashed by SIGSEGV", False),
        (("row_norm",), None, True),
    ],
)
@pytest.mark.parametrize("dtype", [FP16, torch.float32])
def test_eager_is_measured_with_the_mask_that_is_right(monkeypatch, dtype, kernels, reason, served):
    """reason: the verdict of the same entry on the mask; None if the entry has none."""
    asked: list[bool] = []

    def seconds(run, device):
        asked.append(not trial.why_not("drop", dtype, 0, CPU))
        return 1.0

    monkeypatch.setattr(trial_rates, "_seconds", seconds)
    measure, small = trial_rates.measure, (64, 32, 32)
    monkeypatch.setattr(
        trial_rates,
        "measure",
        lambda right, device, mask: measure(right, device, mask, small, small),
    )
    reasons = {} if reason is None else {str(Form("drop", dtype)): reason}
    right = [Form(kernel, dtype) for kernel in kernels]
    assert trial_checks.speed(right, reasons, CPU)
    # The first three are a copy and torch's products.
    assert set(asked[3:]) == {served}
    assert trial_checks.speed([], reasons, CPU) == {}
