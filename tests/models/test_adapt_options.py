"""adapt's options: patterns, exclusions, biases, seeds, dtypes, PEFT's configs."""

import pytest
import torch
from helpers import tiny_transformers
from torch import nn

import lorafast
from lorafast import LaMDA, LoRA, VeRA


def layers_of(model):
    return {name: m.adapter for name, m in model.named_modules() if hasattr(m, "adapter")}


def test_ranks_and_alphas_by_pattern():
    model = lorafast.adapt(
        tiny_transformers.llama(),
        LoRA(r=4, alpha=8),
        ["q_proj", "v_proj"],
        rank_pattern={r"layers\.0\..*": 2, "v_proj": 6},
        alpha_pattern={"layers.1.self_attn.q_proj": 3},
    )
    found = {
        name.removeprefix("model.layers."): (a.r, a.alpha) for name, a in layers_of(model).items()
    }
    assert found == {
        "0.self_attn.q_proj": (2, 8),
        "0.self_attn.v_proj": (2, 8),
        "1.self_attn.q_proj": (4, 3),
        "1.self_attn.v_proj": (6, 8),
    }


def test_exclusions():
    excluded = ["mlp.up_proj", "v_proj", "nothing"]
    model = lorafast.adapt(
        tiny_transformers.llama(),
        LoRA(r=2),
        exclude_modules=excluded,
        modules_to_save=["down_proj"],
    )
    assert {name.rpartition(".")[2] for name in layers_of(model)} == {
        "q_proj",
        "k_proj",
        "o_proj",
        "gate_proj",
    }
    assert lorafast.trainable_summary(model).parts["modules_to_save"] == 2 * 32 * 48
    model = lorafast.adapt(
        tiny_transformers.llama(), LoRA(r=2), exclude_modules=r".*(mlp|[qk]_proj).*"
    )
    assert {name.rpartition(".")[2] for name in layers_of(model)} == {"v_proj", "o_proj"}


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_biases(bias):
    model = lorafast.adapt(tiny_transformers.bart(), LoRA(r=2), ["fc1"], bias=bias)
    trained = {
        name for name, p in model.named_parameters() if p.requires_grad and name.endswith(".bias")
    }
    every = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    assert (
        trained
        == {"none": set(), "all": every, "lora_only": {name for name in every if ".fc1." in name}}[
            bias
        ]
    )
    model(input_ids=tiny_transformers.IDS).logits.sum().backward()
    assert {
        name
        for name, p in model.named_parameters()
        if p.grad is not None and name.endswith(".bias")
    } == trained


def test_a_seed_of_its_own():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    a, b = (lorafast.adapt(tiny_transformers.llama(), LoRA(r=2), seed=9) for _ in range(2))
    c = lorafast.adapt(tiny_transformers.llama(), LoRA(r=2), seed=10)
    for name, value in lorafast.adapter_state_dict(a).items():
        assert torch.equal(value, lorafast.adapter_state_dict(b)[name])
    assert any(
        not torch.equal(v, lorafast.adapter_state_dict(c)[n])
        for n, v in lorafast.adapter_state_dict(a).items()
    )
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), state)
    lorafast.adapt(tiny_transformers.llama(), LaMDA(r=2), seed=9)
    torch.manual_seed(0)
    nn.Linear(4, 4)


def test_adapter_dtype_and_embeddings_by_name():
    model = lorafast.adapt(
        tiny_transformers.llama().bfloat16(),
        LoRA(r=2),
        ["embed_tokens", "q_proj"],
        adapter_dtype=torch.bfloat16,
    )
    assert isinstance(model.model.embed_tokens, lorafast.Embedding)
    assert {p.dtype for p in lorafast.adapter_parameters(model)} == {torch.bfloat16}
    told = str(lorafast.explain(model))
    assert "a lookup on plain torch" in told
    assert "model.embed_tokens" in told


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"rank_pattern": {"q_porj": 2}},
            ValueError,
            r"rank_pattern: 'q_porj' matches no adapted layer; near it: q_proj",
        ),
        ({"alpha_pattern": {"(": 2}}, ValueError, r"alpha_pattern='\(' is no regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, ValueError, r"rank_pattern\['q_proj'\]=0: r=0"),
        ({"rank_pattern": {"q_proj": 2.5}}, ValueError, r"rank_pattern\['q_proj'\]=2\.5"),
        ({"alpha_pattern": {"q_proj": "x"}}, ValueError, r"alpha_pattern\['q_proj'\]='x'"),
        ({"rank_pattern": ["q_proj"]}, ValueError, "rank_pattern=.* must be a dict"),
        (
            {"modules_to_save": ["nrom"]},
            ValueError,
            r"modules_to_save: 'nrom' matches no module; near it: norm",
        ),
        ({"modules_to_save": "norm"}, ValueError, "modules_to_save='norm' must be a list"),
        ({"bias": "some"}, ValueError, "bias='some' must be one of 'none', 'all', 'lora_only'"),
        ({"exclude_modules": r".*"}, ValueError, "matches nothing that exclude_modules"),
        ({"exclude_modules": "("}, ValueError, "exclude_modules='\\(' is no regular expression"),
        ({"exclude_modules": 3}, ValueError, "exclude_modules=3 must be"),
        (
            {"adapter": VeRA(r=2), "rank_pattern": {"q_proj": 3}},
            ValueError,
            "layers of VeRA share tensors of one rank",
        ),
        (
            {"adapter": VeRA(r=2), "alpha_pattern": {"q_proj": 3}},
            ValueError,
            "VeRA has no alpha of its own per layer",
        ),
        ({"adapter": VeRA(r=2), "target_modules": ["embed_tokens"]}, TypeError, "made for linears"),
        ({"adapter_dtype": torch.int8}, TypeError, "adapter_dtype"),
    ],
)
def test_options_that_are_refused_change_nothing(options, error, message):
    model = tiny_transformers.llama()
    modules, flags = list(model.modules()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        lorafast.adapt(model, options.pop("adapter", LoRA(r=2)), **options)
    assert list(model.modules()) == modules
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any("_lorafast" in key for m in modules for key in vars(m))


@pytest.mark.peft
def test_a_config_of_peft_says_all_itself():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(
        ValueError, match="adapter is a LoraConfig, which says target_modules, bias itself"
    ):
        lorafast.adapt(tiny_transformers.llama(), config, ["q_proj"], bias="all")
    assert (
        len(
            layers_of(
                lorafast.adapt(
                    tiny_transformers.llama(), config, seed=3, adapter_dtype=torch.float64
                )
            )
        )
        == 2
    )
    for fields, message in (
        ({"use_qalora": True}, "use_qalora=True"),
        ({"init_lora_weights": "olora"}, "lorafast.accelerate it"),
        ({"init_lora_weights": False}, "init_lora_weights=False"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\]"),
        ({"layer_replication": [(0, 1)]}, "layer_replication"),
        ({"target_modules": None, "target_parameters": ["x"]}, "target_parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            lorafast.adapt(
                tiny_transformers.llama(),
                peft.LoraConfig(**{"target_modules": ["q_proj"]} | fields),
            )
    with pytest.raises(ValueError, match="peft_type='LOHA'"):
        lorafast.adapt(tiny_transformers.llama(), peft.LoHaConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="PEFT has no default for a model of type None"):
        lorafast.adapt(nn.Sequential(nn.Linear(2, 2)), peft.LoraConfig())
    lenient = peft.LoraConfig(
        target_modules=["q_proj", "query"], rank_pattern={"nowhere": 3}, modules_to_save=["nothing"]
    )
    assert len(layers_of(lorafast.adapt(tiny_transformers.llama(), lenient))) == 2
