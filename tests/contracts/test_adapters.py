"""The contract of adapters: start, training, saved bytes, merging, states, copies, files."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from helpers.adapter_layers import ADAPTERS, K, N, each_adapter, inputs, trained_layer
from torch import nn

import lorafast
from lorafast import DoRA, testing

pytestmark = pytest.mark.filterwarnings("ignore:.*now holds the residual")


def test_every_adapter_there_is_is_tested():
    known = {method.adapter for method in lorafast.list_methods() if method.adapter}
    assert {type(adapter) for adapter in ADAPTERS} == known


@each_adapter
def test_a_new_layer_is_its_base(adapter):
    base = nn.Linear(K, N)
    x = inputs()
    want = base(x)
    layer = lorafast.Linear.from_linear(base, adapter).eval()
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-6)
    assert layer.weight is base.weight
    assert layer.bias is base.bias


@each_adapter
def test_what_trains(adapter):
    layer = lorafast.Linear(K, N, adapter=adapter)
    layer.train()(inputs()).sum().backward()
    grads = {name for name, p in layer.named_parameters() if p.grad is not None}
    expected = {name for name, part in adapter.tensor_specs(N, K).items() if part.trained}
    assert grads == expected == {name for name, p in layer.named_parameters() if p.requires_grad}


@each_adapter
def test_training_falls(adapter):
    torch.manual_seed(1)
    layer, x = lorafast.Linear(K, N, adapter=adapter), torch.randn(64, K)
    target = torch.randn(64, N)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@each_adapter
def test_merge_and_unmerge(adapter, dtype):
    layer, x = trained_layer(adapter, dtype=dtype), inputs(dtype)
    y, before = layer(x), layer.weight.detach().clone()
    bias = layer.bias.detach().clone()
    layer.merge()
    assert layer.merged
    tolerance = torch.finfo(dtype).eps * 30
    torch.testing.assert_close(layer(x), y, rtol=tolerance, atol=tolerance)
    merged = layer.weight.detach().clone()
    layer.merge()
    assert torch.equal(layer.weight, merged)
    layer.unmerge()
    assert not layer.merged
    gain = torch.ones(N, 1)
    if layer.magnitude is not None:
        norm = lorafast.functional.row_norm(
            before, layer.lora_A, layer.lora_B, scaling=layer.scaling, axis=adapter.axis
        )
        gain = (
            (layer.magnitude / norm).detach().view(-1, 1)
            if adapter.axis == "out"
            else (layer.magnitude / norm).detach().view(1, -1)
        )
    bound = ulp(merged).double() / 2 / gain.abs().double() + ulp(layer.weight).double() / 2
    if dtype == torch.float64 and layer.magnitude is not None:
        # Nothing is wider than float64: W + delta rounds on the way in, and W'/gain on the way out.
        bound += ulp(merged / gain)
    assert ((layer.weight.double() - before.double()).abs() <= bound).all()
    assert torch.equal(layer.bias, bias)
    layer.unmerge()


def ulp(t):
    t = t.detach().abs()
    return (
        torch.nextafter(t, torch.full_like(t, float("inf"))) - t
        if t.dtype in (torch.float32, torch.float64)
        else _half_ulp(t)
    )


def _half_ulp(t):
    bits = t.view(torch.int16)
    return (bits + 1).view(t.dtype).double() - t.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_adapter
def test_merge_keep_unmerges_bitwise(adapter, dtype):
    layer = trained_layer(adapter, dtype=dtype)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.merge(keep=True)
    with torch.no_grad():
        layer.lora_B.normal_()  # whatever happens to the factors, the base comes back
    layer.unmerge()
    for name in ("weight", "bias"):
        assert torch.equal(layer.state_dict()[name], before[name])


@each_adapter
def test_a_plain_state_dict_loads_and_starts_the_adapter_anew(adapter):
    base, layer, x = nn.Linear(K, N), trained_layer(adapter), inputs()
    assert layer.load_state_dict(base.state_dict()) == nn.Module().load_state_dict({})
    torch.testing.assert_close(layer(x), base(x), rtol=1e-5, atol=1e-6)


@each_adapter
def test_a_full_state_dict_is_loaded_as_it_is(adapter):
    layer, other, x = (
        trained_layer(adapter),
        lorafast.Linear(K, N, adapter=adapter).eval(),
        inputs(),
    )
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


@each_adapter
def test_the_meta_device_waits_for_the_weights(adapter):
    base, x = nn.Linear(K, N), inputs()
    want = base(x)
    with torch.device("meta"):
        layer = lorafast.Linear(K, N, adapter=adapter)
    assert layer.lora_B.is_meta
    layer.load_state_dict(base.state_dict(), assign=True)
    assert not any(p.is_meta for p in layer.parameters())
    torch.testing.assert_close(layer.eval()(x), want, rtol=1e-5, atol=1e-6)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} <= set(
        adapter.tensor_specs(N, K)
    )
    emptied = lorafast.Linear(K, N, adapter=adapter, device="meta").to_empty(device="cpu").eval()
    emptied.load_state_dict(layer.state_dict())
    assert torch.equal(emptied(x), layer(x))


@each_adapter
def test_copies(adapter):
    layer, x = trained_layer(adapter), inputs()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(other(x), layer(x))
        assert other.adapter == layer.adapter
        assert other.lora_A is not layer.lora_A
    layer.merge()
    other = copy.deepcopy(layer)
    other.unmerge()
    layer.unmerge()
    assert torch.equal(other.weight, layer.weight)


@each_adapter
def test_reset_adapter_forgets_training_and_nothing_else(adapter):
    base, x = nn.Linear(K, N), inputs()
    want = base(x)
    layer = pickle.loads(pickle.dumps(lorafast.Linear.from_linear(base, adapter).eval()))
    with torch.no_grad():
        for name, part in layer.named_parameters():
            if name.startswith("lora"):
                part.fill_(float("nan"))
    for frozen in (layer.r - 1, layer.r):
        layer.freeze_columns(frozen)
        layer.scaling = 11.0
        layer.reset_adapter()
        torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)
        assert layer.frozen_columns == 0
        assert layer.lora_B.requires_grad == adapter.tensor_specs(N, K)["lora_B"].trained


# Variants that differ in what they keep alone.
KEEPING = [DoRA(r=3, keep="recompute"), DoRA(r=3, freeze_A=True), DoRA(r=3, detach_norm=False)]


@pytest.mark.parametrize("adapter", [*ADAPTERS, *KEEPING], ids=repr)
@pytest.mark.parametrize(
    ("dtype", "bias"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, False)]
)
def test_the_bytes_that_explain_names_are_those_autograd_keeps(
    adapter, dtype, bias, few_tokens_by_op
):
    layer = lorafast.Linear(K, N, bias=bias, adapter=adapter, dtype=dtype)
    (row,) = lorafast.explain(layer).rows
    x = torch.randn(7, K).to(dtype).requires_grad_()
    saved = testing.saved(lambda: layer(x), {"x": x}, list(layer.parameters()))
    fixed = (8 if adapter.dropout else 0) + (
        4 * layer.magnitude.numel() if layer.magnitude is not None else 0
    )
    assert saved.own == row.saved * 7 + fixed
    assert saved.referenced == set(row.referenced)


@each_adapter
def test_a_spec_survives_a_pickle_and_a_copy(adapter):
    for other in (pickle.loads(pickle.dumps(adapter)), copy.deepcopy(adapter)):
        assert type(other) is type(adapter)
        assert repr(other) == repr(adapter)
        assert other.scaling == adapter.scaling


def trained_model(adapter, base):
    """A model of one linear, adapted, its adapter away from its start, in eval."""
    if isinstance(getattr(adapter, "init", None), lorafast.LoRAGA):
        # In a model a gradient goes by the layer's name.
        gradients = {"0": adapter.init.gradients}
        adapter = dataclasses.replace(adapter, init=lorafast.LoRAGA(gradients))
    model = lorafast.adapt(nn.Sequential(base), adapter, ["0"]).eval()
    with torch.no_grad():
        for parameter in lorafast.adapter_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@each_adapter
def test_disabled_it_is_the_base_and_enabled_what_it_was(adapter):
    base, x = nn.Linear(K, N), inputs()
    want = base(x)
    model = trained_model(adapter, base)
    y = model(x)
    assert not torch.allclose(y, want, rtol=1e-2, atol=1e-2)
    with lorafast.disable_adapter(model):
        torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(model(x), y)
    torch.testing.assert_close(lorafast.merge(copy.deepcopy(model))(x), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lorafast.unload(model)(x), want, rtol=1e-5, atol=1e-6)
    assert type(model[0]) is nn.Linear


@each_adapter
def test_a_file_brings_it_back(adapter, tmp_path):
    base, x = nn.Linear(K, N), inputs()
    model = trained_model(adapter, copy.deepcopy(base))
    lorafast.save_adapter(model, tmp_path)
    loaded = lorafast.load_adapter(nn.Sequential(copy.deepcopy(base)), tmp_path).eval()
    # Exactly, unless the weight had to give up what the adapter starts from.
    tolerance = 1e-5 if adapter.residual else 0
    torch.testing.assert_close(loaded(x), model(x), rtol=tolerance, atol=tolerance)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
