"""Calls of few tokens of an accelerated LoRA run as plain products, several adapters in PEFT."""

import pytest
import torch
from torch import nn

import lorafast
from lorafast.engine import plain_products
from lorafast.runtime import env

peft = pytest.importorskip("peft")
pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
ours = pytest.importorskip("lorafast.integrations.peft_linear")
peft_support = pytest.importorskip("lorafast.integrations.peft_support")
pytestmark = [pytest.mark.peft, pytest.mark.usefixtures("calls_by_python")]
K, N = 12, 16
MANY = plain_products.MOST_ELEMENTS // (K + N) + 1
MANY_COPIED = plain_products.MOST_ELEMENTS_COPIED // (K + N) + 1


@pytest.fixture
def few(monkeypatch):
    """One True for each call that ran as plain products."""
    found, products = [], plain_products.products

    def record(*args):
        found.append(True)
        return products(*args)

    monkeypatch.setattr(plain_products, "products", record)
    return found


def layer_of(accelerated=True, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, **settings)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(K, N)).to(dtype), config)
    if accelerated:
        lorafast.accelerate(model)
    return model.base_model.model[0]


def results(layer, x):
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"lora_bias": True}, {"lora_alpha": 32}], ids=str)
def test_a_lora_on_few_tokens_runs_as_plain_products(dtype, settings, calls, few):
    x = torch.randn(2, 3, K).to(dtype)
    ours, theirs = (layer_of(accelerated, dtype, **settings) for accelerated in (True, False))
    truth = layer_of(False, torch.float64, **settings)
    truth.load_state_dict({name: t.double() for name, t in ours.state_dict().items()})
    eps = torch.finfo(dtype).eps / 8
    right = results(truth, x.double())
    for one, same, exact in zip(results(ours, x), results(theirs, x), right, strict=True):
        assert one.dtype == same.dtype
        error, stock = ((t.double() - exact).square().mean().sqrt() for t in (one, same))
        assert error <= 2 * max(stock, eps * exact.square().mean().sqrt())
    assert calls == {"fast": 0, "why": []}
    assert few == [True]


def test_dropout_on_few_tokens_has_the_bits_of_the_ops(calls, few, monkeypatch):
    layer, x = layer_of(lora_dropout=0.3), torch.randn(2, 3, K)
    plain = results(layer, x)
    assert few == [True]
    monkeypatch.setenv(env.BACKEND.name, "eager")
    for one, same in zip(plain, results(layer, x), strict=True):
        torch.testing.assert_close(one, same)
    assert calls == {"fast": 1, "why": []}


def test_what_must_be_called_is_called(few):
    """Hooks on the parts of a layer, and forwards of their own."""
    x, heard = torch.randn(3, K), []
    for part in ("base_layer", "lora_A", "lora_B", "lora_dropout"):
        layer = layer_of(lora_dropout=0.3)
        module = getattr(layer, part)
        module = module if part == "base_layer" else module["default"]
        module.register_forward_hook(lambda *_, part=part: heard.append(part))
        layer(x)
    assert heard == ["base_layer", "lora_A", "lora_B", "lora_dropout"]
    assert few == []


@pytest.mark.parametrize("M", [3, MANY])
def test_a_conv1d_is_served_alike(M, few, calls):
    base = nn.Sequential(pytorch_utils.Conv1D(N, K))
    model = peft.get_peft_model(
        base,
        peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, fan_in_fan_out=True),
    )
    layer, x = model.base_model.model[0], torch.randn(M, K)
    expected = results(layer, x)
    lorafast.accelerate(model)
    for one, same in zip(results(layer, x), expected, strict=True):
        torch.testing.assert_close(one, same, rtol=1e-4, atol=1e-4)
    assert (len(few), calls) == (
        (1, {"fast": 0, "why": []}) if M == 3 else (0, {"fast": 1, "why": []})
    )


def test_dropout_without_a_mask_of_ours_is_left_to_peft(few, calls, monkeypatch):
    monkeypatch.setattr(plain_products, "_cpu_kernels", lambda: None)
    layer = layer_of(lora_dropout=0.3)
    layer(torch.randn(3, K))
    layer(torch.randn(MANY_COPIED, K))
    assert (few, calls) == ([], {"fast": 1, "why": [peft_support.SMALL_CALL]})


def test_fp16_throughout_is_left_to_peft(few, calls):
    layer = layer_of(dtype=torch.float16).half()
    layer(torch.randn(3, K).half())
    assert (few, calls) == ([], {"fast": 0, "why": [peft_support.SMALL_CALL]})


def test_the_state_of_a_layer_decides(few, calls):
    layer, x = layer_of(), torch.randn(3, K)
    base = layer.base_layer(x)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base)
    layer.enable_adapters(True)
    y = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), y)
    assert few == [True]


@pytest.mark.parametrize(
    ("settings", "dtype", "M"),
    [
        ({}, torch.float32, MANY),
        ({"lora_dropout": 0.3}, torch.float32, MANY_COPIED),
        ({}, torch.bfloat16, MANY_COPIED),
        ({"use_dora": True}, torch.float32, 3),
    ],
    ids=["lora", "dropout", "wider factors", "dora"],
)
def test_many_tokens_and_other_methods_run_on_the_op(settings, dtype, M, calls):
    layer_of(dtype=dtype, **settings)(torch.randn(M, K).to(dtype))
    assert calls == {"fast": 1, "why": []}


def test_dropout_in_evaluation_needs_no_copy(calls):
    layer = layer_of(lora_dropout=0.3).eval()
    layer(torch.randn(MANY_COPIED, K))
    assert calls == {"fast": 0, "why": []}


def test_a_forced_backend_is_not_left(calls, monkeypatch):
    monkeypatch.setenv(env.BACKEND.name, "eager")
    layer_of()(torch.randn(3, K))
    assert calls == {"fast": 1, "why": []}


def test_several_adapters_are_left_together(calls):
    config = peft.LoraConfig(r=4, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), config)
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    lorafast.accelerate(model)
    model(torch.randn(3, K))
    model(torch.randn(MANY, K))
    assert (calls["fast"], len(calls["why"])) == (1, 1)
    rows = lorafast.explain(model, tokens=3).rows
    assert ["PEFT's own forward" in str(row.notes) for row in rows] == [True, True]


def test_explain_tells():
    layer = layer_of()
    (row,) = lorafast.explain(layer, tokens=3).rows
    assert any("3 tokens are few: plain torch products" in note for note in row.notes)
    (row,) = lorafast.explain(layer, tokens=MANY).rows
    assert not any("are few" in note for note in row.notes)
