"""Sizes of published models, as configs written here: no hub is asked. Imports no torch.

A config holds what differs from transformers' defaults for its model_type, and `task` the head that
it is fine-tuned with: "causal", "seq2seq" or "classifier".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from lorafast.runtime.spelling import did_you_mean

TASKS = ("causal", "seq2seq", "classifier")
# The layers that get adapters where the experts of a mixture stay frozen.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class Preset(NamedTuple):
    """A model's sizes.

    config: the fields of transformers' config, model_type among them. targets: the layers that get
    adapters; () are all linears.
    """

    task: str
    config: dict[str, Any]
    targets: tuple[str, ...] = ()

    @property
    def layers(self) -> str:
        """The adapted layers in words."""
        return ", ".join(self.targets) if self.targets else "all linears but the head"


def _llama(hidden: int, inner: int, layers: int, heads: int, groups: int, **more: Any) -> dict:
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        **more,
    }


def _qwen2(vocab: int, hidden: int, inner: int, layers: int, heads: int, groups: int) -> dict:
    return {
        "model_type": "qwen2",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": hidden < 2048,
    }


_QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
}
_MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 32768,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}
_ROBERTA = {
    "model_type": "roberta",
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
}
_DEBERTA = {
    "model_type": "deberta-v2",
    "vocab_size": 128100,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "type_vocab_size": 0,
    "layer_norm_eps": 1e-7,
    "relative_attention": True,
    "max_relative_positions": -1,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
}
_BART = {
    "model_type": "bart",
    "vocab_size": 50265,
    "d_model": 1024,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "encoder_ffn_dim": 4096,
    "decoder_ffn_dim": 4096,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "max_position_embeddings": 1024,
}

PRESETS = {
    "llama3-8b": Preset("causal", _llama(4096, 14336, 32, 32, 8, max_position_embeddings=8192)),
    "llama3.2-1b": Preset("causal", _llama(2048, 8192, 16, 32, 8, tie_word_embeddings=True)),
    "llama3.2-3b": Preset("causal", _llama(3072, 8192, 28, 24, 8, tie_word_embeddings=True)),
    "llama2-7b": Preset(
        "causal",
        _llama(4096, 11008, 32, 32, 32, vocab_size=32000, max_position_embeddings=4096),
    ),
    "qwen2.5-0.5b": Preset("causal", _qwen2(151936, 896, 4864, 24, 14, 2)),
    "qwen2.5-7b": Preset("causal", _qwen2(152064, 3584, 18944, 28, 28, 4)),
    "qwen3-moe": Preset("causal", _QWEN3_MOE, ATTENTION),
    "mistral-7b": Preset("causal", _MISTRAL),
    "gpt2": Preset("causal", {"model_type": "gpt2"}),
    "roberta-base": Preset("classifier", _ROBERTA),
    "deberta-v3-base": Preset("classifier", _DEBERTA),
    "bart-large": Preset("seq2seq", _BART),
}
# Names that stand for one of a family.
ALIASES = {"qwen2.5": "qwen2.5-7b", "qwen3-30b-a3b": "qwen3-moe"}


def find(name: str) -> tuple[str, Preset]:
    """Return the name and the preset that a name stands for, or a config on this machine.

    name: one of PRESETS or ALIASES, a folder with a config.json, or a JSON file.
    Raises ValueError, with the nearest name, for anything else.
    """
    name = ALIASES.get(name, name)
    if name in PRESETS:
        return name, PRESETS[name]
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if file.suffix == ".json" and file.is_file():
        return (path.name if path.is_dir() else path.stem), _read(file)
    known = (*PRESETS, *ALIASES)
    raise ValueError(
        f"{name!r} is none of {', '.join(PRESETS)}, and no folder with a config.json"
        f"{did_you_mean(name, known)}"
    )


def _read(file: Path) -> Preset:
    """Return the preset of a transformers config. ValueError for anything else."""
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: no config: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"{file}: a transformers config has a model_type")
    kinds = " ".join(map(str, config.get("architectures") or ()))
    if config.get("is_encoder_decoder") or "ConditionalGeneration" in kinds:
        task = "seq2seq"
    elif "CausalLM" in kinds or "LMHeadModel" in kinds:
        task = "causal"
    else:
        task = "classifier"
    has_experts = any(config.get(key) for key in ("num_experts", "num_local_experts"))
    return Preset(task, config, ATTENTION if has_experts else ())
