"""resize_token_embeddings of adapted models: never an adapter lost without a word."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_transformers import adapted, bart, copied_tensors, gpt2, llama, outputs, perturb
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
