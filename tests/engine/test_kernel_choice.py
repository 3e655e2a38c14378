"""The choice of Triton's kernels by a verdict: right forms serve where they are faster, and where
they do not, eager serves with the reason."""

import contextlib
import functools

import pytest
import torch
from helpers import backends
from helpers.pretended_gpu import FACTS, take_tensors_for, verdicts

import lorafast
from lorafast.engine import dispatch, kernel_choice, trial
from lorafast.engine.backends import eager, triton
from lorafast.engine.kernels import gemm_routing, measured
from lorafast.engine.problem import PRIMITIVES
from lorafast.engine.trial_forms import GEMMS, SPEED, STREAMS, Verdict
from lorafast.runtime import devices
from lorafast.runtime.devices import Arch
from lorafast.runtime.fallback import Provisional

H200 = Arch("nvidia", "sm_90", 132)
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def compiling(monkeypatch):
    """Triton compiles, as on a GPU; nothing that was chosen before is remembered."""
    monkeypatch.setattr(triton.triton.knobs.runtime, "interpret", False)
    dispatch._routes.cache_clear()
    yield
    dispatch._routes.cache_clear()


@contextlib.contextmanager
def given(known):
    """Verdicts hold, in a process that has chosen nothing yet."""
    dispatch._routes.cache_clear()
    with trial.assuming(known):
        yield


def problem(**fields):
    known = {"arch": H200, "M": 8192, "K": 4096, "N": (4096,), "R": (16,), "dropout": 0.05}
    return backends.problem(**(known | fields))


def chosen(primitive, **fields):
    """The name of the backend that auto chooses, and why not Triton."""
    found = dispatch.pick(primitive, problem(**fields))
    return found.__name__.rpartition(".")[2], dispatch.why_not(
        "triton", primitive, problem(**fields)
    )


def test_without_a_verdict_eager_serves_and_says_why():
    for primitive in PRIMITIVES:
        backend, why = chosen(primitive)
        assert backend == "eager"
        assert why == ("is tried on GPUs, and none is here",)


def test_the_kernels_of_a_layer_with_dropout_serve():
    with given(verdicts()):
        for primitive in ("project", "grad_output", "grad_input", "grad_project", "row_norm"):
            assert chosen(primitive) == ("triton", ()), primitive


def test_the_mask_of_a_dora_that_drops_its_base_is_eagers():
    # Eager asks masks for the kernel, which is the same.
    for known in (verdicts(), verdicts({"drop bfloat16": "is wrong"})):
        with given(known):
            backend, (why,) = chosen("drop", dropout_on="both", gain="out")
            assert backend == "eager"
            assert why == "eager drops by the same kernel where that may serve"


def test_a_kernel_that_is_no_faster_does_not_serve():
    with given(verdicts()):
        for primitive in ("project", "grad_project"):
            backend, (why,) = chosen(primitive, dropout=0.0)
            assert backend == "eager"
            assert why == ("is expected to take 1.00 × eager's time here; at most 0.97 is worth it")
    with given(verdicts(grad_output=1 / 0.96)):
        assert chosen("grad_output") == ("triton", ())
    with given(verdicts(grad_output=1 / 0.98)):
        assert chosen("grad_output")[0] == "eager"


def test_few_tokens_are_bound_by_launches():
    with given(verdicts(row_norm=1.0, project_dropped=0.5)):
        backend, (why,) = chosen("project", M=8)
        assert backend == "eager"
        assert "2.00 × eager's time" in why


def test_the_kept_activation_has_constants_of_its_own():
    with given(verdicts(grad_output=0.5)):
        assert chosen("grad_output")[0] == "eager"
        assert chosen("grad_output", gain="out", keep="output")[0] == "triton"


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_a_wrong_form_does_not_serve_and_others_do(dtype):
    name = str(dtype).removeprefix("torch.")
    with given(verdicts({f"project {name}": "crashed by SIGSEGV"})):
        fields = {"dtype": dtype, "weight_dtype": dtype}
        for primitive in ("project", "grad_output"):
            backend, (why,) = chosen(primitive, **fields)
            assert backend == "eager"
            assert why == f"project {name} failed its trial here: crashed by SIGSEGV"
        assert chosen("grad_project", **fields) == ("triton", ())
        other = torch.float16 if dtype == BF16 else BF16
        assert chosen("project", dtype=other, weight_dtype=other) == ("triton", ())


def test_wide_ranks_have_forms_of_their_own():
    with given(verdicts({"project bfloat16 R>64": "errs 3 times what eager errs"})):
        assert chosen("project", R=(64,))[0] == "triton"
        assert chosen("project", R=(65,))[0] == "eager"
        # Projections of several adapters share a pass over x.
        assert chosen("project", R=(40, 40))[0] == "eager"


def test_what_was_right_but_never_measured_does_not_serve():
    known = verdicts()
    known["streams"] = Verdict(known["streams"].forms | {SPEED: "crashed"}, {})
    with given(known):
        assert chosen("project") == ("eager", ("its speed on this GPU could not be measured",))
        assert chosen("linear") == ("eager", ("crashed",))


SMALL = {"K": 1024, "N": (1024,)}


def test_a_fused_product_serves_where_it_is_faster():
    with given(verdicts(gemm=0.95)):
        assert chosen("linear", **SMALL) == ("triton", ())
        assert triton.describe_route("linear", problem(**SMALL)).startswith("tma 128x")
        backend, (why,) = chosen("linear")
        assert backend == "eager"
        assert why in (kernel_choice._SAME,) or "× eager's time" in why
    with given(verdicts(gemm=0.6)):
        backend, (why,) = chosen("linear", **SMALL)
        assert backend == "eager"
        assert "× eager's time" in why
        assert triton.describe_route("linear", problem(**SMALL)).startswith("torch's")


def test_a_form_of_the_gemm_that_was_wrong_is_no_route():
    with given(verdicts({"gemm_tma bfloat16": "did not end within 120 s"})):
        chosen("linear", **SMALL)
        for primitive in kernel_choice.PRODUCTS:
            assert not triton.describe_route(primitive, problem(**SMALL)).startswith("tma")
    both = {f"{kernel} bfloat16": "is wrong" for kernel in GEMMS}
    with given(verdicts(both)):
        assert chosen("linear", **SMALL) == ("eager", ("is wrong",))
        # torch's product beside our low_rank_add.
        assert chosen("grad_input", **SMALL) == ("triton", ())
        assert triton.describe_route("grad_input", problem(**SMALL)).startswith("torch's")


def test_low_rank_add_must_be_right_whatever_the_route():
    with given(verdicts({"low_rank_add bfloat16": "is wrong"})):
        backend, (why,) = chosen("grad_input", **SMALL)
        assert (backend, why) == ("eager", "low_rank_add bfloat16 failed its trial here: is wrong")


def test_the_gemm_is_tried_only_where_it_may_pay(monkeypatch):
    asked = []
    known = verdicts()
    monkeypatch.setattr(trial, "verdict", lambda device, entry: asked.append(entry) or known[entry])
    kernel_choice.why_not("linear", problem())
    assert set(asked) == {"streams"}
    kernel_choice.why_not("linear", problem(**SMALL))
    assert set(asked) == {"streams", "gemm"}


def test_a_measured_row_of_the_table_decides(monkeypatch):
    with given(verdicts(gemm=0.8)):
        specs = kernel_choice.measured_specs(None, H200, BF16)
        query = kernel_choice.query_of("linear", problem(**SMALL), specs)
        assert chosen("linear", **SMALL)[0] == "eager"
        (route, *_) = (one for one in gemm_routing.candidates(query) if one.fused)
        monkeypatch.setitem(gemm_routing.TABLE, gemm_routing.key(query), route.row)
        dispatch._routes.cache_clear()
        gemm_routing._picked.cache_clear()
        assert chosen("linear", **SMALL) == ("triton", ())
        assert triton.describe_route("linear", problem(**SMALL)) == str(route)
    gemm_routing._picked.cache_clear()


def test_equal_verdicts_choose_alike():
    choices = []
    for _ in range(2):
        with given(verdicts()):
            choices.append(
                [
                    (chosen(primitive, M=M, **size), triton.describe_route(primitive, problem()))
                    for primitive in PRIMITIVES
                    for M in (1, 100, 8192)
                    for size in ({}, SMALL)
                ]
            )
    assert choices[0] == choices[1]


def test_a_provisional_answer_is_not_remembered(monkeypatch):
    answer = [Provisional("nothing is tried during a capture")]
    monkeypatch.setattr(kernel_choice, "why_not", lambda *_: tuple(answer))
    routes = dispatch._routes(problem(), None, None)
    assert routes["project"] is eager
    assert "project" not in routes
    answer.clear()
    assert routes["project"] is triton
    assert dict.__contains__(routes, "project")
    answer.append("a reason that lasts")
    assert routes["project"] is triton
    assert routes["linear"] is eager
    assert "linear" in routes


def test_a_capture_is_answered_by_eager_and_the_next_call_by_the_kernels(monkeypatch):
    monkeypatch.setattr(devices, "_seen", {H200: torch.device("cuda", 0)})
    monkeypatch.setattr(trial, "gpu_of", lambda device: trial.Gpu(FACTS, ""))
    monkeypatch.setattr(devices, "traced", lambda: True)
    backend, (why,) = chosen("project")
    assert backend == "eager"
    assert isinstance(why, Provisional)
    with given(verdicts()):
        assert chosen("project") == ("triton", ())


def test_two_kinds_of_gpu_of_one_architecture_have_verdicts_of_their_own(monkeypatch):
    class Properties:
        major, minor, multi_processor_count = 9, 0, 132

        def __init__(self, name):
            self.name = name

    kinds = {0: Properties("H100"), 1: Properties("H200"), 2: Properties("H200")}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: kinds[device.index])
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(devices, "_seen", {})
    monkeypatch.setattr(devices, "of", functools.cache(devices.of.__wrapped__))
    first, second, third = archs = [devices.of(torch.device("cuda", i)) for i in range(3)]
    assert second == third != first
    assert [devices.seen(arch).index for arch in archs] == [0, 1, 1]
    known = {(torch.device("cuda", 0), "streams"): verdicts({"project bfloat16": "is wrong"})}
    known = {key: found["streams"] for key, found in known.items()}
    known[torch.device("cuda", 1), "streams"] = verdicts()["streams"]
    monkeypatch.setattr(trial, "_known", known)
    assert chosen("project", arch=first)[0] == "eager"
    assert chosen("project", arch=second)[0] == chosen("project", arch=third)[0] == "triton"


def test_a_forced_backend_asks_no_verdict(monkeypatch):
    monkeypatch.setenv("LORAFAST_BACKEND", "triton")
    assert chosen("project") == ("triton", ())
    assert kernel_choice.measured_specs(None, H200, BF16) is None


@pytest.mark.parametrize(
    "arch",
    [Arch("amd", name, 304) for name in ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")]
    + [Arch("xpu", "xpu", 64)],
)
def test_other_vendors_are_admitted_by_the_same_trial(arch):
    assert chosen("project", arch=arch)[0] == "eager"
    with given(verdicts()):
        assert chosen("project", arch=arch) == ("triton", ())
        assert not triton.describe_route("linear", problem(arch=arch, **SMALL)).startswith("tma")


@pytest.mark.parametrize(
    "arch", [Arch("amd", "gfx1030"), Arch("nvidia", "sm_75"), Arch("mps", "mps")]
)
def test_what_the_kernels_are_not_compiled_for_is_not_tried(arch):
    with given(verdicts()):
        backend, (why,) = chosen("project", arch=arch)
        assert backend == "eager"
        assert f"this is {arch.name}" in why


def test_explain_shows_what_a_verdict_chose(monkeypatch):
    layer = lorafast.Linear(4096, 4096, adapter=lorafast.DoRA(r=16), dtype=BF16, device="meta")
    layer = layer.to_empty(device="cpu")
    layer.lora_dropout = torch.nn.Dropout(0.05)
    take_tensors_for(H200, monkeypatch)
    with given(verdicts({"grad_project bfloat16": "crashed by SIGSEGV"})):
        (row,) = lorafast.explain(layer, tokens=8192).rows
        assert row.backends["project"] == row.backends["row_norm"] == "triton"
        assert row.backends["grad_project"] == "eager"
        assert (
            "grad_project bfloat16 failed its trial here: crashed by SIGSEGV"
            in (row.why_not["triton"])
        )
    dispatch._routes.cache_clear()
    (row,) = lorafast.explain(layer, tokens=8192).rows
    assert set(row.backends.values()) == {"eager"}
    assert "is tried on GPUs, and none is here" in row.why_not["triton"]


def test_the_constants_are_names_that_the_model_knows():
    known = verdicts()["streams"].rates
    for kernel in STREAMS[1:]:
        for p in (0.0, 0.05) if kernel != "low_rank_add" else (0.05,):
            assert measured.expected(kernel, problem(dropout=p), known)
    assert measured.expected("project", problem(), {}) is None
