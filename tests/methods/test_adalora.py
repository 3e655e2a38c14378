"""AdaLoRA: the spec, its formula in float64, and its files, PEFT's and forged ones too."""

import json

import pytest
import torch
from helpers import tiny_transformers
from safetensors.torch import load_file, save_file
from torch import nn

import lorafast
from lorafast import AdaLoRA
from lorafast.schedule import AdaLoRA as Schedule

K, N = 7, 11
PARTS = ("lora_A", "lora_core", "lora_B")
NAMES = ["q_proj", "v_proj", "down_proj"]
Q = "base_model.model.model.layers.0.self_attn.q_proj."


def test_the_spec():
    adapter = AdaLoRA()
    assert (adapter.r, adapter.target_r, adapter.alpha, adapter.dropout, adapter.init_r) == (
        12,
        8,
        8,
        0.0,
        12,
    )
    assert adapter.scaling == 8 / (12 + 1e-5)
    assert AdaLoRA(r=5, init_r=12).scaling == adapter.scaling
    assert AdaLoRA(r=12, init_r=12) == adapter
    torch.manual_seed(0)
    start = AdaLoRA(r=40).init_tensors(torch.empty(300, 200))
    assert not start["lora_core"].any()
    for name, shape in (("lora_A", (40, 200)), ("lora_B", (300, 40))):
        assert start[name].shape == shape
        assert abs(start[name].std().item() - 0.02) < 1e-3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 4}, "target_r=8 must be at most init_r=4"),
        ({"r": 9, "init_r": 8}, "r=9 must be at most init_r=8"),
        ({"target_r": 0}, "target_r=0 must be an integer"),
        ({"target_r": 2.0}, r"target_r=2\.0"),
        ({"init_r": True}, "init_r=True"),
        ({"alpha": 0}, "alpha=0 must be a finite number above 0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"alpha": "8"}, "alpha='8'"),
        ({"dropout": 1.0}, r"dropout 1\.0"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        AdaLoRA(**fields)


def test_where_it_cannot_go():
    with pytest.raises(TypeError, match="made for linears"):
        lorafast.Embedding(4, 3, adapter=AdaLoRA())
    with pytest.raises(ValueError, match="AdaLoRA has no alpha of its own per layer"):
        lorafast.adapt(nn.Sequential(nn.Linear(K, N)), AdaLoRA(), alpha_pattern={"0": 4})
    with pytest.raises(ValueError, match=r"rank_pattern\['0'\]=13: r=13 must be at most init_r=12"):
        lorafast.adapt(nn.Sequential(nn.Linear(K, N)), AdaLoRA(), rank_pattern={"0": 13})


@pytest.mark.parametrize("M", [1, 6])
def test_the_formula_and_its_gradients(M):
    torch.manual_seed(3)
    layer = lorafast.Linear(K, N, adapter=AdaLoRA(r=3, target_r=1, alpha=5), dtype=torch.float64)
    x = torch.randn(M, K, dtype=torch.float64, requires_grad=True)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    nn.init.normal_(layer.lora_core)
    parts = [x, *(getattr(layer, part) for part in PARTS)]
    A, E, B = parts[1:]
    want = x @ layer.weight.t() + layer.bias + 5 / (3 + 1e-5) * ((x @ (A * E[:, None]).t()) @ B.t())
    found = layer(x)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-13)
    g = torch.randn_like(want)
    for ours, theirs in zip(
        torch.autograd.grad(found, parts, g), torch.autograd.grad(want, parts, g), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_what_is_kept_for_backward():
    row = lorafast.explain(lorafast.Linear(K, N, adapter=AdaLoRA(r=5, target_r=2))).rows[0]
    assert (row.method, row.r, row.saved, row.referenced) == ("AdaLoRA", 5, 5 * 4, ("x",))


def model_of(make=tiny_transformers.llama, **fields):
    model = lorafast.adapt(make(), AdaLoRA(**{"r": 4, "target_r": 2, "alpha": 32} | fields), seed=1)
    return tiny_transformers.perturb(model)


def run(model, steps=6, tfinal=2):
    """A model at the end of a run, and its schedule."""
    schedule = Schedule(model, total_steps=steps, tinit=1, tfinal=tfinal)
    optimizer = torch.optim.AdamW(lorafast.adapter_parameters(model), lr=0.02)
    for _ in range(steps):
        loss = (
            model(input_ids=tiny_transformers.IDS)[0].float().log_softmax(-1)[..., 3].mean()
            + schedule.penalty()
        )
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return schedule


def through_peft(make, model, tmp_path):
    """Save a model, read it by both, and PEFT's file of it again. Return the model read first."""
    want = tiny_transformers.outputs(model)
    lorafast.save_adapter(model, tmp_path / "ours")
    loaded = lorafast.load_adapter(make(), tmp_path / "ours")
    assert torch.equal(tiny_transformers.outputs(loaded), want)
    theirs = tiny_transformers.loaded_by_peft(make(), tmp_path / "ours")
    torch.testing.assert_close(tiny_transformers.outputs(theirs), want, rtol=1e-4, atol=2e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(
        tiny_transformers.outputs(lorafast.load_adapter(make(), tmp_path / "theirs")),
        want,
        rtol=1e-4,
        atol=2e-5,
    )
    return loaded


@pytest.mark.peft
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bart"])
def test_through_peft_and_back(kind, tmp_path):
    make = tiny_transformers.KINDS[kind]
    model = model_of(make)
    loaded = through_peft(make, model, tmp_path)
    state = load_file(tmp_path / "ours/adapter_model.safetensors")
    assert lorafast.adapter_state_dict(loaded).keys() == state.keys()
    assert state.keys() == load_file(tmp_path / "theirs/adapter_model.safetensors").keys()
    lorafast.save_adapter(model, tmp_path / "plain", as_lora=True)
    torch.testing.assert_close(
        tiny_transformers.outputs(tiny_transformers.loaded_by_peft(make(), tmp_path / "plain")),
        tiny_transformers.outputs(model),
        rtol=1e-4,
        atol=2e-5,
    )


@pytest.mark.peft
def test_masked_and_then_resized(tmp_path):
    model = model_of()
    schedule = run(model)
    masked = tiny_transformers.outputs(model)
    loaded = through_peft(tiny_transformers.llama, model, tmp_path / "masked")
    assert {layer.r for layer in loaded.modules() if isinstance(layer, lorafast.Linear)} == {4}
    ranks = schedule.resize()
    assert len(set(ranks.values())) > 1
    torch.testing.assert_close(tiny_transformers.outputs(model), masked, rtol=1e-5, atol=1e-6)
    loaded = through_peft(tiny_transformers.llama, model, tmp_path / "resized")
    found = {
        name: layer for name, layer in loaded.named_modules() if isinstance(layer, lorafast.Linear)
    }
    assert {name: layer.r for name, layer in found.items()} == ranks
    assert all(layer.adapter == model.get_submodule(name).adapter for name, layer in found.items())
    said = json.loads((tmp_path / "resized/ours/adapter_config.json").read_text())
    assert {
        name: said[name]
        for name in ("peft_type", "init_r", "target_r", "total_step", "tinit", "tfinal", "deltaT")
    } == {
        "peft_type": "ADALORA",
        "init_r": 4,
        "target_r": 2,
        "total_step": 6,
        "tinit": 1,
        "tfinal": 2,
        "deltaT": 1,
    }
    assert said["rank_pattern"] == {
        f"{name}.lora_E": [i < r for i in range(4)] for name, r in ranks.items()
    }
    # Onto a model with the same ranks it loads too; onto one with others it does not.
    lorafast.load_adapter(loaded, tmp_path / "resized/ours")
    with pytest.raises(ValueError, match=r"AdaLoRA\(r=4.*the file AdaLoRA\(r="):
        lorafast.load_adapter(model_of(), tmp_path / "resized/ours")
    plain = lorafast.merge(loaded)
    torch.testing.assert_close(
        tiny_transformers.outputs(plain), tiny_transformers.outputs(model), rtol=1e-4, atol=1e-5
    )


@pytest.mark.peft
@pytest.mark.filterwarnings("ignore:Adapter .* invalid shape")
def test_pefts_own_run_and_its_file(tmp_path):
    """A model that PEFT has masked, a layer of which it has left nothing."""
    import peft

    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        lora_alpha=32,
        target_modules=NAMES,
        total_step=6,
        tinit=1,
        tfinal=2,
        bias="lora_only",
        task_type="CAUSAL_LM",
        lora_dropout=0.1,
    )
    theirs = tiny_transformers.peft_adapted(tiny_transformers.llama(), config)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.02)
    for t in range(1, 5):
        theirs(input_ids=tiny_transformers.IDS, labels=tiny_transformers.IDS).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(t)
        optimizer.zero_grad()
    pattern = theirs.peft_config["default"].rank_pattern
    none = "model.layers.1.self_attn.v_proj"
    pattern[f"{none}.lora_E.default"] = [False] * 4
    theirs.base_model.rankallocator.mask_using_rank_pattern(theirs.base_model.model, pattern)
    want = tiny_transformers.outputs(theirs)
    theirs.save_pretrained(tmp_path)
    loaded = lorafast.load_adapter(tiny_transformers.llama(), tmp_path, trainable=True)
    torch.testing.assert_close(tiny_transformers.outputs(loaded), want, rtol=1e-4, atol=2e-6)
    layers = {
        name: layer for name, layer in loaded.named_modules() if isinstance(layer, lorafast.Linear)
    }
    assert {name: layer.r for name, layer in layers.items()} == {
        key.removesuffix(".lora_E.default"): max(1, sum(kept)) for key, kept in pattern.items()
    }
    assert not layers[none].lora_core.any()
    assert all(
        layer.adapter.init_r == 4 and layer.adapter.dropout == 0.1 for layer in layers.values()
    )
    through_peft(tiny_transformers.llama, loaded.eval(), tmp_path)


@pytest.mark.peft
def test_pefts_config(tmp_path):
    import peft

    config = peft.AdaLoraConfig(
        init_r=6, target_r=3, lora_alpha=16, total_step=10, target_modules=NAMES, lora_dropout=0.2
    )
    ours, theirs = (
        lorafast.adapt(tiny_transformers.llama(), config),
        tiny_transformers.peft_adapted(tiny_transformers.llama(), config),
    )
    layer = ours.model.layers[0].self_attn.q_proj
    assert layer.adapter == AdaLoRA(r=6, target_r=3, alpha=16, dropout=0.2)
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert lorafast.trainable_summary(ours).trainable == trained
    by_default = lorafast.adapt(tiny_transformers.bart(), peft.AdaLoraConfig(total_step=10))
    found = {
        name.rpartition(".")[2]
        for name, one in by_default.named_modules()
        if isinstance(one, lorafast.Linear)
    }
    assert found == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    for fields, message in (
        ({"init_lora_weights": False}, "init_lora_weights=False: AdaLoRA has one start"),
        ({"init_r": 4}, "target_r=8 must be at most init_r=4"),
        ({"use_rslora": True}, "use_rslora=True: lorafast has no such thing"),
        ({"alpha_pattern": {"q_proj": 3}}, "AdaLoRA has no alpha of its own per layer"),
    ):
        with pytest.raises(ValueError, match=message):
            lorafast.adapt(
                tiny_transformers.llama(),
                peft.AdaLoraConfig(total_step=10, target_modules=NAMES, **fields),
            )
    # A file of a schedule that could never run is no less an adapter.
    odd = peft.AdaLoraConfig(
        total_step=1,
        init_r=2,
        target_modules=["q_proj"],
        use_rslora=True,
        alpha_pattern={"q_proj": 3},
    )
    theirs = tiny_transformers.peft_adapted(tiny_transformers.llama(), odd)
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(
        tiny_transformers.outputs(lorafast.load_adapter(tiny_transformers.llama(), tmp_path)),
        tiny_transformers.outputs(theirs),
        rtol=1e-4,
        atol=2e-6,
    )


@pytest.mark.peft
def test_a_scaling_changed_by_hand(tmp_path):
    model = model_of()
    layers = [layer for layer in model.modules() if isinstance(layer, lorafast.Linear)]
    layers[0].scaling *= 2
    with pytest.raises(ValueError, match="adapters of one file may differ in r alone"):
        lorafast.save_adapter(model, tmp_path / "one")
    for layer in layers[1:]:
        layer.scaling *= 2
    through_peft(tiny_transformers.llama, model, tmp_path)


FORGED = [
    ({"rank_pattern": ["x"]}, {}, r"rank_pattern=\['x'\] must be a dict"),
    (
        {"rank_pattern": {"x": [True] * 4}},
        {},
        r"rank_pattern\['x'\].* must be a layer's lora_E and a list of flags",
    ),
    ({"rank_pattern": {"x.lora_E": 3}}, {}, r"rank_pattern\['x\.lora_E'\]=3 must be"),
    (
        {"rank_pattern": {"x.lora_E": [1, 0, 1, 1]}},
        {},
        "must be a layer's lora_E and a list of flags",
    ),
    ({"rank_pattern": {"x.lora_E": [True] * 3}}, {}, "has 3 flags for init_r=4"),
    (
        {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True] * 3 + [False]}},
        {},
        r"q_proj\.lora_A \(4, 32\) must be \(3, 32\)",
    ),
    ({"init_r": 3}, {}, r"\(4, 32\) must be \(3, 32\)"),
    ({"init_r": "4"}, {}, "init_r='4' must be int"),
    ({"init_r": 10**400}, {}, "must be"),
    ({"tinit": "x"}, {}, "tinit='x' must be int or float"),
    ({"lora_alpha": 0}, {}, "alpha=0"),
    ({"peft_type": "LORA"}, {}, "the file is of|lorafast has no such thing"),
    ({}, {f"{Q}lora_E": torch.ones(4)}, r"lora_E \(4,\) must be \(4, 1\)"),
    ({}, {f"{Q}lora_E": torch.ones(0, 1)}, r"lora_E \(0, 1\) must be \(4, 1\)"),
    ({}, {f"{Q}lora_E": None}, "lacks lora_core"),
    (
        {},
        {f"{Q}lora_E": torch.full((4, 1), float("nan"))},
        r"lora_core \(4,\) of the file is not finite",
    ),
]


@pytest.mark.parametrize(("said", "tensors", "message"), FORGED, ids=range(len(FORGED)))
def test_forged(said, tensors, message, tmp_path):
    lorafast.save_adapter(model_of(), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    state = load_file(tmp_path / "adapter_model.safetensors") | tensors
    save_file(
        {name: tensor for name, tensor in state.items() if tensor is not None},
        tmp_path / "adapter_model.safetensors",
    )
    plain = tiny_transformers.llama()
    before, modules = tiny_transformers.copied_tensors(plain), list(plain.modules())
    with pytest.raises((ValueError, TypeError), match=message):
        lorafast.load_adapter(plain, tmp_path)
    assert list(plain.modules()) == modules
    assert all(
        torch.equal(value, before[name])
        for name, value in tiny_transformers.copied_tensors(plain).items()
    )
