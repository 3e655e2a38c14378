"""Adapters of experts in files: PEFT's packing and names, both ways, and what PEFT has not."""

import json

import peft
import pytest
import torch
from helpers import tiny_experts, tiny_transformers
from helpers.tiny_experts import KINDS, TARGETS
from helpers.tiny_transformers import loaded_by_peft, outputs, perturb
from safetensors.torch import load_file

import lorafast
from lorafast import DoRA, LaMDA, LoRA
from lorafast.checkpoint import expert_files
from lorafast.methods.adapter import TensorSpec
from lorafast.models.module_names import adapter_layers

pytestmark = [
    pytest.mark.peft,
    pytest.mark.filterwarnings("ignore:base_model_name_or_path is null"),
    pytest.mark.filterwarnings("ignore:r exceeds"),
]


def adapted(kind, adapter, **options):
    arguments = {"target_modules": None, "target_parameters": TARGETS, "seed": 1} | options
    return perturb(lorafast.adapt(KINDS[kind](), adapter, **arguments))


def wrappers(model):
    """Return PEFT's wrappers by the name of their Parameter in the first layer."""
    return {
        module.parameter_name: module
        for name, module in model.named_modules()
        if type(module).__name__ == "ParamWrapper" and "layers.0." in name
    }


@pytest.mark.parametrize("kind", KINDS)
def test_pefts_files_load_and_ours_load_in_peft(kind, tmp_path):
    theirs = tiny_experts.peft_model(KINDS[kind]())
    theirs.save_pretrained(tmp_path / "theirs")
    own = lorafast.load_adapter(KINDS[kind](), tmp_path / "theirs", trainable=True)
    torch.testing.assert_close(outputs(own), outputs(theirs), rtol=1e-5, atol=1e-5)
    deltas = wrappers(theirs)
    for name, layer in adapter_layers(own).items():
        if "layers.0." in name:
            delta = deltas[layer.parameter_name].get_delta_weight("default")
            mine = layer.scaling * layer.lora_B @ layer.lora_A
            mine = mine.transpose(1, 2) if layer.transposed else mine
            torch.testing.assert_close(mine, delta, rtol=1e-5, atol=1e-6)
    lorafast.save_adapter(own, tmp_path / "own")
    first, second = (
        load_file(tmp_path / f / "adapter_model.safetensors") for f in ("theirs", "own")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    back = loaded_by_peft(KINDS[kind](), tmp_path / "own")
    torch.testing.assert_close(outputs(back), outputs(own), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_one_parameter_alone(target, tmp_path):
    own = adapted("qwen3_moe", LoRA(r=3), target_parameters=[target])
    lorafast.save_adapter(own, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == []
    assert config["target_parameters"] == [target.removeprefix("mlp.")]
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert not any("base_layer" in key for key in keys)
    back = loaded_by_peft(KINDS["qwen3_moe"](), tmp_path)
    torch.testing.assert_close(outputs(back), outputs(own), rtol=1e-5, atol=1e-5)


def test_ranks_and_layers_beside_experts(tmp_path):
    own = adapted(
        "mixtral", LoRA(r=4, alpha=8, rslora=True), target_modules=["q_proj"],
        rank_pattern={"experts.down_proj": 2}, alpha_pattern={"layers.1.mlp.experts.down_proj": 3},
    )  # fmt: skip
    lorafast.save_adapter(own, tmp_path)
    again = lorafast.load_adapter(KINDS["mixtral"](), tmp_path)
    assert torch.equal(outputs(again), outputs(own))
    back = loaded_by_peft(KINDS["mixtral"](), tmp_path)
    torch.testing.assert_close(outputs(back), outputs(own), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "adapter",
    [
        LoRA(r=3, dropout=0.05),
        LoRA(r=3, lora_bias=True),
        LoRA(r=2, init=lorafast.PiSSA()),
        DoRA(r=3, alpha=6, dropout=0.1),
        DoRA(magnitude_only=True),
        LaMDA(r=3),
        LaMDA(r=3, init="zero"),
    ],
    ids=str,
)
def test_every_adapter_comes_back(adapter, tmp_path):
    own = adapted("gpt_oss", adapter)
    lorafast.save_adapter(own, tmp_path)
    again = lorafast.load_adapter(KINDS["gpt_oss"](), tmp_path, trainable=True)
    torch.testing.assert_close(outputs(again), outputs(own), rtol=1e-5, atol=1e-5)
    for first, second in zip(
        adapter_layers(own).values(), adapter_layers(again).values(), strict=True
    ):
        assert first.adapter == second.adapter
    present = adapted("gpt_oss", adapter, seed=2)
    with torch.no_grad():
        for parameter in lorafast.adapter_parameters(present):
            parameter.mul_(0.5)
    lorafast.load_adapter(present, tmp_path)
    torch.testing.assert_close(outputs(present), outputs(own), rtol=1e-5, atol=1e-5)


def test_what_peft_cannot_read_it_refuses(tmp_path):
    lorafast.save_adapter(adapted("qwen3_moe", DoRA(r=3)), tmp_path)
    with pytest.raises(ValueError, match="ParamWrapper does not work with use_dora"):
        loaded_by_peft(KINDS["qwen3_moe"](), tmp_path)


def test_dropout_is_beside_the_config(tmp_path):
    own = adapted("qwen3_moe", LoRA(r=3, dropout=0.05))
    lorafast.save_adapter(own, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0
    back = loaded_by_peft(KINDS["qwen3_moe"](), tmp_path)
    torch.testing.assert_close(outputs(back), outputs(own), rtol=1e-5, atol=1e-5)


def test_a_peft_config_adapts():
    config = peft.LoraConfig(r=3, lora_alpha=6, target_parameters=TARGETS, target_modules=[])
    model = lorafast.adapt(KINDS["qwen3_moe"](), config)
    assert len(adapter_layers(model)) == 4
    config = peft.LoraConfig(r=3, target_parameters=TARGETS)
    names = adapter_layers(lorafast.adapt(KINDS["gpt_oss"](), config))
    theirs = tiny_experts.peft_model(KINDS["gpt_oss"](), target_modules=None)
    expected = {name for name, module in theirs.named_modules() if hasattr(module, "lora_A")}
    assert len(names) == len(expected)


def test_a_merged_model_saves_plainly(tmp_path):
    own = adapted("gpt_oss", DoRA(r=3))
    expected = outputs(own)
    own.save_pretrained(tmp_path / "merged", merged=True)
    assert torch.equal(outputs(own), expected)
    plain = type(own).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(outputs(plain), expected, rtol=1e-5, atol=1e-5)
    assert "_lorafast" not in (tmp_path / "merged" / "config.json").read_text()


def test_updates_for_an_engine():
    own = adapted("qwen3_moe", LoRA(r=3))
    tensors = lorafast.adapter_update(own)
    assert len(tensors) == 8
    key = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight"
    assert tensors[key].shape == (32, 3 * 6)
    assert lorafast.adapter_update(own, as_lora=True).keys() == tensors.keys()


@pytest.mark.parametrize(
    ("adapter", "rank"),
    [
        (LaMDA(r=3), None),
        (LoRA(r=2, init=lorafast.PiSSA()), None),
        (LoRA(r=4, alpha=6), 3),
        (DoRA(r=3), 32),
        (DoRA(r=3), 2),
    ],
    ids=str,
)
def test_plain_lora_of_any_method_for_peft(adapter, rank, tmp_path, capsys):
    own = adapted("qwen3_moe", adapter)
    lorafast.save_adapter(own, tmp_path, as_lora=True, rank=rank)
    back = loaded_by_peft(KINDS["qwen3_moe"](), tmp_path)
    error = (outputs(back) - outputs(own)).abs().max()
    changed = (outputs(own) - outputs(KINDS["qwen3_moe"]())).abs().max()
    assert error < (5e-5 if rank in (None, 32) else 0.9 * changed)
    printed = float(capsys.readouterr().out.partition("at most ")[2].split()[0])
    assert (printed > 1e-3) == (rank in (2, 3))


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_packing_and_back(part):
    tensor = torch.randn(4, 3, 5)
    packed = expert_files.to_file(part, tensor)
    assert packed.shape == ((12, 5) if part == "lora_A" else (3, 20))
    assert expert_files.file_shape(part, (4, 3, 5)) == tuple(packed.shape)
    spec = TensorSpec((4, 3, 5))
    assert torch.equal(expert_files.from_file(part, packed, spec), tensor)


def test_files_that_do_not_fit_change_nothing(tmp_path):
    lorafast.save_adapter(adapted("qwen3_moe", LoRA(r=3)), tmp_path)
    model = KINDS["olmoe"]()
    tensors = tiny_transformers.copied_tensors(model)
    with pytest.raises(ValueError, match="must be"):
        lorafast.load_adapter(model, tmp_path)
    assert tensors.keys() == model.state_dict().keys()
