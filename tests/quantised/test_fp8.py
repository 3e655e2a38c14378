"""FP8 weights with scales beside them: the bits of transformers' own dequantisation."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lorafast
from lorafast.quantised import formats

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP8 = torch.float8_e4m3fn


def layer(N, K, scale, name="weight_scale_inv", dtype=FP8, **attributes):
    """A linear layer with an FP8 weight and a scale."""
    module = nn.Linear(K, N, bias=False)
    generator = torch.Generator().manual_seed(N * 1000 + K)
    weight = torch.randn(N, K, generator=generator).to(dtype)
    module.weight = nn.Parameter(weight, requires_grad=False)
    if isinstance(scale, tuple):
        scale = torch.rand(scale, generator=generator) + 0.5
    module.register_buffer(name, scale)
    for key, value in attributes.items():
        setattr(module, key, value)
    return module


def right(module, scale, rows, columns):
    """W in fp64 from an expanded scale: exact, so that one rounding gives the dtype."""
    N, K = module.weight.shape
    grid = scale.double().reshape(-1, 1) if scale.dim() < 2 else scale.double()
    grid = grid.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:N, :K]
    return module.weight.double() * grid


def _scheme(**weights):
    return SimpleNamespace(weights=SimpleNamespace(**weights))


CASES = {
    "tensor": (lambda: layer(37, 65, ()), (37, 65)),
    "tensor of one": (lambda: layer(37, 65, (1,), "weight_scale"), (37, 65)),
    "row": (lambda: layer(37, 65, (37, 1), "weight_scale"), (1, 65)),
    "flat row": (lambda: layer(37, 65, (37,), "weight_scale"), (1, 65)),
    "block": (lambda: layer(130, 200, (2, 2), block_size=(128, 128)), (128, 128)),
    "small block": (lambda: layer(37, 65, (10, 5), block_size=[4, 16]), (4, 16)),
    "scheme's block": (
        lambda: layer(
            37, 65, (3, 2), "weight_scale", quantization_scheme=_scheme(block_structure=[16, 64])
        ),
        (16, 64),
    ),
    "group": (lambda: layer(37, 96, (37, 3), "weight_scale"), (1, 32)),
    "e5m2": (lambda: layer(37, 65, (37, 1), dtype=torch.float8_e5m2), (1, 65)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_weight_is_the_product_rounded_once(case):
    make, (rows, columns) = CASES[case]
    module = make()
    weight = formats.of(module)
    assert weight.why_not() is None
    scale = getattr(module, "weight_scale_inv", None)
    expected = right(module, module.weight_scale if scale is None else scale, rows, columns)
    for dtype in DTYPES:
        # FP8 x fp32 is rounded to fp32 first, in the library too.
        exact = expected.float().to(dtype)
        assert torch.equal(weight.whole(torch.empty(weight.shape, dtype=dtype)), exact)
        for start, stop in ((0, 1), (3, 9), (15, 33), (36, 37)):
            assert torch.equal(weight.rows(start, stop, dtype), exact[start:stop])
    again = formats.of(copy.deepcopy(module))
    assert torch.equal(again.rows(0, 37, torch.float32), expected.float()[:37])


@pytest.mark.peft
@pytest.mark.parametrize("block", [(16, 32), None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_those_of_transformers(block, dtype):
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    module = fp8.FP8Linear(96, 48, block_size=block)
    with torch.no_grad():
        module.weight.copy_(torch.randn(48, 96))
        module.weight_scale_inv.copy_(torch.rand_like(module.weight_scale_inv) + 0.5)
    weight = formats.of(module)
    theirs = fp8.Fp8Dequantize(None)._dequantize_one
    expected = theirs(module.weight.data, module.weight_scale_inv.data, dtype)
    assert torch.equal(weight.whole(torch.empty(48, 96, dtype=dtype)), expected)
    words = "a scale for each 16 x 32 block" if block else "one scale"
    assert weight.kind == f"float8_e4m3fn, {words}"


def test_bytes_are_exponents():
    module = layer(8, 64, torch.tensor([[125, 130]], dtype=torch.uint8), block_size=(8, 32))
    expected = module.weight.float() * torch.tensor([0.25, 8.0]).repeat_interleave(32)
    weight = formats.of(module)
    assert torch.equal(weight.rows(0, 8, torch.float32), expected)
    with pytest.raises(NotImplementedError, match="powers of two"):
        weight.requantise(torch.zeros(8, 64))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [name for name in CASES if name != "e5m2"])
def test_requantising_is_quantising_anew(case, scale_dtype):
    make, (rows, columns) = CASES[case]
    module = make()
    name = "weight_scale" if hasattr(module, "weight_scale") else "weight_scale_inv"
    scale = getattr(module, name).to(scale_dtype)
    setattr(module, name, scale)
    held, (N, K) = module.weight, module.weight.shape
    W = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    W[: min(rows, N), : min(columns, K)] = 0
    formats.of(module).requantise(W)
    assert module.weight is held
    assert getattr(module, name) is scale
    for i, top in enumerate(range(0, N, rows)):
        for j, left in enumerate(range(0, K, columns)):
            part = W[top : top + rows, left : left + columns]
            factor = (part.abs().max().clamp(min=1e-12) / 448).to(scale_dtype)
            grid = scale.reshape(-1, 1) if scale.dim() < 2 else scale
            assert grid[i, j] == factor
            stored = (part / factor.float()).clamp(-448, 448).to(FP8).float()
            assert torch.equal(held.float()[top : top + rows, left : left + columns], stored)
    if scale_dtype == torch.float32:
        read = formats.of(module).rows(0, N, torch.float32)
        assert (read - W).abs().max() <= W.abs().max() / 16


def test_a_fault_is_one_reason():
    def reason(*arguments, **options):
        return formats.of(layer(*arguments, **options)).why_not()

    grid = "its scale is [2, 1], no grid of blocks of [128, 128] over [130, 200]"
    assert reason(130, 200, (2, 1), block_size=(128, 128)) == grid
    # Two blocks of 65 rows, or one of 128 and a short one?
    undeclared = "its scale is [2, 2], no grid of rows or groups of a row over [130, 200]"
    assert reason(130, 200, (2, 2)) == undeclared
    assert "neither weight_scale_inv nor weight_scale" in reason(8, 8, (), "input_scale")
    module = layer(8, 8, ())
    module.in_features = 7
    assert formats.of(module).why_not() == "its weight is [8, 8] and should be [8, 7]"
    assert "meta device" in formats.of(layer(8, 8, ()).to("meta")).why_not()


def test_the_dtype_is_the_biass():
    module = layer(8, 8, ())
    assert formats.of(module).dtype == torch.bfloat16
    module.bias = nn.Parameter(torch.zeros(8, dtype=torch.float16))
    assert formats.of(module).dtype == torch.float16


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_or_lost_scale_after_adapt_is_an_error_of_the_next_call(cast):
    model = nn.Sequential(layer(16, 32, (16, 1)))
    lorafast.adapt(model, lorafast.LoRA(r=2), target_modules=["0"])
    base, x = model[0].base_layer, torch.randn(3, 32)
    model(x)
    base.to(cast)
    with pytest.raises(RuntimeError, match=f"its weight was cast to {cast}, which rounds"):
        model(x)
    base.weight.data, base.weight_scale_inv = base.weight.data.to(FP8), None
    with pytest.raises(RuntimeError, match="it has neither weight_scale_inv nor weight_scale"):
        model(x)
