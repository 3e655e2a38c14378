"""Old dotted paths and pickles made before the modules moved."""

import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lorafast
from lorafast.runtime import moved_modules

DATA = Path(__file__).parent / "data"


PATHS = [
    pytest.param(old, marks=[pytest.mark.peft] * new.startswith("integrations."))
    for old, new in moved_modules.MOVED.items()
]


@pytest.mark.parametrize("old", PATHS)
def test_an_old_path_is_the_new_module(old):
    module = importlib.import_module(f"lorafast.{old}")
    new = importlib.import_module(f"lorafast.{moved_modules.MOVED[old]}")
    renamed = moved_modules.RENAMED.get(old, {})
    for name in {*vars(new), *renamed} - set(renamed.values()):
        if not name.startswith("__"):
            assert getattr(module, name) is getattr(new, renamed.get(name, name))
    assert not hasattr(module, "no_such_name")


def test_old_paths_are_attributes_too_and_take_over_no_other_name():
    probe = """
import importlib.util, lorafast
assert lorafast.reference.linear and lorafast.layer.Linear is lorafast.Linear
assert lorafast.models.checkpoint.save_adapter is lorafast.save_adapter
assert not hasattr(lorafast, "no_such_name") and not hasattr(lorafast.models, "no_such_name")
for name in ("layer", "problem", "embedding", "catalog", "merging"):
    assert importlib.util.find_spec(name) is None, name
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_path_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"lorafast\.houses"):
        importlib.import_module("lorafast.houses")


def test_layers_pickled_before_the_move_load_and_compute_the_same():
    held = pickle.loads((DATA / "layers_before_the_move.pickle").read_bytes())
    for name, layer in held["modules"].items():
        x = torch.tensor([1, 2]) if name == "table" else held["x"]
        torch.testing.assert_close(layer(x), held["y"][name])
    assert type(held["modules"]["lora"]) is lorafast.Linear
    held["modules"]["merged"].unmerge()
    assert not held["modules"]["merged"].merged


@pytest.mark.peft
def test_a_peft_layer_pickled_before_the_move_is_found():
    from lorafast.integrations import peft_linear

    assert pickle.loads(b"clorafast.models.peft\nLinear\n.") is peft_linear.Linear
