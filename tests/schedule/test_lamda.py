"""LaMDAFreeze: columns freeze in order and bitwise; and all schedules in a process group."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.multiprocessing import spawn
from transformers.pytorch_utils import Conv1D

import lorafast
from lorafast.schedule import LISA, AFLoRA, LaMDAFreeze

R, T = 4, 20


def model_of():
    torch.manual_seed(0)
    first = lorafast.Linear(10, 12, adapter=lorafast.LaMDA(r=R))
    return nn.Sequential(
        first, nn.Tanh(), lorafast.Linear(12, 6, adapter=lorafast.LaMDA(r=R)), lorafast.Linear(6, 3)
    )


def optimizer_of(model, **settings):
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.3, **settings
    )


def train(model, optimizer, schedule, steps, first=0):
    for step in range(first, first + steps):
        torch.manual_seed(100 + step)
        model(torch.randn(8, 10)).square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "settings", [{}, {"fused": True}, {"foreach": True}, {"amsgrad": True}], ids=str
)
def test_frozen_columns_stay_bitwise_constant(settings):
    model = model_of()
    optimizer, schedule = (
        optimizer_of(model, **settings),
        LaMDAFreeze(model, total_steps=T, fraction=0.5),
    )
    layer, held = model[0], {}
    for step in range(T):
        train(model, optimizer, schedule, 1, step)
        due = min(R, int(R * (step + 1) / (0.5 * T)))
        assert layer.frozen_columns == due
        assert layer.lora_B.requires_grad == (due < R)
        for column in range(due):
            now = layer.lora_B[:, column].detach().clone()
            assert torch.equal(now, held.setdefault(column, now))
    assert len(held) == R
    assert layer.lora_core.requires_grad
    assert model[3].lora_B.requires_grad


def test_live_columns_and_the_core_go_on_training():
    model = model_of()
    optimizer, schedule = optimizer_of(model), LaMDAFreeze(model, total_steps=T, fraction=1.0)
    train(model, optimizer, schedule, 10)
    assert model[0].frozen_columns == 2
    before = copy.deepcopy(model[0].state_dict())
    train(model, optimizer, schedule, 1, 10)
    after = model[0].state_dict()
    assert torch.equal(before["lora_B"][:, :2], after["lora_B"][:, :2])
    assert not (before["lora_B"][:, 2:] == after["lora_B"][:, 2:]).any()
    assert not torch.equal(before["lora_core"], after["lora_core"])


def test_the_copy_is_gone_once_all_are_frozen_and_decay_cannot_reach_them():
    model = model_of()
    optimizer = optimizer_of(model)
    train(model, optimizer, LaMDAFreeze(model, total_steps=4, fraction=1.0), 4)
    before = model[0].lora_B.detach().clone()
    assert model[0].frozen_B is None
    model(torch.randn(8, 10)).square().mean().backward()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert torch.equal(model[0].lora_B, before)


@pytest.mark.slow
@pytest.mark.distributed
def test_ddp_goes_on_when_parameters_freeze(tmp_path):
    spawn(_train_in_a_group, args=(str(tmp_path / "rendezvous"),), nprocs=2)


def _train_in_a_group(rank, rendezvous):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for method in (_lamda, _aflora, _lisa):
        method(rank)
    dist.destroy_process_group()
    # Left without ado: DDP's reducer would wait for gloo's threads, and they may wait for the
    # interpreter.
    os._exit(0)


def _alike_in_the_group(
    model, parallel, optimizer, schedule, step, rank, before_the_step=lambda: None
):
    torch.manual_seed(100 + 10 * step + rank)
    parallel(torch.randn(8, 10)).sub(1).square().mean().backward()
    before_the_step()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    for parameter in model.parameters():
        theirs = parameter.detach().clone()
        dist.broadcast(theirs, 0)
        assert torch.equal(theirs, parameter)


def _lamda(rank):
    model = model_of()
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer, schedule = optimizer_of(model), LaMDAFreeze(model, total_steps=4, fraction=0.5)
    frozen = None
    for step in range(5):
        _alike_in_the_group(model, parallel, optimizer, schedule, step, rank)
        if model[0].frozen_columns == R:
            now = model[0].lora_B.detach().clone()
            assert frozen is None or torch.equal(now, frozen)
            frozen = now
    assert frozen is not None


def _aflora(rank):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(lorafast.Linear(10, 10, adapter=lorafast.AFLoRA(r=R)) for _ in range(3))
    )
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer, schedule, held = (
        optimizer_of(model),
        AFLoRA(parallel, total_steps=10, warmup=1, final=2, deltaT=1),
        {},
    )

    def zeros():
        assert not any(model.get_parameter(name).grad.any() for name in held)

    for step in range(12):
        _alike_in_the_group(model, parallel, optimizer, schedule, step, rank, zeros)
        for name in schedule.frozen:
            now = model.get_parameter(name).detach().clone()
            assert torch.equal(now, held.setdefault(name, now))
        if step == 10:  # what is loaded is what stays, though momentum goes on
            model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
            held = {name: value + 1 for name, value in held.items()}
    assert len(held) == 6


def _lisa(rank):
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"layers": nn.ModuleList(nn.Linear(10, 10) for _ in range(4)), "head": nn.Linear(10, 2)}
    )
    model.forward = lambda x: model["head"](nn.Sequential(*model["layers"])(x))
    with pytest.raises(
        ValueError,
        match=r"must be in DistributedDataParallel\(\.\.\., find_unused_parameters=True\)",
    ):
        LISA(model, "layers", seed=1)
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    with pytest.raises(ValueError, match="give every rank the same seed"):
        LISA(parallel, "layers")
    optimizer, schedule, seen = (
        optimizer_of(model),
        LISA(parallel, "layers", active=1, every=2, seed=1),
        set(),
    )
    for step in range(12):
        chosen, before = (
            schedule.chosen,
            [layer.weight.detach().clone() for layer in model["layers"]],
        )
        _alike_in_the_group(model, parallel, optimizer, schedule, step, rank)
        assert [
            not torch.equal(now.weight, old)
            for now, old in zip(model["layers"], before, strict=True)
        ] == [index in chosen for index in range(4)]
        seen.add(chosen)
    assert len(seen) > 2


def test_the_gradient_of_a_frozen_column_is_zero():
    model = model_of()
    schedule = LaMDAFreeze(model, total_steps=10, fraction=1.0)
    for _ in range(5):
        schedule.step()
    model(torch.randn(8, 10)).square().mean().backward()
    assert not model[0].lora_B.grad[:, :2].any()
    assert model[0].lora_B.grad[:, 2:].all()


def test_resume_in_either_order_and_reload_midway():
    model = model_of()
    optimizer, schedule = optimizer_of(model), LaMDAFreeze(model, total_steps=T, fraction=1.0)
    train(model, optimizer, schedule, 10)
    saved = copy.deepcopy((model.state_dict(), schedule.state_dict()))
    for order in ("model, schedule", "schedule, model"):
        resumed = model_of()
        again = LaMDAFreeze(resumed, total_steps=T, fraction=1.0)
        for part in order.split(", "):
            resumed.load_state_dict(saved[0]) if part == "model" else again.load_state_dict(
                saved[1]
            )
        train(resumed, optimizer_of(resumed), again, 1, 10)
        assert torch.equal(resumed[0].lora_B[:, :2], saved[0]["0.lora_B"][:, :2])
    # Another base midway: the columns start anew and freeze at their new values.
    model[0].load_state_dict(torch.nn.Linear(10, 12).state_dict())
    start = model[0].lora_B.detach().clone()
    schedule.step()
    assert torch.equal(model[0].lora_B, start)
    assert model[0].frozen_columns == 2


def test_the_default_is_three_tenths_of_the_run_in_index_order():
    schedule = LaMDAFreeze(model_of(), total_steps=1000)
    counts = [schedule.frozen_columns(32, step) for step in range(1001)]
    assert counts[0] == 0
    assert counts[299] == 31
    assert counts[300] == counts[-1] == 32
    assert counts == sorted(counts)


def test_groups():
    schedule = LaMDAFreeze(model_of(), total_steps=100, fraction=1.0, group=3)
    counts = [schedule.frozen_columns(10, step) for step in range(101)]
    assert sorted(set(counts)) == [0, 3, 6, 9, 10]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_steps": 0}, "total_steps=0"),
        ({"total_steps": 5, "fraction": 0}, "fraction=0"),
        ({"total_steps": 5, "group": 0}, "group=0"),
        ({"total_steps": "5"}, "total_steps='5'"),
        ({"total_steps": 5, "group": 1.5}, r"group=1\.5"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LaMDAFreeze(model_of(), **settings)
    with pytest.raises(TypeError, match="model must be a"):
        LaMDAFreeze([model_of()], total_steps=5)
    with pytest.raises(ValueError, match=r"no layer with a LaMDA adapter"):
        LaMDAFreeze(nn.Linear(2, 2), total_steps=5)


@pytest.mark.compile
def test_compiled_two_graphs_serve_the_whole_schedule():
    def run(compiled):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 12), nn.Linear(12, 20))
        lorafast.adapt(model, lorafast.LaMDA(r=12), rank_pattern={"2": 11, "3": 5}, seed=1)
        schedule = LaMDAFreeze(model, total_steps=40)
        graphs = []

        def counting(graph, inputs):
            graphs.append(graph)
            return make_boxed_func(graph.forward)

        backend = aot_autograd(fw_compiler=counting)
        call = torch.compile(model, backend=backend, fullgraph=True) if compiled else model
        optimizer = torch.optim.AdamW(lorafast.adapter_parameters(model), lr=1e-2, weight_decay=0.3)
        counts = []
        for step in range(16):
            generator = torch.Generator().manual_seed(step)
            call(torch.randn(8, 20, generator=generator)).square().mean().backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            counts.append([layer.frozen_columns for layer in schedule.layers])
        return model, counts, graphs

    torch.compiler.reset()
    plain, counts, _ = run(compiled=False)
    fast, compiled_counts, graphs = run(compiled=True)
    assert compiled_counts == counts
    assert len({tuple(count) for count in counts}) > 8  # dynamo's recompile limit
    # A forward and a backward, while some columns train and when none does.
    assert len(graphs) == 4
    for name, parameter in fast.named_parameters():
        torch.testing.assert_close(parameter, plain.get_parameter(name), rtol=1e-5, atol=1e-6)


@pytest.mark.compile
def test_compiled_the_gradient_of_a_frozen_column_is_zero():
    model = model_of()
    schedule = LaMDAFreeze(model, total_steps=10, fraction=1.0)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for step in range(8):
        compiled(torch.randn(8, 10)).square().mean().backward()
        columns = int(R * step / 10)
        assert not model[0].lora_B.grad[:, :columns].any()
        assert model[0].lora_B.grad[:, columns:].all()
        model.zero_grad()
        schedule.step()


@pytest.mark.parametrize("kind", ["Conv1D", "Embedding"])
def test_other_layers_freeze_too(kind):
    torch.manual_seed(0)
    if kind == "Conv1D":
        model, x = nn.Sequential(Conv1D(9, 10)), torch.randn(4, 10)
    else:
        model, x = nn.Sequential(nn.Embedding(10, 9)), torch.arange(10)
    lorafast.adapt(model, lorafast.LaMDA(r=4), target_modules=["0"])
    optimizer, schedule = optimizer_of(model), LaMDAFreeze(model, total_steps=8, fraction=1.0)
    held = {}
    for step in range(8):
        model(x).square().mean().backward()
        grad = model[0].lora_B.grad
        assert not grad[:, : step // 2].any()
        assert grad[:, step // 2 :].all()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for column in range(model[0].frozen_columns):
            now = model[0].lora_B[:, column].detach().clone()
            assert torch.equal(now, held.setdefault(column, now))
    assert len(held) == 4
    assert not model[0].lora_B.requires_grad


def test_a_new_schedule_begins_anew():
    model = model_of()
    train(model, optimizer_of(model), LaMDAFreeze(model, total_steps=4), 4)
    assert not model[0].lora_B.requires_grad
    LaMDAFreeze(model, total_steps=4)
    assert model[0].lora_B.requires_grad
    assert model[0].frozen_columns == 0
