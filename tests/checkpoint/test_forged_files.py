"""A forged adapter folder gives one error and changes nothing."""

import copy
import json
import os
import sys

import pytest
import torch
from helpers.adapter_folders import K, N, adapted_net, is_unchanged, net, raised_on_purpose
from helpers.rotations import rotating, thinned
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lorafast
from lorafast import LoRA
from lorafast.checkpoint import files
from lorafast.models import expression_limits


def refused(folder, match, model=None, **options):
    """The folder is refused with one error of the right kind, and the model is as it was."""
    model = net() if model is None else model
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=match) as caught:
        lorafast.load_adapter(model, folder, **options)
    assert raised_on_purpose(caught.value)
    assert is_unchanged(model, before, modules)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


@pytest.fixture
def folder(tmp_path):
    lorafast.save_adapter(adapted_net(LoRA(r=2)), tmp_path / "out")
    return tmp_path / "out"


def config_of(folder, **changes):
    path = folder / files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights_of(folder, change, keep_metadata=True):
    path = folder / files.WEIGHTS
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata if keep_metadata else {"format": "pt"})


A0 = "base_model.model.0.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(A0), r"0: the file lacks lora_A"),
        (lambda t: t.update(stray=torch.zeros(2)), r"has a tensor stray"),
        (
            lambda t: t.update({"base_model.model.7.lora_A.weight": t[A0].clone()}),
            r"has a layer 7, which the model",
        ),
        (lambda t: t.update({A0: t[A0][:1].clone()}), r"lora_A\.weight \(1, 6\) must be \(2, 6\)"),
        (lambda t: t.update({A0: t[A0][0].clone()}), r"lora_A\.weight \(6,\) must be \(2, 6\)"),
        (
            lambda t: t.update({A0: t[A0].long()}),
            r"lora_A\.weight \(2, 6\) is torch\.int64, and must be",
        ),
        (
            lambda t: t.update({A0: t[A0].to(torch.float8_e4m3fn)}),
            r"lora_A\.weight \(2, 6\) is F8_E4M3",
        ),
        (
            lambda t: t.update({A0: t[A0] * float("nan")}),
            r"0\.lora_A \(2, 6\) of the file is not finite",
        ),
        (
            lambda t: t.update({A0: t[A0].double() * 1e300}),
            r"0\.lora_A \(2, 6\) of the file is not finite in torch\.float32",
        ),
        (
            lambda t: t.update({A0.replace(".weight", ".default.weight"): t.pop(A0)}),
            r"0: the file lacks lora_A",
        ),
        (lambda t: t.update({A0.replace("model.0", "model.__class__"): t.pop(A0)}), r"__class__"),
        (lambda t: t.update({"0.lora_A.weight": t[A0].clone()}), r"are the same part of one layer"),
        (
            lambda t: t.update({"base_model.model.0.lora_magnitude_vector": torch.ones(N)}),
            r"file has .*lora_magnitude_vector",
        ),
        (
            lambda t: t.update({"base_model.model.0.base_layer.weight": torch.ones(N, K)}),
            r"is another weight than the model's own",
        ),
        (
            lambda t: t.update({"base_model.vera_A": torch.ones(3)}),
            r"vera_A must be a pair of matrices",
        ),
        (lambda t: t.clear(), r"lacks the layer 0, 2, 3"),
    ],
)
def test_forged_tensors(change, match, folder):
    weights_of(folder, change)
    refused(folder, match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "LOHA"}, r"peft_type='LOHA' must be one of 'LORA', 'VERA'"),
        ({"peft_type": "ADALORA"}, r"the file is of .*'LoRA'.*, its config of AdaLoRA\(r=12"),
        ({"peft_type": None}, r"peft_type=None"),
        ({"peft_type": ["LORA"]}, r"peft_type=\['LORA'\]"),
        ({"r": 3}, r"lora_A\.weight \(2, 6\) must be \(3, 6\)"),
        ({"r": "2"}, r"r='2' must be int"),
        ({"r": True}, r"r=True must be int"),
        ({"r": -2}, r"r=-2"),
        ({"r": 10**400}, r"too large|must be"),
        ({"lora_alpha": [8]}, r"lora_alpha=\[8\] must be int or float"),
        ({"lora_dropout": 2.0}, r"dropout 2"),
        ({"use_dora": True}, r"the file is of|lacks lora_magnitude"),
        ({"use_qalora": True}, r"use_qalora=True: lorafast has no such thing"),
        ({"from_the_future": 1}, r"from_the_future=1"),
        ({"init_lora_weights": "olora"}, r"init_lora_weights='olora'"),
        ({"init_lora_weights": "pissa_niter_4"}, r"drawn at random"),
        ({"target_modules": ["0"]}, r"has a layer 2, 3"),
        ({"target_modules": []}, r"target_modules"),
        ({"target_modules": {"a": 1}}, r"target_modules"),
        ({"target_modules": "("}, r"target_modules='\(' is no regular expression"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern='\('"),
        ({"rank_pattern": {"0": 9}}, r"lora_A\.weight \(2, 6\) must be \(9, 6\)"),
        ({"rank_pattern": {"(.+)+x": 9}}, None),
        ({"rank_pattern": {"(?i)x": 9}}, r"rank_pattern='\(\?i\)x' is no regular expression"),
        ({"target_modules": "(" * 5000 + "0" + ")" * 5000}, r"is no regular expression"),
        (
            {"layers_to_transform": [0], "layers_pattern": ["(.+)+"], "target_modules": ["0"]},
            "of a file must be a name",
        ),
        ({"task_type": {"a": 1}}, r"task_type=\{'a': 1\} must be a word"),
        ({"peft_type": "LAMDA", "svd_niter": 10**9}, r"svd_niter=1000000000"),
        ({"alpha_pattern": ["0"]}, r"alpha_pattern=\['0'\] must be a dict"),
        ({"modules_to_save": ["1"], "target_modules": ["0", "2", "3"]}, None),
        ({"modules_to_save": "1"}, r"modules_to_save='1' must be a list"),
        ({"modules_to_save": ["3"], "target_modules": ["0", "2"]}, r"has a layer 3"),
        ({"bias": "some"}, r"bias='some' must be one of"),
        ({"bias": "all"}, r"lacks the tensor 0\.bias, 3\.bias"),
        ({"layers_to_transform": [[0]]}, r"layers_to_transform"),
        ({"base_model_name_or_path": ["x"]}, None),
    ],
)
def test_forged_configs(changes, match, folder):
    config_of(folder, **changes)
    if match is None:
        lorafast.load_adapter(net(), folder)
    else:
        refused(folder, match)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (
            lambda d: (d / files.WEIGHTS).write_bytes((d / files.WEIGHTS).read_bytes()[:-3]),
            r"adapter_model\.safetensors is no sound",
        ),
        (
            lambda d: (d / files.WEIGHTS).write_bytes((d / files.WEIGHTS).read_bytes()[:40]),
            r"is no sound safetensors file",
        ),
        (lambda d: (d / files.WEIGHTS).write_bytes(b""), r"is no sound safetensors file"),
        (
            lambda d: (d / files.WEIGHTS).write_bytes((1 << 60).to_bytes(8, "little") + b"{}"),
            r"is no sound safetensors file",
        ),
        (
            lambda d: (d / files.WEIGHTS).write_bytes((2).to_bytes(8, "little") + b"[]"),
            r"is no sound safetensors file",
        ),
        (
            lambda d: (d / files.WEIGHTS).unlink(),
            r"adapter_model\.safetensors is not in the folder",
        ),
        (
            lambda d: (d / files.WEIGHTS).rename(d / "adapter_model.bin"),
            r"adapter_model\.bin is a pickle",
        ),
        (
            lambda d: (d / files.CONFIG).write_bytes(b"\xff\xfe{"),
            r"adapter_config\.json is no sound JSON",
        ),
        (
            lambda d: (d / files.CONFIG).write_text("[" * 100000),
            r"adapter_config\.json is no sound JSON",
        ),
        (lambda d: (d / files.CONFIG).write_text('{"r": NaN}'), r"NaN is no number of JSON"),
        (lambda d: (d / files.CONFIG).write_text('{"r": 2, "r": 3}'), r"a key comes twice"),
        (lambda d: (d / files.CONFIG).write_text("[]"), r"is no JSON object but a list"),
        (
            lambda d: (d / files.CONFIG).write_text(" " * (1 << 24) + "{}"),
            r"16777218 bytes, more than any config has",
        ),
        (
            lambda d: ((d / files.WEIGHTS).unlink(), os.mkfifo(d / files.WEIGHTS)),
            r"adapter_model\.safetensors is no regular file",
        ),
        (
            lambda d: ((d / files.CONFIG).unlink(), (d / files.CONFIG).mkdir()),
            r"adapter_config\.json is no regular file",
        ),
        (
            lambda d: ((d / files.WEIGHTS).unlink(), (d / files.WEIGHTS).symlink_to("/dev/zero")),
            r"is no regular file",
        ),
        (
            lambda d: weights_of(d, lambda t: None, False) or (d / files.CONFIG).unlink(),
            r"adapter_config\.json is not in the folder",
        ),
    ],
)
def test_forged_files(spoil, match, folder):
    spoil(folder)
    refused(folder, match)


@pytest.mark.parametrize(
    "path", ["nowhere", "a/b/c", "../out/../nothing", "/etc/passwd", "", "-x/y", "..", "a\0b"]
)
def test_paths_that_are_no_folder(path):
    refused(path, r"is no folder|adapter_model\.safetensors is not in the folder|null byte")


def test_an_id_on_the_hub_without_a_network(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def snapshot_download(repo_id, **options):
        asked.append((repo_id, options))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    lorafast.save_adapter(adapted_net(LoRA(r=2)), tmp_path)
    lorafast.load_adapter(net(), "someone/adapter", revision="v1")
    assert asked == [
        ("someone/adapter", {"revision": "v1", "allow_patterns": [files.CONFIG, files.WEIGHTS]})
    ]
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: 1 / 0)
    refused("someone/adapter", "the hub gave no adapter of that id")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("someone/adapter", r"an id on the hub: pip install '\.\[hub\]' in a checkout")


GA = (
    '"kind": "LoRAGA", "direction": "ArB2r", "scale": "gd", "gamma": 16, "svd_niter": null, '
    '"compat": null'
)
STACKED = '"stacked": true, "alpha": 4, "alpha_pattern": {}'


@pytest.mark.parametrize(
    "metadata",
    [
        "{",
        "[]",
        '{"adapter": 3}',
        '{"adapter": {"method": "LoRA", "keep": "all"}}',
        '{"adapter": {"method": "DoRA"}}',
        '{"adapter": {"method": "LoRA", "init": {"svd_niter": -1}}}',
        '{"stacked": true}',
        '{"adapter": {"method": ["LoRA"]}}',
        '{"stacked": true, "alpha": "x", "alpha_pattern": {}}',
        '{"stacked": 1, "alpha": 8, "alpha_pattern": {"(": 1}}',
        '{"adapter": {"method": "LoRA", "freeze_A": 1}}',
        '{"adapter": {"method": "LoRA", "init": {"path": "/"}}}',
        '{"adapter": {"method": "LoRA", "init": {"kind": ["LoRAGA"], "svd_niter": 0}}}',
        '{"adapter": {"init": {"kind": "LoRA"}}}',
        f'{{"adapter": {{"method": "LoRA", "init": {{{GA}, "norm_clip": false}}}}}}',
        f'{{"adapter": {{"method": "LoRA", "init": {{{GA}}}}}, {STACKED}}}',
        f'{{"adapter": {{"method": "LoRA", "init": {{{GA}, "norm_clip": 1}}}}, {STACKED}}}',
    ],
)
def test_forged_metadata(metadata, folder):
    save_file(
        load_file(folder / files.WEIGHTS), folder / files.WEIGHTS, metadata={"lorafast": metadata}
    )
    refused(folder, None)


FIELDS = ["target_modules", "rank_pattern"]
HOSTILE = ["(a+)+Z", "(.|.)*Z", ".?" * 60 + "Z", "(?x)(.+)#c\n+Z"]


@pytest.mark.parametrize(
    ("expression", "field"),
    thinned(
        (expression, field)
        for expression, fields in rotating(HOSTILE, (FIELDS, FIELDS[::-1]))
        for field in fields
    ),
)
def test_expressions_that_run_forever_are_stopped(expression, field, tmp_path, monkeypatch):
    name = "a" * 60
    model = lorafast.adapt(nn.ModuleDict({name: nn.Linear(2, 2)}), LoRA(r=2))
    lorafast.save_adapter(model, tmp_path)
    config_of(tmp_path, **{field: {expression: 3} if "pattern" in field else expression})
    monkeypatch.setattr(expression_limits, "TIMEOUT_SECONDS", 0.5)
    refused(
        tmp_path,
        r"could not be matched in 0\.5 s|matches no module|is no regular expression",
        nn.ModuleDict({name: nn.Linear(2, 2)}),
    )


def test_projections_of_an_enormous_rank_are_not_drawn(tmp_path):
    save_file(
        {
            "base_model.model.0.vera_lambda_d": torch.zeros(1 << 22),
            "base_model.model.0.vera_lambda_b": torch.zeros(64),
        },
        tmp_path / files.WEIGHTS,
    )
    (tmp_path / files.CONFIG).write_text(
        json.dumps({"peft_type": "VERA", "r": 1 << 22, "target_modules": ["0"]})
    )
    refused(
        tmp_path, r"r=4194304 .*is too large to draw projections", nn.Sequential(nn.Linear(64, 64))
    )
