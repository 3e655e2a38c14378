"""What serving engines refuse or misread in a folder, and what an export makes of it."""

import json

import pytest
from helpers.adapter_folders import adapted_net

import lorafast
from lorafast import AFLoRA, DoRA, LaMDA, LoRA, VeRA
from lorafast.bench import cli
from lorafast.bench.cases import choices
from lorafast.checkpoint import files, portable, serving
from lorafast.checkpoint.serving import MISREAD, REFUSED

PATTERNS = {"rank_pattern": {"2": 2}, "alpha_pattern": {"0": 3.0}}


def verdicts(folder):
    """Return {engine: the verdicts of its findings}."""
    found = serving.check(folder, serving.ENGINES)
    return {
        engine: {one.verdict for one in found if one.engine == engine} for engine in serving.ENGINES
    }


@pytest.mark.parametrize(
    ("adapter", "options", "vllm", "sglang", "llama_cpp", "peft"),
    [
        (LoRA(r=4, alpha=8), {}, None, None, None, None),
        (LoRA(r=4, alpha=8, rslora=True), {}, None, MISREAD, MISREAD, None),
        (LoRA(r=4, alpha=8), PATTERNS, MISREAD, MISREAD, MISREAD, None),
        # llama.cpp divides by the rank of the tensor.
        (LoRA(r=4, alpha=8), {"rank_pattern": {"2": 2}}, MISREAD, MISREAD, None, None),
        (DoRA(r=4), {}, REFUSED, REFUSED, REFUSED, None),
        (LaMDA(r=4, init="zero"), {}, REFUSED, REFUSED, REFUSED, REFUSED),
        (DoRA(r=4, axis="in"), {}, REFUSED, REFUSED, REFUSED, REFUSED),
        (AFLoRA(r=4), {}, REFUSED, REFUSED, REFUSED, REFUSED),
        (VeRA(r=4), {}, REFUSED, REFUSED, REFUSED, None),
        (LoRA(r=2), {"bias": "all"}, REFUSED, serving.UNSURE, REFUSED, None),
        (LoRA(r=2, lora_bias=True), {}, REFUSED, serving.UNSURE, REFUSED, None),
        (
            LoRA(r=2),
            {"modules_to_save": ["3"], "target_modules": ["0", "2"]},
            REFUSED,
            serving.UNSURE,
            REFUSED,
            None,
        ),
    ],
    ids=str,
)
def test_the_known_list(adapter, options, vllm, sglang, llama_cpp, peft, tmp_path):
    lorafast.save_adapter(adapted_net(adapter, **options), tmp_path)
    wanted = dict(zip(serving.ENGINES, (vllm, sglang, llama_cpp, peft), strict=True))
    assert verdicts(tmp_path) == {engine: {v} - {None} for engine, v in wanted.items()}


@pytest.mark.parametrize(
    ("adapter", "options"), [(LoRA(r=4, rslora=True), PATTERNS), (LaMDA(r=2), {})], ids=str
)
def test_nothing_is_found_in_what_is_exported(adapter, options, tmp_path):
    lorafast.save_adapter(adapted_net(adapter, **options), tmp_path / "a")
    assert any(verdicts(tmp_path / "a").values())
    made = portable.plain_lora(tmp_path / "a")
    files.write_adapter(tmp_path / "b", made.tensors, made.config, {})
    assert not any(verdicts(tmp_path / "b").values())


def test_a_factor_says_by_how_much_a_layer_is_scaled_wrongly(tmp_path):
    lorafast.save_adapter(adapted_net(LoRA(r=4, alpha=8, rslora=True)), tmp_path)
    (found,) = serving.check(tmp_path, ["sglang"])
    assert "3 of 3 layers are scaled by 0.5 times" in found.what


@pytest.mark.parametrize(
    ("fields", "engine", "words"),
    [
        ({"trainable_token_indices": [1]}, "sglang", "added tokens"),
        ({"init_lora_weights": "pissa"}, "vllm", "changed the base's weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "peft", "draws another start"),
        ({"target_parameters": ["experts"]}, "vllm", "fused experts"),
        ({"modules_to_save": ["head"]}, "vllm", "modules_to_save: head"),
    ],
)
def test_fields_of_a_config(fields, engine, words, tmp_path):
    lorafast.save_adapter(adapted_net(LoRA(r=2)), tmp_path)
    path = tmp_path / files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    assert words in serving.check(tmp_path, [engine])[0].what


def test_the_command_fails_where_an_engine_would(tmp_path, capsys):
    lorafast.save_adapter(adapted_net(LoRA(r=4, rslora=True)), tmp_path)
    assert cli.main(["check", str(tmp_path), "--for", "vllm,peft"]) == 0
    assert "nothing known is refused or misread" in capsys.readouterr().out
    assert cli.main(["check", str(tmp_path), "--json", "-"]) == 1
    said = capsys.readouterr()
    found = json.loads(said.out)["findings"]
    assert {one["engine"] for one in found} == {"sglang", "llama.cpp"}
    assert "misread" in said.err


def test_the_command_says_what_it_cannot_read(tmp_path, capsys):
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    assert cli.main(["check", str(tmp_path)]) == 2
    assert "is a pickle, which lorafast does not open" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["check", str(tmp_path), "--for", "vlm"])
    assert "did you mean vllm?" in capsys.readouterr().err


def test_the_engines_that_the_option_accepts_are_those_of_the_code():
    assert tuple(serving.ENGINES) == choices.ENGINES
