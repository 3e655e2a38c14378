"""Tiny mixture-of-experts models of transformers, built from configs, and their experts in PEFT."""

import torch
import transformers

from helpers import tiny_transformers

SIZES = tiny_transformers.SIZES | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
TARGETS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


def qwen3_moe(**fields):
    """Return a Qwen3-MoE with 6 experts."""
    config = transformers.Qwen3MoeConfig(
        **SIZES | fields, intermediate_size=48, moe_intermediate_size=16, num_experts=6, head_dim=8
    )
    return made(transformers.Qwen3MoeForCausalLM, config)


def gpt_oss(**fields):
    """Return a gpt-oss with 4 experts: transposed weights, biases, and a gate of its own."""
    config = transformers.GptOssConfig(
        **SIZES | fields, intermediate_size=16, num_local_experts=4, head_dim=8
    )
    return made(transformers.GptOssForCausalLM, config)


def mixtral(**fields):
    """Return a Mixtral with 4 experts."""
    config = transformers.MixtralConfig(**SIZES | fields, intermediate_size=16, num_local_experts=4)
    return made(transformers.MixtralForCausalLM, config)


def olmoe(**fields):
    """Return an OLMoE with 8 experts."""
    config = transformers.OlmoeConfig(**SIZES | fields, intermediate_size=16, num_experts=8)
    return made(transformers.OlmoeForCausalLM, config)


def nemotron_h(**fields):
    """Return a Nemotron-H whose experts have no gate."""
    config = transformers.NemotronHConfig(
        **SIZES | fields, intermediate_size=48, moe_intermediate_size=16, n_routed_experts=4,
        layers_block_type=["attention", "moe"], head_dim=8, mamba_num_heads=4, mamba_head_dim=8,
        n_groups=1, ssm_state_size=8,
    )  # fmt: skip
    return made(transformers.NemotronHForCausalLM, config)


KINDS = {"qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss, "mixtral": mixtral, "olmoe": olmoe}


def made(kind, config):
    """Return a model of a class and its config, with random weights of a size that matters."""
    model = tiny_transformers.made(kind, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(values / parameter.shape[-1] ** 0.5)
    return model


def peft_model(model, **options):
    """Return PEFT's model with LoRA on the experts, away from its start."""
    import peft

    arguments = {"r": 3, "lora_alpha": 6, "target_modules": [], "target_parameters": TARGETS}
    config = peft.LoraConfig(**arguments | options)
    return tiny_transformers.peft_adapted(model, config)
