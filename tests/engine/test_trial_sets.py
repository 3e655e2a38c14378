"""The trial of both sets of kernels, Triton's and those of the cuda backend: one child, entries and
verdicts of their own, and a failure of the one leaves the other alone."""

from types import SimpleNamespace

import pytest
import torch
from helpers.pretended_gpu import DEEDS
from helpers.trial_child import RATES

from lorafast.engine import cuda_forms, masks, trial, trial_process
from lorafast.engine.trial_forms import CUDA, ENTRIES, TRITON, together

pytest.importorskip("triton")
GPU = torch.device("cuda", 0)


@pytest.fixture
def both(gpu, monkeypatch):
    """The same GPU where the kernels of the cuda backend can be compiled and launched, too."""
    monkeypatch.setattr(cuda_forms, "why_not", lambda: "")
    return gpu


def why_not(kernel="project", dtype=torch.bfloat16, R=8, by=TRITON):
    return trial.why_not(kernel, dtype, R, GPU, by)


def test_both_sets_are_tried_in_one_child_and_have_entries_of_their_own(both, capsys):
    assert why_not(by=CUDA) == ""
    assert both.runs == ["GPU-1 streams,cuda-bf16 0"]
    assert why_not() == why_not("low_rank_add", by=CUDA) == ""
    said = capsys.readouterr().err
    assert "trying its Triton and CUDA kernels (streams, cuda-bf16) once on" in said
    assert "streams: 12 of 12 forms are right; cuda-bf16: 6 of 6 forms are right\n" in said
    assert trial.verdict(GPU).rates == trial.verdict(GPU, "cuda-bf16").rates == RATES
    both.forget()
    assert why_not() == why_not(by=CUDA) == ""
    assert len(both.runs) == 1
    # Those of fp32 and of wide ranks when they are needed, likewise together.
    assert why_not(dtype=torch.float32) == why_not(dtype=torch.float32, by=CUDA) == ""
    assert why_not(R=65, by=CUDA) == why_not(R=65) == ""
    assert [run.split()[1] for run in both.runs[1:]] == ["fp32,cuda-fp32", "ranks,cuda-ranks"]
    # Triton's in fp16 have been tried, and the fused product has no sibling.
    assert why_not(dtype=torch.float16, by=CUDA) == why_not("gemm_tma") == ""
    assert [run.split()[1] for run in both.runs[3:]] == ["cuda-fp16", "gemm"]


def test_fp16_is_tried_with_tritons_halves(both):
    assert why_not(dtype=torch.float16, by=CUDA) == ""
    assert both.runs == ["GPU-1 streams,cuda-fp16 0"]
    assert all(entry in together(entry) for entry in ENTRIES)


@pytest.mark.parametrize(
    ("wrong", "deed"),
    [
        ("cuda project bfloat16", "crash"),
        pytest.param("project bfloat16", "crash", marks=pytest.mark.slow),
        *(
            pytest.param("cuda project bfloat16", deed, marks=pytest.mark.slow)
            for deed in ("raise", "out of memory", "errs 3 times what eager errs", "poisoned")
        ),
    ],
)
def test_a_set_is_left_alone_by_a_failure_of_the_other(both, wrong, deed):
    both.does(f"{wrong}={deed}")
    by_name = {name: why_not(by=by) for name, by in (("", TRITON), ("cuda ", CUDA))}
    expected = DEEDS[deed].replace("project bfloat16", wrong)
    for name, reason in by_name.items():
        assert reason == (expected if f"{name}project bfloat16" == wrong else "")
    others = [form for form in (*ENTRIES["streams"], *ENTRIES["cuda-bf16"]) if str(form) != wrong]
    assert [why_not(form.kernel, form.dtype, by=form.by) for form in others] == [""] * 17
    assert trial.verdict(GPU).rates == trial.verdict(GPU, "cuda-bf16").rates == RATES


STEPS = {
    "streams": ["drop bfloat16", "project bfloat16", "speed"],
    "cuda": ["cuda drop bfloat16", "cuda project bfloat16", "cuda speed"],
}
LATE = "did not end within 120 s"
GIVEN_UP = "was not tried: the time was up"


@pytest.mark.parametrize(
    ("seconds", "reasons", "children"),
    [
        ({}, {}, 1),
        # One that hangs takes the time of its own set.
        ({"project bfloat16": 999}, {"project bfloat16": LATE, "speed": GIVEN_UP}, 2),
        ({"speed": 999}, {"speed": LATE}, 2),
        ({"cuda speed": 999}, {"cuda speed": LATE}, 2),
        (
            {"drop bfloat16": 999, "cuda drop bfloat16": 999},
            {
                "drop bfloat16": LATE, "project bfloat16": GIVEN_UP, "speed": GIVEN_UP,
                "cuda drop bfloat16": LATE, "cuda project bfloat16": GIVEN_UP,
                "cuda speed": GIVEN_UP,
            },
            2,
        ),
        # What is cut short because the set before it took long begins anew.
        ({"project bfloat16": 110, "cuda drop bfloat16": 30, "cuda speed": 85}, {}, 2),
        ({"speed": 119, "cuda drop bfloat16": 999}, {"cuda drop bfloat16": LATE,
          "cuda project bfloat16": GIVEN_UP, "cuda speed": GIVEN_UP}, 2),
    ],
)  # fmt: skip
def test_a_set_of_kernels_has_its_own_time(monkeypatch, tmp_path, seconds, reasons, children):
    clock, runs = SimpleNamespace(now=0.0), []

    def run_child(uuid, entries, path, left, in_cpp):
        runs.append((uuid, entries))
        report, end = trial_process.Report(path), clock.now + left
        for step in report.left:
            report.write(begin=step)
            clock.now += seconds.get(step, 0)
            if clock.now > end:
                clock.now = end
                return LATE
            report.write(end=step, reason="")
        return ""

    monkeypatch.setattr(trial_process, "_run_child", run_child)
    monkeypatch.setattr(trial_process, "time", SimpleNamespace(monotonic=lambda: clock.now))
    outcome = trial_process.run("GPU-1", STEPS, tmp_path, True)
    every = [step for own in STEPS.values() for step in own]
    assert outcome.reasons == dict.fromkeys(every, "") | reasons
    assert runs == [("GPU-1", ["streams", "cuda"])] * children


def test_a_set_that_cannot_be_tried_leaves_the_other(gpu, monkeypatch):
    monkeypatch.setattr(cuda_forms, "why_not", lambda: "there is no NVRTC")
    assert why_not(by=CUDA) == "there is no NVRTC"
    assert why_not() == ""
    assert gpu.runs == ["GPU-1 streams 0"]
    # That is no verdict: the next process may find a compiler, and tries what is left.
    gpu.forget()
    monkeypatch.setattr(cuda_forms, "why_not", lambda: "")
    assert why_not() == why_not(by=CUDA) == ""
    assert gpu.runs[1:] == ["GPU-1 cuda-bf16 0"]


@pytest.mark.parametrize("missing", ["no triton", "interpreted"])
def test_without_triton_the_cuda_kernels_are_tried_alone(both, monkeypatch, missing):
    if missing == "no triton":
        both.facts["triton"] = "none"
    else:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_not(by=CUDA) == ""
    assert both.runs == ["GPU-1 cuda-bf16 0"]
    assert why_not() != ""


@pytest.mark.parametrize("name", ["sm_75", "gfx942", "xpu"])
def test_the_cuda_kernels_are_not_tried_where_they_do_not_run(both, name):
    both.facts["architecture"] = name
    assert why_not(by=CUDA).endswith(f"this is {name}")
    if name != "sm_75":
        assert why_not() == ""
        assert both.runs == ["GPU-1 streams 0"]


def test_the_cuda_kernels_obey_what_is_asked(both, monkeypatch):
    monkeypatch.setenv("LORAFAST_TRIAL", "0")
    assert why_not(by=CUDA) == "LORAFAST_TRIAL=0: no kernel serves unasked"
    monkeypatch.delenv("LORAFAST_TRIAL")
    both.does("cuda project bfloat16=wrong")
    assert why_not(by=CUDA) == "wrong"
    both.does("")
    both.forget()
    monkeypatch.setenv("LORAFAST_TRIAL", "again")
    assert why_not(by=CUDA) == why_not() == ""
    assert len(both.runs) == 2


def test_a_mask_by_the_cuda_backend_is_not_made_by_torch(both, monkeypatch):
    monkeypatch.delenv("LORAFAST_BACKEND", raising=False)
    both.does("drop bfloat16=wrong")
    assert not masks.made_by_torch(GPU, torch.bfloat16)
    assert not masks.kernel_serves(GPU, torch.bfloat16)
    monkeypatch.setattr(cuda_forms, "why_not", lambda: "no compiler")
    assert masks.made_by_torch(GPU, torch.bfloat16)
    monkeypatch.setattr(cuda_forms, "why_not", lambda: "")
    monkeypatch.setenv("LORAFAST_BACKEND", "eager")
    assert masks.made_by_torch(GPU, torch.bfloat16)
    monkeypatch.delenv("LORAFAST_BACKEND")
    both.does("drop bfloat16=wrong;cuda grad_project bfloat16=wrong")
    monkeypatch.setenv("LORAFAST_TRIAL", "again")
    both.forget()
    assert masks.made_by_torch(GPU, torch.bfloat16)
