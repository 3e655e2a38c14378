"""Layers that dequantise their own weight, by classes that stand in for their packages'."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lorafast
from lorafast.quantised import formats

N, K = 6, 8
W = torch.randn(N, K, generator=torch.Generator().manual_seed(0))


def stand_in(package, name, **attributes):
    """A layer of a class with this name in a package of this name."""
    cls = type(name, (nn.Module,), {"__module__": f"{package}.layers"})
    module = cls()
    module.in_features, module.out_features = K, N
    for key, value in attributes.items():
        setattr(module, key, value)
    return module


def hqq():
    return stand_in(
        "hqq",
        "HQQLinear",
        W_q=torch.zeros(2, dtype=torch.uint8),
        compute_dtype=torch.float16,
        dequantize=lambda: W.half(),
    )


def gptq():
    """It pads K."""
    padded = torch.cat([W.T, torch.zeros(4, N)]).half()
    return stand_in(
        "gptqmodel",
        "TorchLinear",
        qweight=torch.zeros(2, dtype=torch.int32),
        scales=torch.ones(1, dtype=torch.bfloat16),
        dequantize_weight=lambda num_itr=1: padded,
    )


def awq():
    return stand_in(
        "awq",
        "WQLinear_GEMM",
        qweight=torch.zeros(2, dtype=torch.int32),
        qzeros=None,
        scales=torch.ones(1, dtype=torch.float16),
        w_bit=4,
        group_size=8,
    )


def compressed():
    return stand_in(
        "compressed_tensors",
        "CompressedLinear",
        weight_packed=torch.zeros(2, dtype=torch.int32),
        compressor=SimpleNamespace(decompress_module=lambda module: W.half()),
    )


@pytest.fixture(autouse=True)
def awq_package(monkeypatch):
    """The module of awq with its function; awq's W is [K,N]."""

    def dequantize_gemm(qweight, qzeros, scales, bits, group_size):
        assert (bits, group_size) == (4, 8)
        return W.T.half()

    module = SimpleNamespace(dequantize_gemm=dequantize_gemm)
    monkeypatch.setitem(sys.modules, "awq.utils.packing_utils", module)


@pytest.mark.parametrize("make", [hqq, gptq, awq, compressed])
def test_the_weight_is_what_the_layer_gives(make):
    weight = formats.of(make())
    assert weight.why_not() is None
    assert (weight.shape, weight.device) == ((N, K), torch.device("cpu"))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        right = W.half().to(dtype)
        out = torch.empty(N, K, dtype=dtype)
        assert weight.whole(out) is out
        assert torch.equal(out, right)
        rows = weight.rows(1, 4, dtype)
        assert torch.equal(rows, right[1:4])
        assert rows.is_contiguous()
    with pytest.raises(NotImplementedError, match=f"{weight.kind} cannot be quantised again"):
        weight.requantise(W)


def test_the_dtype_is_the_layers():
    dtypes = [formats.of(make()).dtype for make in (hqq, gptq, awq, compressed)]
    assert dtypes == [torch.float16, torch.bfloat16, torch.float16, torch.float16]


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("eetq", "EetqLinear"),
        ("auto_gptq", "QuantLinear"),
        ("aqlm", "QuantizedLinear"),
        ("awq", "WQLinear_GEMV"),
        ("gptqmodel", "MarlinLinear"),
    ],
)
def test_a_layer_without_such_a_function_is_refused(package, name):
    # Other classes of a package may pack differently, and have the function all the same.
    module = stand_in(package, name, qweight=torch.zeros(2), dequantize_weight=lambda: W.T)
    reason = formats.of(module).why_not()
    assert reason == f"{package} {name} has no function that dequantises its weight"


def test_faults_name_themselves():
    module = hqq()
    module.W_q = None
    assert formats.of(module).why_not() == "hqq HQQLinear holds no packed weight"
    module.W_q = torch.zeros(2, device="meta")
    assert "meta device" in formats.of(module).why_not()
    module = gptq()
    module.dequantize_weight = lambda: W
    with pytest.raises(ValueError, match=r"dequantised to \[6, 8\], not \[8, 6\]"):
        formats.of(module).rows(0, 1, torch.float32)


def test_a_layer_of_an_unknown_package_is_no_weight():
    assert formats.of(stand_in("someone", "QuantLinear", qweight=torch.zeros(2))) is None


MAKERS = (hqq, gptq, awq, compressed)


def model_of(make):
    return nn.Sequential(nn.Linear(K, K), make())


@pytest.mark.parametrize("make", MAKERS)
def test_a_layer_without_a_weight_is_adapted_trained_saved_and_loaded(make, tmp_path):
    torch.manual_seed(0)
    model = lorafast.adapt(model_of(make), lorafast.LoRA(r=2), target_modules=["1"])
    layer, x = model[1], torch.randn(3, K)
    before = model(x)
    dtype = formats.of(make()).compute_dtype or torch.float32
    expected = nn.functional.linear(model[0](x).to(dtype), W.half().to(dtype))
    torch.testing.assert_close(before, expected.float())
    optimizer = torch.optim.SGD([layer.lora_B], lr=1.0)
    before.square().sum().backward()
    optimizer.step()
    after = model(x)
    assert not torch.equal(after, before)
    lorafast.save_adapter(model, tmp_path)
    fresh = model_of(make)
    fresh[0].load_state_dict(model[0].state_dict())
    lorafast.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), after)


@pytest.mark.parametrize("make", MAKERS)
def test_ranks_and_refusals_of_a_layer_without_a_weight(make):
    model = model_of(make)
    assert lorafast.spectral_ranks(model, ranks=(2, 4), budget=4, target_modules=["1"]) == {"1": 4}
    with pytest.raises(ValueError, match="take a start that leaves the weight alone"):
        lorafast.adapt(model, lorafast.LoRA(r=2, init=lorafast.PiSSA()), target_modules=["1"])
    model[1] = make()
    assert not formats.of(model[1]).packed.is_floating_point()
