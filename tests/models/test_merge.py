"""merge and unload on real architectures, tied weights among them."""

import copy

import pytest
import torch
from helpers import tiny_transformers
from helpers.whole_models import assert_close, each_adapter

import lorafast
from lorafast import DoRA, LoRA


@each_adapter("gpt2", "bart", "llama")
def test_merged_is_the_adapted_and_unloaded_the_base(adapter, kind, dtype):
    base = tiny_transformers.KINDS[kind]().to(dtype)
    want, before, classes = (
        tiny_transformers.outputs(base),
        tiny_transformers.copied_tensors(base),
        [type(m) for m in base.modules()],
    )
    model = tiny_transformers.adapted(base, adapter, bias="none" if kind == "llama" else "all")
    trained = tiny_transformers.outputs(model)
    for plain, outputs in (
        (lorafast.merge(copy.deepcopy(model)), trained),
        (lorafast.unload(model), want),
    ):
        assert [type(m) for m in plain.modules()] == classes
        assert plain.state_dict().keys() == before.keys()
        assert not any(p.requires_grad for p in plain.parameters())
        assert_close(tiny_transformers.outputs(plain), outputs, dtype, 2)
    assert model is plain
    for name, value in tiny_transformers.copied_tensors(model).items():
        eps = torch.finfo(dtype).eps if adapter.residual else 0
        torch.testing.assert_close(
            value, before[name], rtol=eps, atol=eps * float(before[name].abs().max())
        )
    with pytest.raises(ValueError, match="has no adapted layer"):
        lorafast.unload(model)
    assert lorafast.merge_and_unload is lorafast.merge


def test_adapt_again_after_unload():
    model = lorafast.unload(
        tiny_transformers.adapted(tiny_transformers.llama(), LoRA(r=4), modules_to_save=["norm"])
    )
    assert lorafast.trainable_summary(model).parts == {}
    again = tiny_transformers.adapted(model, DoRA(r=2))
    assert lorafast.trainable_summary(again).parts.keys() == {"lora_A", "lora_B", "lora_magnitude"}


def test_merging_after_a_merge_of_one_layer_and_unloading_too():
    for finish in (lorafast.merge, lorafast.unload):
        model = tiny_transformers.adapted(
            tiny_transformers.llama(), LoRA(r=4), target_modules=["q_proj", "v_proj"]
        )
        want = (
            tiny_transformers.outputs(model)
            if finish is lorafast.merge
            else tiny_transformers.outputs(tiny_transformers.llama())
        )
        model.model.layers[0].self_attn.q_proj.merge(keep=True)
        torch.testing.assert_close(
            tiny_transformers.outputs(finish(model)), want, rtol=1e-5, atol=1e-6
        )


def test_a_merge_that_cannot_changes_nothing():
    model = tiny_transformers.adapted(
        tiny_transformers.llama(), LoRA(r=4), target_modules=["q_proj", "v_proj"]
    )
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.lora_B[0, 0] = float("inf")
    before, modules = tiny_transformers.copied_tensors(model), list(model.modules())
    with pytest.raises(
        ValueError, match=r"weight \(16, 32\) with its adapter folded in is not finite"
    ):
        lorafast.merge(model)
    assert list(model.modules()) == modules
    assert all(
        torch.equal(value, before[name])
        for name, value in tiny_transformers.copied_tensors(model).items()
    )


def test_tied_weights_stay_tied_or_are_refused():
    tied = {"tie_word_embeddings": True}
    model = tiny_transformers.adapted(
        tiny_transformers.llama(**tied), LoRA(r=4), target_modules=["q_proj", "lm_head"]
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    want = tiny_transformers.outputs(model)
    with pytest.raises(
        ValueError,
        match=r"embed_tokens\.weight and lm_head\.weight, which are one tensor.*untie=True",
    ):
        lorafast.merge(model)
    assert torch.equal(tiny_transformers.outputs(model), want)
    merged = lorafast.merge(model, untie=True)
    torch.testing.assert_close(tiny_transformers.outputs(merged), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(
        merged.model.embed_tokens.weight, tiny_transformers.llama(**tied).model.embed_tokens.weight
    )
    both = tiny_transformers.adapted(
        tiny_transformers.llama(**tied), LoRA(r=4), target_modules=["embed_tokens", "lm_head"]
    )
    want = tiny_transformers.outputs(both)
    torch.testing.assert_close(
        tiny_transformers.outputs(lorafast.merge(both, untie=True)), want, rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match=r"modules_to_save: lm_head\.weight is one tensor under"):
        lorafast.adapt(
            tiny_transformers.llama(**tied), LoRA(r=4), ["q_proj"], modules_to_save=["lm_head"]
        )
    lorafast.adapt(
        tiny_transformers.llama(**tied),
        LoRA(r=4),
        ["q_proj"],
        modules_to_save=["lm_head", "embed_tokens"],
    )


@each_adapter("llama")
def test_merged_and_unmerged_layer_by_layer(adapter, kind, dtype):
    model = tiny_transformers.adapted(tiny_transformers.KINDS[kind]().to(dtype), adapter)
    want, before = tiny_transformers.outputs(model), tiny_transformers.copied_tensors(model)
    layers = [m for m in model.modules() if isinstance(m, lorafast.Linear)]
    for layer in layers:
        layer.merge(keep=True)
    assert_close(tiny_transformers.outputs(model), want, dtype, 2)
    for layer in layers:
        layer.unmerge()
    assert torch.equal(tiny_transformers.outputs(model), want)
    assert all(
        torch.equal(value, before[name])
        for name, value in tiny_transformers.copied_tensors(model).items()
    )
