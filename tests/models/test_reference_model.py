"""reference_model: the base model on the same memory, which training does not change."""

import copy
import functools
import types

import pytest
import torch
from helpers import tiny_transformers
from helpers.tiny_transformers import outputs
from torch import nn
from torch.nn.parallel import DataParallel

import lorafast
from lorafast import DoRA, LaMDA, LoRA, PiSSA, VeRA

ADAPTERS = [
    LoRA(r=2),
    DoRA(r=2, dropout=0.5),
    VeRA(r=4),
    LaMDA(r=2),
    LoRA(r=2, init=PiSSA()),
    DoRA(r=2, init=PiSSA()),
]


def storages(model):
    return {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}


def disabled_outputs(model):
    with lorafast.disable_adapter(model):
        return outputs(model)


def train_a_step(model):
    optimizer = torch.optim.SGD(lorafast.adapter_parameters(model), lr=1.0)
    model(input_ids=tiny_transformers.IDS).logits.square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("adapter", ADAPTERS, ids=repr)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bart"])
def test_it_is_the_base_model_and_stays_so(kind, adapter):
    base = tiny_transformers.KINDS[kind]()
    model = lorafast.adapt(copy.deepcopy(base), adapter, seed=1)
    want = disabled_outputs(model)
    reference = lorafast.reference_model(model.train())
    assert type(reference) is type(base)
    assert torch.equal(outputs(reference), want)
    if not adapter.residual:
        assert torch.equal(want, outputs(base))
        assert [type(m) for m in reference.modules()] == [type(m) for m in base.modules()]
    train_a_step(model)
    assert torch.equal(outputs(reference), want)
    assert not torch.equal(outputs(model.eval()), want)


@pytest.mark.parametrize("adapter", [LoRA(r=2), LaMDA(r=2)], ids=repr)
def test_it_shares_all_memory_and_no_training(adapter):
    model = lorafast.adapt(tiny_transformers.llama(), adapter).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    reference = lorafast.reference_model(model)
    assert storages(reference) <= storages(model)
    assert not reference.training
    assert model.training
    assert all(not p.requires_grad for p in reference.parameters())
    reference.requires_grad_(False).train()
    assert [p for p in model.parameters() if p.requires_grad] == trained
    assert not {*map(id, trained)} & {*map(id, reference.parameters())}
    assert not any(layer.disabled for layer in model.modules() if hasattr(layer, "disabled"))


def test_what_trains_beside_adapters_has_its_first_values():
    base = tiny_transformers.bart()
    model = lorafast.adapt(
        copy.deepcopy(base), LoRA(r=2), ["q_proj"], bias="all", modules_to_save=["fc1"]
    )
    reference = lorafast.reference_model(model)
    tiny_transformers.perturb(model)
    late = lorafast.reference_model(model)
    for found in (reference, late):
        assert torch.equal(outputs(found), outputs(base))
        assert list(found.state_dict()) == list(base.state_dict())
        assert not [key for m in found.modules() for key in vars(m) if "_lorafast" in key]
    assert lorafast.trainable_summary(model).parts["modules_to_save"]


def test_tied_weights_stay_tied_and_a_layer_in_two_places_one():
    model = lorafast.adapt(tiny_transformers.gpt2(), LoRA(r=2))
    reference = lorafast.reference_model(model)
    assert reference.lm_head.weight is reference.transformer.wte.weight
    shared = nn.Linear(4, 4)
    reference = lorafast.reference_model(lorafast.adapt(nn.Sequential(shared, shared), LoRA(r=1)))
    assert reference[0] is reference[1]
    assert reference[0].weight is shared.weight


def test_it_moves_with_the_model():
    model = lorafast.adapt(tiny_transformers.llama(), LoRA(r=2))
    reference = lorafast.reference_model(model)
    model.to(torch.float64)
    reference.to(torch.float64)
    assert storages(reference) <= storages(model)


def test_it_saves_the_base_model(tmp_path):
    model = lorafast.adapt(tiny_transformers.llama(), LoRA(r=2))
    reference = lorafast.reference_model(model)
    reference.save_pretrained(tmp_path)
    again = type(reference).from_pretrained(tmp_path)
    assert torch.equal(outputs(again), outputs(reference))
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


def test_wrappers_are_looked_through_and_a_layer_is_enough():
    model = lorafast.adapt(nn.Sequential(nn.Linear(4, 4)), LoRA(r=1))
    assert type(lorafast.reference_model(DataParallel(model))) is nn.Sequential
    layer = lorafast.Linear(4, 3, adapter=DoRA(r=1))
    layer.lora_B.data.normal_()
    x = torch.randn(2, 4)
    want = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(lorafast.reference_model(layer)(x), want)


def test_refusals():
    with pytest.raises(ValueError, match="has no adapted layer"):
        lorafast.reference_model(nn.Linear(2, 2))
    model = lorafast.adapt(nn.Sequential(nn.Linear(4, 4)), LoRA(r=1))
    with lorafast.disable_adapter(model), pytest.raises(RuntimeError, match="are disabled"):
        lorafast.reference_model(model)
    model[0].merge()
    with pytest.raises(RuntimeError, match="merged"):
        lorafast.reference_model(model)


def wrapped_as_trl_does(model):
    """Replace the forward by a function around the bound method, as TRL's fused head is put in."""
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, **kwargs):
        return original(*args, **kwargs)

    model.forward = types.MethodType(forward, model)


def hooked_as_accelerate_does(model):
    """Replace the forward by one that goes through the instance, so that a copy runs itself."""
    model._old_forward = model.forward

    def forward(module, *args, **kwargs):
        return module._old_forward(*args, **kwargs)

    model.forward = functools.update_wrapper(functools.partial(forward, model), model._old_forward)


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ([wrapped_as_trl_does], False),
        ([wrapped_as_trl_does] * 2, False),
        ([hooked_as_accelerate_does], True),
        ([wrapped_as_trl_does, hooked_as_accelerate_does], False),
    ],
    ids=["TRL", "TRL twice", "accelerate", "both"],
)
def test_a_forward_that_a_trainer_replaced_does_not_run_the_trained_model(changes, left):
    base = tiny_transformers.llama()
    model = tiny_transformers.adapted(copy.deepcopy(base), LoRA(r=2))
    trained = outputs(model)
    for change in changes:
        change(model)
    reference = lorafast.reference_model(model)
    assert torch.equal(outputs(reference), outputs(base))
    assert torch.equal(outputs(model), trained)
    assert ("forward" in vars(reference)) is left
    assert "forward" in vars(model)
