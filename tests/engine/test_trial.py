"""The trial of the Triton kernels on a GPU: its verdict, its file, and what may go wrong in it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.pretended_gpu import DEEDS
from helpers.trial_child import RATES

from lorafast.engine import masks, trial, trial_process
from lorafast.engine.trial_forms import ENTRIES, TRITON, Form, Verdict, backend_of
from lorafast.runtime import devices, env, extension
from lorafast.runtime.fallback import Provisional

pytest.importorskip("triton")
GPU = torch.device("cuda", 0)


def why_not(kernel="project", dtype=torch.bfloat16, R=8):
    return trial.why_not(kernel, dtype, R, GPU)


def test_right_kernels_serve_and_the_child_runs_once(gpu, capsys):
    assert [trial.why_not(*form[:2], 8, GPU) for form in ENTRIES["streams"]] == [""] * 12
    assert trial.verdict(GPU).rates == RATES
    assert gpu.runs == ["GPU-1 streams 0"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for part in (
        "Pretended 9000",
        "because no verdict on it is in",
        " s; 12 of 12 forms",
    ):
        assert part in said


def test_entries_are_tried_when_they_are_asked_for(gpu):
    assert why_not() == why_not("gemm_tma") == why_not(R=100) == why_not(dtype=torch.float32) == ""
    assert [run.split()[1] for run in gpu.runs] == ["streams", "gemm", "ranks", "fp32"]
    by_triton = {entry for entry in ENTRIES if backend_of(entry) == TRITON}
    assert set(json.loads(gpu.file.read_text())["entries"]) == by_triton
    gpu.forget()
    assert why_not("gemm_tma") == ""
    assert len(gpu.runs) == 4


def test_what_is_never_tried_does_not_serve(gpu):
    assert why_not(dtype=torch.float64) == "has not been tried on this GPU"


@pytest.mark.parametrize("deed", DEEDS)
def test_a_kernel_that_fails_is_named_and_remembered(gpu, capsys, deed):
    gpu.does(f"project bfloat16={deed}")
    assert why_not() == DEEDS[deed]
    # The child was started again for what was left.
    assert [why_not(form.kernel, form.dtype) for form in ENTRIES["streams"][3:]] == [""] * 9
    assert trial.verdict(GPU).rates == RATES
    said = capsys.readouterr().err
    assert f"11 of 12 forms are right, not project bfloat16: {DEEDS[deed]}" in said
    assert "LORAFAST_TRIAL=again" in said
    runs = len(gpu.runs)
    gpu.forget()
    assert why_not() == DEEDS[deed]
    assert len(gpu.runs) == runs


def test_a_trial_that_was_short_of_memory_is_done_once_more_with_enough(gpu, capsys, monkeypatch):
    free = [1 << 30]
    monkeypatch.setattr(trial, "_free_memory", lambda device: free[0])
    gpu.does("project bfloat16=out of memory: CUDA out of memory")
    assert why_not() == "out of memory: CUDA out of memory"
    assert "and so does a process that finds 4 GiB free" in capsys.readouterr().err
    runs = len(gpu.runs)
    # Neither this process nor others that find as little try again.
    free[0] = 8 << 30
    assert "out of memory" in why_not()
    gpu.forget()
    free[0] = (4 << 30) - 1
    assert "out of memory" in why_not()
    assert len(gpu.runs) == runs
    gpu.forget()
    free[0] = 4 << 30
    assert "out of memory" in why_not()
    said = capsys.readouterr().err
    assert "because memory ran out when it was tried, and there is enough now" in said
    assert "GiB free" not in said
    again = len(gpu.runs)
    assert again > runs
    # With enough memory it has run out all the same: that is a verdict.
    gpu.forget()
    free[0] = 99 << 30
    assert "out of memory" in why_not()
    assert len(gpu.runs) == again


def test_a_trial_that_was_short_of_memory_may_find_all_right_later(gpu, monkeypatch):
    gpu.does("speed=out of memory")
    assert why_not() == ""
    assert trial.verdict(GPU).was_short
    gpu.does("")
    gpu.forget()
    monkeypatch.setattr(trial, "_free_memory", lambda device: 4 << 30)
    # A capture takes the verdict as it is.
    monkeypatch.setattr(devices, "traced", lambda: True)
    assert trial.verdict(GPU).rates == RATES
    assert len(gpu.runs) == 1
    gpu.forget()
    monkeypatch.setattr(devices, "traced", lambda: False)
    assert trial.verdict(GPU).forms["speed"] == ""
    assert len(gpu.runs) == 2


@pytest.mark.parametrize("name", ["sm_75", "sm_70", "gfx906", "gfx1030", "sm_9"])
def test_a_gpu_that_the_kernels_are_not_compiled_for_tries_nothing(gpu, name, monkeypatch):
    monkeypatch.delenv("LORAFAST_BACKEND", raising=False)
    gpu.facts["architecture"] = name
    # As at the first dropout there.
    assert masks.made_by_torch(GPU, torch.bfloat16)
    why = masks.why_not_kernel(GPU, torch.bfloat16)
    assert why.startswith("is compiled for NVIDIA sm_80, ")
    assert why.endswith(f"this is {name}")
    for entry in ENTRIES:
        assert trial.verdict(GPU, entry).forms == {}
    assert gpu.runs == []


@pytest.mark.parametrize("name", ["sm_86", "sm_121", "gfx942", "gfx1100", "xpu"])
def test_a_gpu_that_the_kernels_are_compiled_for_is_tried(gpu, name):
    gpu.facts["architecture"] = name
    assert why_not() == ""


def test_nothing_is_tried_where_triton_interprets(gpu, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interprets kernels on CPU tensors alone" in why_not()
    assert gpu.runs == []


@pytest.mark.parametrize(
    ("architecture", "module", "asked"),
    [("sm_90", object(), "1"), ("sm_90", "no compiler", "0"), ("gfx942", object(), "0")],
)
def test_the_child_finds_a_launcher_or_builds_none(gpu, monkeypatch, architecture, module, asked):
    built, began = [], []
    gpu.facts["architecture"] = architecture
    monkeypatch.setattr(extension, "launcher", lambda: built.append(not began) or module)
    run_child, environment = trial_process._run_child, trial_process._environment

    def noted(*args):
        began.append(True)
        return run_child(*args)

    found = []
    monkeypatch.setattr(trial_process, "_run_child", noted)
    monkeypatch.setattr(
        trial_process,
        "_environment",
        lambda in_cpp: found.append(environment(in_cpp)) or found[-1],
    )
    assert why_not() == ""
    assert [one["LORAFAST_HOST"] for one in found] == [asked]
    assert set(built) == ({True} if architecture == "sm_90" else set())


def test_a_kernel_that_hangs_ends_the_trial(gpu, monkeypatch):
    monkeypatch.setattr(trial_process, "LIMIT", 4.0)
    gpu.does("grad_output bfloat16=hang")
    assert why_not("grad_output") == "did not end within 4 s"
    assert why_not("project") == ""
    assert why_not("row_norm") == "was not tried: the time was up"
    gpu.forget()
    assert why_not("row_norm") == "was not tried: the time was up"
    assert len(gpu.runs) == 1


def test_what_prevents_the_child_is_no_verdict_on_a_kernel(gpu, capsys, monkeypatch):
    for deed, reason in (
        ("unusable", "the device is not visible"),
        ("raise", "no luck with start"),
    ):
        gpu.forget()
        gpu.does(f"start={deed}")
        assert "could not be tried" in why_not()
        assert reason in why_not()
        assert f"none serves: {reason}" in capsys.readouterr().err or deed == "raise"
        assert not gpu.file.exists()
    assert len(gpu.runs) == 2
    gpu.forget()
    monkeypatch.setattr(trial_process, "COMMAND", ("/no/such/program",))
    assert "the child cannot be started: " in why_not()


def test_what_was_found_before_a_device_was_lost_is_kept(gpu):
    gpu.does("project bfloat16=crash;restart=unusable")
    assert why_not("drop") == ""
    assert why_not("project") == "crashed by SIGSEGV"
    assert why_not("row_norm") == "was not tried: the device is not visible"
    gpu.forget()
    assert why_not("project") == "crashed by SIGSEGV"
    assert len(gpu.runs) == 2


def test_the_child_itself_says_that_it_sees_no_gpu(gpu, monkeypatch):
    command = (sys.executable, "-m", "lorafast.engine.trial_checks")
    monkeypatch.setattr(trial_process, "COMMAND", command)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert why_not() == (
        "could not be tried: RuntimeError: a child process does not see the device GPU-1"
    )


def test_a_crash_while_measuring_leaves_no_speed(gpu, capsys):
    gpu.does("speed=crash")
    assert why_not() == ""
    said = capsys.readouterr().err
    assert "12 of 12 forms are right, not speed: crashed by SIGSEGV" in said
    assert trial.verdict(GPU).rates == {}
    assert trial.verdict(GPU).forms["speed"] == "crashed by SIGSEGV"


def test_it_is_tried_again_once_where_that_is_asked(gpu, monkeypatch):
    gpu.does("project bfloat16=wrong")
    assert why_not() == "wrong"
    gpu.does("")
    gpu.forget()
    monkeypatch.setenv("LORAFAST_TRIAL", "again")
    assert why_not() == why_not("drop") == ""
    assert len(gpu.runs) == 2


def test_nothing_is_tried_and_nothing_serves_where_that_is_asked(gpu, monkeypatch):
    why_not()
    monkeypatch.setenv("LORAFAST_TRIAL", "0")
    gpu.forget()
    assert why_not() == "LORAFAST_TRIAL=0: no kernel serves unasked"
    monkeypatch.setenv("LORAFAST_TRIAL", "maybe")
    with pytest.raises(ValueError, match="LORAFAST_TRIAL=maybe is not one of 0, 1, again"):
        why_not()


def test_a_capture_or_a_trace_tries_nothing_and_is_not_remembered(gpu, monkeypatch):
    for capturing in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_initialized", lambda: True)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)  # noqa: B023
            patch.setattr(torch.compiler, "is_compiling", lambda: not capturing)  # noqa: B023
            answer = why_not()
            assert isinstance(answer, Provisional)
            assert "capture or a trace" in answer
    assert gpu.runs == []
    assert why_not() == ""
    monkeypatch.setattr(devices, "traced", lambda: True)
    assert why_not() == ""
    gpu.forget()
    # A file is read all the same.
    assert why_not() == ""


ASK = """
import sys, torch
sys.path.insert(0, {tests!r})
from helpers.pretended_gpu import CHILD, FACTS
from lorafast.engine import masks, trial, trial_process
trial.gpu_of = lambda device: trial.Gpu(FACTS, "GPU-1")
trial_process.COMMAND = CHILD
print(repr(trial.why_not("project", torch.bfloat16, 8, torch.device("cuda", 0))))
"""


@pytest.mark.parametrize("asked", ["1", pytest.param("again", marks=pytest.mark.slow)])
def test_of_two_processes_one_tries_and_both_choose_alike(gpu, asked):
    gpu.does("project bfloat16=slow;drop bfloat16=wrong")
    program = ASK.format(tests=str(Path(__file__).parents[1]))
    environment = env.child(PYTHONPATH=os.pathsep.join(sys.path), LORAFAST_TRIAL=asked)
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    said = [one.communicate() for one in both]
    assert [out for out, _ in said] == ["''\n"] * 2, said
    assert sum("trying its Triton kernels" in err for _, err in said) == len(gpu.runs)
    # With `again` a process that begins late may try again; it never tries beside another.
    assert len(gpu.runs) == 1 or asked == "again"


def test_the_facts_of_a_device_without_triton(monkeypatch, tmp_path, gpu):
    gpu.facts["triton"] = "none"
    assert why_not() == "triton is not installed"
    assert gpu.runs == []


def test_a_cpu_has_no_trial():
    assert trial.why_not("project", torch.float32, 8, torch.device("cpu")) == (
        "is tried on GPUs, and cpu is here"
    )


def test_a_verdict_may_be_assumed(gpu):
    known = {"streams": Verdict({str(Form("drop", torch.float16)): ""}, reason="is wrong")}
    with trial.assuming(known):
        assert why_not("drop", torch.float16, 0) == ""
        assert why_not() == "is wrong"
        assert why_not("gemm_tma") == "has not been tried on this GPU"
    assert gpu.runs == []
