"""LamdaConfig: what it writes and reads, what PEFT makes of it elsewhere, and what it refuses."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import peft
import pytest
import torch
from helpers.peft_models import (
    ALL,
    K,
    N,
    Net,
    X,
    assert_same,
    config,
    lamda_config,
    lamda_model,
    lamda_with_another,
)
from safetensors.torch import load_file
from torch import nn

import lorafast
from lorafast.integrations import peft_registry
from lorafast.integrations.peft_lamda import LamdaConfig
from lorafast.models import peft_config

pytestmark = pytest.mark.peft


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize(
    ("dtype", "fields"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"autocast_adapter_dtype": False}),
        (torch.float32, {"lamda_init": "zero", "use_rslora": True, "rank_pattern": {"up": 2}}),
        (
            torch.float32,
            {"lamda_init": "repo", "svd_niter": 3, "bias": "lora_only", "lora_dropout": 0.1},
        ),
    ],
    ids=str,
)
def test_it_survives_the_disk(tmp_path, dtype, fields, meta):
    model = lamda_model(dtype, targets=ALL, **fields).eval()
    want = model(X.to(dtype))
    model.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (told["peft_type"], told["init_lora_weights"]) == (peft_config.LAMDA, True)
    keys = {
        f"base_model.model.{name}.{part}"
        for name in ALL
        for part in ("lora_A.weight", "lora_B.weight", "lora_core")
    }
    assert keys == {
        key for key in load_file(tmp_path / "adapter_model.safetensors") if "bias" not in key
    }
    read = LamdaConfig.from_pretrained(tmp_path)
    assert (type(read), read.peft_type, read.inference_mode) == (
        LamdaConfig,
        peft.PeftType.LORA,
        True,
    )
    held = model.peft_config["default"]
    assert [(held.lamda_init, held.svd_niter), held.init_lora_weights] == [
        (read.lamda_init, read.svd_niter),
        read.init_lora_weights,
    ]
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(
        Net().to(dtype),
        tmp_path,
        config=read,
        low_cpu_mem_usage=meta,
        autocast_adapter_dtype="autocast_adapter_dtype" not in fields,
    )
    got = loaded(X.to(dtype))
    # PEFT casts what it loads over meta tensors to the base's dtype, a LoRA too.
    cast = meta and dtype == torch.bfloat16
    if cast:
        torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-8)
    else:
        assert torch.equal(got, want)
    assert not [
        name
        for name, parameter in loaded.named_parameters()
        if "lora_" in name and parameter.requires_grad
    ]
    if cast:
        return
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fields",
    [
        {"use_rslora": True, "svd_niter": 3, "rank_pattern": {"up": 2}},
        {"lamda_init": "zero"},
        {"lamda_init": "repo"},
    ],
    ids=str,
)
def test_lorafast_and_peft_read_each_others_files(tmp_path, fields, dtype):
    def base():
        torch.manual_seed(0)
        return Net().to(dtype)

    x, model = X.to(dtype), lamda_model(dtype, targets=ALL, **fields).eval()
    model.save_pretrained(tmp_path / "peft")
    native = lorafast.load_adapter(base(), tmp_path / "peft")
    assert torch.equal(native(x), model(x))
    lorafast.save_adapter(native, tmp_path / "lorafast")
    read = LamdaConfig.from_pretrained(tmp_path / "lorafast")
    back = peft.PeftModel.from_pretrained(base(), tmp_path / "lorafast", config=read)
    # A start that changed the weight is saved as one of twice the rank that does not.
    loose = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype] if "rank_pattern" in fields else 0
    torch.testing.assert_close(back(x), model(x), rtol=loose, atol=loose)
    assert lorafast.adapt(base(), lamda_config(ALL)).up.adapter == lorafast.LaMDA(r=4, alpha=8)


@pytest.mark.slow
def test_a_peft_without_lorafast_refuses_the_file(tmp_path):
    lamda_model(targets=["up"]).save_pretrained(tmp_path)
    lone = (
        "import sys, torch, peft\n"
        f"net = torch.nn.ModuleDict({{'up': torch.nn.Linear({K}, {N})}})\n"
        "try: peft.PeftModel.from_pretrained(net, sys.argv[1])\n"
        "except KeyError as error: print(error)\n"
        "assert not [name for name in sys.modules if name.startswith('lorafast')]"
    )
    told = subprocess.run(
        [sys.executable, "-c", lone, tmp_path], capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == "'LAMDA_NEEDS_IMPORT_LORAFAST'"


def test_the_word_of_older_files_is_read(tmp_path):
    model = lamda_model(targets=["up"])
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace(peft_config.LAMDA, "LAMDA"))
    for read in (
        lambda: peft.PeftModel.from_pretrained(Net(), tmp_path),
        lambda: lorafast.load_adapter(Net(), tmp_path),
    ):
        torch.manual_seed(0)
        read()
    assert type(peft.PeftConfig.from_pretrained(tmp_path)) is LamdaConfig


def _run(code, *arguments, paths=()):
    path = os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    return done.stdout.strip()


@pytest.fixture
def small_peft(tmp_path):
    """The folder of a package named peft that is imported in no time: it has the table alone."""
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").write_text("PEFT_TYPE_TO_CONFIG_MAPPING = {}\n")
    return tmp_path


@pytest.mark.parametrize(
    "imports",
    [
        "lorafast, torch, peft",
        pytest.param("peft, lorafast", marks=pytest.mark.slow),
        pytest.param("torch, lorafast, peft", marks=pytest.mark.slow),
    ],
)
def test_with_lorafast_imported_peft_reads_the_files_of_both(imports, tmp_path):
    model = lamda_model(targets=["up"], lamda_init="zero")
    model.save_pretrained(tmp_path / "peft")
    native = lorafast.load_adapter(Net(), tmp_path / "peft")
    lorafast.save_adapter(native, tmp_path / "lorafast")
    code = (
        f"import sys, {imports}\n"
        "assert not [name for name in sys.modules if 'peft_lamda' in name]\n"
        "import torch\n"
        f"def base(): return torch.nn.ModuleDict({{'up': torch.nn.Linear({K}, {N})}})\n"
        "for folder in sys.argv[1:]:\n"
        "    model = peft.PeftModel.from_pretrained(base(), folder)\n"
        "    core = model.base_model.model['up'].lora_core['default'].tolist()\n"
        "    print(type(model.peft_config['default']).__name__, core)\n"
        "    config = peft.PeftConfig.from_pretrained(folder)\n"
        "    assert type(config).__name__ == 'LamdaConfig'\n"
        "    model.load_adapter(folder, 'other')\n"
    )
    core = model.base_model.model.up.lora_core["default"].tolist()
    told = _run(code, tmp_path / "peft", tmp_path / "lorafast")
    assert told.splitlines() == [f"LamdaConfig {core}"] * 2


@pytest.mark.parametrize(
    ("adapter", "told"),
    [(lorafast.DoRA(r=2, axis="in"), r"DoRA\(axis='in'\)"), (lorafast.AFLoRA(r=2), "AFLoRA")],
    ids=str,
)
def test_peft_says_what_reads_the_files_of_other_methods(adapter, told, tmp_path):
    lorafast.save_adapter(lorafast.adapt(Net(), adapter, target_modules=["up"]), tmp_path)
    for read in (
        lambda: peft.PeftModel.from_pretrained(Net(), tmp_path),
        lambda: peft.PeftConfig.from_pretrained(tmp_path),
    ):
        with pytest.raises(ValueError, match=rf"is a {told} of lorafast.*load_adapter\("):
            read()


def test_the_entries_are_those_of_the_files():
    own = {
        peft_config.LAMDA,
        peft_config.OLD_LAMDA,
        peft_config.DORA_IN,
        peft_config.AFLORA,
    }
    assert set(peft_registry.ENTRIES) == own
    assert own <= set(peft.PEFT_TYPE_TO_CONFIG_MAPPING)


def test_peft_is_found_as_before(small_peft):
    code = (
        "import lorafast, importlib.util, sys\n"
        "assert 'peft' not in sys.modules\n"
        "spec = importlib.util.find_spec('peft')\n"
        "assert 'peft' not in sys.modules\n"
        "import peft, inspect\n"
        "assert 'exec_module' not in vars(peft.__spec__.loader)\n"
        "assert peft.__spec__.origin == spec.origin == inspect.getfile(peft)\n"
        "print('LAMDA_NEEDS_IMPORT_LORAFAST' in peft.PEFT_TYPE_TO_CONFIG_MAPPING)"
    )
    assert _run(code, paths=[small_peft]) == "True"


def test_peft_is_found_past_finders_of_the_old_protocol(small_peft):
    code = (
        "import sys\n"
        "class Old:\n"
        "    def find_module(self, name, path=None): return None\n"
        "sys.meta_path.insert(0, Old())\n"
        "import lorafast, peft\n"
        "print('LAMDA_NEEDS_IMPORT_LORAFAST' in peft.PEFT_TYPE_TO_CONFIG_MAPPING)"
    )
    assert _run(code, paths=[small_peft]) == "True"


def test_a_config_reads_its_own_kind_alone(tmp_path):
    config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"peft_type='LORA' is no LaMDA"):
        LamdaConfig.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="this PEFT knows no more, other, which the file sets"):
        assert LamdaConfig.from_peft_type(**lamda_config().to_dict(), more=1, other=2).r == 4
    assert LamdaConfig(**lamda_config(svd_niter=2).to_dict()).svd_niter == 2
    model = lamda_model(targets=["up"])
    with pytest.raises(
        ValueError, match="path_initial_model_for_weight_conversion cannot make a LoRA of it"
    ):
        model.save_pretrained(
            tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "in")
        )


def test_one_of_several_is_saved_and_loaded_beside_others(tmp_path):
    model = lamda_with_another()
    model.set_adapter("default")
    want = model(X)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    torch.manual_seed(0)
    beside = peft.get_peft_model(Net(), config(ALL))
    lorafast.accelerate(beside)
    beside.add_adapter("late", LamdaConfig.from_pretrained(tmp_path))
    assert beside.load_adapter(tmp_path, "late").missing_keys == []
    beside.set_adapter("late")
    assert_same({"y": beside(X)}, {"y": want})
    beside.save_pretrained(tmp_path / "more")
    found = load_file(tmp_path / "more" / "late" / "adapter_model.safetensors")
    assert_same(found, load_file(tmp_path / "adapter_model.safetensors"), 0, 0)


@pytest.mark.skipif(not hasattr(peft, "convert_to_lora"), reason="this PEFT converts nothing")
def test_what_leaves_the_weight_alone_converts_to_lora():
    model = lamda_model(targets=ALL, lamda_init="zero").eval()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # that it is a LoRA already, which is what PEFT takes it for
        made, state = peft.convert_to_lora(model, rank=4)
    torch.manual_seed(0)
    plain = peft.get_peft_model(Net(), made)
    peft.set_peft_model_state_dict(plain, state)
    torch.testing.assert_close(plain(X), model(X), rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(lamda_model(), rank=4)


def test_mixing_adapters_by_their_deltas_is_right_and_by_their_factors_refused():
    model = lamda_with_another(targets=ALL)
    layer = model.base_model.model.up
    layer.scaling.update(default=1.0, other=1.0)  # PEFT 0.18 counts it twice, a LoRA's too
    model.add_weighted_adapter(
        ["other", "default"], [0.5, 2.0], "mix", combination_type="svd", svd_rank=6
    )
    want = 0.5 * layer.get_delta_weight("other") + 2 * layer.get_delta_weight("default")
    torch.testing.assert_close(layer.get_delta_weight("mix"), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"make a new one instead of dataclasses\.replace"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "mixed")


class Mine(nn.Linear):
    pass


class Packed(nn.Parameter):
    pass


def packed():
    base = nn.Linear(3, 4)
    base.weight = Packed(base.weight.detach())
    return base


@pytest.mark.parametrize(
    ("target", "what"),
    [
        (lambda: nn.Embedding(3, 4), "Embedding"),
        (lambda: nn.Conv2d(3, 4, 1), "Conv2d"),
        (lambda: Mine(3, 4), "test_peft_lamda_config.Mine"),
        (lambda: nn.Linear(3, 4).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (packed, "Packed of torch.float32"),
    ],
)
def test_what_is_no_plain_linear_is_refused(target, what):
    with pytest.raises(
        TypeError,
        match="LaMDA adapts plain nn.Linear and Conv1D layers, and .* is .*"
        f"{what}: PEFT has no LaMDA",
    ):
        peft.get_peft_model(nn.ModuleDict({"odd": target()}), lamda_config(["odd"], r=1))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"use_dora": True}, "LaMDA has no use_dora"),
        ({"lora_bias": True}, "LaMDA has no lora_bias"),
        ({"target_parameters": ["up.weight"]}, "LaMDA has no target_parameters"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights='pissa' is LoRA's; LaMDA starts by lamda_init",
        ),
        ({"init_lora_weights": False}, "init_lora_weights=False is LoRA's"),
        ({"lamda_init": "svd"}, "lamda_init='svd' must be one of 'residual', 'zero', 'repo'"),
        ({"svd_niter": -1}, "svd_niter=-1 must be None or an integer"),
        ({"r": 0}, "r=0 must be an integer of at least 1"),
        ({"lora_alpha": 0}, "alpha=0 leaves nothing for init='residual'"),
    ],
    ids=str,
)
def test_configs_without_a_meaning_are_refused(fields, why):
    with pytest.raises(ValueError, match=why):
        lamda_config(**fields)


def test_a_config_cannot_be_replaced_nor_a_rank_exceed_the_weight_nor_a_meta_weight_give():
    with pytest.raises(ValueError, match="make a new one"):
        replace(lamda_config(), r=2)
    with pytest.raises(ValueError, match=r"r=25 exceeds min\(N, K\)=24"):
        lamda_model(r=25)
    with torch.device("meta"):
        net = Net()
    with pytest.raises(ValueError, match="which is on the meta device: load it first"):
        peft.get_peft_model(net, lamda_config())
