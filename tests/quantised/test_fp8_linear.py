"""FP8Linear: a linear layer on its dequantised weight, of which it keeps nothing of full size."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lorafast
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_backward_obeys_the_dtypes_of_forward_inside_autocast(dtype):
    module = layer(dtype, trains=True)
    x = torch.randn(4, K, dtype=dtype, requires_grad=True)
    expected, kept = [], (x, module.bias)
    for enabled in (False, True):
        y = module(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = torch.autograd.grad(y, kept, torch.ones_like(y))
        expected = expected or found
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_an_x_that_the_adapted_layer_refuses_is_refused(dtype):
    x, words = torch.ones(2, K, dtype=dtype), r"x is torch\.\w+; beside a quantised weight"
    module = layer()
    adapted = lorafast.adapt(nn.Sequential(layer()), lorafast.LoRA(r=2), target_modules=["0"])
    for call in (module, adapted):
        with pytest.raises(TypeError, match=words):
            call(x)


def test_transforms_of_torch_func():
    module, x = layer(), torch.randn(4, K)
    expected, grad = right(module, x)
    torch.testing.assert_close(torch.func.vmap(module)(x), expected)

    def loss(x):
        return module(x).square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(x), grad)
    hessian = torch.func.jacrev(torch.func.grad(loss))(x[0])
    weight = formats.of(module).whole(torch.empty(N, K))
    torch.testing.assert_close(hessian, 2 * weight.T @ weight)
    _, tangent = torch.func.jvp(module, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, nn.functional.linear(torch.ones_like(x), weight))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.compile
def test_an_exported_program_computes_the_same(strict):
    module, x = layer(), torch.randn(4, K)
    program = torch.export.export(module, (x,), strict=strict)
    assert torch.equal(program.module()(x), module(x))
    assert not any("lorafast" in str(node.target) for node in program.graph.nodes)


def test_a_traced_one_computes_the_same():
    module, x = layer(), torch.randn(4, K)
    traced = torch.jit.trace(module, (x,))
    assert torch.equal(traced(2 * x), module(2 * x))


def test_modes_see_torchs_operations():
    module, x = layer(), torch.randn(4, K)
    with FlopCounterMode(display=False) as counter:
        y = module(x)
    assert counter.get_total_flops() == 2 * 4 * K * N
    assert torch.equal(y, module(x))
