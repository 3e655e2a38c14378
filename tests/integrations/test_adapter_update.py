"""lorafast.adapter_update: an adapter's tensors alone, and its folder whole at every moment."""

import json
import threading

import peft
import pytest
import torch
from helpers import peft_models, tiny_transformers
from helpers.adapter_folders import adapted_net, net
from helpers.whole_models import ADAPTERS
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import lorafast
from lorafast import DoRA, LaMDA, LoRA
from lorafast.checkpoint import files
from lorafast.integrations.peft_lamda import LamdaConfig

pytestmark = pytest.mark.peft


def assert_same_tensors(found, want):
    assert found.keys() == want.keys()
    for name in want:
        assert torch.equal(found[name], want[name]), name
        assert found[name].dtype == want[name].dtype


def named(model):
    """The model as if it had been loaded, without which a save warns."""
    model.name_or_path = "lorafast/tiny"
    return model


def metadata(folder):
    with safe_open(folder / files.WEIGHTS, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("adapter", ADAPTERS, ids=repr)
def test_an_adapted_model_s_are_those_of_save_adapter(adapter, tmp_path):
    model = named(tiny_transformers.adapted(tiny_transformers.llama(), adapter))
    found = lorafast.adapter_update(model, tmp_path / "update")
    lorafast.save_adapter(model, tmp_path / "saved")
    configs = [(tmp_path / name / files.CONFIG).read_bytes() for name in ("update", "saved")]
    assert configs[0] == configs[1]
    assert metadata(tmp_path / "update") == metadata(tmp_path / "saved")
    for name in ("update", "saved"):
        assert_same_tensors(found, load_file(tmp_path / name / files.WEIGHTS))
    assert not any(tensor.requires_grad for tensor in found.values())
    base = named(tiny_transformers.llama())
    loaded = lorafast.load_adapter(base, tmp_path / "update")
    torch.testing.assert_close(
        tiny_transformers.outputs(loaded), tiny_transformers.outputs(model), rtol=1e-4, atol=1e-5
    )


def test_it_is_the_adapter_s_bytes_and_shares_its_memory():
    model = tiny_transformers.adapted(tiny_transformers.llama(), LoRA(r=4))
    found = lorafast.adapter_update(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(t.nbytes for t in found.values()) == sum(p.nbytes for p in trained)
    assert {t.data_ptr() for t in found.values()} == {p.data_ptr() for p in trained}


@pytest.mark.parametrize("adapter", [DoRA(r=4), LaMDA(r=4), LoRA(r=4)], ids=repr)
def test_as_lora_are_keys_that_every_engine_reads(adapter, tmp_path, capsys):
    model = named(tiny_transformers.adapted(tiny_transformers.llama(), adapter))
    found = lorafast.adapter_update(model, tmp_path / "update", as_lora=True, rank=3)
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in found)
    lorafast.save_adapter(model, tmp_path / "saved", as_lora=True, rank=3)
    assert_same_tensors(found, load_file(tmp_path / "saved" / files.WEIGHTS))
    assert json.loads((tmp_path / "update" / files.CONFIG).read_text())["peft_type"] == "LORA"


CONFIGS = {
    "lora": peft.LoraConfig(r=4, target_modules="all-linear"),
    "dora": peft.LoraConfig(r=4, target_modules={"q_proj", "v_proj", "down_proj"}, use_dora=True),
    "task": peft.LoraConfig(
        r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", modules_to_save=["lm_head"]
    ),
    "lamda": LamdaConfig(r=4, target_modules=["q_proj", "up_proj"]),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "embedding": peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
}


@pytest.mark.filterwarnings("ignore:accelerate", "ignore:Setting `save_embedding")
@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_peft_model_s_are_those_of_save_pretrained(kind, accelerated, tmp_path):
    model = tiny_transformers.peft_adapted(tiny_transformers.llama(), CONFIGS[kind])
    if accelerated:
        lorafast.accelerate(model)
    found = lorafast.adapter_update(model, tmp_path / "update")
    model.save_pretrained(tmp_path / "saved", save_embedding_layers=False)
    theirs = load_file(tmp_path / "saved" / files.WEIGHTS)
    assert_same_tensors(found, theirs)
    assert_same_tensors(load_file(tmp_path / "update" / files.WEIGHTS), theirs)
    ours, config = (
        json.loads((tmp_path / name / files.CONFIG).read_text()) for name in ("update", "saved")
    )
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = sorted(config["target_modules"])
        ours["target_modules"] = sorted(ours["target_modules"])
    assert ours == config
    assert model.peft_config["default"].inference_mode is False
    again = tiny_transformers.loaded_by_peft(tiny_transformers.llama(), tmp_path / "update")
    torch.testing.assert_close(
        tiny_transformers.outputs(again), tiny_transformers.outputs(model), rtol=1e-4, atol=1e-5
    )


def test_one_of_several_adapters_by_its_name(tmp_path):
    model = peft_models.peft_model()
    peft_models.add_second_adapter(model)
    first = lorafast.adapter_update(model)
    other = lorafast.adapter_update(model, tmp_path, adapter_name="other")
    assert first.keys() == other.keys()
    assert first["base_model.model.up.lora_A.weight"].shape == (4, peft_models.K)
    assert other["base_model.model.up.lora_A.weight"].shape == (2, peft_models.K)
    assert json.loads((tmp_path / files.CONFIG).read_text())["r"] == 2
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"2 active adapters .*choose one by adapter_name"):
        lorafast.adapter_update(model)
    with pytest.raises(ValueError, match="adapter_name='third' is none of 'default', 'other'"):
        lorafast.adapter_update(model, adapter_name="third")


def test_injected_adapters_have_peft_s_keys(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    model = peft.inject_adapter_in_model(config, tiny_transformers.llama())
    tiny_transformers.perturb(model)
    found = lorafast.adapter_update(model, tmp_path)
    assert all(key.startswith("base_model.model.model.layers.") for key in found)
    again = tiny_transformers.loaded_by_peft(tiny_transformers.llama(), tmp_path)
    torch.testing.assert_close(tiny_transformers.outputs(again), tiny_transformers.outputs(model))


@pytest.mark.parametrize("theirs", [False, True], ids=["adapted", "peft"])
def test_a_reader_sees_one_version_whole(theirs, tmp_path):
    """Every tensor of version n is n, and the reader never sees two numbers, nor no file."""
    if theirs:
        model = peft.get_peft_model(net(), peft.LoraConfig(r=4, target_modules="all-linear"))
    else:
        model = adapted_net(LoRA(r=4))
    trained = [p for p in model.parameters() if p.requires_grad]

    def write(version):
        with torch.no_grad():
            for parameter in trained:
                parameter.fill_(version)
        lorafast.adapter_update(model, tmp_path)

    def read(seen, stop):
        while not stop.is_set() or not seen:
            json.loads((tmp_path / files.CONFIG).read_text())
            tensors = load_file(tmp_path / files.WEIGHTS).values()
            seen.append({float(number) for tensor in tensors for number in tensor.unique()})

    write(0)
    seen, stop = [], threading.Event()
    reader = threading.Thread(target=read, args=(seen, stop))
    reader.start()
    for version in range(1, 60):
        write(version)
    stop.set()
    reader.join()
    assert all(len(numbers) == 1 for numbers in seen)
    assert len({next(iter(numbers)) for numbers in seen}) > 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [files.CONFIG, files.WEIGHTS]


@pytest.mark.parametrize("theirs", [False, True], ids=["adapted", "peft"])
def test_inside_merged_it_is_the_same(theirs):
    model = peft_models.peft_model() if theirs else adapted_net(LoRA(r=2))
    want = lorafast.adapter_update(model)
    with lorafast.merged(model):
        assert_same_tensors(lorafast.adapter_update(model), want)


def test_what_an_engine_could_not_use_is_refused(tmp_path):
    own, theirs = adapted_net(LoRA(r=2)), peft_models.peft_model()
    for model, options, why in (
        (net(), {}, "has no adapter: give it one"),
        (own, {"adapter_name": "default"}, "adapter_name='default' is for PEFT's models"),
        (own, {"rank": 2}, "rank=2 belongs to as_lora=True"),
        (theirs, {"as_lora": True}, "as_lora=True is for models that lorafast.adapt adapted"),
        (
            peft_models.peft_model(init_lora_weights="pissa"),
            {},
            "init_lora_weights='pissa' of adapter 'default' has changed the base weights",
        ),
    ):
        with pytest.raises(ValueError, match=why):
            lorafast.adapter_update(model, tmp_path / "never", **options)
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module"):
        lorafast.adapter_update("x")
    with lorafast.disable_adapter(own), pytest.raises(RuntimeError, match="disabled"):
        lorafast.adapter_update(own)
    with lorafast.merged(own), pytest.raises(RuntimeError, match="merged"):
        lorafast.adapter_update(own, as_lora=True)
    assert not (tmp_path / "never").exists()


@pytest.mark.compile
def test_a_wrapped_model_has_the_plain_names():
    model = adapted_net(LoRA(r=2))
    want = lorafast.adapter_update(model)
    assert_same_tensors(lorafast.adapter_update(nn.DataParallel(model)), want)
    theirs = peft_models.peft_model()
    want = lorafast.adapter_update(theirs)
    assert_same_tensors(lorafast.adapter_update(torch.compile(theirs)), want)
