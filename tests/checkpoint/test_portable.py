"""An adapter's folder as plain LoRA of one rank, from the file alone or with the base's weights."""

import json

import pytest
import torch
from helpers import adapter_folders
from helpers.adapter_folders import X, adapted_net, net
from safetensors.torch import save_file
from torch import nn

import lorafast
from lorafast import AdaLoRA, AFLoRA, DoRA, LaMDA, LoRA, PiSSA, VeRA
from lorafast import __main__ as command_line
from lorafast.checkpoint import files
from lorafast.checkpoint.portable import plain_lora

PATTERNS = {"rank_pattern": {"2": 2}, "alpha_pattern": {"0": 3.0}}


def saved(tmp_path, adapter, **options):
    """Save an adapted net, and its base's weights. Returns the output, and both folders."""
    model, base = adapted_net(adapter, **options), tmp_path / "base"
    lorafast.save_adapter(model, tmp_path / "adapter")
    base.mkdir()
    save_file(net().state_dict(), base / "model.safetensors")
    return model(X).detach(), tmp_path / "adapter", base


def served(folder):
    """Return the output of the net with a folder's adapter, as an engine without patterns reads."""
    config = json.loads((folder / files.CONFIG).read_text())
    scaling = config["lora_alpha"] / config["r"]
    assert scaling == 1.0
    assert not any(config[name] for name in ("use_rslora", "rank_pattern", "alpha_pattern"))
    model = net()
    with files.open_adapter(folder) as file:
        tensors = file.tensors()
    for name, layer in model.named_children():
        if isinstance(layer, nn.Linear):
            A, B = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
            assert A.shape[0] == B.shape[1] == config["r"]
            layer.weight.data += B @ A
    return model(X).detach()


def exported(folder, out, *words):
    assert (
        command_line.main(["export", str(folder), "--to", "lora", "--out", str(out), *words]) == 0
    )
    return served(out)


@pytest.mark.parametrize(
    ("adapter", "options"),
    [
        (LoRA(r=4, alpha=8), {}),
        (LoRA(r=4, alpha=8, rslora=True), PATTERNS),
        (LoRA(r=4, freeze_A=True), PATTERNS),
        (LoRA(r=2, init=PiSSA()), {}),
        (LaMDA(r=4, init="zero"), PATTERNS),
        (LaMDA(r=2), {}),
        (AdaLoRA(r=3, target_r=2), {}),
        (AFLoRA(r=3), {}),
    ],
    ids=str,
)
def test_a_low_rank_change_is_exact_without_the_base(adapter, options, tmp_path, capsys):
    want, folder, _ = saved(tmp_path, adapter, **options)
    torch.testing.assert_close(exported(folder, tmp_path / "out"), want)
    assert "at most 0.00e+00" in capsys.readouterr().out


@pytest.mark.parametrize("adapter", [DoRA(r=2), DoRA(r=2, axis="in"), VeRA(r=4)], ids=str)
def test_what_depends_on_the_base_is_exact_at_full_rank(adapter, tmp_path):
    want, folder, base = saved(tmp_path, adapter)
    words = ["--base", str(base), "--rank", str(adapter_folders.K)]
    torch.testing.assert_close(exported(folder, tmp_path / "out", *words), want)


def test_dora_says_its_error_and_is_the_best_of_its_rank(tmp_path):
    _, folder, base = saved(tmp_path, DoRA(r=2))
    made = plain_lora(folder, 3, base)
    layer, weight = adapted_net(DoRA(r=2))[0], net()[0].weight.detach().double()
    layer = layer.double()
    layer.merge(keep=True)
    delta = layer.weight.detach() - weight
    best = torch.linalg.svdvals(delta)[3:].norm() / delta.norm()
    assert made.errors["0"] == pytest.approx(float(best), rel=1e-3)
    assert made.config["r"] == 3
    B, A = (made.tensors[f"base_model.model.0.lora_{part}.weight"].double() for part in "BA")
    assert float((delta - B @ A).norm() / delta.norm()) == pytest.approx(made.errors["0"], rel=1e-3)


@pytest.mark.parametrize("adapter", [DoRA(r=2), VeRA(r=4)], ids=str)
def test_without_the_base_one_line_says_that_it_is_needed(adapter, tmp_path, capsys):
    _, folder, _ = saved(tmp_path, adapter)
    words = ["export", str(folder), "--to", "lora", "--out", str(tmp_path / "out")]
    assert command_line.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--base" in line
    assert not (tmp_path / "out").exists()


def test_weights_in_several_files_are_found_and_no_others(tmp_path):
    want, folder, base = saved(tmp_path, DoRA(r=2))
    (base / "model.safetensors").rename(base / "part.safetensors")
    index = base / "model.safetensors.index.json"
    names = dict.fromkeys(net().state_dict(), "part.safetensors")
    index.write_text(json.dumps({"weight_map": names}))
    words = ["--base", str(base), "--rank", str(adapter_folders.K)]
    torch.testing.assert_close(exported(folder, tmp_path / "out", *words), want)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "../part.safetensors")}))
    with pytest.raises(ValueError, match="no files beside it"):
        plain_lora(folder, base=base)


def test_a_smaller_rank_is_the_best_one(tmp_path):
    _, folder, _ = saved(tmp_path, LoRA(r=4))
    full, less = plain_lora(folder), plain_lora(folder, 2)
    assert less.config["r"] == less.config["lora_alpha"] == 2
    B, A = (full.tensors[f"base_model.model.0.lora_{part}.weight"] for part in "BA")
    best = torch.linalg.svdvals(B @ A)
    assert less.errors["0"] == pytest.approx(float(best[2:].norm() / best.norm()), rel=1e-4)


@pytest.mark.parametrize(
    ("adapter", "options", "message"),
    [
        (LoRA(r=2), {"modules_to_save": ["3"]}, r"tensors that are no adapter's.*3\.weight"),
        (LoRA(r=2), {"bias": "all"}, "no adapter's"),
        (LoRA(r=2, lora_bias=True), {}, "a plain LoRA has no bias"),
    ],
)
def test_what_no_plain_lora_can_say_is_refused(adapter, options, message, tmp_path):
    if "modules_to_save" in options:
        options |= {"target_modules": ["0", "2"]}
    _, folder, _ = saved(tmp_path, adapter, **options)
    with pytest.raises(ValueError, match=message):
        plain_lora(folder)


def test_a_pickle_is_not_opened(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    (tmp_path / files.CONFIG).write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="is a pickle"):
        plain_lora(tmp_path)


@pytest.mark.peft
@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True, "rank_pattern": {"2": 2}, "alpha_pattern": {"0": 3}},
        {"use_dora": True},
    ],
    ids=["rslora", "dora"],
)
def test_a_folder_of_pefts_gives_one_that_peft_loads(options, tmp_path):
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], **options)
    model = peft.get_peft_model(net(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file(net().state_dict(), tmp_path / "base" / "model.safetensors")
    words = ["export", str(tmp_path / "adapter"), "--to", "lora", "--out", str(tmp_path / "out")]
    words += ["--base", str(tmp_path / "base")]
    if "use_dora" in options:
        words += ["--rank", "6"]
    assert command_line.main(words) == 0
    loaded = peft.PeftModel.from_pretrained(net(), tmp_path / "out")
    torch.testing.assert_close(loaded(X), model(X))


@pytest.mark.peft
@pytest.mark.parametrize("adapter", [LaMDA(r=2), LoRA(r=4, rslora=True)], ids=str)
def test_a_folder_of_lorafasts_gives_one_that_peft_loads(adapter, tmp_path):
    import peft

    want, folder, _ = saved(tmp_path, adapter)
    exported(folder, tmp_path / "out")
    loaded = peft.PeftModel.from_pretrained(net(), tmp_path / "out")
    torch.testing.assert_close(loaded(X), want)
