"""FP8Linear: a linear layer on its dequantised weight, of which it keeps nothing of full size."""

import copy
import io

import pytest
import torch
from torch import nn

from lorafast.engine import weight_buffers
from lorafast.quantised import formats
from lorafast.quantised.fp8_linear import FP8Linear

K, N = 65, 37


def layer(dtype=torch.float32, bias=True, trains=False):
    torch.manual_seed(0)
    b = nn.Parameter(torch.randn(N, dtype=dtype), requires_grad=trains) if bias else None
    module = FP8Linear(K, N, b, dtype)
    formats.of(module).requantise(torch.randn(N, K, dtype=dtype))
    return module


def right(module, x):
    """The output and the gradient of x by torch on the dequantised weight."""
    x = x.detach().requires_grad_()
    weight = formats.of(module).whole(torch.empty(N, K, dtype=x.dtype))
    y = nn.functional.linear(x, weight, module.bias)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    return y, grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, K), (K,), (0, K), (2, 3, K)])
def test_it_is_the_linear_of_the_dequantised_weight(dtype, shape):
    module = layer(dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    y = module(x)
    expected, grad = right(module, x)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, grad)


def test_strided_inputs_and_a_bias_that_trains():
    module = layer(trains=True)
    x = torch.randn(K, 6).t()
    module(x).sum().backward()
    assert torch.equal(module.bias.grad, torch.full((N,), 6.0))


def test_nothing_is_kept_and_the_buffer_is_shared():
    weight_buffers.release()
    module, kept = layer(), []
    x = torch.randn(4, K, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = module(module(x)[:, :1].expand(4, K))
    y.sum().backward()
    assert kept == []
    ((buffer,),) = weight_buffers._free.values()
    assert buffer.numel() == N * K


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: nn.Sequential(m).double()[0],
        lambda m: m.to("cpu"),
        lambda m: m.share_memory(),
    ],
)
def test_casts_leave_the_numbers_and_the_scales(cast):
    module = layer()
    weight, scale = module.weight.clone(), module.weight_scale.clone()
    moved = cast(module)
    assert moved.weight.dtype == torch.float8_e4m3fn
    assert not moved.weight.requires_grad
    assert torch.equal(moved.weight.float(), weight.float())
    assert torch.equal(moved.weight_scale, scale)


def test_an_empty_one_on_another_device():
    module = layer().to("meta").to_empty(device="cpu")
    assert (module.weight.dtype, module.weight_scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert formats.of(module).why_not() is None


def test_a_cast_goes_to_the_bias_and_to_what_the_layer_is_merged_into():
    module = layer().to(torch.bfloat16)
    assert module.bias.dtype == formats.of(module).dtype == torch.bfloat16
    assert formats.of(module.double()).dtype == torch.bfloat16
    assert formats.of(layer(torch.float32, bias=False)).dtype == torch.float32


def test_autocast():
    module = layer()
    x = torch.randn(4, K, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    y.float().sum().backward()
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.float32)


def test_copies_pickles_and_state_dicts():
    module = layer()
    x = torch.randn(4, K)
    fresh = FP8Linear(K, N, nn.Parameter(torch.zeros(N)))
    fresh.load_state_dict(module.state_dict())
    # torch's plain pickles cannot read FP8 tensors; its files can.
    torch.save(module, file := io.BytesIO())
    file.seek(0)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False), fresh):
        assert torch.equal(other(x), module(x))
    assert list(module.state_dict()) == ["weight", "bias", "weight_scale"]


@pytest.mark.compile
def test_compiled_it_runs_outside_of_the_graph():
    module = layer()
    x = torch.randn(4, K)
    assert torch.equal(torch.compile(module, backend="eager")(x), module(x))
