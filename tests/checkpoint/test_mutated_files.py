"""Adapter folders changed at random are refused, or loaded as a whole."""

import copy
import json
import random
import shutil

import pytest
import torch
from helpers.adapter_folders import K, X, adapted_net, is_unchanged, net, raised_on_purpose
from helpers.rotations import thinned
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorafast
from lorafast import AdaLoRA, AFLoRA, DoRA, LaMDA, LoRA, VeRA
from lorafast.checkpoint import files


@pytest.mark.parametrize("seed", thinned((seed,) for seed in range(10)))
def test_a_hundred_mutated_folders(seed, tmp_path):
    """Change bytes, tensors and configs at random: a folder is refused or loaded as a whole."""
    randomly = random.Random(seed)
    sources = []
    for i, (adapter, options) in enumerate(
        [
            (LoRA(r=2), {}),
            (DoRA(r=2), {"bias": "all"}),
            (LaMDA(r=2), {}),
            (VeRA(r=3), {}),
            (LoRA(r=2), {"modules_to_save": ["3"]}),
            (AdaLoRA(r=2, target_r=1, init_r=3), {}),
            (AFLoRA(r=2), {}),
        ]
    ):
        lorafast.save_adapter(adapted_net(adapter, **options), tmp_path / str(i))
        sources.append(tmp_path / str(i))
    count = {"refused": 0, "loaded": 0}
    for trial in range(100):
        source, folder = randomly.choice(sources), tmp_path / "mutant"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        randomly.choice((_bytes, _bytes, _json, _header))(folder, randomly)
        model = net()
        before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
        try:
            lorafast.load_adapter(model, folder)
        except (ValueError, TypeError, FileNotFoundError) as error:
            stray = None if raised_on_purpose(error) else error
            assert stray is None, trial
            assert is_unchanged(model, before, modules), trial
            count["refused"] += 1
        else:
            found = lorafast.adapter_state_dict(model)
            assert all(tensor.isfinite().all() for tensor in found.values()), trial
            assert model(X).shape == (4, K)
            count["loaded"] += 1
    assert count["refused"] > 40
    assert count["loaded"] > 4


def _bytes(folder, randomly):
    path = folder / randomly.choice((files.WEIGHTS, files.CONFIG))
    data = bytearray(path.read_bytes())
    for _ in range(randomly.choice((1, 1, 3, 30))):
        place = (
            randomly.randrange(len(data))
            if randomly.random() < 0.5
            else randomly.randrange(min(len(data), 400))
        )
        kind = randomly.randrange(4)
        if kind == 0:
            data[place] = randomly.randrange(256)
        elif kind == 1:
            del data[place : place + randomly.choice((1, 8, 1000))]
        elif kind == 2:
            data[place:place] = bytes(
                randomly.randrange(256) for _ in range(randomly.choice((1, 8)))
            )
        else:
            data[place] ^= 1 << randomly.randrange(8)
        data = data or bytearray(b"\0")
    path.write_bytes(bytes(data))


VALUES = (
    *(
        None,
        True,
        False,
        0,
        -1,
        2,
        3,
        10**30,
        0.5,
        1e308,
        -1e-320,
        "",
        "x",
        "LORA",
        "VERA",
        "LAMDA",
        "LORAFAST_AFLORA",
    ),
    *([], ["0"], [0], [None], {}, {"0": 1}, [[]], {"x": []}),
)


def _json(folder, randomly):
    path = folder / files.CONFIG
    config = json.loads(path.read_text())
    for _ in range(randomly.choice((1, 1, 2, 5))):
        key = randomly.choice([*config, "surprise"])
        if randomly.random() < 0.2:
            config.pop(key, None)
        else:
            config[key] = randomly.choice(VALUES)
    path.write_text(json.dumps(config))


def _header(folder, randomly):
    """A sound file with other tensors in it."""
    path = folder / files.WEIGHTS
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    key = randomly.choice(list(tensors))
    kind = randomly.randrange(7)
    if kind == 0:
        tensors[key + randomly.choice(("x", ".weight", "/../x", "\n", "ß"))] = tensors.pop(key)
    elif kind == 1:
        del tensors[key]
    elif kind == 2:
        tensors[key] = tensors[key].to(
            randomly.choice((torch.float16, torch.int8, torch.float64, torch.bool, torch.bfloat16))
        )
    elif kind == 3:
        tensors[key] = tensors[key][..., :-1].contiguous()
    elif kind == 4:
        tensors[key] = tensors[key].flatten() if tensors[key].dim() > 1 else tensors[key][None]
    elif kind == 5:
        tensors[key].view(-1)[0] = randomly.choice((float("nan"), float("inf"), 1e38))
    else:
        said = {
            randomly.choice(("adapter", "stacked", "alpha", "alpha_pattern")): randomly.choice(
                VALUES
            )
        }
        metadata["lorafast"] = json.dumps(json.loads(metadata["lorafast"]) | said)
    save_file(tensors, path, metadata=metadata)
