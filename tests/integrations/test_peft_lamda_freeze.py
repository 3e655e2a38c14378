"""LaMDAFreeze on PEFT models with a LamdaConfig: as on lorafast's own layers, and under Trainer."""

import copy
import warnings

import peft
import pytest
import torch
from functorch.compile import make_boxed_func
from helpers.peft_models import ALL, K, Net, config, lamda_config
from helpers.trainer_runs import HALF, STEPS, Stop, base, losses, trainer_of
from torch._dynamo.backends.common import aot_autograd

import lorafast
from lorafast.integrations import peft_linear
from lorafast.integrations.peft_lamda import LamdaConfig
from lorafast.integrations.trainer import ScheduleCallback
from lorafast.schedule import LaMDAFreeze

pytestmark = pytest.mark.peft
T = 8


def peft_run(**settings):
    """A PeftModel, its AdamW, and its schedule."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), lamda_config(ALL, **settings))
    return begin(model)


def begin(model):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.3)
    return model, optimizer, LaMDAFreeze(model, total_steps=T, fraction=0.75)


def step(model, optimizer, schedule, number, call=None):
    generator = torch.Generator().manual_seed(number)
    call = model if call is None else call
    call(torch.randn(8, K, generator=generator)).square().mean().backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def factor(model, name):
    return model.base_model.model.get_submodule(name).lora_B["default"]


@pytest.mark.parametrize("init", ["residual", "zero"])
def test_it_trains_as_lorafasts_own_layers_do(init):
    theirs, optimizer, schedule = peft_run(lamda_init=init)
    torch.manual_seed(0)
    own = lorafast.adapt(Net(), lorafast.LaMDA(r=4, alpha=8, init=init), target_modules=ALL)
    ours = begin(own)
    for number in range(T):
        step(theirs, optimizer, schedule, number)
        step(*ours, number)
        for name in ALL:
            layer, B = own.get_submodule(name), factor(theirs, name)
            assert torch.equal(B.weight, layer.lora_B)
            assert (
                B.frozen_columns == layer.frozen_columns == schedule.frozen_columns(4, number + 1)
            )
            assert B.weight.requires_grad == layer.lora_B.requires_grad
            core = theirs.base_model.model.get_submodule(name).lora_core["default"]
            assert torch.equal(core, layer.lora_core)
            assert core.requires_grad
    assert factor(theirs, "up").frozen_columns == 4


def test_pefts_own_forward_gives_frozen_columns_no_gradient():
    model, optimizer, schedule = peft_run(lamda_init="zero")
    seen = []
    factor(model, "up").register_forward_hook(lambda module, x, y: seen.append(module))
    for number in range(3):
        step(model, optimizer, schedule, number)
    model(torch.randn(8, K)).square().mean().backward()
    assert len(seen) == 4
    for name in ALL:
        grad = factor(model, name).weight.grad
        assert not grad[:, :2].any()
        assert grad[:, 2:].any(0).all()


def test_what_is_frozen_stays_so_in_pefts_hands():
    model, optimizer, schedule = peft_run(lamda_init="zero")
    for number in range(3):
        step(model, optimizer, schedule, number)
    loaded = {name: value + 1 for name, value in peft.get_peft_model_state_dict(model).items()}
    peft.set_peft_model_state_dict(model, loaded)
    held = factor(model, "up").weight[:, :2].detach().clone()
    step(model, optimizer, schedule, 3)
    assert torch.equal(factor(model, "up").weight[:, :2], held)
    other = copy.deepcopy(model)
    with model.disable_adapter():
        model(torch.randn(2, K))
    for number in range(4, T):
        step(model, optimizer, schedule, number)
    assert factor(other, "up").frozen_columns == 2
    with model.disable_adapter():
        model(torch.randn(2, K))
    model.set_adapter("default")
    assert not factor(model, "up").weight.requires_grad
    assert not [module for module in model.modules() if type(module) is peft_linear.PeftLinear]
    schedule.load_state_dict(schedule.state_dict() | {"last_step": 0})
    assert factor(model, "up").weight.requires_grad


def test_an_adapter_that_does_not_train_is_left_alone():
    model, _, _ = peft_run(lamda_init="zero")
    model.add_adapter("other", lamda_config(ALL, lamda_init="zero"))
    schedule = LaMDAFreeze(model, total_steps=1)
    assert len(schedule.layers) == 3
    schedule.step()
    model.set_adapter("other")
    layer = model.base_model.model.up
    assert layer.lora_B["default"].frozen_columns == 4
    assert layer.lora_B["other"].frozen_columns == 0
    assert layer.lora_B["other"].weight.requires_grad
    model.delete_adapter("default")
    model.add_adapter("default", lamda_config(ALL, lamda_init="zero"))
    assert layer.lora_B["default"].frozen_columns == 0


@pytest.mark.compile
def test_compiled_two_graphs_serve_the_whole_schedule():
    torch.compiler.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    model, optimizer, schedule = peft_run(lamda_init="zero")
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=counting), fullgraph=True)
    for number in range(T):
        step(model, optimizer, schedule, number, compiled)
    plain = peft_run(lamda_init="zero")
    for number in range(T):
        step(*plain, number)
    assert len(graphs) == 4
    for name, parameter in plain[0].named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init", ["residual", "zero"])
def test_a_run_under_trainer_resumes_to_the_bit(init, tmp_path):
    def prepared():
        config = LamdaConfig(
            r=4, lora_dropout=0.3, target_modules=["q_proj", "up_proj"], lamda_init=init,
            task_type="CAUSAL_LM",
        )  # fmt: skip
        torch.manual_seed(1)
        return peft.get_peft_model(base(), config), ScheduleCallback(LaMDAFreeze, fraction=0.9)

    straight, callback = prepared()
    whole = trainer_of(straight, tmp_path / "a", callback, save_strategy="no")
    whole.train()
    assert callback.schedule.last_step == STEPS
    assert {layer.frozen_columns for layer in callback.schedule.layers} == {4}
    model, first = prepared()
    trainer_of(model, tmp_path / "b", first, Stop()).train()
    assert {layer.frozen_columns for layer in first.schedule.layers} == {2}
    model, resumed = prepared()
    torch.rand(5)
    again = trainer_of(model, tmp_path / "c", resumed)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / f"checkpoint-{HALF}"))
    assert losses(again) == losses(whole)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, straight.get_parameter(name)), name
    assert str(again.optimizer.state_dict()) == str(whole.optimizer.state_dict())
    assert resumed.schedule.state_dict() == callback.schedule.state_dict()


def unscheduled():
    """Return a PeftModel of a LaMDA without a schedule, and what trains in it."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), lamda_config(ALL))
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


def train_step(model, optimizer):
    model(torch.ones(8, K)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("way", [lambda model: model, copy.deepcopy], ids=["itself", "a copy"])
def test_a_plain_loop_without_a_schedule_warns_once(way):
    model = way(unscheduled()[0])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with pytest.warns(UserWarning, match="3 LaMDA adapters train without a schedule") as told:
        train_step(model, optimizer)
    assert [warning.filename for warning in told] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_step(model, optimizer)


def test_a_schedule_before_the_first_step_and_an_adapter_that_does_not_train_are_silent():
    model, trained = unscheduled()
    optimizer = torch.optim.SGD(trained, lr=1e-2)
    LaMDAFreeze(model, total_steps=T)
    other, trained = unscheduled()
    other.add_adapter("other", config([*ALL]))
    other.set_adapter("other")
    active = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_step(model, optimizer)
        train_step(other, active)


@pytest.mark.parametrize("callbacks", [[], [ScheduleCallback(None)]], ids=["plain", "callback"])
def test_under_trainer_without_a_schedule_it_warns(callbacks, tmp_path):
    settings = {"lamda_init": "zero", "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(base(), LamdaConfig(r=2, target_modules=["q_proj"], **settings))
    trainer = trainer_of(model, tmp_path, *callbacks, save_strategy="no")
    with pytest.warns(UserWarning, match="2 LaMDA adapters train without a schedule"):
        trainer.train()
