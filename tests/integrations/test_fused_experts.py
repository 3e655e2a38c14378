"""Mixture-of-experts models: the same layers in PEFT and here, or words that say which differ."""

import warnings

import peft
import pytest
import transformers
from helpers import tiny_transformers
from helpers.tiny_transformers import loaded_by_peft, outputs

import lorafast
from lorafast import LoRA

pytestmark = pytest.mark.peft

SIZES = tiny_transformers.SIZES | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
}


def deepseek():
    """Return a DeepSeek-V3: a dense layer, and one with fused, shared and routed experts."""
    config = transformers.DeepseekV3Config(
        **SIZES,
        num_key_value_heads=4,
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    return tiny_transformers.made(transformers.DeepseekV3ForCausalLM, config)


def mixtral():
    """Return a Mixtral, whose only linears beside the head are those of attention."""
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
    return tiny_transformers.made(transformers.MixtralForCausalLM, config)


def difference(model, other):
    return (outputs(model) - outputs(other)).abs().max().item()


def adapted(make, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "target_modules='all-linear' adapts nn.Linear and Conv1D")
        return tiny_transformers.perturb(lorafast.adapt(make(), LoRA(r=4, alpha=8), **options))


@pytest.mark.parametrize(
    ("make", "options", "same"),
    [
        (deepseek, {}, False),
        (deepseek, {"target_modules": ["q_b_proj", "shared_experts.down_proj"]}, False),
        (deepseek, {"exclude_modules": r".*\.mlp\..*"}, True),
        (mixtral, {}, True),
    ],
    ids=["deepseek", "a shared expert", "deepseek's attention", "mixtral"],
)
def test_a_file_warns_where_peft_reads_it_differently(make, options, same, tmp_path):
    model = adapted(make, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lorafast.save_adapter(model, tmp_path)
    assert difference(lorafast.load_adapter(make(), tmp_path), model) == 0
    # The other warning is that a model made from a config names no base.
    found = [str(one.message) for one in caught if "PEFT" in str(one.message)]
    if same:
        assert not found
        assert difference(loaded_by_peft(make(), tmp_path), model) < 2e-6
    else:
        (message,) = found
        assert "PEFT may take these layers for fused experts" in message
        assert ".mlp." in message
        assert difference(loaded_by_peft(make(), tmp_path), model) > 1e-3


@pytest.mark.parametrize("make", [deepseek, mixtral])
def test_a_file_of_pefts_routers_is_refused_in_words(make, tmp_path):
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    tiny_transformers.peft_adapted(make(), config).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"mlp\.gate\.weight, which belongs to a module that is a "):
        lorafast.load_adapter(make(), tmp_path)


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (deepseek, "all-linear"),
        (mixtral, "all-linear"),
        (mixtral, r".*\.(q_proj|gate)"),
    ],
)
def test_a_config_that_means_routers_is_refused(make, targets):
    config = peft.LoraConfig(r=4, target_modules=targets)
    with pytest.raises(
        ValueError, match=r"in PEFT they mean target_parameters=\[.*Router, whose forward does not"
    ):
        lorafast.adapt(make(), config)


@pytest.mark.parametrize(
    ("make", "targets"),
    [(deepseek, ["q_b_proj", "down_proj"]), (mixtral, ["q_proj", "w1", "w2", "w3"])],
)
def test_a_config_that_means_experts_is_taken(make, targets, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=targets)
    model = tiny_transformers.perturb(lorafast.adapt(make(), config))
    theirs = tiny_transformers.peft_adapted(make(), config)
    assert lorafast.trainable_summary(model).trainable == sum(
        parameter.numel() for parameter in theirs.parameters() if parameter.requires_grad
    )
    theirs.save_pretrained(tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lorafast.save_adapter(model, tmp_path / "own")
    assert difference(loaded_by_peft(make(), tmp_path / "own"), model) < 5e-6
    assert difference(lorafast.load_adapter(make(), tmp_path / "theirs"), theirs) < 5e-6


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*\.layers\.1\..*\.(q|v)_proj"])
def test_a_config_of_attention_is_taken(targets):
    model = lorafast.adapt(mixtral(), peft.LoraConfig(r=4, target_modules=targets))
    first, second = (layer.self_attn.q_proj for layer in model.model.layers)
    assert isinstance(second, lorafast.Linear)
    assert isinstance(first, lorafast.Linear) == isinstance(targets, list)
