"""disable_adapter on real architectures: the base, and back."""

import copy

import pytest
import torch
from helpers import tiny_transformers
from helpers.whole_models import assert_close, each_adapter
from torch import nn

import lorafast
from lorafast import DoRA, LaMDA, LoRA


@each_adapter("gpt2", "bart", "llama")
def test_disabled_is_the_base_and_comes_back(adapter, kind, dtype):
    base = tiny_transformers.KINDS[kind]().to(dtype)
    want = tiny_transformers.outputs(base)
    model = tiny_transformers.adapted(
        base,
        adapter,
        bias="all" if kind != "llama" else "none",
        modules_to_save=["ln_f"] if kind == "gpt2" else (),
    )
    trained = tiny_transformers.outputs(model)
    with lorafast.disable_adapter(model) as nothing:
        assert nothing is None
        assert_close(tiny_transformers.outputs(model), want, dtype, 2)
        with lorafast.disable_adapter(model):
            assert_close(tiny_transformers.outputs(model), want, dtype, 2)
        assert_close(tiny_transformers.outputs(model), want, dtype, 2)
        if not adapter.residual:
            assert torch.equal(tiny_transformers.outputs(model), want)
    assert torch.equal(tiny_transformers.outputs(model), trained)
    assert float((trained - want).abs().max()) > 0.01 * float(want.abs().max())


def test_disabling_what_is_merged_or_unknown_disables_nothing():
    model = tiny_transformers.adapted(
        tiny_transformers.llama(), LoRA(r=4), target_modules=["q_proj"]
    )
    model.model.layers[1].self_attn.q_proj.merge()
    with (
        pytest.raises(RuntimeError, match=r"merged: unmerge\(\) before disable"),
        lorafast.disable_adapter(model),
    ):
        pass
    assert not model.model.layers[0].self_attn.q_proj.disabled
    model.model.layers[1].self_attn.q_proj.unmerge()
    with lorafast.disable_adapter(model):
        assert "disabled: the layer runs as its base" in str(lorafast.explain(model))
        for refused in (
            lorafast.merge,
            lorafast.unload,
            lambda m: m.model.layers[0].self_attn.q_proj.merge(),
        ):
            with pytest.raises(RuntimeError, match="disabled"):
                refused(model)
    with torch.device("meta"):
        meta = lorafast.adapt(
            nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), LoRA(r=1), ["0"], modules_to_save=["1"]
        )
    with (
        pytest.raises(RuntimeError, match="was on the meta device"),
        lorafast.disable_adapter(meta),
    ):
        pass
    with (
        pytest.raises(ValueError, match="has no adapted layer"),
        lorafast.disable_adapter(nn.Linear(2, 2)),
    ):
        pass


def test_an_error_inside_enables_again_and_no_gradient_reaches_the_adapter():
    model = tiny_transformers.adapted(
        tiny_transformers.bart(), DoRA(r=2), bias="all", modules_to_save=["layernorm_embedding"]
    )
    names = dict(model.named_parameters())
    with lorafast.disable_adapter(model):
        logits = model(
            inputs_embeds=torch.randn(1, 3, 32, requires_grad=True),
            decoder_input_ids=tiny_transformers.IDS[:1, :3],
        ).logits
        logits.sum().backward()
        assert all(p.grad is None for p in names.values())
    with pytest.raises(ZeroDivisionError), lorafast.disable_adapter(model):
        raise ZeroDivisionError
    assert dict(model.named_parameters()).items() == names.items()
    model(input_ids=tiny_transformers.IDS).logits.sum().backward()
    assert all(p.grad is not None for p in lorafast.adapter_parameters(model))


@pytest.mark.compile
def test_a_compiled_model_is_disabled_too():
    model = tiny_transformers.adapted(
        tiny_transformers.llama(), LaMDA(r=4), target_modules=["q_proj", "v_proj"]
    )
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(
            tiny_transformers.outputs(compiled), tiny_transformers.outputs(model)
        )
        with lorafast.disable_adapter(compiled):
            torch.testing.assert_close(
                tiny_transformers.outputs(compiled),
                tiny_transformers.outputs(tiny_transformers.llama()),
                rtol=1e-5,
                atol=1e-6,
            )


def test_copies_and_moves_keep_first_values():
    model = tiny_transformers.adapted(
        tiny_transformers.bart(), LaMDA(r=2), bias="all", modules_to_save=["layernorm_embedding"]
    )
    for other in (copy.deepcopy(model), copy.deepcopy(model).double()):
        with lorafast.disable_adapter(other):
            torch.testing.assert_close(
                tiny_transformers.outputs(other),
                tiny_transformers.outputs(tiny_transformers.bart()),
                rtol=1e-5,
                atol=1e-6,
            )
        torch.testing.assert_close(
            tiny_transformers.outputs(other), tiny_transformers.outputs(model), rtol=1e-5, atol=1e-6
        )
    assert model.state_dict().keys() == other.state_dict().keys()
    assert not any("lorafast" in key for key in model.state_dict())
