"""Files that PEFT reads and PEFT's files read: real architectures, every field of its configs."""

import json

import peft
import pytest
import safetensors.torch
import torch
from helpers import tiny_transformers
from torch import nn

import lorafast
from lorafast import DoRA, LoRA, PiSSA, VeRA

pytestmark = pytest.mark.peft

METHODS = {
    "lora": (LoRA(r=4, alpha=8), {}),
    "rslora": (LoRA(r=4, alpha=8, rslora=True, init="gaussian"), {}),
    "dora": (DoRA(r=4, dropout=0.1), {}),
    "pissa": (LoRA(r=4, alpha=4, init=PiSSA()), {}),
    "pissa-rslora": (LoRA(r=3, alpha=5, rslora=True, init=PiSSA()), {}),
    "dora-pissa": (DoRA(r=4, init=PiSSA()), {}),
    "vera": (VeRA(r=16), {}),
    "patterned": (
        LoRA(r=4),
        {"rank_pattern": {r".*\b0\..*": 6}, "alpha_pattern": {r".*\b1\..*": 3.0}},
    ),
    "patterned-pissa": (
        LoRA(r=4, init=PiSSA()),
        {"rank_pattern": {r".*\b0\..*": 6}, "alpha_pattern": {r".*\b0\..*": 3.5}},
    ),
    "bias-all": (LoRA(r=4), {"bias": "all"}),
    "bias-own": (DoRA(r=4), {"bias": "lora_only"}),
}


def options_for(kind, options):
    """Models with one block have no block 1 for a pattern to match."""
    return {
        n: {k: v for k, v in o.items() if kind != "bart" or "1" not in k} if "pattern" in n else o
        for n, o in options.items()
    }


# Of the real model, which takes seconds a piece, one of each sort; but for one they are slow.
SMALL_ONLY = ("pissa-rslora", "dora-pissa", "patterned-pissa", "bias-all", "bias-own")
CASES = [
    pytest.param(kind, method, marks=[pytest.mark.slow] * (kind == "minilm" and method != "lora"))
    for kind in tiny_transformers.KINDS
    for method in METHODS
    if kind != "minilm" or method not in SMALL_ONLY
]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_through_peft_and_back(kind, method, tmp_path):
    make = tiny_transformers.KINDS[kind]
    adapter, options = METHODS[method]
    model = tiny_transformers.adapted(make(), adapter, **options_for(kind, options))
    want = tiny_transformers.outputs(model)
    lorafast.save_adapter(model, tmp_path / "ours")
    torch.testing.assert_close(
        tiny_transformers.outputs(lorafast.load_adapter(make(), tmp_path / "ours")),
        want,
        rtol=0,
        atol=0,
    )
    theirs = tiny_transformers.loaded_by_peft(make(), tmp_path / "ours")
    torch.testing.assert_close(tiny_transformers.outputs(theirs), want, rtol=1e-4, atol=2e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(
        tiny_transformers.outputs(lorafast.load_adapter(make(), tmp_path / "theirs")),
        want,
        rtol=1e-4,
        atol=2e-5,
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "vera"])
def test_through_peft_in_bf16(kind, method, tmp_path):
    def make():
        return tiny_transformers.KINDS[kind]().bfloat16()

    model = tiny_transformers.adapted(make(), METHODS[method][0])
    want = tiny_transformers.outputs(model)
    lorafast.save_adapter(model, tmp_path)
    ours, theirs = (
        lorafast.load_adapter(make(), tmp_path),
        tiny_transformers.loaded_by_peft(make(), tmp_path),
    )
    assert torch.equal(tiny_transformers.outputs(ours), want)
    assert all(
        layer.lora_A.dtype == torch.float32
        for layer in ours.modules()
        if isinstance(layer, lorafast.Linear)
    )
    truth = tiny_transformers.outputs(
        lorafast.load_adapter(tiny_transformers.KINDS[kind](), tmp_path)
    )
    error, eager = (
        (tiny_transformers.outputs(one) - truth).square().mean().sqrt() for one in (ours, theirs)
    )
    assert error <= 2 * eager


CONFIGS = {
    "q-v": {"target_modules": ["q_proj", "v_proj"]},
    "regex": {
        "target_modules": r".*\.(q|v)_proj",
        "rank_pattern": {"v_proj": 6},
        "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 5},
    },
    "all-but": {
        "target_modules": "all-linear",
        "exclude_modules": ["gate_proj"],
        "use_rslora": True,
    },
    "one-layer": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "layers": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [0],
        "layers_pattern": "layers",
    },
    "dora": {"target_modules": ["down_proj"], "use_dora": True, "lora_dropout": 0.1},
    "pissa": {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "pissa"},
    "bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "embedding-dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "head": {"target_modules": ["lm_head"], "modules_to_save": ["norm"]},
    "default": {},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_pefts_file_and_pefts_config(name, tmp_path):
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8} | CONFIGS[name])
    theirs = tiny_transformers.peft_adapted(tiny_transformers.llama(), config)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = lorafast.load_adapter(tiny_transformers.llama(), tmp_path / "theirs", trainable=True)
    torch.testing.assert_close(
        tiny_transformers.outputs(loaded), tiny_transformers.outputs(theirs), rtol=1e-4, atol=2e-6
    )
    ours = lorafast.adapt(
        tiny_transformers.llama(), peft.LoraConfig(**{"r": 4, "lora_alpha": 8} | CONFIGS[name])
    )
    trained = {name: p.numel() for name, p in theirs.named_parameters() if p.requires_grad}
    for model in (loaded, ours):
        assert lorafast.trainable_summary(model).trainable == sum(trained.values())
    # PEFT saves the table under an adapted embedding too.
    keys = {
        key
        for key in safetensors.torch.load_file(tmp_path / "theirs/adapter_model.safetensors")
        if "base_layer.weight" not in key
    }
    assert lorafast.adapter_state_dict(ours).keys() == keys


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_pefts_file_with_biases_and_modules(bias, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], bias=bias, modules_to_save=["fc1"])
    theirs = tiny_transformers.peft_adapted(tiny_transformers.bart(), config)
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(
        tiny_transformers.outputs(lorafast.load_adapter(tiny_transformers.bart(), tmp_path)),
        tiny_transformers.outputs(theirs),
        rtol=1e-4,
        atol=2e-6,
    )


@pytest.mark.parametrize("fields", [{}, {"target_modules": "all-linear"}])
def test_a_task_brings_its_head(fields, tmp_path):
    config = peft.LoraConfig(r=4, task_type="SEQ_CLS", **fields)
    theirs = tiny_transformers.peft_adapted(tiny_transformers.classifier(), config)
    theirs.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(
        tiny_transformers.outputs(
            lorafast.load_adapter(tiny_transformers.classifier(), tmp_path / "theirs")
        ),
        tiny_transformers.outputs(theirs),
        rtol=1e-4,
        atol=2e-6,
    )
    ours = tiny_transformers.perturb(
        lorafast.adapt(
            tiny_transformers.classifier(), peft.LoraConfig(r=4, task_type="SEQ_CLS", **fields)
        )
    )
    assert ours.score.weight.requires_grad
    lorafast.save_adapter(ours, tmp_path / "ours")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    torch.testing.assert_close(
        tiny_transformers.outputs(
            tiny_transformers.loaded_by_peft(tiny_transformers.classifier(), tmp_path / "ours")
        ),
        tiny_transformers.outputs(ours),
        rtol=1e-4,
        atol=2e-6,
    )


@pytest.mark.parametrize("projection", [True, False])
def test_pefts_vera(projection, tmp_path):
    config = peft.VeraConfig(
        r=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
        save_projection=projection,
        vera_dropout=0.1,
    )
    theirs = tiny_transformers.peft_adapted(tiny_transformers.llama(), config)
    theirs.save_pretrained(tmp_path)
    loaded = lorafast.load_adapter(tiny_transformers.llama(), tmp_path)
    torch.testing.assert_close(
        tiny_transformers.outputs(loaded), tiny_transformers.outputs(theirs), rtol=1e-4, atol=2e-6
    )
    ours = lorafast.adapt(tiny_transformers.llama(), config)
    for model in (loaded, ours):
        # One A for every K, one B for every N, and still so in another dtype.
        layers = [m for m in model.double().modules() if isinstance(m, lorafast.Linear)]
        assert sorted(A.shape[1] for A in {layer.lora_A for layer in layers}) == [32, 48]
        assert sorted(B.shape[0] for B in {layer.lora_B for layer in layers}) == [16, 32]


def test_a_scaling_changed_by_hand_is_saved(tmp_path):
    model = tiny_transformers.adapted(
        tiny_transformers.llama(), LoRA(r=4, rslora=True), target_modules=["q_proj", "v_proj"]
    )
    model.model.layers[0].self_attn.q_proj.scaling = torch.tensor(0.3)
    lorafast.save_adapter(model, tmp_path)
    for loaded in (
        lorafast.load_adapter(tiny_transformers.llama(), tmp_path),
        tiny_transformers.loaded_by_peft(tiny_transformers.llama(), tmp_path),
    ):
        torch.testing.assert_close(
            tiny_transformers.outputs(loaded),
            tiny_transformers.outputs(model),
            rtol=1e-5,
            atol=1e-6,
        )


def test_names_that_mean_more_than_their_layers(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc, self.block, self.mid = (
                nn.Linear(4, 4),
                nn.Sequential(nn.Linear(4, 4)),
                nn.ModuleDict({"fc": nn.Linear(4, 4)}),
            )

        def forward(self, x):
            return self.mid["fc"](self.block(self.fc(x)))

    model = tiny_transformers.perturb(lorafast.adapt(Net(), LoRA(r=2), "fc"))
    lorafast.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == "fc"
    x = torch.randn(3, 4)
    for loaded in (
        lorafast.load_adapter(Net(), tmp_path),
        tiny_transformers.loaded_by_peft(Net(), tmp_path),
    ):
        torch.testing.assert_close(loaded(x), model(x))
