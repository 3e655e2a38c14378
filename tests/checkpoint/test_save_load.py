"""save_adapter and load_adapter: a second load, what trains, names, and what is refused."""

import pytest
import torch
from helpers import tiny_transformers
from torch import nn

import lorafast
from lorafast import AFLoRA, DoRA, LaMDA, LoRA, PiSSA

OURS_ALONE = {
    "lamda": LaMDA(r=4),
    "lamda-zero": LaMDA(r=4, init="zero"),
    "dora-in": DoRA(r=4, axis="in"),
    "fa": LoRA(freeze_A=True),
    "aflora": AFLoRA(d_initial=0.3, dropout=0.1),
}


@pytest.mark.peft
@pytest.mark.parametrize("method", OURS_ALONE)
def test_what_peft_has_not(method, tmp_path):
    model = tiny_transformers.adapted(tiny_transformers.llama(), OURS_ALONE[method])
    want, untouched = (
        tiny_transformers.outputs(model),
        tiny_transformers.copied_tensors(tiny_transformers.llama()),
    )
    lorafast.save_adapter(model, tmp_path)
    loaded = lorafast.load_adapter(tiny_transformers.llama(), tmp_path, trainable=True)
    assert torch.equal(tiny_transformers.outputs(loaded), want)
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
            for n, v in tiny_transformers.copied_tensors(lorafast.unload(loaded)).items()
        )
        or ours.adapter.residual
    )
    if method.startswith("lamda"):
        theirs = tiny_transformers.loaded_by_peft(tiny_transformers.llama(), tmp_path)
        torch.testing.assert_close(tiny_transformers.outputs(theirs), want)
    elif method != "fa":
        with pytest.raises(ValueError, match=r"which PEFT has no layers for: .*load_adapter"):
            tiny_transformers.loaded_by_peft(tiny_transformers.llama(), tmp_path)


def test_a_second_load_replaces_the_first(tmp_path):
    for name, seed in (("a", 3), ("b", 4)):
        torch.manual_seed(seed)
        model = tiny_transformers.perturb(lorafast.adapt(tiny_transformers.llama(), LaMDA(r=4)))
        for layer in model.modules():
            if isinstance(layer, lorafast.Linear):
                nn.init.normal_(layer.lora_core)
        lorafast.save_adapter(model, tmp_path / name)
    model = lorafast.load_adapter(tiny_transformers.llama(), tmp_path / "a")
    first = tiny_transformers.outputs(model)
    assert lorafast.load_adapter(model, tmp_path / "b") is model
    torch.testing.assert_close(
        tiny_transformers.outputs(model),
        tiny_transformers.outputs(lorafast.load_adapter(tiny_transformers.llama(), tmp_path / "b")),
        rtol=1e-5,
        atol=1e-6,
    )
    lorafast.load_adapter(model, tmp_path / "a")
    torch.testing.assert_close(tiny_transformers.outputs(model), first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adapter", [LaMDA(r=4), LoRA(r=4, init=PiSSA())], ids=repr)
def test_loading_ones_own_start_leaves_the_weights_to_the_bit(adapter, tmp_path):
    model = tiny_transformers.adapted(tiny_transformers.llama(), adapter)
    before = tiny_transformers.copied_tensors(model)
    lorafast.save_adapter(model, tmp_path)
    for _ in range(2):
        lorafast.load_adapter(tiny_transformers.perturb(model), tmp_path, trainable=True)
        assert all(
            torch.equal(value, before[name])
            for name, value in tiny_transformers.copied_tensors(model).items()
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


@pytest.mark.compile
def test_wrappers_leave_no_trace_in_names(tmp_path):
    model = tiny_transformers.adapted(tiny_transformers.llama(), LoRA(r=4))
    keys = lorafast.adapter_state_dict(model).keys()
    compiled = torch.compile(model)
    compiled.model.layers[0].mlp = torch.compile(compiled.model.layers[0].mlp)
    assert lorafast.adapter_state_dict(compiled).keys() == keys
    lorafast.save_adapter(compiled, tmp_path)
    want = tiny_transformers.outputs(lorafast.load_adapter(tiny_transformers.llama(), tmp_path))
    again = torch.compile(tiny_transformers.llama(), backend="eager")
    again.model.layers[0].mlp = torch.compile(again.model.layers[0].mlp, backend="eager")
    torch.testing.assert_close(
        tiny_transformers.outputs(lorafast.load_adapter(again, tmp_path)), want
    )


def test_another_base_is_refused_by_name(tmp_path):
    model = tiny_transformers.adapted(tiny_transformers.llama(), LoRA(r=4))
    model.name_or_path = "someone/base-7b"
    lorafast.save_adapter(model, tmp_path)
    for name, fits in {
        "other/base-7b": True,
        "/data/base-7B/": True,
        "x/models--someone--base-7b/snapshots/0123": True,
        "": True,
        "someone/base-7b-chat": False,
        "x/models--someone--base-13b/snapshots/0123": False,
    }.items():
        plain = tiny_transformers.llama()
        plain.name_or_path = name
        if fits:
            lorafast.load_adapter(plain, tmp_path)
        else:
            before = tiny_transformers.copied_tensors(plain)
            with pytest.raises(
                ValueError, match=f"for 'someone/base-7b', the model is '{name}'.*check_base=False"
            ):
                lorafast.load_adapter(plain, tmp_path)
            assert tiny_transformers.copied_tensors(plain).keys() == before.keys()
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
    before = tiny_transformers.copied_tensors(model)
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
        torch.equal(value, before[name])
        for name, value in tiny_transformers.copied_tensors(model).items()
    )


@pytest.mark.parametrize("plain", [True, False])
def test_a_load_that_fails_midway_leaves_the_old_adapter(plain, tmp_path, monkeypatch):
    lorafast.save_adapter(
        tiny_transformers.adapted(tiny_transformers.llama(), LaMDA(r=4)), tmp_path
    )
    target = (
        tiny_transformers.llama()
        if plain
        else tiny_transformers.perturb(
            lorafast.load_adapter(tiny_transformers.llama(), tmp_path, trainable=True)
        )
    )
    before, modules = tiny_transformers.copied_tensors(target), list(target.modules())
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
    for name, value in tiny_transformers.copied_tensors(target).items():
        torch.testing.assert_close(value, before[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_parametrized_factors_are_refused_before_anything_changes(factor, trainable, tmp_path):
    def model():
        layers = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        return tiny_transformers.perturb(lorafast.adapt(layers, LoRA(r=2)))

    lorafast.save_adapter(model(), tmp_path)
    loaded, x = model(), torch.randn(3, 6)
    nn.utils.parametrizations.weight_norm(loaded[1], factor)
    want, flags = loaded(x), [parameter.requires_grad for parameter in loaded.parameters()]
    with pytest.raises(RuntimeError, match=rf"{factor} of this layer is parametrized.*remove"):
        lorafast.load_adapter(loaded, tmp_path, trainable=trainable)
    assert torch.equal(loaded(x), want)
    assert [parameter.requires_grad for parameter in loaded.parameters()] == flags


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
