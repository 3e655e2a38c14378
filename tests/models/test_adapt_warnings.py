"""What adapt warns of: weights that "all-linear" leaves out, alpha = 0, ranks above the sizes."""

import warnings

import pytest
import transformers
from helpers import tiny_transformers
from helpers.user_warnings import messages
from torch import nn

import lorafast
from lorafast import DoRA, LaMDA, LoRA, VeRA

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4}
EXPERTS = {
    "vocab_size": 99,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}


def vit():
    """Return a ViT, whose class token and position embeddings are 3-D Parameters."""
    return transformers.ViTModel(
        transformers.ViTConfig(image_size=16, patch_size=4, **SIZES, **HEADS)
    )


def deit():
    """Return a DeiT, which has a distillation token and a mask token too."""
    config = transformers.DeiTConfig(image_size=16, patch_size=4, **SIZES, **HEADS)
    return transformers.DeiTModel(config, use_mask_token=True)


def mixtral():
    """Return a Mixtral with fused experts."""
    fields = EXPERTS | SIZES | HEADS | {"num_local_experts": 4}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**fields))


def qwen():
    """Return a Qwen3-MoE with fused experts."""
    fields = EXPERTS | SIZES | HEADS | {"num_experts": 4, "head_dim": 8}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**fields))


def deepseek():
    """Return a DeepSeek-V3 with fused experts."""
    fields = EXPERTS | SIZES | HEADS
    fields |= {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0}
    fields |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    fields |= {"v_head_dim": 8, "num_key_value_heads": 4}
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**fields))


class Conv(nn.Conv1d):
    """A convolution of somebody's own."""


class Net(nn.Module):
    """Two linears of different sizes."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.narrow(self.wide(x))


@pytest.mark.parametrize(
    "build",
    [vit, deit, tiny_transformers.bart, tiny_transformers.gpt2, tiny_transformers.llama],
    ids=lambda build: build.__name__,
)
def test_tokens_and_position_embeddings_are_no_experts(build):
    assert messages(lambda: lorafast.adapt(build(), LoRA(r=2))) == []


def test_convolutions_of_other_classes_are_no_experts():
    model = nn.Sequential(Conv(2, 3, 3), nn.Linear(4, 4))
    assert messages(lambda: lorafast.adapt(model, LoRA(r=2))) == []


@pytest.mark.parametrize("build", [mixtral, qwen, deepseek], ids=lambda build: build.__name__)
def test_fused_experts_are_named(build):
    model = build()
    (message,) = messages(lambda: lorafast.adapt(model, LoRA(r=2)))
    assert "no 3-D weight, as fused experts have them" in message
    assert message.endswith(
        "model.layers.0.mlp.experts.gate_up_proj, model.layers.0.mlp.experts.down_proj"
    )


def test_experts_are_no_matter_where_targets_are_named():
    assert messages(lambda: lorafast.adapt(mixtral(), LoRA(r=2), ["q_proj"])) == []


@pytest.mark.parametrize(
    "adapter",
    [
        LoRA(r=2, alpha=0),
        LaMDA(r=2, alpha=0, init="zero"),
        DoRA(r=2, alpha=0),
    ],
    ids=repr,
)
def test_alpha_0_warns_once_and_names_the_layers(adapter):
    (message,) = messages(lambda: lorafast.adapt(Net(), adapter))
    assert message.startswith("alpha=0: the scaling s is 0")
    assert message.endswith("in wide, narrow")


def test_alpha_0_of_a_pattern_names_its_layers_alone():
    (message,) = messages(lambda: lorafast.adapt(Net(), LoRA(r=2), alpha_pattern={"narrow": 0}))
    assert message.endswith("in narrow")


def test_a_rank_above_the_sizes_warns_once_and_names_the_layers():
    (message,) = messages(lambda: lorafast.adapt(Net(), LoRA(r=5)))
    assert "r exceeds min(N, K)" in message
    assert message.endswith("in narrow (r=5, N=4, K=8)")
    assert messages(lambda: lorafast.adapt(Net(), LoRA(r=4))) == []
    (message,) = messages(lambda: lorafast.adapt(Net(), LoRA(r=99, alpha=1)))
    assert message.endswith("in wide (r=99, N=8, K=16), narrow (r=99, N=4, K=8)")


def test_shared_projections_may_have_any_rank():
    assert messages(lambda: lorafast.adapt(Net(), VeRA(r=64))) == []


def test_a_warning_that_is_an_error_changes_nothing():
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="r exceeds"):
            lorafast.adapt(model, LoRA(r=5))
    assert type(model.narrow) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_loaded_adapter_does_not_warn_again(tmp_path):
    model = Net()
    messages(lambda: lorafast.adapt(model, LoRA(r=5)))
    lorafast.save_adapter(model, tmp_path)
    assert messages(lambda: lorafast.load_adapter(Net(), tmp_path)) == []
