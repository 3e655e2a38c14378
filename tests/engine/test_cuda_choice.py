"""The choice of the cuda backend's kernels by a verdict: right forms serve where they take less of
the device's time than what would serve otherwise, and where they do not, that serves, with the
reason."""

import contextlib
import types
from unittest import mock

import pytest
import torch
from helpers import backends
from helpers.pretended_gpu import FACTS, cuda_verdicts, take_tensors_for, verdicts

import lorafast
from lorafast.engine import (
    cuda_choice,
    cuda_forms,
    dispatch,
    host,
    kernel_choice,
    masks,
    step_model,
    trial,
)
from lorafast.engine.backends import cuda, triton
from lorafast.engine.kernels import measured, triton_internals
from lorafast.engine.problem import PRIMITIVES
from lorafast.engine.trial_forms import STREAMS, Verdict
from lorafast.runtime import devices, extension
from lorafast.runtime.devices import Arch
from lorafast.runtime.fallback import Provisional

H200 = Arch("nvidia", "sm_90", 132)
BF16, FP32 = torch.bfloat16, torch.float32
# The primitives whose cases cost eager enough beside a mask that both backends pay.
DROPPED = ("project", "grad_output", "grad_input", "grad_project", "row_norm")


@pytest.fixture(autouse=True)
def compiling(monkeypatch):
    """Both sets of kernels compile, as on a GPU; nothing that was chosen before is remembered."""
    monkeypatch.setattr(triton.triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(cuda_forms, "why_not", lambda: "")
    dispatch._routes.cache_clear()
    yield
    dispatch._routes.cache_clear()


@contextlib.contextmanager
def given(by_triton=None, by_cuda=None):
    """Verdicts hold, in a process that has chosen nothing yet."""
    dispatch._routes.cache_clear()
    with trial.assuming((by_triton or {}) | (by_cuda or {})):
        yield


def problem(**fields):
    known = {"arch": H200, "M": 8192, "K": 4096, "N": (4096,), "R": (16,), "dropout": 0.05}
    return backends.problem(**(known | fields))


def chosen(primitive, **fields):
    """The name of the backend that auto chooses, and why not the cuda backend."""
    name, refusals = dispatch.choice(primitive, problem(**fields))
    assert dispatch.pick(primitive, problem(**fields)).__name__.endswith(f".{name}")
    return name, refusals.get("cuda", ())


def test_its_right_and_faster_kernels_serve():
    with given(verdicts(), cuda_verdicts()):
        for primitive in DROPPED:
            assert chosen(primitive) == ("cuda", ()), primitive
    with given(None, cuda_verdicts()):
        for primitive in DROPPED:
            assert chosen(primitive) == ("cuda", ()), primitive


def test_without_a_verdict_on_it_the_choice_is_triton_s_alone():
    for known in ({}, verdicts(), verdicts({"project bfloat16": "is wrong"})):
        with given(known):
            for primitive in PRIMITIVES:
                name, why = chosen(primitive)
                assert why == ("has not been tried on this GPU",)
                by_triton = not kernel_choice.why_not(primitive, problem())
                assert name == ("triton" if by_triton else "eager")
    dispatch._routes.cache_clear()
    assert chosen("project") == ("eager", ("is tried on GPUs, and none is here",))


@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP32])
@pytest.mark.parametrize("kernel", STREAMS)
def test_a_wrong_form_does_not_serve_and_leaves_triton_s(kernel, dtype):
    name = f"cuda {kernel} {str(dtype).removeprefix('torch.')}"
    fields = {"dtype": dtype, "weight_dtype": dtype}
    launched = cuda_choice._LAUNCHED
    with given(verdicts(), cuda_verdicts({name: "crashed by SIGSEGV"})):
        for primitive in DROPPED:
            if kernel in launched.get(primitive, (primitive,)):
                why = (f"{name} failed its trial here: crashed by SIGSEGV",)
                assert chosen(primitive, **fields) == ("triton", why)
            else:
                assert chosen(primitive, **fields) == ("cuda", ())


def test_a_wrong_form_of_triton_s_leaves_it():
    wrong = {f"{kernel} bfloat16": "is wrong" for kernel in STREAMS}
    with given(verdicts(wrong), cuda_verdicts()):
        for primitive in DROPPED:
            assert chosen(primitive) == ("cuda", ())


@pytest.mark.parametrize(("share", "serves"), [(0.96, True), (0.98, False)])
def test_it_has_to_be_faster_than_what_would_serve_otherwise(share, serves):
    # Triton's kernel takes 1 of these times, eager 4.
    with given(verdicts(), cuda_verdicts(project_dropped=share)):
        name, why = chosen("project")
        assert (name == "cuda") == serves
        if not serves:
            assert name == "triton"
            assert why == (
                "is expected to take 0.980 × triton's time here; at most 0.97 is worth it",
            )
    wrong = verdicts({"project bfloat16": "is wrong"})
    with given(wrong, cuda_verdicts(project_dropped=4 * share)):
        name, why = chosen("project")
        assert (name == "cuda") == serves
        if not serves:
            assert name == "eager"
            assert why == (
                "is expected to take 0.980 × eager's time here; at most 0.97 is worth it",
            )


def test_what_a_launch_costs_does_not_count():
    """Triton's own choice counts it, and refuses few tokens; this one compares rates."""
    with given(verdicts(project_dropped=0.5), cuda_verdicts()):
        assert kernel_choice.why_not("project", problem(M=8))
        for M in (1, 8, 8192):
            assert chosen("project", M=M) == ("cuda", ())


def test_the_forms_of_a_primitive_have_rates_of_their_own():
    slow = {"grad_output": 3, "linear_gained": 9, "drop_dropped": 1}
    with given(verdicts(gemm=0.3), cuda_verdicts(**slow)):
        assert chosen("grad_output")[0] == "triton"
        assert chosen("grad_output", gain="out", keep="output")[0] == "cuda"
        assert chosen("linear", gain="out", keep="inner")[0] == "cuda"
        assert "× eager's time" in chosen("linear", gain="out")[1][0]
        assert chosen("drop", dropout_on="both", gain="out")[0] == "eager"
    with given(verdicts(gemm=0.3), cuda_verdicts()):
        assert chosen("drop", dropout_on="both", gain="out") == ("cuda", ())
        assert chosen("linear", gain="out") == ("cuda", ())
        # Its addition takes as long as eager's: then C++ makes the call.
        assert chosen("linear") == ("cuda", ())
        # Of a base that drops, too, dx is not masked.
        assert chosen("grad_input", dropout_on="both", gain="out") == ("cuda", ())


def test_a_product_is_weighed_whole():
    """Beside a long base product an addition that takes a fifth longer makes no difference."""
    with given(None, cuda_verdicts(grad_input_dropped=4 * 1.2)):
        assert chosen("grad_input", N=(65536,)) == ("cuda", ())
        name, (why,) = chosen("grad_input", N=(128,))
        assert name == "eager"
        assert "× eager's time here; at most 1.005" in why


def test_the_host_path_serves_where_a_kernel_is_right(monkeypatch):
    if why := extension.why_unused():
        pytest.skip(why)
    take_tensors_for(H200, monkeypatch)
    x = types.SimpleNamespace(is_cpu=False, is_cuda=True, device=torch.device("cuda"), dtype=BF16)
    with given():
        assert not host._may_serve(x)
    with given(None, cuda_verdicts({"cuda project bfloat16": "is wrong"})):
        assert not host._may_serve(x)
    with given(None, cuda_verdicts()):
        assert host._may_serve(x)
        x.dtype = torch.float64
        assert not host._may_serve(x)
    monkeypatch.setenv("LORAFAST_BACKEND", "cuda")
    assert host._may_serve(x)


def test_the_host_path_serves_where_a_kernel_of_triton_s_is_right(monkeypatch):
    if why := extension.why_unused():
        pytest.skip(why)
    if not triton_internals.enabled:
        pytest.skip("launches of this Triton are not followed")
    take_tensors_for(H200, monkeypatch)
    x = types.SimpleNamespace(is_cpu=False, is_cuda=True, device=torch.device("cuda"), dtype=BF16)
    with given(verdicts({"project bfloat16": "is wrong"})):
        assert not host._may_serve(x)
    with given(verdicts()):
        assert host._may_serve(x)
        with mock.patch.object(triton_internals, "enabled", False):
            assert not host._may_serve(x)
    monkeypatch.setenv("LORAFAST_BACKEND", "triton")
    assert host._may_serve(x)
    take_tensors_for(Arch("amd", "gfx942"), monkeypatch)
    assert not host._may_serve(x)


def test_a_fused_product_of_triton_s_may_be_faster():
    small = {"K": 1024, "N": (1024,), "dropout": 0.0}
    with given(verdicts(gemm=1.2), cuda_verdicts(linear_gained=1.0)):
        name, (why,) = chosen("linear", gain="out", **small)
        assert name == "triton"
        assert "× triton's time here" in why
    with given(verdicts(gemm=0.3), cuda_verdicts(linear_gained=1.0)):
        assert chosen("linear", gain="out", **small) == ("cuda", ())


def test_wide_ranks_and_several_adapters():
    wide = {"cuda project bfloat16 R>64": "errs 3 times", "cuda low_rank_add bfloat16 R>64": "too"}
    with given(None, cuda_verdicts(wide)):
        assert chosen("project", R=(64,)) == ("cuda", ())
        assert "errs 3 times" in chosen("project", R=(65,))[1][0]
        # Each takes a pass of its own, which is counted, but in linear, where they are one factor.
        assert chosen("project", R=(40, 40)) == ("cuda", ())
        many = chosen("project", R=(8,) * 6)
        assert many == (
            "eager",
            ("is expected to take 1.200 × eager's time here; at most 0.97 is worth it",),
        )
        assert chosen("linear", R=(32, 32), gain="out") == ("cuda", ())
        assert "failed its trial here: too" in chosen("linear", R=(40, 40), gain="out")[1][0]


def test_what_was_right_but_never_measured_does_not_serve():
    known = cuda_verdicts()
    known["cuda-bf16"] = Verdict(known["cuda-bf16"].forms | {"cuda speed": "crashed"}, {})
    with given(None, known):
        assert chosen("project") == ("eager", ("crashed",))
        assert chosen("linear") == ("eager", ("crashed",))
    known["cuda-bf16"] = Verdict(cuda_verdicts()["cuda-bf16"].forms, {})
    with given(None, known):
        assert chosen("project")[1] == ("its speed on this GPU could not be measured",)


def test_what_cannot_be_launched_in_this_process_does_not_serve(monkeypatch):
    monkeypatch.setattr(cuda_forms, "why_not", lambda: "no compiler")
    with given(verdicts(), cuda_verdicts()):
        assert chosen("project") == ("triton", ("no compiler",))


def test_fp32_in_tf32_is_not_tried_and_that_is_not_remembered(monkeypatch):
    fields = {"dtype": FP32, "weight_dtype": FP32}
    with given(verdicts(), cuda_verdicts()):
        monkeypatch.setattr(cuda_forms, "in_tf32", lambda: True)
        name, (why,) = chosen("project", **fields)
        assert name == "triton"
        assert isinstance(why, Provisional)
        assert chosen("project") == ("cuda", ())
        monkeypatch.setattr(cuda_forms, "in_tf32", lambda: False)
        assert chosen("project", **fields) == ("cuda", ())


def test_a_capture_is_answered_by_eager_and_the_next_call_by_the_kernels(monkeypatch):
    monkeypatch.setattr(devices, "_seen", {H200: torch.device("cuda", 0)})
    monkeypatch.setattr(trial, "gpu_of", lambda device: trial.Gpu(FACTS, ""))
    monkeypatch.setattr(devices, "traced", lambda: True)
    name, (why,) = chosen("project")
    assert name == "eager"
    assert isinstance(why, Provisional)
    with given(verdicts(), cuda_verdicts()):
        assert chosen("project") == ("cuda", ())


@pytest.mark.parametrize("arch", [Arch("amd", "gfx942", 304), Arch("nvidia", "sm_75")])
def test_what_it_does_not_run_on_is_said_and_not_tried(arch, monkeypatch):
    monkeypatch.setattr(cuda_choice, "why_not", lambda *_: pytest.fail("asked for a trial"))
    (why,) = cuda.why_not("project", problem(arch=arch))
    assert f"this is {arch.name}" in why


def test_equal_verdicts_choose_alike():
    choices = []
    for _ in range(2):
        with given(verdicts(), cuda_verdicts()):
            choices.append(
                [
                    chosen(primitive, M=M, K=K, N=(K,))
                    for primitive in PRIMITIVES
                    for M in (1, 100, 8192)
                    for K in (1024, 4096)
                ]
            )
    assert choices[0] == choices[1]


def test_a_forced_backend_asks_no_verdict(monkeypatch):
    for name in ("cuda", "triton"):
        monkeypatch.setenv("LORAFAST_BACKEND", name)
        assert dispatch.choice("project", problem()) == (name, {})


@pytest.fixture
def layer(monkeypatch):
    """A DoRA layer with dropout on an H200."""
    made = lorafast.Linear(4096, 4096, adapter=lorafast.DoRA(r=16), dtype=BF16, device="meta")
    made = made.to_empty(device="cpu")
    made.lora_dropout = torch.nn.Dropout(0.05)
    take_tensors_for(H200, monkeypatch)
    return made


def test_explain_and_the_log_show_what_a_verdict_chose(layer, monkeypatch, capsys):
    wrong = {"cuda grad_project bfloat16": "crashed by SIGSEGV"}
    with given(verdicts(), cuda_verdicts(wrong)):
        (row,) = lorafast.explain(layer, tokens=8192).rows
        assert row.backends["project"] == row.backends["row_norm"] == "cuda"
        assert row.backends["grad_project"] == "triton"
        reason = "cuda grad_project bfloat16 failed its trial here: crashed by SIGSEGV"
        assert reason in row.why_not["cuda"]
        monkeypatch.setenv("LORAFAST_LOG", "1")
        for primitive in ("project", "grad_project"):
            dispatch.pick(primitive, problem())
    said = capsys.readouterr().err
    assert "lorafast: project -> cuda; Problem(" in said
    assert f"lorafast: grad_project -> triton; not cuda ({reason}); Problem(" in said
    dispatch._routes.cache_clear()
    (row,) = lorafast.explain(layer, tokens=8192).rows
    assert set(row.backends.values()) == {"eager"}
    assert "is tried on GPUs, and none is here" in row.why_not["cuda"]


def a_lora(monkeypatch, r=16):
    made = lorafast.Linear(1024, 1024, False, dtype=BF16, adapter=lorafast.LoRA(r=r, dropout=0.05))
    take_tensors_for(H200, monkeypatch)
    monkeypatch.setattr(masks, "why_not_kernel", lambda device, dtype: "no Triton")
    return made


def test_a_step_is_priced_by_what_serves_each_primitive(monkeypatch):
    served = []
    of = step_model.step
    monkeypatch.setattr(step_model, "step", lambda *asked: served.append(asked[2:]) or of(*asked))
    made = a_lora(monkeypatch)
    with given(
        verdicts({"grad_project bfloat16": "is wrong"}), cuda_verdicts(grad_output=9, linear=9)
    ):
        (row,) = lorafast.explain(made).rows
    assert row.backends == {
        "project": "cuda", "linear": "triton", "grad_output": "triton", "grad_input": "cuda",
        "grad_project": "cuda",
    }  # fmt: skip
    (asked,) = served
    by_triton, mask, by_cuda = asked
    assert (by_triton, mask) == ({"linear", "grad_output"}, False)
    assert by_cuda == {"project", "grad_input", "grad_project"}
    with given(verdicts(), {}):
        (triton_alone,) = lorafast.explain(made).rows
    (eager_alone,) = lorafast.explain(made).rows
    assert 1 < row.modelled < eager_alone.modelled
    assert row.modelled != triton_alone.modelled


def test_forms_that_are_not_counted_are_priced_as_what_they_replace(monkeypatch):
    made = a_lora(monkeypatch, r=48)
    with given(verdicts(), {}):
        (before,) = lorafast.explain(made).rows
    with given(verdicts(), cuda_verdicts()):
        (row,) = lorafast.explain(made).rows
    assert row.backends["project"] == "cuda"
    assert before.backends["project"] == "triton"
    assert row.modelled == before.modelled


def test_the_constants_are_names_that_the_model_knows():
    rates = cuda_verdicts()["cuda-bf16"].rates
    for primitive in (*PRIMITIVES, "drop"):
        for gain, keep in (("none", "none"), ("out", "none"), ("out", "inner"), ("out", "output")):
            for p in (0.0, 0.05):
                asked = problem(dropout=p or 0.05 * (primitive == "drop"), gain=gain, keep=keep)
                for by in (measured.CUDA, measured.EAGER):
                    assert measured.seconds(primitive, asked, rates, by), (primitive, gain, p)
    assert measured.seconds("project", problem(), {}, measured.CUDA) is None
