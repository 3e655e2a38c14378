"""A trial's checks of the cuda backend's kernels on the emulator: right ones pass, and faults in a
form or around it are found."""

import itertools
import re

import pytest
import torch
from emulator import machine
from helpers import cuda_compiler, emulated_cuda
from helpers.cuda_compiler import skip_without_nvcc
from helpers.emulated_cuda import emulating

from lorafast.engine import cuda_forms, philox, step_model, trial_checks, trial_process, trial_rates
from lorafast.engine.backends import cuda
from lorafast.engine.kernel_cases import Sizes, kernel_cases
from lorafast.engine.kernels import measured
from lorafast.engine.problem import CallOptions, GradMask, LayerTensors
from lorafast.engine.trial_forms import CUDA, RANKS, STREAMS, TRITON, Form, speed_of
from lorafast.runtime import devices

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU = torch.device("cpu")
SIZES = [Sizes(80, 128, 64, 16, 0.05), Sizes(45, 51, 37, 16, 0.0), Sizes(9, 104, 40, 16, 0.0)]
QUICK = [("drop", BF16, 90), ("project", BF16, 90)]


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """Nothing of this file runs without nvcc; the mask is checked in few elements."""
    skip_without_nvcc()
    monkeypatch.setattr(trial_checks, "MASKS", ((7, 43), (16, 64)))


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_few_tokens_are_tried_with_the_kernel_that_is_another_for_them(dtype):
    for kernel, by, wide in itertools.product(STREAMS[1:], (CUDA, TRITON), (False, True)):
        settings = trial_checks._settings(Form(kernel, dtype, wide, by), SIZES)
        found = any(size.M <= trial_checks.FEW for size, _ in settings)
        assert found == ((kernel, by, wide, dtype) == ("low_rank_add", CUDA, False, BF16))


def check(kernel, dtype=BF16, capability=90, wide=False, sizes=SIZES):
    with emulating(capability):
        return trial_checks.check(Form(kernel, dtype, wide, CUDA), CPU, sizes)


@pytest.mark.parametrize(
    ("kernel", "dtype", "capability"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * (case not in QUICK))
        for case in itertools.product(STREAMS, (BF16, FP16, FP32), (90, 80))
    ],
)
def test_a_right_kernel_passes(kernel, dtype, capability):
    assert check(kernel, dtype, capability) == ""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("kernel", STREAMS[1:])
def test_a_right_kernel_of_wide_ranks_passes(kernel, dtype):
    assert check(kernel, dtype, wide=True, sizes=SIZES[:1]) == ""


WEYL = (r"-1640531527", "-1640531526")
NO_STORE, NO_PRODUCT = (r"\tst\.global[^;]*;", ""), (r"\tmma\.sync[^;]*;", "")
# In the machine code of every form of a kernel: what is replaced, where it stands first, and the
# reason.
FAULTS = [
    ("drop", WEYL, "drops other elements than philox (seed=1 p="),
    ("project", NO_STORE, "errs inf times what eager errs; at most 2 is right (project "),
    ("project", WEYL, "times what eager errs; at most 2 is right (project "),
    ("grad_output", NO_PRODUCT, "times what eager errs; at most 2 is right (grad_output "),
    ("grad_project", NO_PRODUCT, "times what eager errs; at most 2 is right (grad_project "),
    ("grad_project", WEYL, "times what eager errs; at most 2 is right (grad_project "),
    ("low_rank_add", NO_STORE, "times what eager errs; at most 2 is right (linear "),
    ("low_rank_add", WEYL, "times what eager errs; at most 2 is right (grad_input "),
    ("row_norm", NO_PRODUCT, "times what eager errs; at most 2 is right (row_norm "),
]


@pytest.mark.parametrize(
    ("kernel", "fault", "reason"),
    [
        pytest.param(*one, marks=[pytest.mark.slow] * (i not in (0, 1, 6)))
        for i, one in enumerate(FAULTS)
    ],
)
def test_a_fault_in_a_form_is_found(monkeypatch, kernel, fault, reason):
    right = emulated_cuda.code

    def code(form, capability):
        if form.stem != kernel:
            return right(form, capability)
        changed, count = re.subn(*fault, cuda_compiler.ptx(form, capability), count=1)
        # Not every form drops.
        assert count or fault is WEYL
        return machine.Code(changed)

    monkeypatch.setattr(emulated_cuda, "code", code)
    assert reason in check(kernel)


def plant(monkeypatch, fault):
    """Let the backend's project have a fault."""
    right, calls = cuda.project, []

    def wrong(x, downs):
        calls.append(x)
        (pair,) = right(x, downs)
        if fault == "differs":
            pair[0][0, 0] *= 1 + (len(calls) % 2) * torch.finfo(x.dtype).eps
        elif fault == "beside":
            outside = x.new_empty(8)
            outside.as_strided((1,), (1,), outside.storage_offset() + 8).fill_(0)
        else:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return [pair]

    monkeypatch.setattr(cuda, "project", wrong)


@pytest.mark.parametrize(
    ("fault", "reason"), [("differs", "two runs differ"), ("beside", "writes beside its outputs")]
)
def test_a_fault_around_a_form_is_found(monkeypatch, fault, reason):
    plant(monkeypatch, fault)
    assert check("project", sizes=SIZES[1:]).startswith(reason)


def test_the_child_checks_then_measures_and_a_wrong_form_leaves_the_others(tmp_path, monkeypatch):
    forms = [Form(kernel, BF16, by=CUDA) for kernel in ("drop", "project", "low_rank_add")]
    steps = [*map(str, forms), speed_of(CUDA)]
    path = tmp_path / "report.jsonl"
    path.touch()
    trial_process.Report(path).write(steps=steps)
    plant(monkeypatch, "memory")
    monkeypatch.setitem(trial_checks.RANKS, CUDA, ((16,), ()))
    measure, small = trial_rates.measure, (40, 32, 32)
    monkeypatch.setattr(trial_rates, "measure", lambda *asked: measure(*asked, small, small))
    monkeypatch.setitem(trial_checks.trial_forms.ENTRIES, "cuda-bf16", tuple(forms))
    monkeypatch.setattr(trial_checks, "find", lambda uuid: CPU)
    monkeypatch.setattr(trial_checks, "_why_not_mask", lambda device, dtype: "no Triton")
    monkeypatch.setattr(trial_checks, "problems", lambda device: SIZES[1:])
    with emulating(90):
        arguments = ["--device", "GPU-1", "--entries", "cuda-bf16", "--out", str(path)]
        assert trial_checks.main(arguments) == 0
        problems = [case.problem for case in kernel_cases(SIZES[0], BF16, CPU, 0, CUDA)]
    report = trial_process.Report(path)
    wrong = "out of memory: OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert report.reasons == dict.fromkeys(steps, "") | {"cuda project bfloat16": wrong}
    rates = report.rates[speed_of(CUDA)]
    assert all(isinstance(rate, float) and rate > 0 for rate in rates.values())
    for primitive in ("drop", "linear", "grad_input"):
        for by in (measured.CUDA, measured.EAGER):
            assert measured.seconds(primitive, problems[0], rates, by) > 0
    assert measured.seconds("project", problems[0], rates, measured.CUDA) is None


# A layer's options and shapes: what a step with it needs of each kernel.
LAYERS = [
    {},
    {"dropout": 0.05},
    {"bias": True},
    {"dropout": 0.05, "magnitude": True, "keep": "inner"},
    {"dropout": 0.05, "dropout_on": "both", "magnitude": True, "keep": "inner"},
    {"magnitude": True, "bias": True, "keep": "output"},
    {"core": "full", "dropout": 0.05},
    {"core": "diagonal", "frozen_A": True, "out_scale": True},
    {"frozen_columns": 3},
    {"frozen_B": True},
]


def layer(options, M, K, N, R, dtype, factors):
    """The layer of step_model that some options make; factors: the dtype of its parameters."""

    def meta(*shape, dtype=factors):
        return torch.empty(*shape, dtype=dtype, device="meta")

    given = dict(options)
    has_bias, has_magnitude = given.pop("bias", False), given.pop("magnitude", False)
    has_scale, core = given.pop("out_scale", False), given.pop("core", None)
    frozen_A, frozen_B = given.pop("frozen_A", False), given.pop("frozen_B", False)
    tensors = LayerTensors(
        meta(N, K, dtype=dtype),
        meta(N, dtype=dtype) if has_bias else None,
        meta(R, K),
        meta(N, R),
        None if core is None else meta(R, R) if core == "full" else meta(R),
        meta(N) if has_magnitude else None,
        None,
        meta(N) if has_scale else None,
    )
    needs = GradMask(
        True, has_bias, not frozen_A, not frozen_B, core is not None, has_magnitude, False,
        has_scale,
    )  # fmt: skip
    given["frozen_columns"] = min(R, given.get("frozen_columns", 0))
    return step_model.layer_of(M, tensors, CallOptions(scaling=2.0, **given), needs)


def launched_by_steps(dtype, ranks):
    """The forms that layers of some ranks launch in steps, aligned and ragged, of many tokens and
    of few."""
    forms = set()

    def note(self, form, grid, *arguments):
        forms.add(form)

    machine_of = step_model.modelled.H200
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_model.ModelledForms, "launch", note)
        shapes = [(8512, 512, 384), (192, 2048, 1024), (203, 1019, 517)]
        shapes += [(1, 512, 4096), (16, 4096, 512)]
        for options, R, factors in itertools.product(LAYERS, ranks, {FP32, dtype}):
            for M, K, N in shapes:
                step_model.step.cache_clear()
                step_model.cuda_step(layer(options, M, K, N, R, dtype, factors), machine_of)
        step_model.step.cache_clear()
    return forms


def launched_by_a_trial(dtype, wide):
    """The forms that a trial on an H200 launches."""
    forms = set()

    def loaded(form, device):
        forms.add(form)
        return lambda grid, *arguments: None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_forms, "loaded", loaded)
        patch.setattr(devices, "of", lambda device: step_model.modelled.H200_ARCH)
        patch.setattr(trial_checks, "_check_case", lambda case, runs, dtype: runs[0]()[:0])
        patch.setattr(philox, "drop", lambda x, seed, p: x)
        for kernel in STREAMS[1:]:
            trial_checks.check(Form(kernel, dtype, wide, CUDA), CPU, trial_checks.problems(CPU))
        for M, K in trial_checks.MASKS:
            cuda.drop(torch.empty(M, K, dtype=dtype), torch.tensor([1]), 0.5)
    return forms


@pytest.mark.parametrize("dtype", [BF16, pytest.param(FP32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("wide", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_layers_launch_a_trial_has_tried(dtype, wide):
    ranks = (65, 100, 128, 256) if wide else (1, 3, 8, 9, 16, 17, 20, 32, 33, RANKS)
    missing = launched_by_steps(dtype, ranks) - launched_by_a_trial(dtype, wide)
    assert not missing, sorted(map(str, missing))
