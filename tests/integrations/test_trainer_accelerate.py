"""AccelerateCallback and axolotl's plugin: a Trainer's PEFT model on lorafast's ops."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import peft
import pytest
import torch
from helpers.trainer_runs import base, losses, trainer_of

import lorafast
from lorafast.integrations import AccelerateCallback, peft_linear

pytestmark = pytest.mark.peft


def peft_model(**fields):
    torch.manual_seed(0)
    return peft.get_peft_model(
        base(), peft.LoraConfig(**{"r": 4, "target_modules": "all-linear"} | fields)
    )


def served(model):
    return [type(module) for module in model.modules()].count(peft_linear.Linear)


def test_it_trains_as_accelerate_before_the_trainer_does(tmp_path):
    want = trainer_of(theirs := peft_model(use_dora=True), tmp_path / "a", save_strategy="no")
    lorafast.accelerate(theirs)
    want.train()
    callback = AccelerateCallback()
    trainer = trainer_of(
        ours := peft_model(use_dora=True), tmp_path / "b", callback, save_strategy="no"
    )
    assert len(callback.report.taken) == served(ours) == 14
    trainer.train()
    assert losses(trainer) == losses(want)
    assert losses(trainer)[-1] != losses(trainer)[0]


def test_a_model_of_model_init_and_a_callback_added_later(tmp_path):
    callback = AccelerateCallback()
    made = []

    def model_init():
        made.append(peft_model())
        return made[-1]

    trainer = trainer_of(
        None, tmp_path / "a", callback, model_init=model_init, save_strategy="no", max_steps=1
    )
    trainer.train()
    assert served(made[-1]) == 14
    late = trainer_of(model := peft_model(), tmp_path / "b", save_strategy="no", max_steps=1)
    late.add_callback(callback)
    assert served(model) == 0
    late.train()
    assert served(model) == 14


def test_the_options_are_accelerate_s(tmp_path):
    model = peft_model(use_dora=True)
    trainer_of(model, tmp_path, AccelerateCallback("adapter", keep="output"))
    layer = next(m for m in model.modules() if type(m) is peft_linear.Linear)
    assert (layer.lorafast_dropout_on, layer.lorafast_keep) == ("adapter", "output")
    with pytest.raises(ValueError, match="keep"):
        AccelerateCallback(keep="everything")


def test_a_model_without_adapters_is_refused_when_training_begins(tmp_path):
    trainer = trainer_of(base(), tmp_path, callback := AccelerateCallback(), save_strategy="no")
    assert callback.report is None
    with pytest.raises(ValueError, match="carries no PEFT adapter"):
        trainer.train()


def test_a_missing_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = lorafast.integrations.Nothing


@pytest.fixture
def plugin_class(monkeypatch):
    """The plugin as it is made where axolotl, or what stands for it, can be imported."""
    monkeypatch.delitem(sys.modules, "lorafast.integrations.axolotl", raising=False)
    try:
        importlib.import_module("axolotl.integrations.base")
    except ImportError:
        for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))

        class BasePlugin:
            def post_model_load(self, cfg, model):
                """Do nothing, as all hooks of axolotl's."""

        sys.modules["axolotl.integrations.base"].BasePlugin = BasePlugin
    from lorafast.integrations.axolotl import LorafastPlugin

    yield LorafastPlugin
    sys.modules.pop("lorafast.integrations.axolotl", None)


def test_axolotl_s_plugin_accelerates_the_model_of_the_trainer(plugin_class):
    plugin, model = plugin_class(), peft_model()
    assert isinstance(plugin, sys.modules["axolotl.integrations.base"].BasePlugin)
    plugin.post_model_load({}, model)
    assert served(model) == 0
    plugin.post_trainer_create({}, SimpleNamespace(model=model))
    assert served(model) == 14
    plugin.post_trainer_create({}, SimpleNamespace(model=base()))  # full fine-tuning


def test_axolotl_s_plugin_without_axolotl_can_be_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "lorafast.integrations.axolotl", raising=False)
    monkeypatch.setitem(sys.modules, "axolotl", None)
    from lorafast.integrations.axolotl import LorafastPlugin

    model = peft_model()
    LorafastPlugin().post_trainer_create({}, SimpleNamespace(model=model))
    assert served(model) == 14
    sys.modules.pop("lorafast.integrations.axolotl", None)
