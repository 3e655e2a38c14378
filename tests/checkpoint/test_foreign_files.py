"""Adapter files as other writers spell them: read with their outputs, or refused in words."""

import json

import peft
import pytest
import safetensors.torch
import torch
from helpers import tiny_transformers
from helpers.tiny_transformers import llama, loaded_by_peft, outputs, peft_adapted

import lorafast

pytestmark = pytest.mark.peft

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def config(**fields):
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | fields
    )


def assert_same(model, other):
    torch.testing.assert_close(outputs(model), outputs(other), rtol=1e-4, atol=2e-6)


def rename(folder, rename_key):
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    renamed = {rename_key(key): tensor for key, tensor in tensors.items()}
    safetensors.torch.save_file(renamed, folder / WEIGHTS)


@pytest.mark.parametrize(
    "spelling",
    [
        lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
        lambda key: f"_orig_mod.{key}",
        lambda key: key.replace("layers.1.", "layers.1._checkpoint_wrapped_module."),
        lambda key: key.replace("layers.0.", "_fsdp_wrapped_module.layers.0."),
        # As transformers writes a model that carries the adapter itself.
        lambda key: key.removeprefix(PREFIX),
    ],
    ids=["compiled base", "compiled model", "checkpointed", "FSDP", "without prefix"],
)
def test_other_spellings_of_keys(spelling, tmp_path):
    theirs = peft_adapted(llama(), config(modules_to_save=["lm_head"]))
    theirs.save_pretrained(tmp_path)
    rename(tmp_path, spelling)
    assert_same(lorafast.load_adapter(llama(), tmp_path), theirs)


def test_a_file_of_a_compiled_base(tmp_path):
    theirs = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.ModuleDict({"_orig_mod": llama()})), config()
    )
    tiny_transformers.perturb(theirs).save_pretrained(tmp_path)
    keys = safetensors.torch.load_file(tmp_path / WEIGHTS)
    assert all("._orig_mod." in key for key in keys)
    rename(tmp_path, lambda key: key.replace("0._orig_mod.", "_orig_mod."))
    loaded = lorafast.load_adapter(llama(), tmp_path)
    inner = theirs.base_model.model[0]["_orig_mod"]
    assert_same(loaded, inner)


def test_one_tensor_under_two_spellings_is_refused(tmp_path):
    peft_adapted(llama(), config(modules_to_save=["lm_head"])).save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS)
    head = f"{PREFIX}lm_head.weight"
    tensors[f"{PREFIX}_orig_mod.lm_head.weight"] = tensors[head] + 1
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"lm_head\.weight are the same tensor of the model"):
        lorafast.load_adapter(llama(), tmp_path)


def grown(rows=105, **fields):
    """Return the model after its vocabulary grew."""
    model = llama(**fields)
    torch.manual_seed(7)
    model.resize_token_embeddings(rows)
    return model


@torch.no_grad()
def trained_elsewhere(model):
    """Return the model with another table and head."""
    for name, parameter in model.named_parameters():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]])
def test_tables_saved_beside_after_the_vocabulary_grew(tie, targets, tmp_path):
    make = lambda: grown(tie_word_embeddings=tie)  # noqa: E731
    written = trained_elsewhere(peft_adapted(make(), config(target_modules=targets)))
    written.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    # Beside an adapted table PEFT does not write the head.
    theirs = loaded_by_peft(make(), tmp_path / "theirs")
    assert torch.equal(outputs(theirs), outputs(written)) == (tie or len(targets) == 1)
    loaded = lorafast.load_adapter(make(), tmp_path / "theirs", trainable=True)
    assert_same(loaded, theirs)
    base = theirs.unload()
    with lorafast.disable_adapter(loaded):
        assert_same(loaded, base)
    assert not loaded.lm_head.weight.requires_grad
    # Their own file and a second load into the adapted model have the tables too.
    lorafast.save_adapter(loaded, tmp_path / "ours")
    for again in (
        lorafast.load_adapter(make(), tmp_path / "ours"),
        loaded_by_peft(make(), tmp_path / "ours"),
        lorafast.load_adapter(
            lorafast.adapt(make(), lorafast.LoRA(r=4, alpha=8), targets), tmp_path / "ours"
        ),
    ):
        assert_same(again, loaded)
    assert_same(lorafast.unload(loaded), make())


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]])
def test_the_models_own_tables_come_back(tie, targets, tmp_path):
    make = lambda: grown(tie_word_embeddings=tie)  # noqa: E731
    for folder, change in (("a", trained_elsewhere), ("c", trained_elsewhere), ("b", lambda m: m)):
        torch.manual_seed(len(list(tmp_path.iterdir())))
        written = change(peft_adapted(make(), config(target_modules=targets)))
        written.save_pretrained(tmp_path / folder, save_embedding_layers=folder != "b")
    want = {folder: outputs(lorafast.load_adapter(make(), tmp_path / folder)) for folder in "abc"}
    own = tiny_transformers.copied_tensors(make())
    model = make()
    for folder in "aacbcab":
        lorafast.load_adapter(model, tmp_path / folder)
        assert torch.equal(outputs(model), want[folder])
    for folder in "bac":
        lorafast.load_adapter(model, tmp_path / folder)
        lorafast.unload(model)
        assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    # What is adapted after that saves no table, and the base of its file is the model's own.
    lorafast.adapt(model, lorafast.LoRA(r=4), ["q_proj"])
    lorafast.save_adapter(tiny_transformers.perturb(model), tmp_path / "d")
    keys = safetensors.torch.load_file(tmp_path / "d" / WEIGHTS)
    assert not any("embed_tokens" in key or "lm_head" in key for key in keys)
    assert torch.equal(outputs(lorafast.load_adapter(make(), tmp_path / "d")), outputs(model))


def test_a_reference_and_a_merged_model_keep_the_files_tables(tmp_path):
    written = trained_elsewhere(peft_adapted(grown(), config()))
    written.save_pretrained(tmp_path, save_embedding_layers=True)
    model = lorafast.load_adapter(grown(), tmp_path)
    reference = lorafast.reference_model(model)
    with lorafast.disable_adapter(model):
        assert torch.equal(outputs(model), outputs(reference))
    assert torch.equal(reference.lm_head.weight, written.base_model.model.lm_head.weight)
    with pytest.raises(ValueError, match=r"embed_tokens and lm_head, made for 105 tokens"):
        model.resize_token_embeddings(110)
    want = outputs(model)
    lorafast.merge(model)
    torch.testing.assert_close(outputs(model), want)
    merged = tiny_transformers.copied_tensors(model)
    lorafast.unload(lorafast.adapt(model, lorafast.LoRA(r=4), ["q_proj"]))
    assert all(torch.equal(value, merged[name]) for name, value in model.state_dict().items())


def test_tables_of_another_size_say_what_to_do(tmp_path):
    theirs = peft_adapted(grown(), config())
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    model = llama()
    before = tiny_transformers.copied_tensors(model)
    with pytest.raises(
        ValueError, match=r"another size: model\.resize_token_embeddings\(105\) first"
    ):
        lorafast.load_adapter(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert before.keys() == model.state_dict().keys()


def test_tables_that_differ_in_the_file_and_are_one_in_the_model(tmp_path):
    theirs = trained_elsewhere(peft_adapted(llama(), config()))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(
        ValueError, match=r"are one tensor \(99, 32\) in the model, and two in the file"
    ):
        lorafast.load_adapter(llama(tie_word_embeddings=True), tmp_path)


def test_another_weight_than_a_table_is_still_refused(tmp_path):
    peft_adapted(llama(), config()).save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS)
    tensors[f"{PREFIX}model.norm.weight"] = torch.full((32,), 2.0)
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(
        ValueError, match=r"norm\.weight \(32,\) is another weight than the model's own"
    ):
        lorafast.load_adapter(llama(), tmp_path)


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_ties_are_kept_where_the_config_says_so(saved, tmp_path):
    make = lambda: llama(tie_word_embeddings=True)  # noqa: E731
    fields = {"modules_to_save": saved, "ensure_weight_tying": True}
    theirs = peft_adapted(make(), config(**fields))
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = lorafast.load_adapter(make(), tmp_path / "theirs", trainable=True)
    assert_same(loaded, theirs)
    ours = tiny_transformers.perturb(lorafast.adapt(make(), config(**fields)))
    for model in (loaded, ours):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight.requires_grad
    lorafast.save_adapter(ours, tmp_path / "ours")
    assert_same(loaded_by_peft(make(), tmp_path / "ours"), ours)
    assert_same(lorafast.load_adapter(make(), tmp_path / "ours"), ours)


def test_tied_adapters_are_refused_in_words(tmp_path):
    make = lambda: llama(tie_word_embeddings=True)  # noqa: E731
    fields = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    peft_adapted(make(), config(**fields)).save_pretrained(tmp_path)
    for call in (
        lambda: lorafast.load_adapter(make(), tmp_path),
        lambda: lorafast.adapt(make(), config(**fields)),
    ):
        with pytest.raises(ValueError, match=r"ensure_weight_tying=True: .* lorafast has no tied"):
            call()
    # Where nothing is tied, the field asks for nothing.
    theirs = peft_adapted(llama(), config(**fields))
    theirs.save_pretrained(tmp_path / "untied")
    assert_same(lorafast.load_adapter(llama(), tmp_path / "untied"), theirs)


def test_olora_says_how_to_save_it_and_is_read_then(tmp_path):
    torch.manual_seed(1)
    theirs = peft.get_peft_model(llama(), config(init_lora_weights="olora"))
    theirs.save_pretrained(tmp_path / "start")
    tiny_transformers.perturb(theirs).eval().save_pretrained(tmp_path / "as is")
    with pytest.raises(
        ValueError, match=r"'olora': .*save it from PEFT with path_initial_model_for"
    ):
        lorafast.load_adapter(llama(), tmp_path / "as is")
    theirs.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    assert json.loads((tmp_path / "plain/adapter_config.json").read_text())["r"] == 8
    assert_same(lorafast.load_adapter(llama(), tmp_path / "plain"), theirs)
