"""lorafast.Linear as a module: construction, sharing, state dicts, meta, copies, dtypes, merging."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import lorafast
from lorafast import DoRA, LaMDA, LoRA

N, K = 14, 10
ADAPTERS = [
    LoRA(r=3), LoRA(r=3, lora_bias=True), LoRA(r=3, freeze_A=True, init="gaussian", rslora=True), DoRA(r=3), DoRA(r=3, axis="in"),
    DoRA(r=3, dropout_on="both", keep="inner", dropout=0.2), LaMDA(r=3), LaMDA(r=3, init="zero"), LaMDA(r=3, init="repo"),
]  # fmt: skip
each_adapter = pytest.mark.parametrize("adapter", ADAPTERS, ids=repr)
pytestmark = pytest.mark.filterwarnings("ignore:.*now holds the residual")


def trained(adapter, **settings):
    """A layer whose adapter has moved away from its start."""
    layer = lorafast.Linear(K, N, adapter=adapter, **settings)
    with torch.no_grad():
        for name, part in layer.named_parameters():
            if name.startswith("lora"):
                part.add_(torch.randn_like(part) * 0.2)
    return layer.eval()


def x_of(dtype=torch.float32):
    return torch.randn(5, K).to(dtype)


@each_adapter
def test_a_new_layer_is_its_base(adapter):
    base = nn.Linear(K, N)
    x = x_of()
    want = base(x)
    layer = lorafast.Linear.from_linear(base, adapter).eval()
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-6)
    assert layer.weight is base.weight
    assert layer.bias is base.bias


@each_adapter
def test_what_trains(adapter):
    layer = lorafast.Linear(K, N, adapter=adapter)
    layer.train()(x_of()).sum().backward()
    grads = {name for name, p in layer.named_parameters() if p.grad is not None}
    expected = {name for name, part in adapter.parts(N, K).items() if part.trained}
    assert grads == expected == {name for name, p in layer.named_parameters() if p.requires_grad}


def test_names_shapes_and_properties():
    layer = lorafast.Linear(K, N, bias=False, adapter=DoRA(r=3, alpha=6))
    assert [name for name, _ in layer.named_parameters()] == ["weight", "lora_A", "lora_B", "lora_magnitude"]
    assert layer.lora_A.shape == (3, K)
    assert layer.lora_B.shape == (N, 3)
    assert layer.magnitude is layer.lora_magnitude
    assert layer.core is None
    assert layer.out_scale is None
    assert (layer.r, layer.scaling, layer.adapter.alpha, layer.merged, layer.bias) == (3, 2.0, 6, False, None)
    lamda = lorafast.Linear(K, N, adapter=LaMDA(r=3))
    assert lamda.core is lamda.lora_core
    assert lamda.core.shape == (3, 3)
    assert isinstance(layer, nn.Linear)
    assert repr(layer) == "Linear(in_features=10, out_features=14, bias=False, adapter=DoRA(r=3, alpha=6))"
    layer.merge()
    assert repr(layer).endswith("DoRA(r=3, alpha=6), merged)")
    assert repr(lorafast.Linear(K, N).adapter) == "LoRA(r=8, alpha=8)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_adapter_dtype(dtype):
    expected = torch.float32 if dtype.itemsize == 2 else dtype
    layer = lorafast.Linear(K, N, adapter=DoRA(r=3), dtype=dtype)
    assert {p.dtype for name, p in layer.named_parameters() if name.startswith("lora")} == {expected}
    assert layer(x_of(dtype)).dtype == dtype
    assert lorafast.Linear(K, N, dtype=dtype, adapter_dtype=torch.bfloat16).lora_A.dtype == torch.bfloat16
    assert {p.dtype for p in layer.to(torch.bfloat16).parameters()} == {torch.bfloat16}


@each_adapter
def test_a_plain_state_dict_loads_and_starts_the_adapter_anew(adapter):
    base, layer, x = nn.Linear(K, N), trained(adapter), x_of()
    assert layer.load_state_dict(base.state_dict()) == nn.Module().load_state_dict({})
    torch.testing.assert_close(layer(x), base(x), rtol=1e-5, atol=1e-6)


@each_adapter
def test_a_full_state_dict_is_loaded_as_it_is(adapter):
    layer, other, x = trained(adapter), lorafast.Linear(K, N, adapter=adapter).eval(), x_of()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_part_of_an_adapter_is_an_error_and_changes_nothing():
    layer = nn.Sequential(trained(DoRA(r=3)))
    before = copy.deepcopy(layer.state_dict())
    partial = {name: torch.zeros_like(value) for name, value in before.items() if name != "0.lora_magnitude"}
    with pytest.raises(RuntimeError, match=r"0\.lora_magnitude missing for DoRA\(r=3"):
        layer.load_state_dict(partial)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


def test_strict_still_means_strict():
    layer = trained(LoRA(r=3))
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected.*other"):
        layer.load_state_dict(state | {"other": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"Missing.*bias"):
        layer.load_state_dict({"weight": state["weight"]})
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict({"weight": torch.zeros(3, 3), "bias": state["bias"]})


@each_adapter
def test_the_meta_device_waits_for_the_weights(adapter):
    base, x = nn.Linear(K, N), x_of()
    want = base(x)
    with torch.device("meta"):
        layer = lorafast.Linear(K, N, adapter=adapter)
    assert layer.lora_B.is_meta
    layer.load_state_dict(base.state_dict(), assign=True)
    assert not any(p.is_meta for p in layer.parameters())
    torch.testing.assert_close(layer.eval()(x), want, rtol=1e-5, atol=1e-6)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} <= set(adapter.parts(N, K))
    emptied = lorafast.Linear(K, N, adapter=adapter, device="meta").to_empty(device="cpu").eval()
    emptied.load_state_dict(layer.state_dict())
    assert torch.equal(emptied(x), layer(x))


@each_adapter
def test_copies(adapter):
    layer, x = trained(adapter), x_of()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), layer(x))
        assert other.adapter == layer.adapter
        assert other.lora_A is not layer.lora_A
    layer.merge()
    other = copy.deepcopy(layer)
    other.unmerge()
    layer.unmerge()
    assert torch.equal(other.weight, layer.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@each_adapter
def test_merge_and_unmerge(adapter, dtype):
    layer, x = trained(adapter, dtype=dtype), x_of(dtype)
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
        norm = lorafast.functional.row_norm(before, layer.lora_A, layer.lora_B, scaling=layer.scaling, axis=adapter.axis)
        gain = (
            (layer.magnitude / norm).detach().view(-1, 1)
            if adapter.axis == "out"
            else (layer.magnitude / norm).detach().view(1, -1)
        )
    # Nothing is wider than float64, so there the fold and its inverse round four times, not twice.
    roundings = 2 if dtype == torch.float64 and layer.magnitude is not None else 1
    bound = roundings * ulp(merged).double() / 2 / gain.abs().double() + roundings * ulp(layer.weight).double() / 2
    assert ((layer.weight.double() - before.double()).abs() <= bound).all()
    assert torch.equal(layer.bias, bias)
    layer.unmerge()


def ulp(t):
    t = t.detach().abs()
    return torch.nextafter(t, torch.full_like(t, float("inf"))) - t if t.dtype in (torch.float32, torch.float64) else _half_ulp(t)


def _half_ulp(t):
    bits = t.view(torch.int16)
    return (bits + 1).view(t.dtype).double() - t.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_adapter
def test_merge_keep_unmerges_bitwise(adapter, dtype):
    layer = trained(adapter, dtype=dtype)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.merge(keep=True)
    with torch.no_grad():
        layer.lora_B.normal_()  # whatever happens to the factors, the base comes back
    layer.unmerge()
    for name in ("weight", "bias"):
        assert torch.equal(layer.state_dict()[name], before[name])


def test_unmerge_takes_out_what_was_put_in_even_if_the_factors_moved():
    layer = trained(DoRA(r=3), dtype=torch.float64)
    before = layer.weight.clone()
    layer.merge()
    with torch.no_grad():
        layer.lora_B.normal_(), layer.lora_magnitude.normal_()
    layer.unmerge()
    torch.testing.assert_close(layer.weight, before, rtol=1e-13, atol=1e-13)


def test_what_cannot_be_merged_says_so_and_stays():
    layer = trained(DoRA(r=3))
    with torch.no_grad():
        layer.lora_magnitude[2] = 0
    before = layer.weight.clone()
    with pytest.raises(ValueError, match=r"magnitude \(14,\).*keep=True"):
        layer.merge()
    assert torch.equal(layer.weight, before)
    assert not layer.merged
    layer.merge(keep=True)
    layer.unmerge()
    assert torch.equal(layer.weight, before)
    with pytest.raises(ValueError, match=r"lora_bias \(14,\)"):
        trained(LoRA(r=3, lora_bias=True), bias=False).merge()
    with pytest.raises(RuntimeError, match="meta"):
        lorafast.Linear(K, N, device="meta").merge()


def test_a_merged_layer_neither_saves_nor_loads_nor_restarts():
    layer = trained(LoRA(r=3))
    state = layer.state_dict()
    layer.merge()
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.state_dict()
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.reset_adapter()


def test_eval_never_merges():
    layer = trained(LoRA(r=3))
    before = layer.weight.clone()
    layer.train().eval()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("adapter", [LaMDA(r=3), LoRA(r=3), DoRA(r=3)], ids=repr)
def test_reset_adapter_loses_nothing_of_a_fresh_layer(adapter):
    base, x = nn.Linear(K, N), x_of()
    want = base(x)
    layer = lorafast.Linear.from_linear(base, adapter).eval()
    for _ in range(3):
        layer.reset_adapter()
        torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-6)


def test_a_residual_start_on_a_shared_weight_warns():
    with pytest.warns(UserWarning, match=r"\(14, 10\) shared with the linear now holds the residual"):
        lorafast.Linear.from_linear(nn.Linear(K, N), LaMDA(r=3))


def test_refusals_leave_the_linear_as_it_was():
    base = nn.Linear(K, N)
    before = base.weight.clone()
    for wrong, message in ((LaMDA(r=11), r"r=11 exceeds min\(N, K\)=10 of weight \(14, 10\)"), ("lora", "adapter must be")):
        with pytest.raises((ValueError, TypeError), match=message):
            lorafast.Linear.from_linear(base, wrong)
    assert base.weight.requires_grad
    assert torch.equal(base.weight, before)
    with pytest.raises(TypeError, match=r"plain torch\.nn\.Linear"):
        lorafast.Linear.from_linear(nn.Conv1d(2, 2, 1))
    with pytest.raises(TypeError, match=r"plain torch\.nn\.Linear"):
        lorafast.Linear.from_linear(lorafast.Linear(K, N))
    with pytest.raises(TypeError, match="adapter_dtype"):
        lorafast.Linear(K, N, adapter_dtype=torch.int8)


def test_a_trained_weight_gets_its_gradient():
    layer = trained(DoRA(r=3))
    layer.weight.requires_grad_(True)
    layer(x_of()).sum().backward()
    assert layer.weight.grad is not None
    assert layer.lora_magnitude.grad is not None


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
