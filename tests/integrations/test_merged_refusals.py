"""lorafast.merged: what it refuses, with nothing changed."""

from unittest.mock import Mock

import peft
import pytest
import torch
from helpers import tiny_transformers
from helpers.merged_models import IDS, Tied, assert_unchanged, bits, models, on_peft
from torch import nn

import lorafast
from lorafast import LoRA

pytestmark = pytest.mark.peft


@pytest.mark.parametrize("which", [0, 1], ids=["adapted", "peft"])
def test_an_entering_that_fails_halfway_is_undone(which):
    model = models()[which]
    last = [p for n, p in model.named_parameters() if "lora_B" in n][-1]
    with torch.no_grad():
        last[0, 0] = float("inf")
    before = bits(model)
    with pytest.raises(ValueError, match="not finite"), lorafast.merged(model):
        pass
    assert_unchanged(model, before)
    assert not any(getattr(module, "merged", False) for module in model.modules())


@pytest.mark.parametrize("which", [0, 1], ids=["adapted", "peft"])
def test_a_merged_model_is_refused_with_the_name_of_the_argument(which):
    model = models()[which]
    before = bits(model)
    with (
        lorafast.merged(model),
        pytest.raises(RuntimeError, match=r"model \w+ is merged already.*q_proj.*merged\(model\)"),
        lorafast.merged(model),
    ):
        pass
    assert_unchanged(model, before)
    layer = next(m for n, m in model.named_modules() if n.endswith("q_proj"))
    layer.merge()
    with (
        pytest.raises(RuntimeError, match=r"is merged already, in .*q_proj: "),
        lorafast.merged(model),
    ):
        pass


def disabled(model):
    return (
        model.disable_adapter()
        if hasattr(model, "peft_config")
        else lorafast.disable_adapter(model)
    )


@pytest.mark.parametrize("which", [0, 1], ids=["adapted", "peft"])
def test_disabled_adapters_are_refused(which):
    model = models()[which]
    with (
        disabled(model),
        pytest.raises(RuntimeError, match=r"adapters of .* are disabled"),
        lorafast.merged(model),
    ):
        pass


def test_what_has_no_adapter_is_refused():
    for model, kind, why in (
        (nn.Linear(2, 2), ValueError, "model Linear has no adapter"),
        ("x", TypeError, "must be a torch.nn.Module"),
    ):
        with pytest.raises(kind, match=why), lorafast.merged(model):
            pass


def test_a_weight_on_the_meta_device_is_refused():
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(8, 8))
    model = lorafast.adapt(base, LoRA(r=2))
    with pytest.raises(RuntimeError, match=r"^0: weight .* meta device"), lorafast.merged(model):
        pass
    theirs = on_peft(nn.Sequential(nn.Linear(8, 8)), targets=["0"]).to("meta")
    with pytest.raises(RuntimeError, match=r"0: weight .* meta device"), lorafast.merged(theirs):
        pass


def test_a_computed_weight_is_refused():
    model = on_peft(nn.Sequential(nn.Linear(8, 8)), targets=["0"])
    nn.utils.parametrizations.weight_norm(model.base_model.model[0].base_layer)
    with pytest.raises(RuntimeError, match=r"0: the weight .* is no Param"), lorafast.merged(model):
        pass


def test_sharded_weights_are_refused():
    own = lorafast.adapt(nn.Sequential(nn.Linear(8, 8)), LoRA(r=2))
    own[0].weight.full_tensor = None
    with pytest.raises(NotImplementedError, match=r"^0: weight .* DTensor"), lorafast.merged(own):
        pass
    for mark in ("full_tensor", "ds_id"):
        theirs = on_peft(nn.Sequential(nn.Linear(8, 8)), targets=["0"])
        setattr(theirs.base_model.model[0].base_layer.weight, mark, None)
        with (
            pytest.raises(NotImplementedError, match=r"0: weight \(8, 8\) is sharded"),
            lorafast.merged(theirs),
        ):
            pass


def test_attention_whose_merging_replaces_tensors_is_refused():
    model = on_peft(nn.Sequential(nn.MultiheadAttention(8, 2)), targets=["0"])
    before, _ = bits(model)
    with (
        pytest.raises(NotImplementedError, match=r"0: is a .*MultiheadAttention, and"),
        lorafast.merged(model),
    ):
        pass
    # PEFT itself gives it other Parameters now and then.
    assert all(map(torch.equal, bits(model)[0], before))


def test_quantised_layers_are_refused_before_anything_changes():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def base():
        packed = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
        return nn.Sequential(nn.Linear(64, 64), packed.to("cpu"))

    own = lorafast.adapt(base(), LoRA(r=2))
    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["0", "1"]))
    for model, why in ((own, "1: .*merging rounds it"), (theirs, "1: its weight is .*nf4")):
        before = bits(model)
        merge = Mock()
        for module in model.modules():
            if hasattr(module, "merge"):
                module.merge = merge
        with pytest.raises((RuntimeError, NotImplementedError), match=why), lorafast.merged(model):
            pass
        assert_unchanged(model, before)
        merge.assert_not_called()


@pytest.mark.parametrize("peft_s", [False, True], ids=["adapted", "peft"])
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings")
def test_tied_weights_are_refused_or_get_a_tensor_for_the_time(peft_s):
    torch.manual_seed(0)
    if peft_s:
        model = on_peft(Tied(), targets=["table", "head"])
    else:
        model = tiny_transformers.perturb(lorafast.adapt(Tied(), LoRA(r=2), ["table", "head"]))
    with torch.no_grad():
        before, want = bits(model), model(IDS)
        with (
            pytest.raises(ValueError, match=r"table.* and .*head.*one tensor: .*untie=True"),
            lorafast.merged(model),
        ):
            pass
        with lorafast.merged(model, untie=True):
            torch.testing.assert_close(model(IDS), want)
        assert_unchanged(model, before)
        assert torch.equal(model(IDS), want)
