"""torch.compile: one graph, no recompilation for another M, and the same numbers."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import lorafast

pytestmark = pytest.mark.compile

ADAPTERS = {
    "lora": lorafast.LoRA(r=4),
    "lora-bias": lorafast.LoRA(r=4, lora_bias=True),
    "dora": lorafast.DoRA(r=4),
    "dora-exact": lorafast.DoRA(r=4, detach_norm=False),
    "dora-in": lorafast.DoRA(r=4, axis="in"),
    "lamda": lorafast.LaMDA(r=4),
}


def layer_of(adapter, bias=True):
    layer = lorafast.Linear(12, 10, bias=bias, adapter=adapter)
    with torch.no_grad():
        layer.lora_B.add_(torch.randn_like(layer.lora_B))
    return layer


def step(function, layer, x):
    x = x.detach().requires_grad_()
    y = function(x)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def assert_equal_steps(layer, compiled, rows):
    for M in rows:
        x = torch.randn(2, M, 12)
        for got, want in zip(step(compiled, layer, x), step(layer, layer, x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    # Inductor asserts on NaN-filled buffers of its own under deterministic mode; the ops are
    # poisoned in every other test.
    torch.use_deterministic_algorithms(False)


def test_dynamic_shapes_need_no_recompile():
    layer = layer_of(ADAPTERS["dora"])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    assert_equal_steps(layer, compiled, (5,))
    seen = counter.frame_count
    assert_equal_steps(layer, compiled, (7, 30, 2))
    assert counter.frame_count == seen


@pytest.mark.usefixtures("few_tokens_by_op")
@pytest.mark.parametrize("name", ADAPTERS)
def test_aot_eager_one_graph_and_one_dynamic_recompile(name):
    layer = layer_of(ADAPTERS[name])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    assert_equal_steps(layer, compiled, (5, 7))
    seen = counter.frame_count
    assert_equal_steps(layer, compiled, (9, 3, 30, 11))
    assert counter.frame_count == seen <= 2


def test_inductor():
    block = torch.nn.Sequential(layer_of(ADAPTERS["lora"]), torch.nn.ReLU())
    layer = block[0]
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for M in (5, 9):
        x = torch.randn(2, M, 12)
        for got, want in zip(step(compiled, layer, x), step(block, layer, x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_inductor_dora_with_dropout_and_an_in_place_op():
    layer = layer_of(lorafast.DoRA(r=4, dropout=0.5, keep="inner"), bias=False)

    def function(x):
        return layer(x).relu_()

    compiled = torch.compile(function, fullgraph=True)
    x = torch.randn(64, 12, requires_grad=True)
    with torch._inductor.config.patch(fallback_random=True):
        torch.manual_seed(1)
        y = compiled(x)
        torch.manual_seed(1)
        want = torch.relu(layer(x))
    torch.testing.assert_close(y, want)
    leaves = [x, layer.lora_A, layer.lora_B, layer.lora_magnitude]
    for got, wanted in zip(
        torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_under_autocast_and_in_eval():
    layer = layer_of(ADAPTERS["dora"]).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(4, 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count == 1


def test_a_tensor_scaling_changes_without_a_recompile():
    layer = layer_of(ADAPTERS["lora"])
    layer.scaling = torch.tensor(2.0)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(4, 12)
    for value in (2.0, 3.0, 0.5):
        layer.scaling.fill_(value)
        torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == 1


def test_freezing_columns_needs_three_graphs_with_dynamic_integers():
    layer = lorafast.Linear(12, 16, adapter=lorafast.LaMDA(r=12))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(4, 12)
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
        for count in range(13):
            layer.freeze_columns(count)
            for got, want in zip(step(compiled, layer, x), step(layer, layer, x), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 3


def test_a_merged_layer_compiles():
    layer = layer_of(ADAPTERS["dora"])
    layer.merge()
    x = torch.randn(4, 12)
    torch.testing.assert_close(
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x)
    )
