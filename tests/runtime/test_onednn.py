"""The product with a bias: an adapter at its start changes no bit of the frozen layer.

Where half precision goes by panels, whose product is the frozen one there, of theirs.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers.cpp_compiler import needs_compiler

import lorafast
from lorafast.engine import half_products
from lorafast.engine.backends import cpu
from lorafast.runtime import onednn

where_tried = pytest.mark.skipif(
    torch.cpu._is_amx_tile_supported(), reason="the bits on AMX tiles have not been tried"
)
# Large enough for cpu.linear to leave torch's linear; M, K, N with odd ones among them.
SHAPES = [(70, 130, 520), (1, 2051, 2050), (257, 384, 1536), (33, 1030, 129)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def matrices(M, K, N, dtype):
    torch.manual_seed(M)
    return (
        torch.randn(M, K).to(dtype),
        (torch.randn(N, K) / K**0.5).to(dtype),
        torch.randn(N).to(dtype),
    )


def frozen(x, weight, bias):
    M = x.numel() // x.shape[-1]
    if not half_products.serves(M, weight.t()):
        return F.linear(x, weight, bias)
    y = torch.empty(M, weight.shape[0], dtype=x.dtype)
    half_products.addmm(bias, x.reshape(M, -1), weight.t(), y)
    return y.view(*x.shape[:-1], -1)


@needs_compiler
@where_tried
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_adapter_at_its_start_changes_no_bit(shape, dtype, training):
    M, K, N = shape
    x, weight, bias = matrices(M, K, N, dtype)
    layer = lorafast.Linear(K, N, adapter=lorafast.LoRA(r=4, dropout=0.1), dtype=dtype).train(
        training
    )
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    assert M * N * K >= cpu._SMALL
    torch.testing.assert_close(layer(x), frozen(x, weight, bias), rtol=0, atol=0)
    twice = x.repeat(2, 1).view(2, M, K)
    torch.testing.assert_close(layer(twice), frozen(twice, weight, bias), rtol=0, atol=0)
    strided = torch.empty(M, 2 * K, dtype=dtype)[:, ::2].copy_(x)
    torch.testing.assert_close(layer(strided), frozen(strided, weight, bias), rtol=0, atol=0)


@where_tried
@pytest.mark.parametrize("shape", [*SHAPES, (0, 64, 64), (3, 64, 48)], ids=str)
def test_it_has_the_bits_of_torchs_linear(shape):
    x, weight, bias = matrices(*shape, torch.bfloat16)
    if not onednn.is_available(x, weight):
        pytest.skip("this torch or this processor has no bf16 product of oneDNN's")
    for given in (x, x[None, :, None]):
        y = onednn.linear(given, weight, bias)
        torch.testing.assert_close(y, F.linear(given, weight, bias), rtol=0, atol=0)
        assert y.is_contiguous()


def test_what_it_does_not_serve(monkeypatch):
    x, weight, _ = matrices(64, 64, 64, torch.bfloat16)
    assert not onednn.is_available(x.float(), weight.float())
    assert not onednn.is_available(x, weight.float())
    assert not onednn.is_available(x.t(), weight)
    assert not onednn.is_available(x, weight.t())
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn.is_available(x, weight)
    monkeypatch.setattr(onednn, "_op", lambda: None)
    assert not onednn.is_available(x, weight)


@needs_compiler
@pytest.mark.parametrize("fallback", [False, True])
def test_a_trained_layer_is_right_with_it_and_without(fallback, monkeypatch):
    if fallback:
        monkeypatch.setattr(onednn, "_op", lambda: None)
    x, weight, bias = matrices(129, 257, 260, torch.bfloat16)
    A, B = torch.randn(8, 257) / 16, torch.randn(260, 8) / 8
    y = lorafast.linear(x, weight, bias, A, B, scaling=2.0)
    wide = [t.double() for t in (x, weight, bias, A.bfloat16(), B.bfloat16())]
    truth = wide[0] @ wide[1].T + wide[2] + 2 * (wide[0] @ wide[3].T) @ wide[4].T
    eager = F.linear(x, weight, bias) + 2 * F.linear(F.linear(x, A.bfloat16()), B.bfloat16())
    assert (y.double() - truth).square().mean().sqrt() <= 2 * (
        eager.double() - truth
    ).square().mean().sqrt()
