"""save_adapter and load_adapter: through PEFT and back on real architectures, and what is refused."""

import json

import peft
import pytest
import safetensors.torch
import torch
from helpers import tiny_transformers
from torch import nn

import lorafast
from lorafast import AFLoRA, DoRA, LaMDA, LoRA, PiSSA, VeRA

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
OURS_ALONE = {
    "lamda": LaMDA(r=4),
    "lamda-zero": LaMDA(r=4, init="zero"),
    "dora-in": DoRA(r=4, axis="in"),
    "fa": LoRA(freeze_A=True),
    "aflora": AFLoRA(d_initial=0.3, dropout=0.1),
}


def options_for(kind, options):
    """Models with one block have no block 1 for a pattern to match."""
    return {
        n: {k: v for k, v in o.items() if kind != "bart" or "1" not in k} if "pattern" in n else o
        for n, o in options.items()
    }


# Of the real model, which takes seconds a piece, one of each sort.
ONCE = ("pissa-rslora", "dora-pissa", "patterned-pissa", "bias-all", "bias-own")
CASES = [
    (kind, method)
    for kind in tiny_transformers.KINDS
    for method in METHODS
    if kind != "minilm" or method not in ONCE
]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_through_peft_and_back(kind, method, tmp_path):
    make = tiny_transformers.KINDS[kind]
    adapter, options = METHODS[method]
    model = tiny_transformers.adapted(make(), adapter, **options_for(kind, options))
    want = tiny_transformers.out(model)
    lorafast.save_adapter(model, tmp_path / "ours")
    torch.testing.assert_close(
        tiny_transformers.out(lorafast.load_adapter(make(), tmp_path / "ours")),
        want,
        rtol=0,
        atol=0,
    )
    theirs = tiny_transformers.from_peft(make(), tmp_path / "ours")
    torch.testing.assert_close(tiny_transformers.out(theirs), want, rtol=1e-4, atol=2e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(
        tiny_transformers.out(lorafast.load_adapter(make(), tmp_path / "theirs")),
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
    want = tiny_transformers.out(model)
    lorafast.save_adapter(model, tmp_path)
    ours, theirs = (
        lorafast.load_adapter(make(), tmp_path),
        tiny_transformers.from_peft(make(), tmp_path),
    )
    assert torch.equal(tiny_transformers.out(ours), want)
    assert all(
        layer.lora_A.dtype == torch.float32
        for layer in ours.modules()
        if isinstance(layer, lorafast.Linear)
    )
    truth = tiny_transformers.out(lorafast.load_adapter(tiny_transformers.KINDS[kind](), tmp_path))
    error, eager = (
        (tiny_transformers.out(one) - truth).square().mean().sqrt() for one in (ours, theirs)
    )
    assert error <= 2 * eager


@pytest.mark.parametrize("method", OURS_ALONE)
def test_what_peft_has_not(method, tmp_path):
    model = tiny_transformers.adapted(tiny_transformers.llama(), OURS_ALONE[method])
    want, untouched = (
        tiny_transformers.out(model),
        tiny_transformers.tensors(tiny_transformers.llama()),
    )
    lorafast.save_adapter(model, tmp_path)
    loaded = lorafast.load_adapter(tiny_transformers.llama(), tmp_path, trainable=True)
    assert torch.equal(tiny_transformers.out(loaded), want)
    ours, theirs = (
        next(m for m in one.modules() if isinstance(m, lorafast.Linear)) for one in (model, loaded)
    )
    assert theirs.adapter == ours.adapter
    assert {n for n, p in theirs.named_parameters() if p.requires_grad} == {
        n for n, p in ours.named_parameters() if p.requires_grad
    }
    assert (
        all(
            torch.equal(v, untouched[n])
            for n, v in tiny_transformers.tensors(lorafast.unload(loaded)).items()
        )
        or ours.adapter.residual
    )
    if method != "fa":
        with pytest.raises(KeyError, match=r"LAMDA|LORAFAST_(DORA_IN|AFLORA)"):
            tiny_transformers.from_peft(tiny_transformers.llama(), tmp_path)


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
    theirs = tiny_transformers.pefted(tiny_transformers.llama(), config)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = lorafast.load_adapter(tiny_transformers.llama(), tmp_path / "theirs", trainable=True)
    torch.testing.assert_close(
        tiny_transformers.out(loaded), tiny_transformers.out(theirs), rtol=1e-4, atol=2e-6
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
    theirs = tiny_transformers.pefted(tiny_transformers.bart(), config)
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(
        tiny_transformers.out(lorafast.load_adapter(tiny_transformers.bart(), tmp_path)),
        tiny_transformers.out(theirs),
        rtol=1e-4,
        atol=2e-6,
    )


@pytest.mark.parametrize("fields", [{}, {"target_modules": "all-linear"}])
def test_a_task_brings_its_head(fields, tmp_path):
    config = peft.LoraConfig(r=4, task_type="SEQ_CLS", **fields)
    theirs = tiny_transformers.pefted(tiny_transformers.classifier(), config)
    theirs.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(
        tiny_transformers.out(
            lorafast.load_adapter(tiny_transformers.classifier(), tmp_path / "theirs")
        ),
        tiny_transformers.out(theirs),
        rtol=1e-4,
        atol=2e-6,
    )
    ours = tiny_transformers.shake(
        lorafast.adapt(
            tiny_transformers.classifier(), peft.LoraConfig(r=4, task_type="SEQ_CLS", **fields)
        )
    )
    assert ours.score.weight.requires_grad
    lorafast.save_adapter(ours, tmp_path / "ours")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    torch.testing.assert_close(
        tiny_transformers.out(
            tiny_transformers.from_peft(tiny_transformers.classifier(), tmp_path / "ours")
        ),
        tiny_transformers.out(ours),
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
    theirs = tiny_transformers.pefted(tiny_transformers.llama(), config)
    theirs.save_pretrained(tmp_path)
    loaded = lorafast.load_adapter(tiny_transformers.llama(), tmp_path)
    torch.testing.assert_close(
        tiny_transformers.out(loaded), tiny_transformers.out(theirs), rtol=1e-4, atol=2e-6
    )
    ours = lorafast.adapt(tiny_transformers.llama(), config)
    for model in (loaded, ours):
        # One A for every K, one B for every N, and still so in another dtype.
        layers = [m for m in model.double().modules() if isinstance(m, lorafast.Linear)]
        assert sorted(A.shape[1] for A in {layer.lora_A for layer in layers}) == [32, 48]
        assert sorted(B.shape[0] for B in {layer.lora_B for layer in layers}) == [16, 32]


def test_a_second_load_replaces_the_first(tmp_path):
    for name, seed in (("a", 3), ("b", 4)):
        torch.manual_seed(seed)
        model = tiny_transformers.shake(lorafast.adapt(tiny_transformers.llama(), LaMDA(r=4)))
        for layer in model.modules():
            if isinstance(layer, lorafast.Linear):
                nn.init.normal_(layer.lora_core)
        lorafast.save_adapter(model, tmp_path / name)
    model = lorafast.load_adapter(tiny_transformers.llama(), tmp_path / "a")
    first = tiny_transformers.out(model)
    assert lorafast.load_adapter(model, tmp_path / "b") is model
    torch.testing.assert_close(
        tiny_transformers.out(model),
        tiny_transformers.out(lorafast.load_adapter(tiny_transformers.llama(), tmp_path / "b")),
        rtol=1e-5,
        atol=1e-6,
    )
    lorafast.load_adapter(model, tmp_path / "a")
    torch.testing.assert_close(tiny_transformers.out(model), first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adapter", [LaMDA(r=4), LoRA(r=4, init=PiSSA())], ids=repr)
def test_loading_ones_own_start_leaves_the_weights_to_the_bit(adapter, tmp_path):
    model = tiny_transformers.adapted(tiny_transformers.llama(), adapter)
    before = tiny_transformers.tensors(model)
    lorafast.save_adapter(model, tmp_path)
    for _ in range(2):
        lorafast.load_adapter(tiny_transformers.shake(model), tmp_path, trainable=True)
        assert all(
            torch.equal(value, before[name])
            for name, value in tiny_transformers.tensors(model).items()
        )


def test_what_is_loaded_trains_only_when_asked(tmp_path):
    lorafast.save_adapter(
        lorafast.adapt(
            tiny_transformers.bart(), LoRA(r=2), ["q_proj"], bias="all", modules_to_save=["fc1"]
        ),
        tmp_path,
    )
    assert (
        lorafast.trainable_summary(
            lorafast.load_adapter(tiny_transformers.bart(), tmp_path)
        ).trainable
        == 0
    )
    again = lorafast.adapt(
        tiny_transformers.bart(), LoRA(r=2), ["q_proj"], bias="all", modules_to_save=["fc1"]
    )
    want = lorafast.trainable_summary(again)
    assert (
        lorafast.trainable_summary(
            lorafast.load_adapter(tiny_transformers.bart(), tmp_path, trainable=True)
        )
        == want
    )
    assert (
        lorafast.trainable_summary(lorafast.load_adapter(again, tmp_path, trainable=True)) == want
    )
    assert lorafast.trainable_summary(lorafast.load_adapter(again, tmp_path)).trainable == 0
    assert (
        lorafast.trainable_summary(lorafast.load_adapter(again, tmp_path, trainable=True)) == want
    )


def test_a_scaling_changed_by_hand_is_saved(tmp_path):
    model = tiny_transformers.adapted(
        tiny_transformers.llama(), LoRA(r=4, rslora=True), target_modules=["q_proj", "v_proj"]
    )
    model.model.layers[0].self_attn.q_proj.scaling = torch.tensor(0.3)
    lorafast.save_adapter(model, tmp_path)
    for loaded in (
        lorafast.load_adapter(tiny_transformers.llama(), tmp_path),
        tiny_transformers.from_peft(tiny_transformers.llama(), tmp_path),
    ):
        torch.testing.assert_close(
            tiny_transformers.out(loaded), tiny_transformers.out(model), rtol=1e-5, atol=1e-6
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

    model = tiny_transformers.shake(lorafast.adapt(Net(), LoRA(r=2), "fc"))
    lorafast.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == "fc"
    x = torch.randn(3, 4)
    for loaded in (
        lorafast.load_adapter(Net(), tmp_path),
        tiny_transformers.from_peft(Net(), tmp_path),
    ):
        torch.testing.assert_close(loaded(x), model(x))


def test_wrappers_leave_no_trace_in_names(tmp_path):
    model = tiny_transformers.adapted(tiny_transformers.llama(), LoRA(r=4))
    keys = lorafast.adapter_state_dict(model).keys()
    compiled = torch.compile(model)
    compiled.model.layers[0].mlp = torch.compile(compiled.model.layers[0].mlp)
    assert lorafast.adapter_state_dict(compiled).keys() == keys
    lorafast.save_adapter(compiled, tmp_path)
    want = tiny_transformers.out(lorafast.load_adapter(tiny_transformers.llama(), tmp_path))
    again = torch.compile(tiny_transformers.llama(), backend="eager")
    again.model.layers[0].mlp = torch.compile(again.model.layers[0].mlp, backend="eager")
    torch.testing.assert_close(tiny_transformers.out(lorafast.load_adapter(again, tmp_path)), want)


def test_another_base_is_refused_by_name(tmp_path):
    model = tiny_transformers.adapted(tiny_transformers.llama(), LoRA(r=4))
    model.name_or_path = "someone/base-7b"
    lorafast.save_adapter(model, tmp_path)
    for name, fits in {
        "other/base-7b": True, "/data/base-7B/": True, "x/models--someone--base-7b/snapshots/0123": True, "": True,
        "someone/base-7b-chat": False, "x/models--someone--base-13b/snapshots/0123": False,
    }.items():  # fmt: skip
        plain = tiny_transformers.llama()
        plain.name_or_path = name
        if fits:
            lorafast.load_adapter(plain, tmp_path)
        else:
            before = tiny_transformers.tensors(plain)
            with pytest.raises(
                ValueError, match=f"for 'someone/base-7b', the model is '{name}'.*check_base=False"
            ):
                lorafast.load_adapter(plain, tmp_path)
            assert tiny_transformers.tensors(plain).keys() == before.keys()
            lorafast.load_adapter(plain, tmp_path, check_base=False)


def test_what_cannot_share_a_file(tmp_path):
    net = nn.Sequential(
        lorafast.Linear(4, 4, adapter=LoRA(r=2)), lorafast.Linear(4, 4, adapter=DoRA(r=2))
    )
    with pytest.raises(ValueError, match=r"may differ in r and alpha"):
        lorafast.save_adapter(net, tmp_path / "out")
    with pytest.raises(ValueError, match="has no adapted layer"):
        lorafast.save_adapter(tiny_transformers.llama(), tmp_path / "out")
    with pytest.raises(ValueError, match="rank=3 belongs to as_lora"):
        lorafast.save_adapter(net, tmp_path / "out", rank=3)
    unseen = lorafast.adapt(tiny_transformers.llama(), LaMDA(r=2), ["q_proj"])
    unseen.load_state_dict({name: value * 1.5 for name, value in unseen.state_dict().items()})
    with pytest.raises(RuntimeError, match="load the base weights first"):
        lorafast.save_adapter(unseen, tmp_path / "out")
    (tmp_path / "file").write_text("x")
    fine = tiny_transformers.adapted(tiny_transformers.llama(), LoRA(r=2))
    with pytest.raises(NotADirectoryError):
        lorafast.save_adapter(fine, tmp_path / "file")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (LoRA(r=3), r"LoRA\(r=3.*the file LoRA\(r=4"),
        (DoRA(r=4), "the file LoRA"),
        (LoRA(r=4, alpha=16), "scaling 4, the file .* with 2"),
        (LoRA(r=4, alpha=8, init=PiSSA()), "the file LoRA"),
    ],
)
def test_an_adapted_model_takes_its_own_kind_only(adapter, message, tmp_path):
    lorafast.save_adapter(
        tiny_transformers.adapted(
            tiny_transformers.llama(), LoRA(r=4, alpha=8), target_modules=["q_proj"]
        ),
        tmp_path,
    )
    model = tiny_transformers.adapted(tiny_transformers.llama(), adapter, target_modules=["q_proj"])
    before = tiny_transformers.tensors(model)
    with pytest.raises(ValueError, match=message):
        lorafast.load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"lacks the layer model\.layers\.0\.self_attn\.v_proj"):
        lorafast.load_adapter(
            tiny_transformers.adapted(
                tiny_transformers.llama(), LoRA(r=4, alpha=8), target_modules=["q_proj", "v_proj"]
            ),
            tmp_path,
        )
    assert all(
        torch.equal(value, before[name]) for name, value in tiny_transformers.tensors(model).items()
    )


@pytest.mark.parametrize("plain", [True, False])
def test_a_load_that_fails_midway_leaves_the_old_adapter(plain, tmp_path, monkeypatch):
    lorafast.save_adapter(
        tiny_transformers.adapted(tiny_transformers.llama(), LaMDA(r=4)), tmp_path
    )
    target = (
        tiny_transformers.llama()
        if plain
        else tiny_transformers.shake(
            lorafast.load_adapter(tiny_transformers.llama(), tmp_path, trainable=True)
        )
    )
    before, modules = tiny_transformers.tensors(target), list(target.modules())
    right, calls = lorafast.Linear.take, []

    def failing(layer, *args):
        calls.append(layer)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("take")
        right(layer, *args)

    monkeypatch.setattr(lorafast.Linear, "take", failing)
    with pytest.raises(torch.OutOfMemoryError):
        lorafast.load_adapter(target, tmp_path)
    assert list(target.modules()) == modules
    for name, value in tiny_transformers.tensors(target).items():
        torch.testing.assert_close(value, before[name], rtol=1e-6, atol=1e-7)


def test_the_meta_device_has_nothing_to_save_and_nowhere_to_load(tmp_path):
    lorafast.save_adapter(
        tiny_transformers.adapted(tiny_transformers.llama(), LoRA(r=4), target_modules=["q_proj"]),
        tmp_path,
    )
    with pytest.raises(
        ValueError, match=r"q_proj.* on the meta device: load them before the adapter"
    ):
        lorafast.load_adapter(tiny_transformers.llama().to("meta"), tmp_path)
    before = sorted(path.read_bytes() for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"lora_A\.weight \(4, 32\) is on the meta device"):
        lorafast.save_adapter(
            lorafast.adapt(tiny_transformers.llama().to("meta"), LoRA(r=4), ["q_proj"]), tmp_path
        )
    assert sorted(path.read_bytes() for path in tmp_path.iterdir()) == before


def test_a_half_adapter_dtype_overflows_into_an_error(tmp_path):
    model = tiny_transformers.adapted(
        tiny_transformers.llama(), LoRA(r=4), target_modules=["q_proj"]
    )
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.lora_A[0, 0] = 1e6
    lorafast.save_adapter(model, tmp_path)
    with pytest.raises(
        ValueError,
        match=r"layers\.1\.self_attn\.q_proj\.lora_A \(4, 32\).* not finite in torch\.float16",
    ):
        lorafast.load_adapter(tiny_transformers.llama(), tmp_path, adapter_dtype=torch.float16)
