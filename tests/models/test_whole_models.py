"""disable_adapter, merge, unload, summaries and plain-LoRA export on real architectures, and adapt's options."""

import copy

import pytest
import torch
from helpers import tiny_transformers
from torch import nn

import lorafast
from lorafast import DoRA, LaMDA, LoRA, PiSSA, VeRA

ADAPTERS = [
    LoRA(r=4, alpha=8),
    DoRA(r=4),
    LoRA(r=4, init=PiSSA()),
    DoRA(r=4, init=PiSSA()),
    LaMDA(r=4),
    VeRA(r=8),
]
each = pytest.mark.parametrize("adapter", ADAPTERS, ids=repr)
kinds = pytest.mark.parametrize("kind", ["gpt2", "bart", "llama"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def close(found, want, dtype, times=1):
    """Logits of a model whose weights were rounded once more."""
    bound = times * {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype] * float(want.abs().max())
    torch.testing.assert_close(found, want, rtol=0, atol=bound)


@each
@kinds
@dtypes
def test_disabled_is_the_base_and_comes_back(adapter, kind, dtype):
    base = tiny_transformers.KINDS[kind]().to(dtype)
    want = tiny_transformers.out(base)
    model = tiny_transformers.adapted(
        base,
        adapter,
        bias="all" if kind != "llama" else "none",
        modules_to_save=["ln_f"] if kind == "gpt2" else (),
    )
    trained = tiny_transformers.out(model)
    with lorafast.disable_adapter(model) as nothing:
        assert nothing is None
        close(tiny_transformers.out(model), want, dtype, 2)
        with lorafast.disable_adapter(model):
            close(tiny_transformers.out(model), want, dtype, 2)
        close(tiny_transformers.out(model), want, dtype, 2)
        if not adapter.residual:
            assert torch.equal(tiny_transformers.out(model), want)
    assert torch.equal(tiny_transformers.out(model), trained)
    assert float((trained - want).abs().max()) > 0.01 * float(want.abs().max())


@each
@kinds
@dtypes
def test_merged_is_the_adapted_and_unloaded_the_base(adapter, kind, dtype):
    base = tiny_transformers.KINDS[kind]().to(dtype)
    want, before, classes = (
        tiny_transformers.out(base),
        tiny_transformers.tensors(base),
        [type(m) for m in base.modules()],
    )
    model = tiny_transformers.adapted(base, adapter, bias="none" if kind == "llama" else "all")
    trained = tiny_transformers.out(model)
    for plain, outputs in (
        (lorafast.merge(copy.deepcopy(model)), trained),
        (lorafast.unload(model), want),
    ):
        assert [type(m) for m in plain.modules()] == classes
        assert plain.state_dict().keys() == before.keys()
        assert not any(p.requires_grad for p in plain.parameters())
        close(tiny_transformers.out(plain), outputs, dtype, 2)
    assert model is plain
    for name, value in tiny_transformers.tensors(model).items():
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
            tiny_transformers.out(model)
            if finish is lorafast.merge
            else tiny_transformers.out(tiny_transformers.llama())
        )
        model.model.layers[0].self_attn.q_proj.merge(keep=True)
        torch.testing.assert_close(tiny_transformers.out(finish(model)), want, rtol=1e-5, atol=1e-6)


def test_a_merge_that_cannot_changes_nothing():
    model = tiny_transformers.adapted(
        tiny_transformers.llama(), LoRA(r=4), target_modules=["q_proj", "v_proj"]
    )
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.lora_B[0, 0] = float("inf")
    before, modules = tiny_transformers.tensors(model), list(model.modules())
    with pytest.raises(
        ValueError, match=r"weight \(16, 32\) with its adapter folded in is not finite"
    ):
        lorafast.merge(model)
    assert list(model.modules()) == modules
    assert all(
        torch.equal(value, before[name]) for name, value in tiny_transformers.tensors(model).items()
    )


def test_tied_weights_stay_tied_or_are_refused():
    tied = {"tie_word_embeddings": True}
    model = tiny_transformers.adapted(
        tiny_transformers.llama(**tied), LoRA(r=4), target_modules=["q_proj", "lm_head"]
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    want = tiny_transformers.out(model)
    with pytest.raises(
        ValueError,
        match=r"embed_tokens\.weight and lm_head\.weight, which are one tensor.*untie=True",
    ):
        lorafast.merge(model)
    assert torch.equal(tiny_transformers.out(model), want)
    merged = lorafast.merge(model, untie=True)
    torch.testing.assert_close(tiny_transformers.out(merged), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(
        merged.model.embed_tokens.weight, tiny_transformers.llama(**tied).model.embed_tokens.weight
    )
    both = tiny_transformers.adapted(
        tiny_transformers.llama(**tied), LoRA(r=4), target_modules=["embed_tokens", "lm_head"]
    )
    want = tiny_transformers.out(both)
    torch.testing.assert_close(
        tiny_transformers.out(lorafast.merge(both, untie=True)), want, rtol=1e-5, atol=1e-6
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


def test_a_compiled_model_is_disabled_too():
    model = tiny_transformers.adapted(
        tiny_transformers.llama(), LaMDA(r=4), target_modules=["q_proj", "v_proj"]
    )
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(tiny_transformers.out(compiled), tiny_transformers.out(model))
        with lorafast.disable_adapter(compiled):
            torch.testing.assert_close(
                tiny_transformers.out(compiled),
                tiny_transformers.out(tiny_transformers.llama()),
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
                tiny_transformers.out(other),
                tiny_transformers.out(tiny_transformers.bart()),
                rtol=1e-5,
                atol=1e-6,
            )
        torch.testing.assert_close(
            tiny_transformers.out(other), tiny_transformers.out(model), rtol=1e-5, atol=1e-6
        )
    assert model.state_dict().keys() == other.state_dict().keys()
    assert not any("lorafast" in key for key in model.state_dict())


def test_summary_and_parameters():
    model = lorafast.adapt(
        tiny_transformers.bart(), DoRA(r=2), ["q_proj"], bias="lora_only", modules_to_save=["fc1"]
    )
    summary = lorafast.trainable_summary(model)
    layers = [m for m in model.modules() if isinstance(m, lorafast.Linear)]
    assert len(layers) == 3
    assert summary.parts == {
        "lora_A": 3 * 2 * 32, "lora_B": 3 * 32 * 2, "lora_magnitude": 3 * 32, "bias": 3 * 32, "modules_to_save": 2 * (32 * 48 + 48),
    }  # fmt: skip
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in lorafast.adapter_parameters(model)} == {id(p) for p in trained}
    assert summary.trainable == sum(p.numel() for p in trained)
    assert summary.total == sum(p.numel() for p in model.parameters())
    share = 100 * summary.trainable / summary.total
    assert str(summary).startswith(
        f"trainable params: {summary.trainable:,d} || all params: {summary.total:,d} || trainable%: {share:.4f}\nlora_A 192, "
    )
    assert lorafast.trainable_summary(nn.Linear(3, 2)) == (8, 8, {"other": 8})
    layers[0].lora_A.requires_grad_(False)
    assert len(lorafast.adapter_parameters(model)) == len(trained) - 1
    with pytest.raises(ValueError, match="has no adapted layer"):
        lorafast.adapter_parameters(nn.Linear(3, 2))


def test_the_state_dict_is_the_models_memory():
    model = tiny_transformers.adapted(
        tiny_transformers.llama(), LoRA(r=2), target_modules=["q_proj"]
    )
    state = lorafast.adapter_state_dict(model)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert state[key].data_ptr() == model.model.layers[0].self_attn.q_proj.lora_A.data_ptr()
    assert not state[key].requires_grad
    assert len(state) == 4


@each
@dtypes
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_exported_as_plain_lora(adapter, dtype, kind, tmp_path, capsys):
    def make():
        return tiny_transformers.KINDS[kind]().to(dtype)

    model = tiny_transformers.adapted(
        make(), adapter, rank_pattern={} if isinstance(adapter, VeRA) else {r".*\b0\..*": 3}
    )
    want = tiny_transformers.out(model)
    if isinstance(adapter, DoRA):
        with pytest.raises(ValueError, match=r"has no low rank.*rank="):
            lorafast.save_adapter(model, tmp_path, as_lora=True)
    lorafast.save_adapter(model, tmp_path, as_lora=True, rank=48)  # no layer has more
    told = capsys.readouterr().out
    assert "as plain LoRA of rank" in told
    assert float(told.split("at most ")[1].split()[0]) < 1e-5
    loaded = lorafast.load_adapter(make(), tmp_path)
    for one in (loaded, tiny_transformers.from_peft(make(), tmp_path)):
        close(tiny_transformers.out(one), want, dtype, 4)
    layers = [m for m in loaded.modules() if isinstance(m, lorafast.nn.linear.AdapterLinearBase)]
    assert {(type(layer.adapter), layer.scaling) for layer in layers} == {(LoRA, 1.0)}


@each
@dtypes
def test_merged_and_unmerged_layer_by_layer(adapter, dtype):
    model = tiny_transformers.adapted(tiny_transformers.llama().to(dtype), adapter)
    want, before = tiny_transformers.out(model), tiny_transformers.tensors(model)
    layers = [m for m in model.modules() if isinstance(m, lorafast.Linear)]
    for layer in layers:
        layer.merge(keep=True)
    close(tiny_transformers.out(model), want, dtype, 2)
    for layer in layers:
        layer.unmerge()
    assert torch.equal(tiny_transformers.out(model), want)
    assert all(
        torch.equal(value, before[name]) for name, value in tiny_transformers.tensors(model).items()
    )


@pytest.mark.parametrize(
    "adapter", [LoRA(r=4), DoRA(r=4), VeRA(r=8), DoRA(r=4, axis="in"), LaMDA(r=4)], ids=repr
)
def test_the_printed_truncation_error_is_the_true_one(adapter, tmp_path, capsys):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(20, 16))
    weight = base[0].weight.detach().clone().double()
    model = tiny_transformers.adapted(base, adapter)
    layer = copy.deepcopy(model[0]).double()
    layer.merge(keep=True)
    delta = layer.weight.detach() - weight
    errors = []
    for rank in (1, 2, 3):
        lorafast.save_adapter(model, tmp_path, as_lora=True, rank=rank)
        told = float(capsys.readouterr().out.split("at most ")[1].split()[0])
        loaded = lorafast.load_adapter(nn.Sequential(nn.Linear(20, 16)), tmp_path)[0]
        left = delta - (loaded.lora_B @ loaded.lora_A).double() * loaded.scaling
        best = torch.linalg.svdvals(delta)[rank:].norm() / delta.norm()
        assert told == pytest.approx(float(left.norm() / delta.norm()), rel=0.02)
        assert told == pytest.approx(float(best), rel=0.02)
        errors.append(told)
    assert errors == sorted(errors, reverse=True)
    for wrong in (0, True, 2.5):
        with pytest.raises(ValueError, match=f"rank={wrong!r}"):
            lorafast.save_adapter(model, tmp_path, as_lora=True, rank=wrong)


def test_biases_are_exported(tmp_path, capsys):
    base = nn.Sequential(nn.Linear(6, 5))
    model = tiny_transformers.adapted(copy.deepcopy(base), DoRA(r=2, lora_bias=True))
    lorafast.save_adapter(model, tmp_path, as_lora=True, rank=5)
    x = torch.randn(3, 6)
    torch.testing.assert_close(
        lorafast.load_adapter(copy.deepcopy(base), tmp_path)(x), model(x), rtol=1e-4, atol=1e-5
    )


def layers_of(model):
    return {name: m.adapter for name, m in model.named_modules() if hasattr(m, "adapter")}


def test_ranks_and_alphas_by_pattern():
    model = lorafast.adapt(
        tiny_transformers.llama(), LoRA(r=4, alpha=8), ["q_proj", "v_proj"],
        rank_pattern={r"layers\.0\..*": 2, "v_proj": 6}, alpha_pattern={"layers.1.self_attn.q_proj": 3},
    )  # fmt: skip
    found = {
        name.removeprefix("model.layers."): (a.r, a.alpha) for name, a in layers_of(model).items()
    }
    assert found == {
        "0.self_attn.q_proj": (2, 8), "0.self_attn.v_proj": (2, 8), "1.self_attn.q_proj": (4, 3), "1.self_attn.v_proj": (6, 8),
    }  # fmt: skip


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
