"""save_pretrained of adapted transformers models: their adapter, or all of them merged."""

import copy
import io
import pickle
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
from helpers.tiny_transformers import (
    KINDS,
    adapted,
    bart,
    copied_tensors,
    gpt2,
    llama,
    loaded_by_peft,
    outputs,
    perturb,
)
from helpers.trainer_runs import HALF, STEPS, assert_same, losses, trainer_of
from helpers.trainer_runs import adapted as adapted_for_trainer
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DataParallel

import lorafast
from lorafast import DoRA, LaMDA, LoRA, PiSSA, VeRA

pytestmark = pytest.mark.peft

ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}
METHODS = {
    "lora": LoRA(r=4),
    "dora": DoRA(r=4),
    "lamda": LaMDA(r=4),
    "pissa": LoRA(r=4, init=PiSSA()),
    "vera": VeRA(r=8),
}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def names(folder):
    return {path.name for path in folder.iterdir()}


def assert_files_agree(folder, other):
    found, want = (load_file(path / "adapter_model.safetensors") for path in (folder, other))
    assert found.keys() == want.keys()
    assert not [key for key in want if not torch.equal(found[key], want[key])]


@methods
def test_save_pretrained_writes_what_save_adapter_writes(method, tmp_path):
    model = adapted(llama(), method)
    model.save_pretrained(tmp_path / "found")
    lorafast.save_adapter(model, tmp_path / "want")
    assert names(tmp_path / "found") == ADAPTER_FILES
    assert_files_agree(tmp_path / "found", tmp_path / "want")
    loaded = lorafast.load_adapter(llama(), tmp_path / "found")
    torch.testing.assert_close(outputs(loaded), outputs(model))
    if not isinstance(method, LaMDA):
        theirs = loaded_by_peft(llama(), tmp_path / "found")
        torch.testing.assert_close(outputs(theirs), outputs(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "method"),
    [(kind, METHODS["lora"]) for kind in KINDS]
    + [("llama", method) for method in METHODS.values()][1:],
    ids=str,
)
def test_merged_weights_are_loaded_without_lorafast(kind, method, tmp_path):
    model = adapted(KINDS[kind](), method)
    want, layers = copied_tensors(model), dict(model.named_modules())
    model.save_pretrained(tmp_path, merged=True, max_shard_size="40KB")
    assert_same(model, SimpleNamespace(state_dict=lambda: want))
    assert dict(model.named_modules()) == layers
    assert not ADAPTER_FILES & names(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert not [name for name in loaded.state_dict() if "lora_" in name]
    torch.testing.assert_close(outputs(loaded), outputs(model), rtol=1e-4, atol=1e-5)


def test_merged_weights_are_those_of_merge(tmp_path):
    model = adapted(llama(), DoRA(r=4, lora_bias=False), modules_to_save=["norm"])
    model.save_pretrained(tmp_path, merged=True)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert_same(loaded, lorafast.merge(model))


@pytest.mark.parametrize(
    ("make", "target"),
    [
        (gpt2, "lm_head"),
        (gpt2, "wte"),
        (bart, "lm_head"),
        (lambda: llama(tie_word_embeddings=True), "embed_tokens"),
    ],
)
def test_a_tied_weight_gets_its_own_tensor_in_the_merged_file(make, target, tmp_path):
    model = adapted(make(), LoRA(r=4), target_modules=[target])
    model.save_pretrained(tmp_path, merged=True)
    assert model.config.tie_word_embeddings
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(outputs(loaded), outputs(model), rtol=1e-4, atol=1e-5)


def test_a_merged_layer_is_saved_as_it_is(tmp_path):
    model = adapted(llama(), LoRA(r=4))
    want = outputs(model)
    model.model.layers[0].self_attn.q_proj.merge()
    model.save_pretrained(tmp_path / "merged", merged=True)
    model.save_pretrained(tmp_path / "adapter")
    assert model.model.layers[0].self_attn.q_proj.merged
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(outputs(loaded), want, rtol=1e-4, atol=1e-5)
    loaded = lorafast.load_adapter(llama(), tmp_path / "adapter")
    torch.testing.assert_close(outputs(loaded), want, rtol=1e-4, atol=1e-5)


def test_transformers_reads_the_folder_by_itself(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted(model.eval(), LoRA(r=4))
    model.save_pretrained(tmp_path / "adapter")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(outputs(loaded), outputs(model))


@pytest.mark.parametrize("leave", [lorafast.merge, lorafast.unload])
def test_a_plain_model_saves_itself_again(leave, tmp_path):
    untouched = llama()
    model = leave(adapted(llama(), LoRA(r=4)))
    added = vars(model).keys() - vars(untouched).keys()
    assert added <= {"_lorafast_task_type"}
    assert not model._load_state_dict_pre_hooks
    assert not model._load_state_dict_post_hooks
    assert b"lorafast.checkpoint" not in pickle.dumps(model)
    model.save_pretrained(tmp_path)
    assert "model.safetensors" in names(tmp_path)
    assert not ADAPTER_FILES & names(tmp_path)
    assert_same(transformers.LlamaForCausalLM.from_pretrained(tmp_path), model)


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled, _saved_whole])
def test_a_copy_saves_itself(copied, tmp_path):
    model = adapted(llama(), LoRA(r=4))
    other = perturb(copied(model))
    other.save_pretrained(tmp_path / "found")
    lorafast.save_adapter(other, tmp_path / "want")
    assert_files_agree(tmp_path / "found", tmp_path / "want")
    lorafast.unload(model)
    other.save_pretrained(tmp_path / "merged", merged=True)
    other.save_pretrained(tmp_path / "again")
    assert names(tmp_path / "again") == ADAPTER_FILES


@pytest.mark.parametrize("wrap", [DataParallel, torch.compile])
def test_a_wrapped_model_saves_its_adapter(wrap, tmp_path):
    model = adapted(llama(), LoRA(r=4))
    wrapped = wrap(model)
    inner = wrapped.module if wrap is DataParallel else wrapped
    inner.save_pretrained(tmp_path / "found", state_dict=inner.state_dict())
    lorafast.save_adapter(wrapped, tmp_path / "want")
    assert_files_agree(tmp_path / "found", tmp_path / "want")


def test_inner_and_outer_transformers_save_theirs(tmp_path):
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = llama()

    tower = Tower()
    adapted(tower, LoRA(r=4))
    tower.encoder.save_pretrained(tmp_path / "whole")
    tower.encoder.model.save_pretrained(tmp_path / "part")
    loaded = lorafast.load_adapter(llama(), tmp_path / "whole")
    torch.testing.assert_close(outputs(loaded), outputs(tower.encoder))
    loaded = lorafast.load_adapter(llama().model, tmp_path / "part")
    torch.testing.assert_close(outputs(loaded), outputs(tower.encoder.model))
    assert not hasattr(tower, "save_pretrained")


@methods
def test_values_come_from_the_state_dict_that_is_given(method, tmp_path):
    model = adapted(llama(), method, modules_to_save=["norm"], bias="all")
    lorafast.save_adapter(model, tmp_path / "want")
    values = copied_tensors(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    model.save_pretrained(tmp_path / "found", state_dict=values)
    assert_files_agree(tmp_path / "found", tmp_path / "want")
    key = next(name for name in values if name.endswith("norm.weight"))
    del values["model.norm.weight"]
    assert key in values
    with pytest.raises(ValueError, match=r"state_dict lacks model\.norm\.weight \(32,\)"):
        model.save_pretrained(tmp_path / "no", state_dict=values)
    with pytest.raises(ValueError, match=r"model\.norm\.weight \(3,\) must be \(32,\)"):
        model.save_pretrained(
            tmp_path / "no", state_dict=values | {"model.norm.weight": torch.ones(3)}
        )
    with pytest.warns(UserWarning, match="state_dict is empty: no adapter is written into"):
        model.save_pretrained(tmp_path / "no", state_dict={})
    assert not (tmp_path / "no").exists()


def test_weights_that_were_unfrozen_by_hand_are_told(tmp_path):
    model = adapted_for_trainer(LoRA(r=4), modules_to_save=["norm"], bias="all")
    model.lm_head.weight.requires_grad_(True)
    trainer = trainer_of(model, tmp_path)
    trainer.train()  # the checkpoints hold them
    key = "lm_head.weight"
    checkpoint = load_file(tmp_path / f"checkpoint-{STEPS}" / "model.safetensors")
    assert torch.equal(checkpoint[key], model.lm_head.weight)
    with pytest.warns(UserWarning, match=rf"file: {key}\. .* modules_to_save=, .* merged=True"):
        trainer.save_model(tmp_path / "saved")
    model.save_pretrained(tmp_path / "merged", merged=True)
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")[key], checkpoint[key])


@pytest.mark.parametrize("other", [LaMDA(r=4), LoRA(r=4, freeze_A=True)], ids=str)
def test_trainer_resumes_a_mixture_which_no_file_holds(other, tmp_path):
    def trained(folder, **arguments):
        model = adapted_for_trainer(LoRA(r=4), adapter_pattern={"q_proj": other})
        trainer = trainer_of(model, folder)
        with pytest.warns(UserWarning, match="no adapter file, but Trainer resumes") as told:
            trainer.train(**arguments)
        assert len([w for w in told if "no adapter file" in str(w.message)]) == 1
        return trainer

    straight = trained(tmp_path / "runs")
    checkpoint = tmp_path / "runs" / f"checkpoint-{HALF}"
    assert not ADAPTER_FILES & names(checkpoint)
    again = trained(tmp_path / "again", resume_from_checkpoint=str(checkpoint))
    assert_same(again.model, straight.model)
    with pytest.raises(ValueError, match=r"adapters of one file may .* merged=True"):
        straight.model.save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()
    straight.model.save_pretrained(tmp_path / "merged", merged=True)


def test_what_peft_reads_differently_is_told(tmp_path):
    model = llama()
    model.again = model.model.layers[0].self_attn.q_proj
    adapted(model, LoRA(r=4), target_modules=["q_proj", "again"])
    with pytest.warns(UserWarning, match="are one layer: PEFT will put"):
        model.save_pretrained(tmp_path / "shared")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32}
    experts = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4}
    config = transformers.Qwen2MoeConfig(
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, **sizes, **experts
    )
    model = transformers.Qwen2MoeForCausalLM(config)
    lorafast.adapt(model, LoRA(r=4), target_modules=["q_proj", "gate_proj"])
    with pytest.warns(UserWarning, match="PEFT may take these layers for fused"):
        model.save_pretrained(tmp_path / "experts")


def test_what_cannot_be_saved_is_refused(tmp_path):
    model = adapted(llama(), LoRA(r=4))
    model.save_pretrained(tmp_path / "no", is_main_process=False)
    for arguments, told in (
        ({"distributed_checkpoint": True}, "an adapter is one file"),
        ({"merged": True, "state_dict": model.state_dict()}, "leave state_dict out"),
    ):
        with pytest.raises(ValueError, match=told):
            model.save_pretrained(tmp_path / "no", **arguments)
    assert not (tmp_path / "no").exists()
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="holds an adapter, which from_pretrained would add"):
        model.save_pretrained(tmp_path / "adapter", merged=True)
    assert names(tmp_path / "adapter") == ADAPTER_FILES


def test_transformers_other_arguments_are_taken(tmp_path):
    model = adapted(llama(), LoRA(r=4))
    model.save_pretrained(
        tmp_path, True, None, False, max_shard_size="1KB", safe_serialization=False, variant="fp16"
    )
    assert names(tmp_path) == ADAPTER_FILES


def test_an_adapter_is_pushed_to_the_hub(tmp_path, monkeypatch):
    calls = []

    class Hub:
        def __init__(self, token=None):
            calls.append(token)

        def create_repo(self, repo_id, exist_ok, private):
            return SimpleNamespace(repo_id=f"someone/{repo_id}")

        def create_branch(self, repo_id, branch, exist_ok):
            assert exist_ok
            calls.append((repo_id, branch))

        def upload_folder(self, **arguments):
            calls.append(arguments)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    model = adapted(llama(), LoRA(r=4))
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, token="t", commit_message="all")
    assert calls[0] == "t"
    assert calls[1]["repo_id"] == "someone/mine"
    assert calls[1]["commit_message"] == "all"
    assert set(calls[1]["allow_patterns"]) == ADAPTER_FILES == names(tmp_path / "mine")
    for revision, branches in (("dev", [("someone/mine", "dev")]), ("refs/pr/3", [])):
        calls.clear()
        model.save_pretrained(tmp_path / "mine", push_to_hub=True, revision=revision)
        assert calls[1:-1] == branches
        assert calls[-1]["revision"] == revision


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile], ids=["plain", "compiled"])
def test_trainer_resumes_and_saves_without_a_callback(wrap, tmp_path):
    def trained(folder, **arguments):
        model = wrap(adapted_for_trainer(LoRA(r=4, init=PiSSA())))
        trainer = trainer_of(model, folder, remove_unused_columns=False)
        trainer.train(**arguments)
        return trainer

    torch.compiler.set_stance("force_eager")
    try:
        straight = trained(tmp_path)
        checkpoint = tmp_path / f"checkpoint-{HALF}"
        again = trained(tmp_path / "again", resume_from_checkpoint=str(checkpoint))
    finally:
        torch.compiler.set_stance("default")
    assert losses(again) == losses(straight)
    assert len(losses(again)) == STEPS
    assert_same(again.model, straight.model)
    straight.save_model(tmp_path / "saved")
    assert names(tmp_path / "saved") == ADAPTER_FILES | {"training_args.bin"}
    assert names(checkpoint) > ADAPTER_FILES


def test_load_adapter_says_what_a_whole_model_is(tmp_path):
    model = adapted(llama(), LoRA(r=4))
    model.save_pretrained(tmp_path / "merged", merged=True)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is a whole model without"):
        lorafast.load_adapter(llama(), tmp_path / "merged")
    lorafast.merge(model).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    with pytest.raises(FileNotFoundError, match=r"without adapters.*from_pretrained"):
        lorafast.load_adapter(llama(), tmp_path / "sharded")


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_load_adapter_says_how_to_read_what_version_0_1_saved(shards, tmp_path):
    model = adapted(llama(), DoRA(r=4))
    type(model).save_pretrained(model, tmp_path, max_shard_size=shards)  # as version 0.1 did
    with pytest.raises(FileNotFoundError, match=r"keys of adapters beside base weights.*strict="):
        lorafast.load_adapter(llama(), tmp_path)
    again = lorafast.adapt(llama(), DoRA(r=4))
    for file in tmp_path.glob("*.safetensors"):
        again.load_state_dict(load_file(file), strict=False)
    assert_same(again, model)


def test_models_of_other_libraries_are_left_alone(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    before = set(vars(model))
    lorafast.adapt(model, LoRA(r=2))
    assert vars(model).keys() - before == {"_lorafast_layers", "_lorafast_task_type"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "use",
    [
        "from lorafast.models.adapt import adapt\n"
        "from lorafast.methods.lora import LoRA\n"
        "apply = lambda model, folder: adapt(model, LoRA(r=2))",
        "from lorafast.checkpoint.save_load import load_adapter as apply",
    ],
    ids=["adapt", "load_adapter"],
)
def test_the_adapter_is_saved_where_one_module_is_imported_before_torch(tmp_path, use):
    base = gpt2()
    base.config.save_pretrained(tmp_path)
    lorafast.save_adapter(adapted(base, LoRA(r=2)), tmp_path)
    program = f"""
{use}
import sys, transformers
model = transformers.GPT2LMHeadModel(transformers.GPT2Config.from_pretrained(sys.argv[1]))
apply(model, sys.argv[1])
assert "resize_token_embeddings" in vars(model)
model.save_pretrained(sys.argv[1] + "/saved")
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / "saved") == ADAPTER_FILES
