"""Which modules adapt replaces with all that belongs to them, and what it says of the others."""

import copy
import warnings

import accelerate
import pytest
import torch
import transformers
from helpers import tiny_transformers
from helpers.foreign_weights import codes
from helpers.tiny_transformers import outputs
from torch import nn

import lorafast
from lorafast import LoRA


def net():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


X = torch.arange(24.0).reshape(3, 8) / 24


def test_falcons_linear_computes_what_a_linear_does():
    config = transformers.FalconConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=99, bias=True
    )
    torch.manual_seed(0)
    base = transformers.FalconForCausalLM(config).eval()
    model = lorafast.adapt(copy.deepcopy(base), LoRA(r=2))
    layer = model.transformer.h[0].mlp.dense_h_to_4h
    assert isinstance(layer, lorafast.Linear)
    torch.testing.assert_close(outputs(model), outputs(base))
    tiny_transformers.perturb(model)
    want = outputs(model)
    merged = lorafast.merge(model)
    assert type(merged.transformer.h[0].mlp.dense_h_to_4h) is type(
        base.transformer.h[0].mlp.dense_h_to_4h
    )
    torch.testing.assert_close(outputs(merged), want, rtol=1e-4, atol=1e-5)


def test_hooks_of_the_call_stay_where_they_are():
    model, seen = net(), []
    handles = [
        model[0].register_forward_hook(lambda m, x, y: seen.append(("forward", m, y.detach()))),
        model[0].register_forward_pre_hook(lambda m, x: seen.append(("before", m, x[0]))),
        model[0].register_full_backward_hook(lambda m, dx, dy: seen.append(("backward", m, dy[0]))),
        model[0].register_forward_hook(
            lambda m, x, kwargs, y: seen.append(("kwargs", m, kwargs)), with_kwargs=True
        ),
    ]
    lorafast.adapt(model, LoRA(r=2))
    model[0].lora_B.data.normal_()
    model(X).sum().backward()
    assert [kind for kind, *_ in seen] == ["before", "forward", "kwargs", "backward"]
    assert {module for _, module, _ in seen} == {model[0]}
    handles[0].remove()
    handles[1].remove()
    seen.clear()
    model(X).sum().backward()
    assert [kind for kind, *_ in seen] == ["kwargs", "backward"]
    model = lorafast.merge(model)
    seen.clear()
    model(X)
    assert [(kind, module) for kind, module, _ in seen] == [("kwargs", model[0])]
    for handle in handles:
        handle.remove()
    seen.clear()
    model(X)
    assert seen == []


def test_a_hook_that_changes_the_output_changes_the_adapted_layers():
    model = net()
    model[0].register_forward_hook(lambda m, x, y: 2 * y)
    want = model(X)
    lorafast.adapt(model, LoRA(r=2))
    torch.testing.assert_close(model(X), want)


def test_gradients_of_inputs_that_transformers_asks_for_go_on_after_adapting_embeddings():
    model = tiny_transformers.llama()
    model.enable_input_require_grads()
    lorafast.adapt(model, LoRA(r=2), ["embed_tokens", "q_proj"])
    assert isinstance(model.model.embed_tokens, lorafast.Embedding)
    model(input_ids=tiny_transformers.IDS).logits.sum().backward()
    assert model.model.embed_tokens.lora_B.grad is not None
    model.disable_input_require_grads()
    assert not model.model.embed_tokens._forward_hooks


def test_a_failed_adapt_leaves_hooks_where_they_were():
    model, seen = net(), []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(Exception, match=r"(?i)svd|nan|converge"):
        lorafast.adapt(model, lorafast.LaMDA(r=2))
    model(X)
    assert seen == [1]


def test_a_foreign_weight_is_quantised_and_both_ways_are_named():
    model = net()
    model[2].weight = codes(model[2].weight)
    with pytest.raises(TypeError, match=r"matches 2, which is a .*Linear with a quantised weight"):
        lorafast.adapt(model, LoRA(r=2))
    with pytest.raises(TypeError, match=r"load the model unquantised .*lorafast\.accelerate"):
        lorafast.adapt(model, LoRA(r=2))
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("dtype", "why"),
    [
        (torch.int8, "quantised weight: load the model unquantised"),
        (torch.uint8, "quantised weight: load the model unquantised"),
        (torch.float8_e4m3fn, "2, which has a quantised weight that cannot be read: it has nei"),
    ],
)
def test_narrow_weights_are_quantised(dtype, why):
    model = net()
    narrow = torch.zeros(4, 8, dtype=dtype)
    model[2].weight = nn.Parameter(narrow, requires_grad=False)
    with pytest.raises(TypeError, match=why):
        lorafast.adapt(model, LoRA(r=2))


def test_layers_of_other_packages_that_hold_codes_are_quantised():
    class QuantLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", torch.zeros(4, 8, dtype=torch.int32))

    model = nn.Sequential(nn.Linear(8, 8), QuantLinear())
    with pytest.raises(TypeError, match=r"matches 1, which is a .*QuantLinear with a quantised"):
        lorafast.adapt(model, LoRA(r=2), ["1"])


def quantised(K, N):
    """Return the dynamically quantised linear of torch."""
    return pytest.importorskip("torch.ao.nn.quantized.dynamic").Linear(K, N)


@pytest.mark.parametrize("targets", ["all-linear", ["2"], "2"])
def test_what_torch_quantised_is_refused_and_the_way_that_is_named_works(targets):
    quantize = pytest.importorskip("torch.ao.quantization").quantize_dynamic
    model = net()
    mixed = nn.Sequential(model[0], model[1], quantised(8, 4))
    way = r"quantised weight: adapt .* quantise it after lorafast\.merge_and_unload\(model\)"
    with pytest.raises(TypeError, match=rf"matches 2, which is a torch\.ao\S+Linear with a {way}"):
        lorafast.adapt(mixed, LoRA(r=2), targets)
    assert type(mixed[0]) is nn.Linear
    lorafast.adapt(mixed, LoRA(r=2), exclude_modules=["2"])
    assert type(mixed[0]) is lorafast.Linear
    lorafast.adapt(model := net(), LoRA(r=2))
    tiny_transformers.perturb(model)
    want = model(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = quantize(lorafast.merge_and_unload(model), {nn.Linear})
    assert type(done[2]) is type(quantised(8, 4))
    torch.testing.assert_close(done(X), want, rtol=0.1, atol=0.1)


def test_a_model_that_is_quantised_as_a_whole_is_told_the_way():
    with pytest.raises(TypeError, match=r"matches 0, which is a .* with a quantised weight: adapt"):
        lorafast.adapt(nn.Sequential(quantised(8, 8)), LoRA(r=2))


def mamba(kind, **fields):
    """Return a small model with Mamba layers and a linear in each place that they have."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 99, "use_mambapy": False}
    config = getattr(transformers, f"{kind}Config")(**sizes | fields)
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


JAMBA = {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "use_mamba_kernels": False,
    "attn_layer_offset": 1,
    "attn_layer_period": 2,
    "num_experts": 1,
    "mamba_d_state": 4,
}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("Mamba", {"state_size": 4}), ("FalconMamba", {"state_size": 4}), ("Jamba", JAMBA)],
    ids=["Mamba", "FalconMamba", "Jamba"],
)
def test_all_linear_leaves_out_what_a_mamba_does_not_call(kind, fields):
    model = mamba(kind, **fields)
    (name,) = (name for name, _ in model.named_modules() if name.endswith("dt_proj"))
    with pytest.raises(TypeError, match=rf"matches {name}, which {kind}M?\w*Mixer does not call"):
        lorafast.adapt(model, LoRA(r=2), ["dt_proj", "x_proj"])
    with pytest.warns(UserWarning, match=rf"leaves out linears .* no effect: {name}$"):
        lorafast.adapt(model, LoRA(r=2))
    assert type(model.get_submodule(name)) is nn.Linear
    assert type(model.get_submodule(name.replace("dt_proj", "x_proj"))) is lorafast.Linear
    model(input_ids=tiny_transformers.IDS, use_cache=False).logits.sum().backward()
    assert lorafast.adapters_without_gradient(model) == []


@pytest.mark.peft
def test_a_file_of_pefts_mamba_is_loaded_with_adapters_that_have_no_effect(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["x_proj", "dt_proj"])
    theirs = tiny_transformers.peft_adapted(mamba("Mamba"), config)
    theirs.save_pretrained(tmp_path)
    ours = lorafast.load_adapter(mamba("Mamba"), tmp_path).eval()
    assert isinstance(ours.backbone.layers[0].mixer.dt_proj, lorafast.Linear)
    torch.testing.assert_close(outputs(ours), outputs(theirs))


def test_naming_or_excluding_them_warns_of_nothing(recwarn):
    lorafast.adapt(mamba("Mamba"), LoRA(r=1), exclude_modules=["dt_proj"])
    lorafast.adapt(mamba("Mamba"), LoRA(r=1), ["x_proj", "in_proj"])
    assert [str(w.message) for w in recwarn if "leaves out" in str(w.message)] == []


def test_all_linear_with_nothing_that_is_called_is_an_error():
    class TDNNLayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Linear(8, 8)

    with pytest.raises(ValueError, match=r"matches 0\.kernel and the like alone"):
        lorafast.adapt(nn.Sequential(TDNNLayer()), LoRA(r=2))


def test_wavlms_attention_reads_all_its_projections():
    config = transformers.WavLMConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8,), conv_kernel=(3,), conv_stride=(2,), num_conv_pos_embedding_groups=2,
        num_conv_pos_embeddings=4, num_feat_extract_layers=1,
    )  # fmt: skip
    model = transformers.WavLMModel(config)
    with pytest.warns(UserWarning, match=r"attention\.k_proj, .*attention\.out_proj"):
        lorafast.adapt(model, LoRA(r=2))
    model.eval()(torch.randn(1, 64)).last_hidden_state.sum().backward()
    assert lorafast.adapters_without_gradient(model) == []


def test_all_linear_leaves_out_what_torchs_attention_reads():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 8)})
    with pytest.warns(UserWarning, match=r"without calling them, .*: attention\.out_proj$"):
        lorafast.adapt(model, LoRA(r=2))
    assert type(model["up"]) is lorafast.Linear
    assert not isinstance(model["attention"].out_proj, lorafast.Linear)
    with pytest.raises(ValueError, match=r"matches 0\.out_proj and the like alone"):
        lorafast.adapt(nn.Sequential(nn.MultiheadAttention(8, 2)), LoRA(r=2))


def test_layers_that_accelerate_placed_are_refused_and_the_way_that_is_named_works(tmp_path):
    model = net()
    want = model(X)
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(TypeError, match=r"placed or offloaded by accelerate \(device_map\)"):
        lorafast.adapt(model, LoRA(r=2))
    accelerate.hooks.remove_hook_from_submodules(model)
    lorafast.adapt(model, LoRA(r=2))
    torch.testing.assert_close(model(X), want)
    model[0].lora_B.data.normal_()
    want = model(X)
    accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert model[0].weight.is_meta
    torch.testing.assert_close(model(X), want)


@pytest.mark.peft
def test_layers_that_accelerate_placed_may_be_left_to_peft():
    peft = pytest.importorskip("peft")
    model = net()
    hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu")
    accelerate.hooks.add_hook_to_module(model[2], hook)
    with pytest.raises(TypeError, match=r"placed or offloaded .* call lorafast\.accelerate"):
        lorafast.adapt(model, LoRA(r=2))
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    want = model(X)
    with pytest.warns(UserWarning, match="1 of 2 PEFT layers run on lorafast"):
        report = lorafast.accelerate(model)
    assert report.taken == ("base_model.model.0",)
    torch.testing.assert_close(model(X), want)
