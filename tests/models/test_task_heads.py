"""task_type trains and saves a model's head; without it, a head that is new gives a warning."""

import copy
import warnings

import peft
import pytest
import torch
import transformers
from helpers.tiny_transformers import (
    IDS,
    bart,
    classifier,
    gpt2,
    llama,
    loaded_by_peft,
    outputs,
    perturb,
)
from torch import nn
from transformers import (
    BartForSequenceClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    GPT2ForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import lorafast
from lorafast import LaMDA, LoRA

pytestmark = pytest.mark.peft

HEADS = {
    DistilBertForSequenceClassification: ("SEQ_CLS", {"classifier", "pre_classifier"}),
    DistilBertForTokenClassification: ("TOKEN_CLS", {"classifier"}),
    DistilBertForQuestionAnswering: ("QUESTION_ANS", {"qa_outputs"}),
    LlamaForSequenceClassification: ("SEQ_CLS", {"score"}),
    GPT2ForSequenceClassification: ("SEQ_CLS", {"score"}),
    BartForSequenceClassification: ("SEQ_CLS", {"classification_head"}),
}
kinds = pytest.mark.parametrize("kind", HEADS, ids=lambda kind: kind.__name__)


def distilbert():
    config = DistilBertConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=32, vocab_size=50)
    return DistilBertForMaskedLM(config)


def loaded(kind, folder, **options):
    """Return a model of a class from a checkpoint without its head."""
    made = {"Distil": distilbert, "LlamaF": llama, "GPT2Fo": gpt2, "BartFo": bart}
    if not folder.exists():
        made[kind.__name__[:6]]().save_pretrained(folder)
    model = kind.from_pretrained(folder, **options).eval()
    model.config.pad_token_id = 0
    return model


def head_names(model):
    return {
        name.partition(".")[0]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "lora_" not in name
    }


def outputs_of(model):
    ids = IDS % 50
    ids = torch.where(ids == 2, 5, ids)
    ids[:, -1] = 2  # BART's head reads the one end of a sentence
    with torch.no_grad():
        return model(input_ids=ids)[0]


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@kinds
def test_the_head_of_a_task_trains_and_is_saved(kind, no_warnings, tmp_path):
    task, heads = HEADS[kind]
    model = lorafast.adapt(loaded(kind, tmp_path / "base"), LoRA(r=4), task_type=task)
    assert head_names(model) == heads
    assert not [n for n, m in model.named_modules() if n in heads and hasattr(m, "lora_A")]
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(9)
    again = lorafast.load_adapter(loaded(kind, tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(outputs_of(again), outputs_of(model), rtol=0, atol=0)


@kinds
def test_peft_reads_the_head(kind, tmp_path):
    task, _ = HEADS[kind]
    model = lorafast.adapt(loaded(kind, tmp_path / "base"), LoRA(r=4), task_type=task)
    perturb(model).save_pretrained(tmp_path / "adapter")
    theirs = loaded_by_peft(loaded(kind, tmp_path / "base"), tmp_path / "adapter")
    assert type(theirs) is not peft.PeftModel
    torch.testing.assert_close(outputs_of(theirs), outputs_of(model))
    again = kind.from_pretrained(tmp_path / "adapter").eval()
    again.config.pad_token_id = 0
    torch.testing.assert_close(outputs_of(again), outputs_of(model))


@kinds
def test_a_peft_config_trains_the_head_besides_whatever_it_asks(kind, tmp_path):
    task, heads = HEADS[kind]
    base = loaded(kind, tmp_path / "base")
    other = next(n for n, m in base.named_modules() if isinstance(m, nn.LayerNorm | nn.Embedding))
    config = peft.LoraConfig(
        r=4, task_type=task, target_modules="all-linear", modules_to_save=[other]
    )
    model = lorafast.adapt(base, config)
    assert head_names(model) == heads | {other.partition(".")[0]}
    perturb(model).save_pretrained(tmp_path / "adapter")
    again = lorafast.load_adapter(loaded(kind, tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(outputs_of(again), outputs_of(model), rtol=0, atol=0)
    theirs = loaded_by_peft(loaded(kind, tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(outputs_of(theirs), outputs_of(model))


def test_the_head_is_saved_besides_other_modules(tmp_path):
    model = lorafast.adapt(
        classifier(), LaMDA(r=4), task_type=peft.TaskType.SEQ_CLS, modules_to_save=["norm"]
    )
    assert head_names(model) == {"score", "model"}
    perturb(model).save_pretrained(tmp_path)
    again = lorafast.load_adapter(classifier(), tmp_path)
    torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=0)
    with torch.no_grad(), lorafast.disable_adapter(model):
        torch.testing.assert_close(outputs(model), outputs(classifier()))


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"])
def test_other_tasks_are_only_written_down(task, no_warnings, tmp_path):
    base = llama()
    # One without a name is warned of.
    base.name_or_path = "tiny"
    model = lorafast.adapt(base, LoRA(r=4), task_type=task)
    assert not head_names(model)
    lorafast.save_adapter(model, tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).task_type == task


@kinds
def test_a_new_head_gives_a_warning_that_names_it(kind, tmp_path):
    task, heads = HEADS[kind]
    told = f"{', '.join(sorted(heads, reverse=True))}: newly initialised .*task_type='{task}'"
    with pytest.warns(UserWarning, match=told) as caught:
        lorafast.adapt(loaded(kind, tmp_path / "base"), LoRA(r=4))
    assert caught[0].filename == __file__
    config = peft.LoraConfig(r=4, target_modules=["q_lin", "q_proj", "c_attn"])
    with pytest.warns(UserWarning, match=told):
        lorafast.adapt(loaded(kind, tmp_path / "base"), config)


def test_a_classifier_made_from_a_config_gives_a_warning():
    with pytest.warns(UserWarning, match=r"score: newly .*adapt\(\.\.\., task_type='SEQ_CLS'\)"):
        lorafast.adapt(classifier(), LoRA(r=4))
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    with pytest.warns(UserWarning, match=r"classifier: newly .*modules_to_save=\['classifier'\]"):
        lorafast.adapt(transformers.ViTForImageClassification(config), LoRA(r=4))


def test_every_new_module_is_named(tmp_path):
    llama().model.save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match=r"lm_head: newly .*modules_to_save=\['lm_head'\]"):
        lorafast.adapt(model, LoRA(r=4), task_type="CAUSAL_LM")

    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = LlamaForCausalLM.from_pretrained(tmp_path / "base")

    with pytest.warns(UserWarning, match=r"encoder\.lm_head: newly"):
        lorafast.adapt(Tower(), LoRA(r=4), target_modules=["q_proj"])


def test_what_is_loaded_or_saved_gives_no_warning(no_warnings, tmp_path):
    classifier().save_pretrained(tmp_path / "base")
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "base")
    lorafast.adapt(copy.deepcopy(model), LoRA(r=2))
    lorafast.adapt(model, LoRA(r=2))
    lorafast.adapt(classifier(), LoRA(r=2), modules_to_save=["score"])
    lorafast.adapt(llama(), LoRA(r=2))
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    lorafast.adapt(LlamaForCausalLM.from_pretrained(tmp_path / "tied"), LoRA(r=2))
    lorafast.adapt(nn.Sequential(nn.Linear(4, 4)), LoRA(r=2))


def test_a_task_without_a_head_is_refused():
    model = llama()
    with pytest.raises(ValueError, match=r"task_type='seq' must be one of 'SEQ_CLS'"):
        lorafast.adapt(model, LoRA(r=4), task_type="seq")
    plain = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"Sequential has no qa_outputs: name its .* children"):
        lorafast.adapt(plain, LoRA(r=2), task_type="QUESTION_ANS")
    assert type(plain[0]) is nn.Linear
    lorafast.adapt(plain, LoRA(r=2), ["0"], task_type="FEATURE_EXTRACTION")
    with pytest.raises(ValueError, match="which says task_type itself"):
        lorafast.adapt(model, peft.LoraConfig(r=4), task_type="CAUSAL_LM")
