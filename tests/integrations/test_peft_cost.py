"""On a GPU a layer stays on PEFT's forward where the model expects that to take less time."""

import re

import pytest
import torch
from helpers.pretended_gpu import take_tensors_for, verdicts
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lorafast
from lorafast.engine import cuda_forms, dispatch, masks, step_model, trial
from lorafast.engine.kernels import modelled
from lorafast.engine.masks import made_by_torch
from lorafast.engine.problem import CallOptions, GradMask, LayerTensors
from lorafast.runtime.fallback import Provisional

peft = pytest.importorskip("peft")
triton = pytest.importorskip("lorafast.engine.backends.triton")
ours = pytest.importorskip("lorafast.integrations.peft_linear")
peft_calls = pytest.importorskip("lorafast.integrations.peft_calls")
peft_cost = pytest.importorskip("lorafast.integrations.peft_cost")
peft_lamda = pytest.importorskip("lorafast.integrations.peft_lamda")
pytestmark = pytest.mark.peft
BF16, FP32 = torch.bfloat16, torch.float32
SIZE = 1024


@pytest.fixture
def gpu(monkeypatch):
    """Tensors are taken for those of an H200; the mask's kernel serves where Triton's do."""
    take_tensors_for(modelled.H200_ARCH, monkeypatch)
    monkeypatch.setattr(
        masks, "why_not_kernel", lambda device, dtype: trial.why_not("drop", dtype, 0, device)
    )
    monkeypatch.setattr(masks, "made_by_torch", lambda *what: not masks.kernel_serves(*what))
    monkeypatch.setattr(triton.triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(peft_cost, "_answers", {})
    monkeypatch.setattr(peft_cost, "_recent", {})
    dispatch._routes.cache_clear()
    yield monkeypatch
    dispatch._routes.cache_clear()


def model_of(factors=BF16, dtype=BF16, size=SIZE, **settings):
    config = peft.LoraConfig(r=16, target_modules=["0"], **settings)
    base = nn.Sequential(nn.Linear(size, size, bias=False, dtype=dtype))
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(factors)
    return model


def accelerated(**settings):
    """The report of a model of one layer, and its layer."""
    model = model_of(**settings)
    report = ours.why_not_convert(model.base_model.model[0], "both", "inner")
    if report:
        with pytest.warns(UserWarning, match="0 of 1 PEFT layers run on lorafast"):
            made = lorafast.accelerate(model)
        assert list(made.left.values()) == [report]
    else:
        made = lorafast.accelerate(model)
        assert made.left == {}
    return made, model.base_model.model[0]


CASES = {
    # By the ops without and with kernels, and by PEFT, as the page of modelled steps has them.
    "bf16 factors": ({}, True, False),
    "fp32 factors": ({"factors": FP32}, False, False),
    "dropout": ({"factors": FP32, "lora_dropout": 0.05}, True, False),
    "DoRA, bf16 factors": ({"use_dora": True}, True, False),
    "DoRA, fp32 factors": ({"use_dora": True, "factors": FP32}, False, False),
}


@pytest.mark.parametrize("case", CASES)
def test_a_layer_goes_the_way_that_is_modelled_as_quicker(case, gpu):
    settings, left_without, left_with = CASES[case]
    assert bool(accelerated(**settings)[0].left) == left_without
    peft_cost._answers.clear()
    peft_cost._recent.clear()
    with trial.assuming(verdicts()):
        dispatch._routes.cache_clear()
        assert bool(accelerated(**settings)[0].left) == left_with


def test_a_call_asks_for_its_own_number_of_tokens(gpu, calls):
    # The quick check asks only where x is on a GPU.
    gpu.setattr(peft_calls, "usual_call", lambda layer: None)
    gpu.setattr(ours.peft_support, "is_small_call", lambda layer, x: False)
    report, layer = accelerated()
    (why,) = report.left.values()
    said = re.fullmatch(
        r"PEFT's forward is quicker in a model of 2048 tokens: (\d\.\d\d) × the frozen layer, "
        r"(\d\.\d\d) by the ops",
        why,
    )
    assert 1 < float(said[1]) < float(said[2])
    layer(torch.randn(3, 7, SIZE, dtype=BF16))
    (why_small,) = calls["why"]
    assert why_small.startswith("PEFT's forward is quicker in a model of 32 tokens: ")
    assert calls["fast"] == 0
    (row,) = lorafast.explain(layer).rows
    assert f"PEFT's own forward: {why}" in row.notes
    assert row.modelled is None
    # A large layer's base product hides what the ops launch.
    assert ours.why_quicker(layer, 1 << 17, BF16) is None


def test_a_forced_cuda_backend_is_priced_as_itself(gpu):
    """It makes its own dropout bits, so that no layer is left for want of Triton's kernel."""
    gpu.setenv("LORAFAST_BACKEND", "cuda")
    gpu.setattr(cuda_forms, "why_not", lambda: "")
    gpu.setattr(masks, "made_by_torch", lambda _, dtype: made_by_torch(torch.device("cuda"), dtype))
    needs = GradMask(x=True, lora_A=True, lora_B=True)
    weight = torch.empty(SIZE, SIZE, dtype=BF16)
    for r, is_counted in ((16, True), (24, False)):
        A, B = torch.empty(r, SIZE, dtype=BF16), torch.empty(SIZE, r, dtype=BF16)
        call = LayerTensors(weight, None, A, B), CallOptions(1.0, 0.05)
        found = step_model.modelled_step(512, *call, needs)
        if is_counted:
            assert found.seconds == step_model.cuda_step(found.layer, found.machine)
        else:
            assert found is None
            assert peft_cost.why_peft(512, BF16, *call) is None


def test_an_answer_is_remembered_unless_it_is_provisional(gpu):
    layer = model_of().base_model.model[0]
    asked = []
    real = step_model.modelled_step
    gpu.setattr(step_model, "modelled_step", lambda *call: asked.append(1) or real(*call))
    first = ours.why_quicker(layer, 2000, BF16)
    assert first
    assert ours.why_quicker(layer, 1100, BF16) == first
    assert len(asked) == 1
    assert ours.why_quicker(layer, 1000, BF16) != first
    assert len(asked) == 2
    peft_cost._answers.clear()
    peft_cost._recent.clear()
    gpu.setattr(triton.kernel_choice, "why_not", lambda *problem: (Provisional("is captured"),))
    for _ in range(2):
        assert ours.why_quicker(layer, 2000, BF16) == first
    assert len(asked) == 4


def test_what_the_model_does_not_know_is_left_only_for_its_mask(gpu):
    for settings, left in (
        ({}, False),
        ({"lora_dropout": 0.3}, True),
        ({"lora_dropout": 0.3, "use_dora": True}, False),
    ):
        _, layer = accelerated(factors=FP32, dtype=FP32, size=64, **settings)
        why = ours.why_quicker(layer, 2048, FP32)
        assert why == (peft_cost.SLOW_DROPOUT if left else None)
        (row,) = lorafast.explain(layer).rows
        assert any(peft_cost.SLOW_DROPOUT in note for note in row.notes) == left
        assert ours.why_quicker(layer.eval(), 2048, FP32) is None
    with torch.autocast("cpu", BF16):
        assert (
            peft_cost.why_peft(
                2048, BF16, *peft_calls.call_of(model_of().base_model.model[0], "default", 0.0)
            )
            is None
        )


def test_several_adapters_are_left_only_for_their_mask(gpu):
    model = model_of(lora_dropout=0.05)
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=["0"]))
    model.base_model.set_adapter(["default", "other"])
    layer = model.base_model.model[0]
    assert ours.why_quicker(layer, 2048, BF16) == peft_cost.SLOW_DROPOUT
    assert ours.why_quicker(layer.eval(), 2048, BF16) is None


def test_nothing_is_asked_under_a_compiler_or_on_a_cpu(monkeypatch, calls, calls_by_python):
    _, layer = accelerated()
    assert ours.why_quicker(layer, 2048, BF16) is None
    x = torch.randn(4, SIZE, dtype=BF16)
    monkeypatch.setattr(peft_cost, "why_peft", lambda *call: "was asked")
    monkeypatch.setattr(peft_calls, "usual_call", lambda layer: None)
    monkeypatch.setattr(ours.peft_support, "is_small_call", lambda layer, x: False)
    layer(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    layer(x)
    assert calls == {"fast": 1, "why": ["was asked"]}


def test_the_users_random_numbers_stay_what_they_are(gpu):
    layer, state = model_of(lora_dropout=0.05).base_model.model[0], torch.get_rng_state()
    peft_cost.peft_seconds.cache_clear()
    step_model.frozen.cache_clear()
    step_model.step.cache_clear()
    assert ours.why_quicker(layer, 2048, BF16)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_dispatch_mode_sees_nothing_of_the_model(gpu):
    layer = model_of().base_model.model[0]
    for _ in range(2):
        with FlopCounterMode(display=False) as counted:
            assert ours.why_quicker(layer, 2048, BF16) is None
        assert counted.get_total_flops() == 0
        # As known as it may be, the answer is the same in both passes of a checkpoint.
        assert ours.why_quicker(layer, 2048, BF16)


def test_a_lamda_stays_on_the_ops(gpu):
    config = peft_lamda.LamdaConfig(r=4, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(64, 64, dtype=BF16)), config)
    assert lorafast.accelerate(model).left == {}
