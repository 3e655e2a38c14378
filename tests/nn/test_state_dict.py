"""State dicts, the meta device, copies, and starting anew."""

import copy

import pytest
import torch
from helpers.adapter_layers import K, N, each_adapter, inputs, trained_layer
from torch import nn

import lorafast
from lorafast import DoRA, LaMDA, LoRA, PiSSA

pytestmark = pytest.mark.filterwarnings("ignore:.*now holds the residual")


def test_part_of_an_adapter_is_an_error_and_changes_nothing():
    layer = nn.Sequential(trained_layer(DoRA(r=3)))
    before = copy.deepcopy(layer.state_dict())
    partial = {
        name: torch.zeros_like(value)
        for name, value in before.items()
        if name != "0.lora_magnitude"
    }
    with pytest.raises(RuntimeError, match=r"0\.lora_magnitude missing for DoRA\(r=3"):
        layer.load_state_dict(partial)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


def test_strict_still_means_strict():
    layer = trained_layer(LoRA(r=3))
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected.*other"):
        layer.load_state_dict(state | {"other": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"Missing.*bias"):
        layer.load_state_dict({"weight": state["weight"]})
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict({"weight": torch.zeros(3, 3), "bias": state["bias"]})


@pytest.mark.parametrize("adapter", [LaMDA(r=3), LoRA(r=3), DoRA(r=3)], ids=repr)
def test_reset_adapter_loses_nothing_of_a_fresh_layer(adapter):
    base, x = nn.Linear(K, N), inputs()
    want = base(x)
    layer = lorafast.Linear.from_linear(base, adapter).eval()
    for _ in range(3):
        layer.reset_adapter()
        torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-6)


def test_what_the_user_froze_stays_frozen_over_a_reset():
    layer = trained_layer(LoRA(r=3))
    layer.lora_A.requires_grad_(False)
    layer.load_state_dict(nn.Linear(K, N).state_dict())
    assert not layer.lora_A.requires_grad
    assert layer.lora_B.requires_grad


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_residual_whose_start_was_not_seen_is_not_reset(device):
    state = trained_layer(LaMDA(r=3)).state_dict()
    layer = lorafast.Linear(K, N, adapter=LaMDA(r=3), device=device)
    layer.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    with pytest.raises(RuntimeError, match=r"weight \(14, 10\).*load the base weights first"):
        layer.reset_adapter()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, state[name])


def test_adapter_keys_alone_leave_the_start_known():
    base, x = nn.Linear(K, N), inputs()
    want = base(x)
    layer = lorafast.Linear.from_linear(base, LaMDA(r=3)).eval()
    factors = {
        name: value * 2 for name, value in layer.state_dict().items() if name.startswith("lora")
    }
    with pytest.raises(RuntimeError, match="Missing"):
        layer.load_state_dict(factors)
    layer.load_state_dict(factors, strict=False)
    assert torch.equal(layer.lora_B, factors["lora_B"])
    layer.reset_adapter()
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-6)


def test_a_bias_alone_or_a_wrong_weight_leaves_the_adapter_alone():
    layer = trained_layer(DoRA(r=3))
    before = copy.deepcopy(layer.state_dict())
    layer.load_state_dict({"bias": torch.zeros(N)}, strict=False)
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict({"weight": torch.zeros(2, 2), "bias": torch.zeros(N)})
    for name in ("lora_A", "lora_B", "lora_magnitude"):
        assert torch.equal(layer.state_dict()[name], before[name])


def test_a_meta_layer_keeps_what_was_frozen():
    layer = lorafast.Linear(K, N, adapter=LoRA(r=3), device="meta")
    layer.lora_A.requires_grad_(False)
    layer.load_state_dict(nn.Linear(K, N).state_dict(), assign=True)
    assert not layer.lora_A.requires_grad
    assert layer.lora_B.requires_grad


def test_fresh_parameters_owe_nothing_to_the_last_start():
    layer = trained_layer(LaMDA(r=3))
    torch.manual_seed(5)
    layer.reset_parameters()
    torch.manual_seed(5)
    torch.testing.assert_close(
        layer.weight + layer.scaling * layer.lora_B @ layer.core @ layer.lora_A,
        nn.Linear(K, N).weight,
    )


def test_a_user_who_froze_lora_B_finds_it_frozen():
    layer = trained_layer(LaMDA(r=3))
    layer.lora_B.requires_grad_(False)
    layer.freeze_columns(3)
    layer.reset_adapter()
    assert not layer.lora_B.requires_grad


def test_a_parametrized_factor_is_not_reset():
    layer = trained_layer(LoRA(r=3))
    nn.utils.parametrize.register_parametrization(layer, "lora_B", nn.Identity())
    with pytest.raises(RuntimeError, match="lora_B of this layer is parametrized"):
        layer.reset_adapter()


def test_a_reset_that_fails_changes_nothing(monkeypatch):
    layer = trained_layer(LaMDA(r=3))
    before = copy.deepcopy(layer.state_dict())

    def failing(*_):
        raise torch.OutOfMemoryError("SVD")

    monkeypatch.setattr(lorafast.methods.svd, "truncated_svd", failing)
    with pytest.raises(torch.OutOfMemoryError):
        layer.reset_adapter()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


def test_an_assigned_base_weight_stays_the_callers():
    base = nn.Linear(K, N)
    before = base.weight.clone()
    layer = lorafast.Linear(K, N, adapter=LaMDA(r=3), device="meta")
    layer.load_state_dict(base.state_dict(), assign=True)
    assert torch.equal(base.weight, before)
    plain = lorafast.Linear(K, N, adapter=LoRA(r=3), device="meta")
    plain.load_state_dict(base.state_dict(), assign=True)
    assert plain.weight.data_ptr() == base.weight.data_ptr()


def test_a_parametrized_factor_loads_its_own_state():
    layer = trained_layer(LoRA(r=3))
    nn.utils.parametrize.register_parametrization(layer, "lora_A", nn.Identity())
    state = {name: value * 2 for name, value in layer.state_dict().items()}
    layer.load_state_dict(state)
    assert torch.equal(layer.lora_A, state["parametrizations.lora_A.original"])
    assert torch.equal(layer.lora_B, state["lora_B"])


@pytest.mark.parametrize("adapter", [LoRA(r=3), DoRA(r=3)], ids=repr)
def test_the_meta_device_runs_a_forward(adapter):
    assert lorafast.Linear(K, N, adapter=adapter, device="meta")(
        torch.empty(5, K, device="meta")
    ).shape == (5, N)


@each_adapter
def test_reset_parameters_makes_a_new_layer(adapter):
    for layer in (
        trained_layer(adapter),
        lorafast.Linear(K, N, adapter=adapter, device="meta").to_empty(device="cpu").eval(),
    ):
        layer.reset_parameters()
        x = inputs()
        plain = nn.functional.linear(x, layer.weight, layer.bias)
        if adapter.residual:
            core = torch.eye(3) if layer.core is None else layer.core
            plain += x @ (layer.lora_B @ core @ layer.lora_A * layer.scaling).t()
        torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-6)
        assert {n for n, p in layer.named_parameters() if p.requires_grad} == {
            n for n, p in adapter.tensor_specs(N, K).items() if p.trained
        }


def test_a_flattened_weight_does_not_hinder_loading():
    layer = lorafast.Linear(K, N, adapter=LoRA(r=3))
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    shard = nn.Parameter(torch.zeros(7))
    layer._parameters["weight"] = shard  # as a sharding library leaves it between calls
    state["weight"] = torch.ones(7)
    layer.load_state_dict(state)
    assert torch.equal(shard, torch.ones(7))


@each_adapter
def test_a_trained_adapter_survives_a_base_weight_under_strict_false(adapter):
    layer = nn.Sequential(trained_layer(adapter)).eval()
    again = nn.Sequential(copy.deepcopy(layer[0]))
    trained, base = copy.deepcopy(layer.state_dict()), nn.Linear(K, N)
    names = {name for name in trained if "lora_" in name}
    given = {f"0.{name}": value for name, value in base.state_dict().items()}
    for _ in range(2):
        keys = layer.load_state_dict(given, strict=False)
        assert set(keys.missing_keys) == names
        assert not keys.unexpected_keys
    for name in names:
        assert torch.equal(layer.state_dict()[name], trained[name])
    # Its weight is W, or W less what the start takes out.
    lorafast.unload(layer)
    torch.testing.assert_close(layer[0].weight, base.weight, rtol=1e-5, atol=1e-6)
    with pytest.warns(UserWarning, match=r"trained adapters start anew .*strict=False") as told:
        again.load_state_dict(given)
    assert told[0].filename == __file__
    x = inputs()
    torch.testing.assert_close(again(x), base(x), rtol=1e-5, atol=1e-6)


@each_adapter
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.filterwarnings("error")
def test_an_untrained_adapter_starts_from_any_base_weight(adapter, strict):
    base, x = nn.Linear(K, N), inputs()
    for layer in (
        lorafast.Linear(K, N, adapter=adapter),
        lorafast.Linear(K, N, adapter=adapter, device="meta").to_empty(device="cpu"),
    ):
        keys = layer.load_state_dict(base.state_dict(), strict=strict)
        assert not keys.missing_keys
        torch.testing.assert_close(layer.eval()(x), base(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "adapter", [DoRA(r=3), DoRA(r=3, axis="in"), LoRA(r=3, init=PiSSA()), LaMDA(r=3)], ids=repr
)
@pytest.mark.parametrize(
    "dtypes",
    [[torch.bfloat16], [torch.float16], [torch.float64], [torch.bfloat16, torch.float32]],
    ids=str,
)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.filterwarnings("error")
def test_a_cast_does_not_train_an_adapter(adapter, dtypes, strict):
    layer, base = lorafast.Linear(K, N, adapter=adapter), nn.Linear(K, N).to(dtypes[-1])
    for dtype in dtypes:
        layer.to(dtype)
    with torch.no_grad():
        base.weight.mul_(3)
    assert not layer.load_state_dict(base.state_dict(), strict=strict).missing_keys
    x = inputs().to(dtypes[-1])
    rounding = 4 * torch.finfo(dtypes[0]).eps
    torch.testing.assert_close(layer.eval()(x), base(x), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_magnitude_trained_alone_stays(dtype):
    layer = lorafast.Linear(K, N, adapter=DoRA(r=3)).to(dtype)
    with torch.no_grad():
        layer.lora_magnitude[0] *= 1 + 4 * torch.finfo(dtype).eps + 2**-16
    trained = layer.lora_magnitude.detach().clone()
    layer.load_state_dict(nn.Linear(K, N).to(dtype).state_dict(), strict=False)
    assert torch.equal(layer.lora_magnitude, trained)


@each_adapter
@pytest.mark.filterwarnings("error")
def test_values_left_on_the_meta_device_are_no_trained_adapter(adapter):
    base, x = nn.Linear(K, N), inputs()
    layer = trained_layer(adapter).to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7.0)
    assert not layer.load_state_dict(base.state_dict(), strict=False).missing_keys
    torch.testing.assert_close(layer.eval()(x), base(x), rtol=1e-5, atol=1e-6)


@each_adapter
def test_a_layer_that_went_to_the_meta_device_comes_back(adapter):
    source, base, x = trained_layer(adapter), nn.Linear(K, N), inputs()
    layer = copy.deepcopy(source).to("meta")
    layer.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(layer(x), source(x))
    layer.to("meta")
    layer.weight, layer.bias = base.weight, base.bias
    wanted = base(x)
    layer.to("cpu")
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-6)


def test_the_adapter_first_and_then_the_base():
    source = trained_layer(DoRA(r=3))
    state = source.state_dict()
    layer = nn.Sequential(lorafast.Linear(K, N, adapter=DoRA(r=3))).eval()
    for of_adapter in (True, False):
        part = {f"0.{n}": value for n, value in state.items() if ("lora_" in n) == of_adapter}
        layer.load_state_dict(part, strict=False)
    x = inputs()
    assert torch.equal(layer(x), source(x))


def test_a_base_weight_under_an_unknown_start_is_an_error():
    state = trained_layer(LaMDA(r=3)).state_dict()
    layer = lorafast.Linear(K, N, adapter=LaMDA(r=3))
    layer.load_state_dict(state)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match="took out of the weight is not known; strict=True"):
        layer.load_state_dict(nn.Linear(K, N).state_dict(), strict=False)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])
