"""Weights that torchao quantised: the bits of their own dequantize."""

import copy
import io

import pytest
import torch
from torch import nn

from lorafast.quantised import formats

quantization = pytest.importorskip("torchao.quantization")

from torchao.quantization import granularity  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CONFIGS = {
    "int8 row": quantization.Int8WeightOnlyConfig(),
    "int8 tensor": quantization.Int8WeightOnlyConfig(granularity=granularity.PerTensor()),
    "int8 group": quantization.Int8WeightOnlyConfig(granularity=granularity.PerGroup(32)),
    "int8 dynamic": quantization.Int8DynamicActivationInt8WeightConfig(),
    "float8": quantization.Float8WeightOnlyConfig(),
    "intx group": quantization.IntxWeightOnlyConfig(granularity=granularity.PerGroup(32)),
    "int4": quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4),
}


def quantised(name, N=37, K=96, dtype=torch.bfloat16, seed=0):
    """A layer that torchao quantised."""
    model = nn.Sequential(nn.Linear(K, N, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(N, K, generator=torch.Generator().manual_seed(seed)))
    quantization.quantize_(model.to(dtype), CONFIGS[name])
    return model[0]


def whole(module, dtype=torch.float32):
    """W as lorafast reads it."""
    weight = formats.of(module)
    assert weight.why_not() is None
    return weight.whole(torch.empty(weight.shape, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_bits_are_those_of_torchao(name, dtype):
    module = quantised(name, dtype=dtype)
    right = module.weight.dequantize()
    weight = formats.of(module)
    assert (weight.dtype, weight.shape) == (dtype, (37, 96))
    for asked in DTYPES:
        assert torch.equal(whole(module, asked), right.to(asked))
        for start, stop in ((0, 1), (3, 9), (36, 37)):
            assert torch.equal(weight.rows(start, stop, asked), right.to(asked)[start:stop])


def _loaded(module):
    """From a file of its state; the layer itself cannot be pickled, torchao patches its repr."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = nn.Linear(96, 37, bias=False, device="meta")
    fresh.load_state_dict(torch.load(file, weights_only=False), assign=True)
    return fresh


@pytest.mark.parametrize("move", [copy.deepcopy, _loaded])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_weight_stays_itself(name, move):
    module = quantised(name)
    right = whole(module)
    assert torch.equal(whole(move(module)), right)


@pytest.mark.parametrize("name", CONFIGS)
def test_after_a_cast_it_is_what_torchao_made_of_it(name):
    module = quantised(name, dtype=torch.float32).to(torch.float16)
    # Intx casts its scales; int8 and float8 stay as they are.
    right = module.weight.dequantize()
    assert torch.equal(whole(module), right.float())
    assert formats.of(module).dtype == right.dtype


@pytest.mark.parametrize("name", CONFIGS)
def test_requantising_is_quantising_anew(name):
    module = quantised(name)
    right = whole(quantised(name, seed=1))
    held = module.weight
    W = torch.randn(37, 96, generator=torch.Generator().manual_seed(1))
    weight = formats.of(module)
    if name in ("intx group", "int4"):
        with pytest.raises(NotImplementedError, match="IntxUnpackedToInt8Tensor cannot be"):
            weight.requantise(W)
        return
    before = weight.kind
    weight.requantise(W)
    assert module.weight is held
    assert torch.equal(whole(module), right)
    assert weight.kind == before
    assert ("activations too" in before) == (name == "int8 dynamic")


def test_a_fault_is_one_reason():
    def reason(module):
        return formats.of(module).why_not()

    module = quantised("int8 group")
    module.weight.scale = module.weight.scale[:, :2]
    assert reason(module) == "its scale is [37, 2] and should be [37, 3]"
    with pytest.raises(NotImplementedError, match="its scale"):
        formats.of(module).requantise(torch.zeros(37, 96))
    module = quantised("int8 row")
    module.weight.act_pre_scale = torch.ones(96)
    assert "act_pre_scale" in reason(module)
    module = quantised("float8")
    module.in_features = 95
    assert reason(module) == "its weight is [37, 96] and should be [37, 95]"


def test_a_class_without_dequantize_is_refused():
    from torchao.quantization.quantize_.workflows import Int4Tensor

    module = nn.Linear(64, 8, bias=False)
    scale = torch.ones(2, 8, dtype=torch.bfloat16)
    packed = Int4Tensor(torch.zeros(8, 32, dtype=torch.int8), scale, scale, [1, 32], (8, 64))
    module.weight = nn.Parameter(packed, requires_grad=False)
    assert "Int4Tensor has no function that dequantises it" in formats.of(module).why_not()


def test_nf4_gives_its_rows_from_a_whole():
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    module = nn.Linear(128, 64, bias=False)
    nf4 = to_nf4(torch.randn(64, 128), 64, 128)
    module.weight = nn.Parameter(nf4, requires_grad=False)
    right = nf4.get_original_weight()
    assert torch.equal(whole(module), right)
    assert torch.equal(formats.of(module).rows(3, 9, torch.bfloat16), right[3:9].bfloat16())
