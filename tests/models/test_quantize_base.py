"""lorafast.quantize_base: the weights it makes, the errors it tells, and what it refuses."""

import gc
import sys
import weakref

import pytest
import torch
from torch import nn

import lorafast
from lorafast.models import quantize_base
from lorafast.quantised import formats

try:
    import bitsandbytes as bnb
except ImportError:
    bnb = None

needs_bnb = pytest.mark.skipif(bnb is None, reason="bitsandbytes is not installed")
BITS = ["fp8", pytest.param("nf4", marks=needs_bnb), pytest.param("int8", marks=needs_bnb)]
# What rounding may make of these uniform numbers: measured 0.025, 0.092 and 0.0039.
ERRORS = {"fp8": 0.03, "nf4": 0.11, "int8": 0.005}
# Multiples of 64: of others bitsandbytes' own CPU forward of 4 bits is wrong.
K, N = 128, 192


def dense(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, N), nn.GELU(), nn.Linear(N, 64, bias=False)).to(dtype)


def dequantised(module, dtype=torch.float32):
    weight = formats.of(module)
    return weight.whole(torch.empty(weight.shape, dtype=dtype))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_report_is_of_what_is_stored(bits, dtype):
    model = dense(dtype)
    weights = {name: model[int(name)].weight.detach().clone() for name in "02"}
    bias = model[0].bias
    report = lorafast.quantize_base(model, bits)
    assert (report.bits, list(report.layers)) == (bits, ["0", "2"])
    for name, layer in report.layers.items():
        W = weights[name].double()
        right = (dequantised(model[int(name)]).double() - W).norm() / W.norm()
        assert layer.error == pytest.approx(right.item(), rel=1e-5)
        assert 0.003 < layer.error < ERRORS[bits]
        assert layer.bytes_before == W.numel() * dtype.itemsize
        packed = W.numel() // 2 if bits == "nf4" else W.numel()
        assert packed < layer.bytes_after < packed + 2500
        assert formats.of(model[int(name)]).dtype in (dtype, torch.float16)
    assert model[0].bias is bias
    assert "2 layers in " + bits in str(report)
    assert f"{report.layers['2'].error:.2e}" in str(report)


@pytest.mark.parametrize("bits", BITS)
def test_adapt_takes_the_layers_and_trains(bits, tmp_path):
    model = dense()
    lorafast.quantize_base(model, bits)
    plain = model(x := torch.randn(20, K))
    lorafast.adapt(model, lorafast.DoRA(r=4))
    # int8's own forward rounds x too.
    close = {"rtol": 0.1, "atol": 0.1} if bits == "int8" else {}
    torch.testing.assert_close(model(x), plain, **close)
    optimizer = torch.optim.SGD(lorafast.adapter_parameters(model), lr=0.1)
    losses = []
    for _ in range(5):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    lorafast.save_adapter(model, tmp_path)
    again = dense()
    lorafast.quantize_base(again, bits)
    lorafast.load_adapter(again, tmp_path)
    assert torch.equal(again(x), model(x))
    errors = lorafast.merge_quantised(again, "dequantise")
    assert type(again[0]) is nn.Linear
    assert max(errors.values()) < 1e-3


@pytest.mark.parametrize("bits", BITS)
def test_the_dense_weight_of_a_layer_is_freed_before_the_next(bits, monkeypatch):
    model = dense()
    held = [weakref.ref(model[0].weight), weakref.ref(model[2].weight)]
    alive = []
    quantise = quantize_base._quantise_layer

    def noting(*arguments):
        alive.append([one() is not None for one in held])
        return quantise(*arguments)

    monkeypatch.setattr(quantize_base, "_quantise_layer", noting)
    gc.disable()
    try:
        lorafast.quantize_base(model, bits)
        alive.append([one() is not None for one in held])
    finally:
        gc.enable()
    assert alive == [[True, True], [False, True], [False, False]]


@needs_bnb
def test_nf4_is_what_bitsandbytes_makes():
    linear = nn.Linear(K, N)
    model = nn.Sequential(linear)
    theirs = bnb.nn.Linear4bit(K, N, quant_type="nf4")
    theirs.load_state_dict(linear.state_dict())
    theirs.to("cpu")
    lorafast.quantize_base(model, "nf4")
    for name, one in theirs.state_dict().items():
        assert torch.equal(model.state_dict()[f"0.{name}"], one), name


def test_names_exclusions_the_head_hooks_and_shared_modules():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.lm_head = (nn.Linear(8, 8) for _ in range(3))
            self.again = self.second

        def get_output_embeddings(self):
            return self.lm_head

        def forward(self, x):
            return self.lm_head(self.again(self.second(self.first(x))))

    model = Net()
    calls = []
    model.second.register_forward_hook(lambda *_: calls.append(1))
    assert list(lorafast.quantize_base(model, "fp8", exclude_modules=["first"]).layers) == [
        "second"
    ]
    assert model.second is model.again
    assert isinstance(model.first, nn.Linear)
    assert isinstance(model.lm_head, nn.Linear)
    model(torch.randn(2, 8))
    assert len(calls) == 2
    assert list(lorafast.quantize_base(model, "fp8", ["lm_head"]).layers) == ["lm_head"]


def test_a_conv1d_becomes_a_linear_layer():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(Conv1D(24, 16))
    x = torch.randn(3, 16)
    y = model(x)
    lorafast.quantize_base(model, "fp8")
    torch.testing.assert_close(model(x), y, rtol=0.1, atol=0.01)


def _tied(model):
    model[2].weight = nn.Parameter(torch.randn(64, N))
    model.append(nn.Embedding(64, N))
    model[3].weight = model[2].weight


def _value(value):
    def change(model):
        model[2].weight.data[3, 5] = value

    return change


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        (_tied, ValueError, r"2\.weight and 3\.weight are one tensor: leave 2 out"),
        (_value(float("nan")), ValueError, r"2: its weight \(64, 192\) is not finite"),
        (_value(float("-inf")), ValueError, r"2: its weight \(64, 192\) is not finite"),
        (lambda model: model[2].double(), TypeError, r"matches 2, which has a weight in torch\.fl"),
        (lambda model: model[2].to("meta"), ValueError, "2: its weight is on the meta device"),
        (
            lambda model: lorafast.quantize_base(model, "fp8", ["2"]),
            TypeError,
            "2, which is quantised already: float8_e4m3fn, a scale for each row",
        ),
        (
            lambda model: lorafast.adapt(model, lorafast.LoRA(r=2), ["2"]),
            ValueError,
            r"adapted already: 2 is a lorafast\.Linear",
        ),
    ],
    ids=["tied", "nan", "inf", "fp64", "meta", "quantised", "adapted"],
)
def test_what_is_refused_is_named_and_nothing_changes(change, error, why):
    model = dense()
    change(model)
    layers = [*model]
    with pytest.raises(error, match=why):
        lorafast.quantize_base(model, "fp8")
    assert [*model] == layers


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"bits='fp4' must be one of"):
        lorafast.quantize_base(dense(), "fp4")
    with pytest.raises(ValueError, match="matches no module"):
        lorafast.quantize_base(dense(), "fp8", ["up"])
    with pytest.raises(TypeError, match="1, which is a"):
        lorafast.quantize_base(dense(), "fp8", ["1"])
    with pytest.raises(TypeError, match="itself a Linear"):
        lorafast.quantize_base(nn.Linear(4, 4), "fp8")
    model = nn.Sequential(nn.Embedding(4, 4))
    with pytest.raises(TypeError, match="is a Embedding, and no linear"):
        lorafast.quantize_base(model, "fp8", ["0"])


@needs_bnb
def test_what_fp16_cannot_hold_is_refused_for_int8():
    model = dense()
    model[2].weight.data[0, 0] = 70000.0
    with pytest.raises(ValueError, match=r"2: its weight has 7e\+04, beyond what bitsandbytes"):
        lorafast.quantize_base(model, "int8")
    lorafast.quantize_base(model, "nf4")


def test_without_bitsandbytes_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = dense()
    with pytest.raises(ModuleNotFoundError, match=r"needs bitsandbytes: pip install '\.\[quant\]'"):
        lorafast.quantize_base(model, "nf4")
    assert type(model[0]) is nn.Linear
    lorafast.quantize_base(model, "fp8")


def test_a_long_report_is_cut():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(13)))
    lines = str(lorafast.quantize_base(model, "fp8")).splitlines()
    assert len(lines) == 13
    assert lines[-1].startswith("3 more, of errors up to ")


def test_zeros_have_no_error():
    model = nn.Sequential(nn.Linear(8, 4))
    nn.init.zeros_(model[0].weight)
    assert lorafast.quantize_base(model, "fp8").layers["0"].error == 0.0
    assert torch.equal(dequantised(model[0]), torch.zeros(4, 8))


def test_iterations_without_loftq_are_refused():
    model = dense()
    weight = model[0].weight
    for iterations, words in ((3, "without loftq"), (0, "iterations"), (1.5, "iterations")):
        with pytest.raises(ValueError, match=words):
            lorafast.quantize_base(model, "fp8", iterations=iterations)
    assert model[0].weight is weight
