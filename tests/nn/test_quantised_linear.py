"""An adapter beside a quantised weight: what a dense layer on the dequantised weight gives."""

import contextlib
import copy
import gc
import pickle
import weakref

import pytest
import torch
from helpers import host_path
from helpers.quantised_layers import int8, quantised
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import lorafast
from lorafast.engine import plain_products, weight_buffers
from lorafast.engine.problem import CallOptions, LayerTensors
from lorafast.nn.quantised_linear import QuantisedLinear
from lorafast.quantised import formats

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

K, N = 128, 96
ADAPTERS = [
    lorafast.LoRA(r=4),
    lorafast.LoRA(r=4, dropout=0.3),
    lorafast.LoRA(r=4, rslora=True),
    lorafast.DoRA(r=4),
    lorafast.DoRA(r=4, axis="in", dropout=0.3),
    lorafast.DoRA(r=4, keep="recompute"),
    lorafast.DoRA(r=4, keep="output"),
    lorafast.LaMDA(r=4, init="zero"),
    lorafast.VeRA(r=4),
    lorafast.AdaLoRA(init_r=12, target_r=8),
    lorafast.AFLoRA(r=4),
]


@pytest.fixture(autouse=True)
def dense_by_the_op(monkeypatch):
    """Dense layers on few tokens run the op too where the host path is off, not plain autograd."""
    for most in ("MOST_ELEMENTS", "MOST_ELEMENTS_COPIED"):
        monkeypatch.setattr(plain_products, most, -1)


def pair(adapter, dtype=torch.float32, make=quantised, bias=True):
    """Return a dense and a quantised model of one layer, with the same weight and adapter."""
    torch.manual_seed(0)
    linear = nn.Linear(K, N, bias, dtype=dtype)
    packed = nn.Sequential(make(linear))
    lorafast.adapt(packed, adapter, target_modules=["0"], seed=1)
    linear.weight.data.copy_(packed[0].dequantised(dtype))
    dense = lorafast.adapt(nn.Sequential(linear), adapter, target_modules=["0"], seed=1)
    if packed[0].lora_magnitude is not None:
        dense[0].lora_magnitude.data.copy_(packed[0].lora_magnitude)
    for part in ("lora_A", "lora_B", "lora_core", "lora_out_scale"):
        if getattr(packed[0], part) is not None:
            values = torch.randn_like(getattr(packed[0], part)) / 8
            for model in (dense, packed):
                getattr(model[0], part).data.copy_(values)
    return dense, packed


def step(model, x):
    """Return what a step and a call without gradients give, and the bytes that autograd keeps."""
    weight, kept = model[0]._parameters.get("weight"), {}

    def note(tensor):
        if weight is None or tensor.data_ptr() != weight.data_ptr():
            kept[tensor.data_ptr(), tensor.shape] = tensor.numel() * tensor.element_size()
        return tensor

    x = x.clone().requires_grad_()
    torch.manual_seed(2)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = model(x)
    y.square().sum().backward()
    with torch.no_grad():
        alone = model.eval()(x)
    model.train()
    grads = {
        name.rpartition(".")[2]: one.grad
        for name, one in model.named_parameters()
        if one.grad is not None
    }
    return {"y": y, "alone": alone, "x": x.grad} | grads, sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
@pytest.mark.filterwarnings("ignore:.*train without a schedule")
def test_it_is_the_dense_layer_on_the_dequantised_weight(adapter, dtype):
    dense, packed = pair(adapter, dtype)
    x = torch.randn(2, 20, K, dtype=dtype)
    (expected, bytes_dense), (found, bytes_packed) = step(dense, x), step(packed, x)
    assert expected.keys() == found.keys()
    for name, one in expected.items():
        assert torch.equal(found[name], one), name
    # The host path saves out of its one node what the Python path saves.
    assert bytes_packed == bytes_dense > 0


@pytest.mark.parametrize("make", [int8, lambda linear: quantised(linear, quant_type="fp4")])
def test_every_format_of_bitsandbytes(make):
    dense, packed = pair(lorafast.DoRA(r=4), make=make, bias=False)
    x = torch.randn(20, K)
    (expected, _), (found, _) = step(dense, x), step(packed, x)
    for name, one in expected.items():
        assert torch.equal(found[name], one), name


def test_few_tokens_none_and_leading_dims():
    dense, packed = pair(lorafast.LoRA(r=4))
    for shape in ((0, K), (1, K), (K,), (2, 0, K), (2, 3, 4, K)):
        x = torch.randn(shape)
        (expected, _), (found, _) = step(dense, x), step(packed, x)
        assert torch.equal(found["y"], expected["y"])
        assert torch.equal(found["lora_A"], expected["lora_A"])


def test_layers_share_one_buffer_and_no_graph_holds_it():
    weight_buffers.release()
    model = nn.Sequential(*(quantised(nn.Linear(64, 64)) for _ in range(3)))
    lorafast.adapt(model, lorafast.LoRA(r=2))
    model(torch.randn(4, 64)).sum().backward()
    ((buffer,),) = weight_buffers._free.values()
    assert buffer.numel() == 64 * 64
    with torch.inference_mode():
        model(torch.randn(4, 64))
    model(torch.randn(4, 64)).sum().backward()


def test_what_is_overwritten_between_forward_and_backward_is_dequantised_again():
    model = nn.Sequential(*(quantised(nn.Linear(64, 64)) for _ in range(2)))
    lorafast.adapt(model, lorafast.LoRA(r=2))
    x = torch.randn(4, 64, requires_grad=True)
    expected = model[1].dequantised().t() @ torch.ones(64) @ model[0].dequantised()
    model(x).sum().backward()
    torch.testing.assert_close(x.grad, expected.expand(4, 64))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant):
    _, packed = pair(lorafast.DoRA(r=4, dropout=0.2))
    x = torch.randn(6, K, requires_grad=True)
    grads = []
    for run in (packed, lambda x: checkpoint(packed, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        run(x).square().sum().backward()
        grads.append([x.grad, packed[0].lora_A.grad, packed[0].lora_magnitude.grad])
        x.grad = None
        packed.zero_grad()
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def test_it_computes_in_the_dtype_that_the_module_is_told():
    linear = nn.Linear(K, N)
    model = nn.Sequential(quantised(linear, torch.bfloat16))
    lorafast.adapt(model, lorafast.LoRA(r=4))
    x = torch.randn(20, K)
    y = model(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, model[0].base_layer(x), rtol=2**-6, atol=2**-6)
    assert not torch.equal(
        y, nn.functional.linear(x, model[0].dequantised(torch.float32), linear.bias)
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16


def test_a_copy_a_pickle_a_disabled_layer_and_the_base():
    _, packed = pair(lorafast.DoRA(r=4))
    x = torch.randn(20, K)
    y, base = packed(x), packed[0].base_layer(x)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(other(x), y)
        assert other[0].base_layer is not packed[0].base_layer
    with lorafast.disable_adapter(packed):
        assert torch.equal(packed(x), base)
    assert torch.equal(packed(x), y)
    assert type(lorafast.unload(packed)[0]) is bnb.nn.Linear4bit
    assert torch.equal(packed(x), base)


def test_an_adapter_is_saved_and_loaded_and_read_by_the_dense_model(tmp_path):
    dense, packed = pair(lorafast.DoRA(r=4))
    x = torch.randn(20, K)
    lorafast.save_adapter(packed, tmp_path)
    for model in (dense, packed):
        base = lorafast.unload(copy.deepcopy(model))
        lorafast.load_adapter(base, tmp_path)
        assert torch.equal(base(x), packed(x))


def test_another_base_layer_is_the_one_that_is_computed_with():
    _, packed = pair(lorafast.LoRA(r=4))
    layer, x = packed[0], torch.randn(20, K)
    before, delta = layer.quantised, packed(x) - layer.base_layer(x)
    assert layer.quantised is before
    for make in (quantised, int8):
        layer.base_layer = make(nn.Linear(K, N))
        expected = nn.functional.linear(x, layer.dequantised(), layer.base_layer.bias)
        torch.testing.assert_close(packed(x), expected + delta)
        assert layer.weight is layer.base_layer.weight
    assert "int8" in repr(layer)
    layer.base_layer = nn.Linear(K, N)
    with pytest.raises(TypeError, match="base_layer Linear has no weight of a known format"):
        packed(x)


@pytest.mark.parametrize("strict", [True, False])
def test_a_trained_adapter_stays_where_the_state_dict_is_of_the_bare_module(strict):
    _, packed = pair(lorafast.LoRA(r=4))
    before = copy.deepcopy(packed[0].state_dict())
    state = lorafast.unload(copy.deepcopy(packed)).state_dict()
    with pytest.raises(RuntimeError, match=r"0\.lora_A") if strict else contextlib.nullcontext():
        packed.load_state_dict(state, strict=strict)
    for name, value in packed[0].state_dict().items():
        assert torch.equal(value, before[name]), name


def test_reset_parameters_is_refused():
    _, packed = pair(lorafast.LoRA(r=4))
    with pytest.raises(RuntimeError, match=r"would have to be quantised: reset_adapter\(\)"):
        packed[0].reset_parameters()


@pytest.mark.compile
def test_compiled_it_runs_outside_of_the_graph():
    _, packed = pair(lorafast.LoRA(r=4))
    x = torch.randn(20, K)
    expected = packed(x)
    assert torch.equal(torch.compile(packed, backend="eager")(x), expected)


@pytest.mark.parametrize(
    ("adapter", "why"),
    [
        (lorafast.LoRA(r=2, init=lorafast.PiSSA()), "takes a delta out of the weight"),
        (lorafast.LaMDA(r=2), r"LaMDA\(init='zero'\)"),
        (lorafast.DoRA(r=2, detach_norm=False), "has no gradient"),
        (lorafast.DoRA(r=2, cache_norm=True), "computed in every call"),
    ],
    ids=str,
)
def test_what_a_quantised_weight_cannot_have_is_refused(adapter, why):
    model = nn.Sequential(quantised(nn.Linear(K, N)))
    before = model[0]
    with pytest.raises(ValueError, match=why):
        lorafast.adapt(model, adapter)
    assert model[0] is before


def test_fp64_is_refused():
    _, packed = pair(lorafast.LoRA(r=4))
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        packed(torch.randn(2, K, dtype=torch.float64))


def test_explain_names_the_format():
    _, packed = pair(lorafast.LoRA(r=4))
    assert isinstance(packed[0], QuantisedLinear)
    assert "nf4" in repr(packed[0])
    said = str(lorafast.explain(packed))
    assert f"the weight, {packed[0].quantised.kind}, is dequantised for every product" in said


@pytest.mark.parametrize(
    ("adapter", "schedule"),
    [
        (lorafast.LaMDA(r=4, init="zero"), lorafast.schedule.LaMDAFreeze),
        (lorafast.AdaLoRA(init_r=12, target_r=8), lorafast.schedule.AdaLoRA),
        (lorafast.AFLoRA(r=4), lorafast.schedule.AFLoRA),
    ],
    ids=str,
)
def test_a_schedule_trains_it_as_it_trains_the_dense_layer(adapter, schedule):
    models = pair(adapter)
    x, target = torch.randn(20, K), torch.randn(20, N)
    for model in models:
        parameters = lorafast.adapter_parameters(model)
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        steps = schedule(model, total_steps=12)
        for _ in range(12):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
            steps.step()
    dense, packed = (dict(model[0].named_parameters()) for model in models)
    for name, one in dense.items():
        if name.startswith("lora"):
            assert torch.equal(packed[name], one), name


def test_no_tensor_of_an_observer_stays_in_a_buffer():
    dense, packed = pair(lorafast.LoRA(r=4))
    x = torch.randn(20, K)
    weight_buffers.release()
    torch.export.export(packed.eval(), (x,))
    with FakeTensorMode(allow_non_fake_inputs=True):
        packed(x)
    assert not weight_buffers._free
    (expected, _), (found, _) = step(dense, x), step(packed, x)
    assert type(found["y"]) is torch.Tensor
    assert torch.equal(found["y"], expected["y"])


def test_a_trained_scaling_reads_a_weight_of_its_own():
    models = [quantised(nn.Linear(64, 64, bias=False)) for _ in range(2)]
    weights = [formats.of(one).whole(torch.empty(64, 64)) for one in models]
    x, scaling = torch.randn(3, 64, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    A, B = torch.randn(2, 64), torch.randn(64, 2)
    tensors, options = LayerTensors(None, lora_A=A, lora_B=B), CallOptions(scaling, keep="auto")
    y = x
    for one in models:
        y = lorafast.functional.by_quantised(y, formats.of(one), tensors, options)
    (dx,) = torch.autograd.grad(y.sum(), x)
    first, second = (W + 2.0 * B @ A for W in weights)
    torch.testing.assert_close(dx, (torch.ones(3, 64) @ second) @ first, rtol=1e-4, atol=1e-3)


def test_a_weight_changed_since_forward_is_noticed():
    _, packed = pair(lorafast.LoRA(r=4))
    y = packed(torch.randn(20, K, requires_grad=True))
    packed[0].weight.zero_()
    with pytest.raises(RuntimeError, match="quantised weight of this call has been modified"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M", [1, 8, 40])
def test_the_bits_are_the_same_without_gradients_and_by_python(M, dtype, calls_by_python):
    _, packed = pair(lorafast.LoRA(r=4), dtype)
    x = torch.randn(M, K, dtype=dtype)
    with torch.no_grad():
        alone = packed(x)
    assert torch.equal(packed(x), alone)


def test_transforms_are_refused_in_words():
    _, packed = pair(lorafast.DoRA(r=4))
    with pytest.raises(NotImplementedError, match=r"no torch\.func transforms"):
        torch.vmap(packed)(torch.randn(5, 3, K))


def test_a_larger_weight_takes_the_place_of_the_buffer():
    weight_buffers.release()
    for size in (64, 128):
        model = nn.Sequential(quantised(nn.Linear(size, size)))
        lorafast.adapt(model, lorafast.LoRA(r=2))(torch.randn(4, size))
    ((buffer,),) = weight_buffers._free.values()
    assert buffer.numel() == 128 * 128


def test_a_weight_that_is_replaced_before_backward_is_an_error():
    model = nn.Sequential(quantised(nn.Linear(64, 64)))
    lorafast.adapt(model, lorafast.LoRA(r=2))
    x = torch.randn(4, 64, requires_grad=True)
    loss = model(x).sum()
    other = quantised(nn.Linear(64, 64))
    model[0].base_layer.weight = other.weight
    with pytest.raises(RuntimeError, match="modified in place or replaced"):
        loss.backward()


def test_an_output_does_not_keep_the_quantised_weight_after_backward():
    model = nn.Sequential(quantised(nn.Linear(64, 64)))
    lorafast.adapt(model, lorafast.LoRA(r=2))
    # The node of the Python path lives as long as y.
    host_path.ready()
    packed = weakref.ref(model[0].base_layer.weight)
    y = model(torch.randn(4, 64, requires_grad=True))
    y.sum().backward()
    del model
    gc.collect()
    assert y.grad_fn is not None
    assert packed() is None
