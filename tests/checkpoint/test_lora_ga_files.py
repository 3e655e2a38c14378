"""Files of LoRA-GA and PiSSA: twice the rank for the untouched weight, PEFT's, and refusals."""

import copy
import json

import pytest
import torch
from helpers.gradient_nets import X, gradients_of, loss_of, matrices, net, perturbed
from safetensors.torch import load_file

import lorafast
from lorafast import DoRA, LoRA, LoRAGA, PiSSA
from lorafast.checkpoint import file_format


@pytest.mark.parametrize("start", ["pissa", "lora-ga"])
def test_a_file_of_twice_the_rank_says_the_same_to_the_untouched_weight(start, tmp_path):
    model = net()
    weights, init = (
        matrices(model),
        PiSSA() if start == "pissa" else LoRAGA(gradients_of(model), "ArBr", "gd", 7),
    )
    perturbed(
        lorafast.adapt(
            model,
            LoRA(r=2, alpha=3, rslora=True, init=init),
            rank_pattern={"down": 4},
            alpha_pattern={"up": 5},
        )
    )
    want = model(X)
    lorafast.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["init_lora_weights"]) == (
        4,
        {"down": 8},
        True,
    )
    loaded = lorafast.load_adapter(net(), tmp_path, trainable=True)
    assert torch.equal(loaded(X), want)
    for name, layer in loaded.named_children():
        ours = getattr(model, name)
        A, B = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        now = ours._W() + ours.scaling * ours.lora_B @ ours.lora_A
        torch.testing.assert_close(
            weights[name] + ours.scaling * B @ A, now.detach(), rtol=1e-13, atol=1e-13
        )
        assert layer.adapter == ours.adapter
        torch.testing.assert_close(layer._base_weight(), weights[name], rtol=1e-13, atol=1e-14)
    lorafast.save_adapter(loaded, tmp_path / "again")
    torch.testing.assert_close(
        lorafast.load_adapter(net(), tmp_path / "again")(X), want, rtol=1e-12, atol=1e-13
    )
    merged = lorafast.merge(loaded)
    torch.testing.assert_close(merged(X), want, rtol=1e-12, atol=1e-13)


@pytest.mark.peft
def test_a_loaded_layer_works_and_says_that_its_gradients_are_gone(tmp_path):
    peft = pytest.importorskip("peft")
    model = net(torch.float32)
    perturbed(lorafast.adapt(model, DoRA(r=2, init=LoRAGA(gradients_of(model)))))
    want, x = model(X.float()), X.float()
    lorafast.save_adapter(model, tmp_path)
    torch.testing.assert_close(
        peft.PeftModel.from_pretrained(net(torch.float32), tmp_path)(x), want, rtol=1e-4, atol=1e-5
    )
    loaded = lorafast.load_adapter(net(torch.float32), tmp_path, trainable=True)
    torch.testing.assert_close(loaded(x), want, rtol=0, atol=0)
    before = copy.deepcopy(loaded.state_dict())
    gone = r"LoRAGA\(.* has no gradients .*a loaded layer cannot start anew.*estimate_gradients"
    for again in (loaded.up.reset_adapter, loaded.up.reset_parameters):
        with pytest.raises(ValueError, match=gone):
            again()
    with pytest.raises(
        RuntimeError, match=rf"up\.weight without adapter keys would start the adapter anew: {gone}"
    ):
        loaded.load_state_dict(
            {name: value * 2 for name, value in net(torch.float32).state_dict().items()},
            strict=False,
        )
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())
    with lorafast.disable_adapter(loaded):
        torch.testing.assert_close(loaded(x), net(torch.float32)(x), rtol=1e-5, atol=1e-6)
    # The model it was saved from takes the file too, and keeps its weights to the bit.
    weights = matrices(model)
    lorafast.load_adapter(perturbed(model), tmp_path)
    assert all(torch.equal(weight, weights[name]) for name, weight in matrices(model).items())
    torch.testing.assert_close(
        lorafast.unload(loaded)(x), net(torch.float32)(x), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "init",
    [PiSSA(3), LoRAGA(direction="ArBr", scale="gd", gamma=0.5, svd_niter=2, norm_clip=True)],
    ids=str,
)
def test_a_start_is_described_in_full_and_without_its_tensors(init):
    said = json.loads(json.dumps({"adapter": file_format._extra_fields(DoRA(init=init))}))
    assert file_format.apply_extras(DoRA(), said | {"stacked": True}) == DoRA(init=init)
    if isinstance(init, LoRAGA):
        with pytest.raises(ValueError, match=r"the file is of LoRAGA\(.*, and holds no start"):
            file_format.apply_extras(DoRA(), said)


@pytest.mark.peft
def test_pefts_own_files_are_refused_in_words_or_read(tmp_path):
    peft = pytest.importorskip("peft")
    loraga = pytest.importorskip("peft.tuners.lora.loraga")
    config = peft.LoraConfig(
        r=2,
        target_modules=["up", "down"],
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(),
        lora_alpha=4,
    )
    base, x = net(torch.float32), X.float()
    with pytest.raises(
        ValueError,
        match=r"no config holds gradients; adapt with lorafast\.LoRA\(init=lorafast\.LoRAGA",
    ):
        lorafast.adapt(base, config)
    loraga.preprocess_loraga(base, config, lambda: loss_of(base, x).backward())
    theirs = peft.get_peft_model(base, config)
    theirs.save_pretrained(tmp_path / "start")
    theirs = perturbed(theirs)
    theirs.save_pretrained(tmp_path / "now")
    with pytest.raises(
        ValueError, match="save it from PEFT with path_initial_model_for_weight_conversion"
    ):
        lorafast.load_adapter(net(torch.float32), tmp_path / "now")
    want = theirs(x).detach()
    theirs.save_pretrained(
        tmp_path / "both", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    torch.testing.assert_close(
        lorafast.load_adapter(net(torch.float32), tmp_path / "both")(x), want, rtol=1e-4, atol=1e-5
    )
