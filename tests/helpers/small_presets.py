"""The bench's presets with few and narrow layers, whose steps a test takes really."""

from lorafast.bench.cases import model_presets

_DECODER = {
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
_ENCODER = {
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "vocab_size": 1000,
}
_BART = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "d_model": 256,
    "encoder_ffn_dim": 512,
    "decoder_ffn_dim": 512,
    "vocab_size": 1000,
}
_EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "head_dim": 32,
}
_SMALL = {
    "llama": _DECODER,
    "mistral": _DECODER,
    "qwen2": _DECODER,
    "qwen3_moe": _DECODER | _EXPERTS,
    "gpt2": {"n_layer": 2, "n_embd": 256, "n_head": 8, "vocab_size": 1000},
    "roberta": _ENCODER,
    "deberta-v2": _ENCODER,
    "bart": _BART,
}


def small(name):
    """Return a preset of the same kind as the named one."""
    preset = model_presets.find(name)[1]
    return preset._replace(config=preset.config | _SMALL[preset.config["model_type"]])
