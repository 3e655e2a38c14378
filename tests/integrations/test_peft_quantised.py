"""accelerate on PEFT's layers beside quantised weights: the same numbers, and what stays PEFT's."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lorafast

peft = pytest.importorskip("peft", reason="PEFT is not installed")
bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

from lorafast.integrations import peft_quantised  # noqa: E402
from lorafast.quantised import formats  # noqa: E402

pytestmark = pytest.mark.peft
K, N = 128, 96


class Net(nn.Module):
    """A quantised layer and a dense one, as a model that transformers loaded."""

    def __init__(self, bits, dtype=torch.float32, **options):
        super().__init__()
        if bits == 4:
            up = bnb.nn.Linear4bit(K, N, **{"compute_dtype": dtype, "quant_type": "nf4"} | options)
        else:
            up = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False)
        up.to(dtype).load_state_dict(nn.Linear(K, N).state_dict())
        self.up, self.down = up.to("cpu"), nn.Linear(N, 4).to(dtype)
        self.is_loaded_in_4bit, self.is_loaded_in_8bit = bits == 4, bits == 8

    def forward(self, x):
        return self.down(self.up(x).relu())


def peft_model(bits=4, dtype=torch.float32, targets=("up",), options=None, **config):
    torch.manual_seed(0)
    model = peft.get_peft_model(
        Net(bits, dtype, **options or {}),
        peft.LoraConfig(r=4, target_modules=list(targets), **config),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def step(model, x):
    """Return the output and every gradient of a training step."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(1)
    y = model(x)
    y.float().square().sum().backward()
    return [y, x.grad] + [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(
    ("bits", "options"),
    [
        (4, {"compress_statistics": True}),
        (4, {"compress_statistics": False, "quant_type": "fp4"}),
        (8, {}),
    ],
)
def test_it_gives_pefts_numbers(bits, options, use_dora):
    model = peft_model(bits, options=options, use_dora=use_dora, use_rslora=True)
    x = torch.randn(2, 10, K)
    expected = step(model, x)
    report = lorafast.accelerate(model)
    assert (len(report.taken), report.left) == (1, {})
    found = step(model, x)
    assert len(expected) == len(found) > 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected[0])


def test_half_precision_compute_and_autocast():
    model = peft_model(dtype=torch.bfloat16)
    x = torch.randn(20, K, dtype=torch.bfloat16)
    expected = step(model, x)[0]
    lorafast.accelerate(model)
    found = step(model, x)[0]
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2**-5, atol=2**-5)
    wide = peft_model()
    with torch.autocast("cpu", torch.bfloat16):
        expected = wide.base_model.model.up(x.float())
        lorafast.accelerate(wide)
        found = wide.base_model.model.up(x.float())
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=2**-5, atol=2**-5)


def test_an_adapter_wider_than_the_layers_products_stays_pefts():
    model = peft_model(options={"compute_dtype": torch.bfloat16})
    x = torch.randn(20, K)
    expected = step(model, x)
    lorafast.accelerate(model)
    for one, other in zip(step(model, x), expected, strict=True):
        assert torch.equal(one, other)


def test_nothing_of_full_size_is_kept():
    model = peft_model()
    lorafast.accelerate(model)
    kept = []
    x = torch.randn(20, K, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        model.base_model.model.up(x).sum()
    assert kept
    assert max(one.numel() for one in kept) < K * N


def test_layers_keep_their_state_dict_merge_and_pickle():
    model = peft_model(use_dora=True)
    keys = list(model.state_dict())
    lorafast.accelerate(model)
    layer = model.base_model.model.up
    assert type(layer).__name__ == "Linear4bit"
    assert type(layer).__module__ == "lorafast.integrations.peft_quantised"
    assert isinstance(layer, peft_quantised.PEFTS[type(layer)])
    assert list(model.state_dict()) == keys
    x = torch.randn(20, K)
    y = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y)
    with model.disable_adapter():
        base = model(x)
    assert not torch.equal(base, y)
    with pytest.warns(UserWarning, match="rounding"):
        model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=0.3, atol=0.3)


def test_restore_gives_pefts_classes_back():
    model = peft_model(targets=("up", "down"))
    before = [type(module) for module in model.modules()]
    assert len(lorafast.accelerate(model).taken) == 2
    assert lorafast.restore(model) == 2
    assert [type(module) for module in model.modules()] == before
    assert "lorafast_keep" not in vars(model.base_model.model.up)


@pytest.mark.parametrize("what", ["several adapters", "hooks", "a damaged state"])
def test_what_stays_pefts_says_why(what):
    model = peft_model()
    base = model.base_model.model.up.base_layer
    x = torch.randn(20, K)
    if what == "several adapters":
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["up"]))
        model.base_model.set_adapter(["default", "other"])
    elif what == "hooks":
        base.register_forward_hook(lambda *_: None)
    else:
        base.weight.quant_state.absmax = base.weight.quant_state.absmax[:-1]
    with pytest.warns(UserWarning, match="left 1: "):
        report = lorafast.accelerate(model)
    (why,) = report.left.values()
    assert any(word in why for word in ("several", "hooks", "absmax"))
    if what != "a damaged state":
        assert model(x).shape == (20, 4)


def test_explain_names_the_layer():
    model = peft_model(use_dora=True)
    lorafast.accelerate(model)
    said = str(lorafast.explain(model))
    assert "DoRA of PEFT (default)" in said
    assert "is dequantised for every product" in said
    model.merge_adapter()
    assert "the adapters are merged" in str(lorafast.explain(model))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("use_dora", [False, True])
def test_explain_makes_no_weight_and_says_what_it_says_of_one(monkeypatch, bits, use_dora):
    def real(self):
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    adapter = lorafast.DoRA(r=4) if use_dora else lorafast.LoRA(r=4)
    models = [peft_model(bits, use_dora=use_dora), lorafast.adapt(Net(bits), adapter, ["up"])]
    lorafast.accelerate(models[0])
    weight_class = type(formats.of(models[1].up.base_layer))
    monkeypatch.setattr(weight_class, "whole", None)
    for model in models:
        said = [str(lorafast.explain(model, tokens)) for tokens in (1, 512)]
        rows = lorafast.explain(model).rows
        with monkeypatch.context() as patch:
            patch.setattr(weight_class, "stand_in", real)
            assert said == [str(lorafast.explain(model, tokens)) for tokens in (1, 512)]
            assert rows == lorafast.explain(model).rows
        assert "is dequantised for every product" in said[1]


def test_explain_of_a_weight_that_is_lost_says_so():
    model = peft_model(options={"compute_dtype": None})
    lorafast.accelerate(model)
    base = model.base_model.model.up.base_layer
    base.quant_state = base.weight.quant_state = None
    base.compute_dtype = None
    assert "its quant_state is lost" in str(lorafast.explain(model))
