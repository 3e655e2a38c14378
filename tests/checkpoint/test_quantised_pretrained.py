"""save_pretrained of a transformers model that quantize_base quantised."""

import copy
import io

import pytest
import torch
from helpers.tiny_transformers import IDS, llama

import lorafast
from lorafast.quantised import formats

transformers = pytest.importorskip("transformers")

WORDS = r"was quantised by lorafast\.quantize_base.*merge_quantised\(model, 'dequantise'\)"


def quantised_llama(**options):
    model = llama()
    lorafast.quantize_base(model, "fp8", **options)
    return model


def _pickled(model):
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, _pickled])
def test_a_quantised_base_is_refused_with_the_way_out(copied, tmp_path):
    model = copied(quantised_llama())
    with pytest.raises(ValueError, match=WORDS):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_an_adapter_on_it_is_saved_and_the_base_stays_refused(tmp_path):
    model = lorafast.adapt(quantised_llama(), lorafast.LoRA(r=2))
    torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.lora_B)
    model.save_pretrained(tmp_path)
    again = quantised_llama()
    lorafast.load_adapter(again, tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    with pytest.raises(ValueError, match=WORDS):
        model.save_pretrained(tmp_path / "merged", merged=True)
    lorafast.merge_quantised(model, "requantise")
    with pytest.raises(ValueError, match=WORDS):
        model.save_pretrained(tmp_path / "requantised")


def test_a_base_whose_layers_are_partly_adapted_is_not_saved_merged(tmp_path):
    model = quantised_llama(target_modules=["up_proj"])
    lorafast.adapt(model, lorafast.LoRA(r=2), target_modules=["down_proj"])
    with pytest.raises(ValueError, match=r"up_proj was quantised"):
        model.save_pretrained(tmp_path, merged=True)
    lorafast.merge(model)
    with pytest.raises(ValueError, match=r"up_proj was quantised"):
        model.save_pretrained(tmp_path)


def test_a_dequantised_model_is_saved_as_any_other(tmp_path):
    model = lorafast.adapt(quantised_llama(), lorafast.LoRA(r=2))
    lorafast.merge_quantised(model, "dequantise")
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path)
    fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(fresh(IDS).logits, model(IDS).logits)


def test_loftq_is_saved_as_an_adapter(tmp_path):
    model = quantised_llama(loftq=lorafast.LoRA(r=2))
    model.save_pretrained(tmp_path)
    again = quantised_llama()
    lorafast.load_adapter(again, tmp_path)
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


def test_what_trainer_resumes_from_is_written(tmp_path):
    model = quantised_llama()
    model.save_pretrained(tmp_path / "checkpoint-3")
    assert (tmp_path / "checkpoint-3" / "model.safetensors").exists()


def test_a_model_that_was_refused_before_its_first_change_is_saved(tmp_path):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        lorafast.quantize_base(model, "fp8")
    assert "save_pretrained" not in vars(model)
    assert not any(formats.of(module) for module in model.modules())
    model.save_pretrained(tmp_path)
