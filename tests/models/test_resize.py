"""resize_token_embeddings of adapted models: never an adapter lost without a word."""

import copy
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from helpers.tiny_transformers import (
    adapted,
    bart,
    copied_tensors,
    gpt2,
    llama,
    made,
    outputs,
    perturb,
)
from helpers.trainer_runs import assert_same

import lorafast
from lorafast import LoRA

pytestmark = pytest.mark.peft

CASES = {
    "embedding": (llama, {"target_modules": ["embed_tokens"]}),
    "head": (llama, {"target_modules": ["lm_head"]}),
    "tied": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["embed_tokens", "lm_head"]},
    ),
    "saved": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved-embedding": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "gpt2": (gpt2, {"target_modules": ["wte"]}),
}
cases = pytest.mark.parametrize(("make", "options"), CASES.values(), ids=CASES)


@cases
@pytest.mark.parametrize("arguments", [(101,), (90,), (99, 8), (None, 64)], ids=str)
def test_another_size_is_refused_and_changes_nothing(make, options, arguments):
    model = adapted(make(), LoRA(r=4), **options)
    want, modules = copied_tensors(model), dict(model.named_modules())
    told = r"new_num_tokens=\d+: .*, made for 99 tokens, .* resize first, then adapt"
    for copied in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match=told):
            copied.resize_token_embeddings(*arguments)
    assert_same(model, SimpleNamespace(state_dict=lambda: want))
    assert dict(model.named_modules()) == modules
    assert model.config.vocab_size == 99


@cases
def test_the_same_size_changes_nothing(make, options):
    model = adapted(make(), LoRA(r=4), **options)
    want = outputs(model)
    modules = dict(model.named_modules())
    for arguments in ((99,), (97, 9), (None,), ()):
        assert model.resize_token_embeddings(*arguments) is model.get_input_embeddings()
    assert dict(model.named_modules()) == modules
    torch.testing.assert_close(outputs(model), want, rtol=0, atol=0)
    lorafast.unload(model)
    torch.testing.assert_close(outputs(model), outputs(make()))


@pytest.mark.parametrize("make", [llama, bart, lambda: llama(tie_word_embeddings=True)])
def test_a_table_without_adapter_is_resized(make):
    model = adapted(make(), LoRA(r=4), target_modules=["q_proj"])
    want = outputs(model)
    model.resize_token_embeddings(110)
    torch.testing.assert_close(outputs(model)[..., :99], want)
    assert outputs(model).shape[-1] == 110
    with torch.no_grad(), lorafast.disable_adapter(model):
        torch.testing.assert_close(outputs(model)[..., :99], outputs(make()))


def test_the_order_that_the_message_gives_works():
    model = adapted(llama(), LoRA(r=4), target_modules=["embed_tokens", "lm_head"])
    lorafast.unload(model).resize_token_embeddings(110)
    assert "resize_token_embeddings" not in vars(model)
    lorafast.adapt(model, LoRA(r=4), target_modules=["embed_tokens", "lm_head"])
    assert outputs(perturb(model)).shape[-1] == 110


def t5():
    """Return a T5, whose encoder and decoder have embeddings of their own on one tensor."""
    config = transformers.T5Config(
        vocab_size=99,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return made(transformers.T5ForConditionalGeneration, config)


@pytest.mark.parametrize("place", ["encoder.embed_tokens", "decoder.embed_tokens", "shared"])
@pytest.mark.parametrize("saved", [False, True], ids=["adapted", "saved"])
def test_every_table_of_an_encoder_and_decoder_is_looked_at(place, saved):
    model = t5()
    config = peft.LoraConfig(
        r=2,
        target_modules=["q"] if saved else ["q", place],
        modules_to_save=[place] if saved else None,
    )
    lorafast.adapt(model, config)
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=rf"new_num_tokens=110: .*{place}.*, made for 99 tokens"):
        model.resize_token_embeddings(110)
    assert dict(model.named_modules()) == modules
    model.resize_token_embeddings(99)
    assert dict(model.named_modules()) == modules


def test_an_encoder_and_decoder_without_adapted_tables_is_resized():
    model = lorafast.adapt(t5(), LoRA(r=2), target_modules=["q"])
    model.resize_token_embeddings(110)
    assert len(model.encoder.embed_tokens.weight) == 110


@pytest.mark.parametrize("tie", [False, True])
def test_new_rows_are_in_the_file_where_the_table_and_the_head_are_saved(tie, tmp_path):
    def resized(seed):
        model = llama(tie_word_embeddings=tie)
        torch.manual_seed(seed)
        model.resize_token_embeddings(110, mean_resizing=False)
        return model

    saved = ["embed_tokens", "lm_head"]
    model = adapted(resized(1), LoRA(r=4), target_modules=["q_proj"], modules_to_save=saved)
    lorafast.save_adapter(model, tmp_path)
    loaded = lorafast.load_adapter(resized(2), tmp_path)
    assert_same(loaded, model)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tie
