"""adapt with target_parameters: what it changes of a model, what undoes it, and what it refuses."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers import tiny_transformers
from helpers.tiny_experts import KINDS, TARGETS
from helpers.tiny_transformers import copied_tensors, outputs, perturb
from torch import nn

import lorafast
from lorafast import DoRA, LaMDA, LoRA
from lorafast.models.module_names import adapter_layers
from lorafast.nn.expert_parameter import ParameterExperts

ADAPTERS = [LoRA(r=3), DoRA(r=3), LaMDA(r=3), LoRA(r=2, init=lorafast.PiSSA())]


def adapted(kind="qwen3_moe", adapter=None, moved=True, **options):
    """Return a model with an adapter on its experts."""
    arguments = {"target_modules": None, "target_parameters": TARGETS, "seed": 1} | options
    model = lorafast.adapt(KINDS[kind](), adapter or LoRA(r=3), **arguments)
    return perturb(model) if moved else model


def close(first, second):
    torch.testing.assert_close(first, second, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_the_base_stays_itself(kind, adapter):
    plain = KINDS[kind]()
    before, tensors, config = outputs(plain), copied_tensors(plain), plain.config
    model = adapted(kind, adapter, moved=False)
    close(outputs(model), before)
    assert tensors.keys() <= model.state_dict().keys()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora" in name for name in trained)
    assert model.config.to_dict() == config.to_dict()
    after = outputs(perturb(model))
    assert (after - before).abs().max() > 1e-3
    with lorafast.disable_adapter(model):
        close(outputs(model), before)
        assert adapter.residual or torch.equal(outputs(model), before)
    assert torch.equal(outputs(model), after)
    close(outputs(lorafast.reference_model(model)), before)
    lorafast.unload(model)
    assert model.state_dict().keys() == tensors.keys()
    close(outputs(model), before)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, tensors[name], msg=name)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_merge_gives_a_plain_model(adapter):
    model = adapted("gpt_oss", adapter)
    expected = outputs(model)
    with lorafast.merged(model):
        close(outputs(model), expected)
    assert torch.equal(outputs(model), expected)
    lorafast.merge(model)
    close(outputs(model), expected)
    assert model.state_dict().keys() == KINDS["gpt_oss"]().state_dict().keys()
    experts = model.model.layers[0].mlp.experts
    assert experts.config is model.config
    assert not list(experts.children())
    lorafast.adapt(model, LoRA(r=2), None, target_parameters=TARGETS)
    close(outputs(model), expected)


def test_copies_and_pickles():
    model = adapted(adapter=DoRA(r=3, dropout=0.1)).eval()
    expected = outputs(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(other), expected)
        experts = other.model.layers[0].mlp.experts
        for name, layer in adapter_layers(other).items():
            own = experts if "layers.0." in name else other.model.layers[1].mlp.experts
            assert layer.host is own
        perturb(other)
        assert torch.equal(outputs(model), expected)
        lorafast.unload(other)
        assert experts.config is other.config


def test_names_and_reports():
    model = adapted(adapter=LoRA(r=3, alpha=6))
    names = [
        f"model.layers.{i}.mlp.experts.{key}"
        for i in (0, 1)
        for key in ("gate_up_proj", "down_proj")
    ]
    assert list(adapter_layers(model)) == names
    assert [row.name for row in lorafast.explain(model).rows] == names
    layer = adapter_layers(model)[names[0]]
    assert isinstance(layer, ParameterExperts)
    assert layer.weight is model.model.layers[0].mlp.experts.gate_up_proj
    assert layer.lora_A.shape == (6, 3, 32)
    assert layer.lora_B.shape == (6, 32, 3)
    assert lorafast.trainable_summary(model).parts == {
        "lora_A": 2 * 6 * 3 * (32 + 16),
        "lora_B": 2 * 6 * 3 * (32 + 32),
    }
    assert len(lorafast.adapter_parameters(model)) == 8
    model(input_ids=tiny_transformers.IDS).logits.sum().backward()
    assert not lorafast.adapters_without_gradient(model)


def test_patterns_and_layers_beside_experts():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "r exceeds")
        model = adapted(
            "mixtral", LoRA(r=3), target_modules="all-linear",
            rank_pattern={"experts.down_proj": 2}, alpha_pattern={r".*gate_up_proj": 5},
        )  # fmt: skip
    layers = adapter_layers(model)
    experts = {name: layer for name, layer in layers.items() if ".experts." in name}
    assert len(experts) == 4
    assert {layer.r for name, layer in experts.items() if "down" in name} == {2}
    assert {layer.adapter.alpha for name, layer in experts.items() if "gate" in name} == {5}
    others = {name.rpartition(".")[2] for name in layers.keys() - experts.keys()}
    assert others == {"q_proj", "k_proj", "v_proj", "o_proj"}
    expected = outputs(model)
    lorafast.merge(model)
    close(outputs(model), expected)


def test_all_linear_alone_names_the_argument():
    with pytest.warns(UserWarning, match="target_parameters takes experts' weights"):
        lorafast.adapt(KINDS["mixtral"](), LoRA(r=3))


def test_state_dicts():
    model, other = adapted(adapter=DoRA(r=3)), adapted(adapter=DoRA(r=3), moved=False)
    other.load_state_dict(model.state_dict())
    assert torch.equal(outputs(other), outputs(model))
    base = perturb(KINDS["qwen3_moe"]())
    with pytest.warns(UserWarning, match="trained adapters start anew"):
        other.load_state_dict(base.state_dict())
    close(outputs(other), outputs(base))
    part = {name: value for name, value in model.state_dict().items() if "lora_B" not in name}
    with pytest.raises(RuntimeError, match="part of an adapter"):
        other.load_state_dict(part)
    for layer in adapter_layers(model).values():
        layer.merge()
    with pytest.raises(RuntimeError, match="is merged"):
        model.state_dict()


def test_the_meta_device():
    tensors = KINDS["qwen3_moe"]().state_dict()
    with torch.device("meta"):
        model = KINDS["qwen3_moe"]()
        lorafast.adapt(model, DoRA(r=3), None, target_parameters=TARGETS)
    model.load_state_dict(tensors, assign=True)
    for layer in adapter_layers(model).values():
        assert not layer.lora_A.is_meta
        torch.testing.assert_close(layer.magnitude.detach(), layer._W().norm(dim=2))


def test_steps_of_training():
    model = adapted(adapter=LoRA(r=3, dropout=0.05), moved=False).train()
    optimizer = torch.optim.AdamW(lorafast.adapter_parameters(model), lr=0.02)
    ids, losses = tiny_transformers.IDS, []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_gradient_checkpointing_and_schedules():
    model = adapted(adapter=LaMDA(r=3, init="repo", dropout=0.1)).train()
    schedule = lorafast.schedule.LaMDAFreeze(model, total_steps=4)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(lorafast.adapter_parameters(model), lr=0.01)
    for _ in range(3):
        model(input_ids=tiny_transformers.IDS, labels=tiny_transformers.IDS).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert all(layer.frozen_columns for layer in adapter_layers(model).values())


class OwnExperts(nn.Module):
    """Experts that transformers' registry does not know."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Linear(4, 4)
        self.down_proj = nn.Parameter(torch.randn(3, 4, 4))


def unchanged(model, message, kind=TypeError, adapter=None, **options):
    """Assert that adapt refuses in these words, and leaves the model as it was."""
    tensors, flags = copied_tensors(model), [p.requires_grad for p in model.parameters()]
    arguments = {"target_modules": None, "target_parameters": TARGETS} | options
    with pytest.raises(kind, match=message):
        lorafast.adapt(model, adapter or LoRA(r=2), **arguments)
    assert flags == [p.requires_grad for p in model.parameters()]
    assert tensors.keys() == model.state_dict().keys()
    assert all(torch.equal(tensors[name], value) for name, value in model.state_dict().items())


def test_refusals_of_parameters():
    model = KINDS["gpt_oss"]()
    unchanged(
        OwnExperts(), "does not go by transformers' registry", target_parameters=["down_proj"]
    )
    unchanged(
        model, "router.weight, which belongs to a module that is a .*GptOssTopKRouter, whose",
        target_parameters=["router.weight"],
    )  # fmt: skip
    unchanged(
        model, "is no projection of experts; those are gate_up_proj and down_proj",
        target_parameters=["experts.gate_up_proj_bias"],
    )  # fmt: skip
    unchanged(
        model, r"'experts.gate_proj' matches no Parameter; near it: .*gate_up_proj", ValueError,
        target_parameters=["experts.gate_proj"],
    )  # fmt: skip
    unchanged(
        model, r"which is a .*GptOssExperts; name its weights in target_parameters",
        target_modules=["experts"], target_parameters=(),
    )  # fmt: skip
    unchanged(model, "target_parameters='x' must be a list", ValueError, target_parameters="x")


def test_refusals_of_states():
    model = KINDS["qwen3_moe"]()
    experts = model.model.layers[1].mlp.experts
    experts._is_expert_parallel = True
    unchanged(model, r"layers\.1.*spread over processes \(expert parallelism\)")
    experts._is_expert_parallel = False
    experts.forward = lambda *_: None
    unchanged(model, r"layers\.1.*whose forward has been replaced")
    del experts.forward
    experts.down_proj.ds_shape = (1,)
    unchanged(model, r"layers\.1.*is partitioned by ZeRO-3")
    del experts.down_proj.ds_shape
    experts.down_proj.full_tensor = lambda: None
    unchanged(model, r"layers\.1.*is a sharded DTensor")
    del experts.down_proj.full_tensor
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    tensors = model.state_dict()
    with pytest.raises(TypeError, match=r"layers\.1.*does not compute in \(torch\.float8_e4m3fn\)"):
        lorafast.adapt(model, LoRA(r=2), None, target_parameters=TARGETS)
    assert tensors.keys() == model.state_dict().keys()


def test_kernels_of_the_hub_are_refused():
    model = KINDS["gpt_oss"]()
    block = model.model.layers[1].mlp
    block.forward = block.forward
    unchanged(model, r"layers\.1.*which a replacement of GptOssMLP's forward may read")
    del block.forward
    lorafast.adapt(model, LoRA(r=2), None, target_parameters=TARGETS)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (DoRA(axis="in"), "axis='in' is not offered for experts"),
        (lorafast.VeRA(r=4), "VeRA is made for single layers"),
        (lorafast.AdaLoRA(r=4, target_r=2), "AdaLoRA is made for single layers"),
        (lorafast.AFLoRA(r=4), "AFLoRA is made for single layers"),
    ],
)
def test_refusals_of_adapters(adapter, message):
    unchanged(KINDS["qwen3_moe"](), f"experts.gate_up_proj: .*{message}", ValueError, adapter)


def test_what_experts_refuse_later():
    model = adapted(moved=False)
    layer = adapter_layers(model)["model.layers.0.mlp.experts.down_proj"]
    with pytest.raises(RuntimeError, match="belongs to a Qwen3MoeExperts"):
        layer.reset_parameters()
    layer.host._is_expert_parallel = True
    with pytest.raises(RuntimeError, match="expert parallelism"):
        outputs(model)
    with pytest.raises(ValueError, match="model is adapted already"):
        lorafast.adapt(model, LoRA(r=2), None, target_parameters=TARGETS)


def test_experts_are_adapted_or_saved():
    options = {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}
    model = lorafast.adapt(KINDS["qwen3_moe"](), LoRA(r=2), **options)
    assert not [name for name in adapter_layers(model) if "experts" in name]
    unchanged(KINDS["qwen3_moe"](), "matches no Parameter", ValueError, **options)
