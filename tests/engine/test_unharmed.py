"""A failure anywhere in adapt, load, merge or save leaves model and folder as they were."""

import copy
import shutil

import pytest
import torch
from helpers import tiny_transformers
from helpers.adapter_folders import X, adapted_net, net
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lorafast
from lorafast import DoRA, LaMDA, LoRA
from lorafast.checkpoint import files, save_load
from lorafast.models import adapt, extra_trainables

OPTIONS = {"bias": "all", "modules_to_save": ["norm"]}


class Stopped(BaseException):
    """As a KeyboardInterrupt would be."""


def stops(monkeypatch, owner, name, at):
    """The call number `at` of a function raises."""
    right, calls = getattr(owner, name), []

    def stopping(*args, **kwargs):
        calls.append(name)
        if len(calls) == at:
            raise Stopped
        return right(*args, **kwargs)

    monkeypatch.setattr(owner, name, stopping)


def assert_as_it_was(model, before, modules, flags):
    assert list(model.modules()) == modules
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any("_lorafast" in key for m in modules for key in vars(m))
    for name, value in tiny_transformers.copied_tensors(model).items():
        torch.testing.assert_close(value, before[name], rtol=1e-6, atol=1e-7)


STEPS = [
    (adapt, "share_tensors", 1),
    (adapt, "replace_module", 1),
    (adapt, "replace_module", 2),
    (extra_trainables, "enable_training", 1),
    (extra_trainables, "_set_trainable", 1),
]


@pytest.mark.parametrize(("owner", "name", "at"), STEPS)
def test_adapt_stopped_anywhere(owner, name, at, monkeypatch):
    model = tiny_transformers.llama()
    before, modules, flags = (
        tiny_transformers.copied_tensors(model),
        list(model.modules()),
        [p.requires_grad for p in model.parameters()],
    )
    # Only its first calls: what follows is the way back.
    stops(monkeypatch, owner, name, at)
    with pytest.raises(Stopped):
        lorafast.adapt(model, LaMDA(r=2), **OPTIONS)
    assert_as_it_was(model, before, modules, flags)


@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [*STEPS, (save_load, "_load_extra", 1), (save_load, "set_trainable", 1)],
)
def test_load_stopped_anywhere(owner, name, at, tmp_path, monkeypatch):
    lorafast.save_adapter(
        tiny_transformers.adapted(tiny_transformers.llama(), LaMDA(r=2), **OPTIONS), tmp_path
    )
    model = tiny_transformers.llama()
    before, modules, flags = (
        tiny_transformers.copied_tensors(model),
        list(model.modules()),
        [p.requires_grad for p in model.parameters()],
    )
    stops(monkeypatch, owner, name, at)
    with pytest.raises(Stopped):
        lorafast.load_adapter(model, tmp_path)
    assert_as_it_was(model, before, modules, flags)


@pytest.mark.parametrize("adapter", [LoRA(r=2), DoRA(r=2), LaMDA(r=2)], ids=repr)
@pytest.mark.parametrize("at", [1, 5, 20])
def test_a_merge_stopped_anywhere_can_be_had_again(adapter, at, monkeypatch):
    model = tiny_transformers.adapted(tiny_transformers.llama(), adapter)
    want, base = (
        tiny_transformers.outputs(model),
        tiny_transformers.outputs(tiny_transformers.llama()),
    )
    with monkeypatch.context() as patch:
        stops(patch, lorafast.Linear, "merge_result", at)
        with pytest.raises(Stopped):
            lorafast.merge(model)
    torch.testing.assert_close(tiny_transformers.outputs(model), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        tiny_transformers.outputs(lorafast.unload(copy.deepcopy(model))), base, rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        tiny_transformers.outputs(lorafast.merge(model)), want, rtol=1e-5, atol=1e-6
    )


def test_untying_clones_the_tied_weight_alone():
    model = tiny_transformers.adapted(
        tiny_transformers.llama(tie_word_embeddings=True),
        LoRA(r=4),
        target_modules=["q_proj", "lm_head"],
    )
    own = model.model.layers[0].self_attn.q_proj.weight
    assert lorafast.merge(model, untie=True).model.layers[0].self_attn.q_proj.weight is own


def test_nothing_is_saved_or_loaded_while_disabled(tmp_path):
    model = adapted_net(LoRA(r=2), modules_to_save=["3"])
    lorafast.save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with lorafast.disable_adapter(model):
        for refused in (
            lambda: lorafast.save_adapter(model, tmp_path),
            lambda: lorafast.load_adapter(model, tmp_path),
            lambda: lorafast.adapter_state_dict(model),
            lambda: lorafast.adapter_parameters(model),
        ):
            with pytest.raises(RuntimeError, match="the adapters are disabled"):
                refused()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_resumed_state_dict_keeps_the_start_it_shares(tmp_path):
    trained = tiny_transformers.adapted(tiny_transformers.llama(), LaMDA(r=4))
    resumed = lorafast.adapt(tiny_transformers.llama(), LaMDA(r=4))
    resumed.load_state_dict(copy.deepcopy(trained.state_dict()))
    lorafast.save_adapter(resumed, tmp_path)
    torch.testing.assert_close(
        tiny_transformers.outputs(lorafast.load_adapter(tiny_transformers.llama(), tmp_path)),
        tiny_transformers.outputs(trained),
    )
    torch.testing.assert_close(
        tiny_transformers.outputs(lorafast.unload(resumed)),
        tiny_transformers.outputs(tiny_transformers.llama()),
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_scaling_that_rounds_is_its_own_still(tmp_path):
    model = adapted_net(LoRA(r=3))
    for layer in (model[0], model[2], model[3]):
        layer.scaling = 0.1
    lorafast.save_adapter(model, tmp_path)
    y = model(X)
    torch.testing.assert_close(lorafast.load_adapter(model, tmp_path)(X), y)


def test_a_reader_keeps_the_file_it_opened_and_begins_again_when_a_save_comes_between(
    tmp_path, monkeypatch
):
    first, second = adapted_net(LoRA(r=2)), adapted_net(DoRA(r=4))
    for name, model in (("first", first), ("second", second)):
        lorafast.save_adapter(model, tmp_path / name)
    outcomes = [lorafast.load_adapter(net(), tmp_path / name)(X) for name in ("first", "second")]
    shutil.copytree(tmp_path / "first", tmp_path / "out")
    with files.open_adapter(tmp_path / "out") as file:
        lorafast.save_adapter(second, tmp_path / "out")
        assert {key: tuple(tensor.shape) for key, tensor in file.tensors().items()} == {
            k: e.shape for k, e in file.entries.items()
        }
    right, calls = files._read_config, []

    def between(folder, extras):
        calls.append(folder)
        if len(calls) == 1:
            lorafast.save_adapter(first, folder)
        return right(folder, extras)

    monkeypatch.setattr(files, "_read_config", between)
    torch.testing.assert_close(
        lorafast.load_adapter(net(), tmp_path / "out")(X), outcomes[0], rtol=0, atol=0
    )
    assert len(calls) == 2
    monkeypatch.setattr(
        files, "_read_config", lambda folder, extras: lorafast.save_adapter(first, folder)
    )
    with pytest.raises(ValueError, match="somebody is saving into the folder"):
        lorafast.load_adapter(net(), tmp_path / "out")


def test_ddp_first_is_refused(tmp_path):
    lorafast.save_adapter(adapted_net(LoRA(r=2)), tmp_path)
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = net()
    for refused in (
        lambda: lorafast.adapt(wrapped, LoRA(r=2)),
        lambda: lorafast.load_adapter(wrapped, tmp_path),
    ):
        with pytest.raises(ValueError, match="in DistributedDataParallel already"):
            refused()


@pytest.mark.parametrize("wrong", [None, "model", 3])
def test_what_is_no_model(wrong, tmp_path):
    lorafast.save_adapter(adapted_net(LoRA(r=2)), tmp_path)
    for call in (
        lambda m: lorafast.adapt(m, LoRA()),
        lambda m: lorafast.load_adapter(m, tmp_path),
        lambda m: lorafast.save_adapter(m, tmp_path),
        lorafast.merge,
        lorafast.unload,
        lorafast.explain,
        lorafast.trainable_summary,
        lorafast.adapter_state_dict,
    ):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, not"):
            call(wrong)
