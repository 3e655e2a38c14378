"""Tiny models of many families of transformers, with random weights, and inputs for each.

Families whose linears are unusual: fused, transposed, shared between blocks, read by their parents,
in experts or beside them, in two towers, or of classes of their own.
"""

from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

transformers.logging.set_verbosity_error()

SPECIAL = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
TEXT = SIZES | SPECIAL | {"max_position_embeddings": 32, "use_cache": False}
IMAGE = SIZES | {"image_size": 16, "patch_size": 4}
SPEECH = SIZES | {
    "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0, "apply_spec_augment": False,
}  # fmt: skip
# The names that GPT-2 and others after it use.
OLD_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4}
ENCODER_DECODER = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
MANY_EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip

IDS = {"input_ids": torch.arange(24).reshape(2, 12) + 3}
BOTH_IDS = IDS | {"decoder_input_ids": IDS["input_ids"]}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)}
SOUND = {"input_values": torch.sin(torch.arange(2 * 800.0)).reshape(2, 800)}
MEL = torch.sin(torch.arange(2 * 8 * 12.0)).reshape(2, 8, 12)


class Family(NamedTuple):
    """A class of transformers, its config's fields, and the inputs of a call.

    Attributes:
        read: regular expression of the linears whose weight the model reads without calling them.
        idle: of those that it does not call with these inputs.
        peft: "same" layers as here under "all-linear", "same, warned" where a file warns that it
            may not be so, "others" where it is not, or PEFT "refuses" the model.
    """

    model: str
    kind: str
    fields: dict[str, Any]
    inputs: dict[str, torch.Tensor]
    read: str = "-"
    idle: str = "-"
    peft: str = "same"

    def make(self) -> nn.Module:
        """Return the model, with the same weights at every call."""
        kind = getattr(transformers, self.model + self.kind)
        torch.manual_seed(0)
        return kind(kind.config_class(**self.fields)).eval()


def _lm(model: str, read: str = "-", peft: str = "same", **fields: Any) -> Family:
    return Family(model, "ForCausalLM", TEXT | fields, IDS, read=read, peft=peft)


def _masked(model: str, read: str = "-", idle: str = "-", **fields: Any) -> Family:
    return Family(model, "ForMaskedLM", TEXT | fields, IDS, read=read, idle=idle)


def _old(model: str, kind: str = "ForCausalLM", **fields: Any) -> Family:
    return Family(model, kind, SPECIAL | {"use_cache": False} | fields, IDS)


DECODERS = {
    "llama": _lm("Llama", **GROUPED),
    "gpt2": _old("GPT2", "LMHeadModel", **OLD_SIZES),
    "gptj": _old("GPTJ", **OLD_SIZES, rotary_dim=4),
    "gpt-bigcode": _old("GPTBigCode", **OLD_SIZES),
    "gpt-neox": _lm("GPTNeoX"),
    "mpt": _old("Mpt", d_model=32, n_layers=2, n_heads=4, max_seq_len=32),
    "bloom": _lm("Bloom", n_layer=2, n_head=4),
    "falcon": _lm("Falcon"),
    "falcon-grouped": _lm("Falcon", new_decoder_architecture=True, num_kv_heads=2),
    "phi": _lm("Phi"),
    "phi3": _lm("Phi3"),
    "gemma2": _lm("Gemma2", head_dim=8, **GROUPED),
    "gemma3": _lm("Gemma3", head_dim=8, **GROUPED),
    "xlnet": _old("XLNet", "LMHeadModel", d_model=32, n_layer=2, n_head=4, d_inner=48),
}
RECURRENT = {
    "mamba": _lm("Mamba", r".*\.dt_proj", "refuses", state_size=4, time_step_rank=4),
    "mamba2": _lm(
        "Mamba2", peft="refuses", state_size=4, num_heads=4, head_dim=16, n_groups=2, chunk_size=4
    ),
    "jamba": _lm(
        "Jamba", r".*\.dt_proj", "same, warned", attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, num_experts=2, mamba_d_state=4,
        mamba_dt_rank=4, use_mamba_kernels=False, **GROUPED,
    ),
    "zamba2": _lm(
        "Zamba2", mamba_d_state=4, n_mamba_heads=4, mamba_ngroups=1, chunk_size=4, adapter_rank=4,
        layers_block_type=["mamba", "hybrid"], num_mem_blocks=1, use_mamba_kernels=False,
    ),
    "recurrent-gemma": _lm(
        "RecurrentGemma", num_key_value_heads=1, lru_width=32, attention_window_size=8, head_dim=8,
        block_types=["recurrent", "attention"],
    ),
    "lfm2": _lm("Lfm2", layer_types=["conv", "full_attention"], **GROUPED),
    "rwkv": Family(
        "Rwkv", "ForCausalLM", TEXT | {"attention_hidden_size": 32, "context_length": 32}, IDS
    ),
}  # fmt: skip
EXPERTS = {
    "mixtral": _lm("Mixtral", num_local_experts=2, **GROUPED),
    "gpt-oss": _lm("GptOss", num_local_experts=2, num_experts_per_tok=2, head_dim=8, **GROUPED),
    "qwen2-moe": _lm("Qwen2Moe", peft="same, warned", **MANY_EXPERTS, **GROUPED),
    "qwen3-next": _lm(
        "Qwen3Next", peft="others", head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"], **MANY_EXPERTS, **GROUPED,
    ),
    "deepseek-v3": _lm(
        "DeepseekV3", peft="others", kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, n_group=2, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=1, moe_intermediate_size=16,
    ),
}  # fmt: skip
ENCODERS = {
    "deberta": _masked("Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta-v2": _masked(
        "DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"], conv_kernel_size=3
    ),
    "albert": _masked("Albert", embedding_size=16),
    "mobilebert": _masked(
        "MobileBert", read=r"cls\.predictions\.(dense|decoder)", embedding_size=16,
        true_hidden_size=16, intra_bottleneck_size=16,
    ),
    "convbert": _masked(
        "ConvBert", embedding_size=32, num_groups=2, conv_kernel_size=3, head_ratio=2
    ),
    "squeezebert": _masked("SqueezeBert", idle=r".*pooler\.dense", embedding_size=32),
    "longformer": _masked("Longformer", idle=r".*_global", attention_window=4),
    "perceiver": Family(
        "Perceiver", "ForMaskedLM",
        TEXT | {
            "d_model": 32, "d_latents": 32, "num_latents": 4, "num_blocks": 1,
            "num_self_attends_per_block": 1, "num_self_attention_heads": 2,
            "num_cross_attention_heads": 2,
        },
        {"inputs": IDS["input_ids"]},
    ),
}  # fmt: skip
ENCODER_DECODERS = {
    "bart": Family("Bart", "ForConditionalGeneration", SPECIAL | ENCODER_DECODER, IDS),
    "t5": Family(
        "T5", "ForConditionalGeneration",
        {
            "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4,
            "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu",
        },
        BOTH_IDS,
    ),
    "whisper": Family(
        "Whisper", "ForConditionalGeneration",
        SPECIAL | ENCODER_DECODER | {
            "num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 16
        },
        {"input_features": MEL, "decoder_input_ids": IDS["input_ids"]},
    ),
}  # fmt: skip
IMAGES_AND_SOUND = {
    "vit": Family("ViT", "ForImageClassification", IMAGE, PIXELS),
    "dinov2-swiglu": Family("Dinov2", "Model", IMAGE | {"use_swiglu_ffn": True}, PIXELS),
    "swin": Family(
        "Swin", "ForImageClassification",
        {
            "image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1],
            "num_heads": [2, 2], "window_size": 4,
        },
        PIXELS,
    ),
    "segformer": Family(
        "Segformer", "ForSemanticSegmentation",
        {
            "depths": [1, 1], "num_encoder_blocks": 2, "sr_ratios": [2, 1],
            "hidden_sizes": [16, 32],
            "num_attention_heads": [2, 2], "patch_sizes": [3, 3], "strides": [2, 2],
            "mlp_ratios": [2, 2], "decoder_hidden_size": 16,
        },
        PIXELS,
    ),
    "clip": Family(
        "CLIP", "Model", {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 16},
        IDS | PIXELS,
    ),
    "siglip": Family(
        "Siglip", "Model", {"text_config": TEXT, "vision_config": IMAGE}, IDS | PIXELS,
        read=r".*attention\.out_proj",
    ),
    "wav2vec2": Family("Wav2Vec2", "Model", SPEECH, SOUND),
    "wav2vec2-bert": Family(
        "Wav2Vec2Bert", "Model", SPEECH | {"feature_projection_input_dim": 8},
        {"input_features": MEL.mT.contiguous()},
    ),
    "wavlm": Family(
        "WavLM", "Model", SPEECH, SOUND, read=r".*\.attention\.(q|k|v|out)_proj"
    ),
}  # fmt: skip
FAMILIES = DECODERS | RECURRENT | EXPERTS | ENCODERS | ENCODER_DECODERS | IMAGES_AND_SOUND
