"""Merging and unmerging: what comes out, how exactly it goes back, and what is refused."""

import pytest
import torch
from helpers.adapter_layers import K, N, trained_layer
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import lorafast
from lorafast import DoRA, LoRA

pytestmark = pytest.mark.filterwarnings("ignore:.*now holds the residual")


def test_unmerge_takes_out_what_was_put_in_even_if_the_factors_moved():
    layer = trained_layer(DoRA(r=3), dtype=torch.float64)
    before = layer.weight.clone()
    layer.merge()
    with torch.no_grad():
        layer.lora_B.normal_(), layer.lora_magnitude.normal_()
    layer.scaling = 9.0
    layer.unmerge()
    torch.testing.assert_close(layer.weight, before, rtol=1e-13, atol=1e-13)


def test_a_gain_that_cannot_be_undone_is_not_merged():
    layer = trained_layer(DoRA(r=3))
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
    for unusable in (float("inf"), float("nan")):
        with torch.no_grad():
            layer.lora_magnitude[2] = unusable
        with pytest.raises(ValueError, match=r"magnitude \(14,\).*keep=True"):
            layer.merge()


def test_an_overflow_is_not_merged():
    half = trained_layer(LoRA(r=3), dtype=torch.float16)
    with torch.no_grad():
        half.lora_B[4] = 1e6
        half.weight[0, 0] = float("inf")  # one that was there before hides nothing
    for keep in (True, False):
        before = half.weight.clone()
        with pytest.raises(ValueError, match=r"weight \(14, 10\).*not finite in torch\.float16"):
            half.merge(keep)
        assert torch.equal(half.weight, before)
        assert not half.merged
    biased = trained_layer(LoRA(r=3, lora_bias=True), dtype=torch.float16)
    with torch.no_grad():
        biased.lora_bias[1] = 1e6
    before = biased.weight.clone()
    with pytest.raises(ValueError, match=r"bias \(14,\).*not finite in torch\.float16"):
        biased.merge()
    assert torch.equal(biased.weight, before)


def test_what_has_nowhere_to_go_is_not_merged():
    with pytest.raises(ValueError, match=r"lora_bias \(14,\)"):
        trained_layer(LoRA(r=3, lora_bias=True), bias=False).merge()
    with pytest.raises(RuntimeError, match="meta"):
        lorafast.Linear(K, N, device="meta").merge()


def test_a_merged_layer_neither_saves_nor_loads_nor_restarts():
    layer = trained_layer(LoRA(r=3))
    state = layer.state_dict()
    layer.merge()
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.state_dict()
    with pytest.raises(RuntimeError, match="unmerge"):
        layer.load_state_dict(state)
    before = layer.weight.clone()
    for restart in (layer.reset_adapter, layer.reset_parameters):
        with pytest.raises(RuntimeError, match="unmerge"):
            restart()
    assert torch.equal(layer.weight, before)


def test_eval_never_merges():
    layer = trained_layer(LoRA(r=3))
    before = layer.weight.clone()
    layer.train().eval()
    assert torch.equal(layer.weight, before)


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 2 * weight


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "parametrized": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    "parametrized bias": lambda layer: parametrize.register_parametrization(
        layer, "bias", Doubled()
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm", "ignore:.*spectral_norm")
@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_a_weight_that_is_computed_is_refused_before_anything_changes(compute):
    layer = trained_layer(LoRA(r=3))
    compute(layer)
    model, x = nn.Sequential(layer).eval(), torch.randn(5, K)
    want = model(x)
    for action in (layer.merge, lambda: lorafast.merge(model), lambda: lorafast.unload(model)):
        with pytest.raises(RuntimeError, match=r"(weight|bias) \(14.*is computed from other"):
            action()
        assert not layer.merged
        torch.testing.assert_close(model(x), want, rtol=0, atol=0)


def test_a_merged_weight_that_is_computed_now_is_not_unmerged():
    layer = trained_layer(LoRA(r=3))
    layer.merge()
    prune.l1_unstructured(layer, "weight", 0.3)
    with pytest.raises(RuntimeError, match=r"remove that before unmerge\(\)"):
        layer.unmerge()
    assert layer.merged


def test_a_start_that_changes_the_weight_is_refused_on_a_computed_one():
    layer = trained_layer(lorafast.LaMDA(r=3))
    parametrizations.weight_norm(layer)
    before = layer.lora_core.clone()
    with pytest.raises(RuntimeError, match="starting an adapter that changes the weight"):
        layer.reset_adapter()
    assert torch.equal(layer.lora_core, before)
