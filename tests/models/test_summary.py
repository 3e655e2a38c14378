"""trainable_summary, adapter_parameters and adapter_state_dict."""

import pytest
from helpers import tiny_transformers
from torch import nn

import lorafast
from lorafast import DoRA, LoRA


def test_summary_and_parameters():
    model = lorafast.adapt(
        tiny_transformers.bart(), DoRA(r=2), ["q_proj"], bias="lora_only", modules_to_save=["fc1"]
    )
    summary = lorafast.trainable_summary(model)
    layers = [m for m in model.modules() if isinstance(m, lorafast.Linear)]
    assert len(layers) == 3
    assert summary.parts == {
        "lora_A": 3 * 2 * 32,
        "lora_B": 3 * 32 * 2,
        "lora_magnitude": 3 * 32,
        "bias": 3 * 32,
        "modules_to_save": 2 * (32 * 48 + 48),
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in lorafast.adapter_parameters(model)} == {id(p) for p in trained}
    assert summary.trainable == sum(p.numel() for p in trained)
    assert summary.total == sum(p.numel() for p in model.parameters())
    share = 100 * summary.trainable / summary.total
    assert str(summary).startswith(
        f"trainable params: {summary.trainable:,d} || all params: {summary.total:,d} || "
        f"trainable%: {share:.4f}\nlora_A 192, "
    )
    assert lorafast.trainable_summary(nn.Linear(3, 2)) == (8, 8, {"other": 8})
    layers[0].lora_A.requires_grad_(False)
    assert len(lorafast.adapter_parameters(model)) == len(trained) - 1
    with pytest.raises(ValueError, match="has no adapted layer"):
        lorafast.adapter_parameters(nn.Linear(3, 2))


def test_a_notebook_shows_the_summary_as_a_table():
    model = lorafast.adapt(nn.Sequential(nn.Linear(16, 16, bias=False)), LoRA(r=2))
    page = lorafast.trainable_summary(model)._repr_html_()
    cells = [line.replace("</td>", "").split("<td") for line in page.splitlines() if "<td" in line]
    assert [
        [cell.rpartition(">")[2] for cell in line[1:]]
        for line in ([part.replace("</tr>", "") for part in line] for line in cells)
    ] == [
        ["lora_A", "32", "10.0000"],
        ["lora_B", "32", "10.0000"],
        ["trainable", "64", "20.0000"],
        ["total", "320", "100.0000"],
    ]


def test_the_state_dict_is_the_models_memory():
    model = tiny_transformers.adapted(
        tiny_transformers.llama(), LoRA(r=2), target_modules=["q_proj"]
    )
    state = lorafast.adapter_state_dict(model)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert state[key].data_ptr() == model.model.layers[0].self_attn.q_proj.lora_A.data_ptr()
    assert not state[key].requires_grad
    assert len(state) == 4
