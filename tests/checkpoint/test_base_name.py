"""The base that an adapter's config names, and the warning where a transformers model has none."""

import json
import warnings

import pytest
import torch
import transformers
from helpers.tiny_transformers import adapted, llama, outputs
from torch import nn

import lorafast
from lorafast import LoRA

pytestmark = pytest.mark.peft

SAVES = {
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "save_adapter": lorafast.save_adapter,
    "as_lora": lambda model, folder: lorafast.save_adapter(model, folder, as_lora=True),
}
each_save = pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)


def messages(function, *args):
    """Return what a call warns of the base; each warning names this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args)
    found = [one for one in caught if "base_model_name_or_path" in str(one.message)]
    assert {warning.filename for warning in found} <= {__file__}
    return [str(warning.message) for warning in found]


def named_base(folder):
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


@each_save
def test_a_model_made_from_a_config_warns_and_both_ways_work(save, tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, LoRA(r=4))
    (message,) = messages(save, model, tmp_path / "adapter")
    assert named_base(tmp_path / "adapter") is None
    for part in ("made from a config", "hub for 'None'", "load_adapter", "model.name_or_path"):
        assert part in message
    again = lorafast.load_adapter(llama(), tmp_path / "adapter")
    torch.testing.assert_close(outputs(again), outputs(model))
    model.name_or_path = str(tmp_path / "base")
    assert messages(save, model, tmp_path / "named") == []
    assert named_base(tmp_path / "named") == str(tmp_path / "base")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "named").eval()
    torch.testing.assert_close(outputs(loaded), outputs(model))


@each_save
def test_a_loaded_model_has_a_name_and_warns_of_nothing(save, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert messages(save, adapted(model, LoRA(r=4)), tmp_path / "adapter") == []
    assert named_base(tmp_path / "adapter") == str(tmp_path / "base")


def test_a_model_of_no_hub_and_a_checkpoint_of_trainer_warn_of_nothing(tmp_path):
    plain = lorafast.adapt(nn.Sequential(nn.Linear(8, 8)), LoRA(r=2))
    assert messages(lorafast.save_adapter, plain, tmp_path / "plain") == []
    model = adapted(llama(), LoRA(r=4))
    assert messages(model.save_pretrained, tmp_path / "checkpoint-3") == []
