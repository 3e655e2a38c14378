"""AdaLoRA's budget: the formulas in float64, PEFT's whole run, a resize, and refusals."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lorafast
from lorafast import AdaLoRA
from lorafast.schedule import AdaLoRA as Schedule

K, N, R, T = 7, 11, 5, 12
TIMES = {"total_steps": T, "tinit": 2, "tfinal": 3, "deltaT": 2}
PARTS = ("lora_A", "lora_core", "lora_B")


class Net(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(K, N, dtype=dtype), nn.Linear(N, K, bias=False, dtype=dtype)

    def forward(self, x, target):
        y = self.down(torch.tanh(self.up(x)))
        return SimpleNamespace(loss=(y - target).square().mean(), y=y)


def model_of(dtype=torch.float64, **fields):
    return lorafast.adapt(
        Net(dtype), AdaLoRA(**{"r": R, "target_r": 2, "alpha": 6} | fields), seed=1
    )


def optimizer_of(model):
    return torch.optim.AdamW(lorafast.adapter_parameters(model), lr=0.03)


def batch(t, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 + t)
    x = torch.randn(9, K, generator=generator, dtype=dtype)
    return x, x.roll(1, 1) * 2


def train(model, optimizer, schedule, first, last, seen=lambda t: None):
    for t in range(first, last + 1):
        optimizer.zero_grad()
        (model(*batch(t, model.up.weight.dtype)).loss + schedule.penalty()).backward()
        optimizer.step()
        schedule.step()
        seen(t)


def trained(**times):
    """A model at the end of a run, and its schedule."""
    model = model_of()
    schedule = Schedule(model, **TIMES | times)
    train(model, optimizer_of(model), schedule, 1, T)
    return model, schedule


@pytest.mark.peft
@pytest.mark.parametrize(
    "times",
    [{}, {"tinit": 0, "tfinal": 0, "deltaT": 1}, {"tinit": 5, "tfinal": 6, "deltaT": 3}],
    ids=str,
)
def test_the_budget_is_the_codes_formula_and_pefts(times):
    import peft

    times = TIMES | times
    schedule, (tinit, tfinal) = Schedule(model_of(), **times), (times["tinit"], times["tfinal"])
    config = peft.AdaLoraConfig(
        init_r=R,
        target_r=2,
        total_step=T,
        target_modules=["up", "down"],
        **{n: v for n, v in times.items() if n != "total_steps"},
    )
    allocator = peft.get_peft_model(Net(), config).base_model.rankallocator
    budgets = [schedule.budget(t) for t in range(T + 3)]
    for t, budget in enumerate(budgets):
        assert budget == allocator.budget_schedule(t)[0]
        if tinit < t < T - tfinal:
            assert budget == int(4 + 6 * (1 - (t - tinit) / (T - tinit - tfinal)) ** 3)
    assert budgets[: tinit + 1] == [10] * (tinit + 1)
    assert set(budgets[T - tfinal :]) == {4}
    assert budgets == sorted(budgets, reverse=True)


def test_every_choice_is_the_formulas():
    """The mask from w and its gradient, computed beside the schedule."""
    model = model_of()
    schedule = Schedule(model, **TIMES, beta1=0.7, beta2=0.9)
    mean, spread, chosen = {}, {}, []

    def check(t):
        scores = []
        for layer in (model.up, model.down):
            for part in PARTS:
                w, grad = before[layer, part], getattr(layer, part).grad
                now, key = (w * grad).abs(), (layer, part)
                mean[key] = 0.7 * mean.get(key, 0) + 0.3 * now
                spread[key] = 0.9 * spread.get(key, 0) + 0.1 * (now - mean[key]).abs()
            A, E, B = (mean[layer, part] * spread[layer, part] for part in PARTS)
            scores.append(E + A.mean(1) + B.mean(0))
        if t > 2 and (t % 2 == 0 or t == T - 3) and t <= T - 3:
            if t == T - 3:
                scores = last
            threshold = torch.cat(scores).sort().values[10 - schedule.budget(t) - 1]
            kept = [score > threshold for score in scores]
            assert sum(int(one.sum()) for one in kept) == schedule.budget(t)
            chosen.append(kept)
            assert list(schedule.rank_pattern.values()) == [one.tolist() for one in kept]
            for layer, one in zip((model.up, model.down), kept, strict=True):
                assert torch.equal(layer.lora_core == 0, ~one)
        last[:] = scores

    last, before, optimizer = [], {}, optimizer_of(model)
    for t in range(1, T + 1):
        optimizer.zero_grad()
        (model(*batch(t)).loss + schedule.penalty()).backward()
        optimizer.step()
        before = {
            (layer, part): getattr(layer, part).detach().clone()
            for layer in (model.up, model.down)
            for part in PARTS
        }
        schedule.step()
        check(t)
    assert len(chosen) == 4


def test_a_triplet_comes_back_until_the_ranks_are_fixed():
    model = model_of()
    schedule, layer = Schedule(model, total_steps=6, tfinal=2), model.up
    gone = torch.tensor([True, True, False, False, False])

    def step(felt):
        """Gradients that make these triplets of the first layer matter."""
        for one, size in ((model.up, 0.0), (model.down, 0.1)):
            for part in PARTS:
                getattr(one, part).grad = torch.full_like(getattr(one, part), size)
        with torch.no_grad():
            layer.lora_core.add_(1.0)
        layer.lora_core.grad[felt] = 1e3 * torch.arange(1.0, R + 1, dtype=torch.float64)[felt]
        schedule.step()

    step(~gone)
    step(~gone)
    assert not layer.lora_core[gone].any()
    assert layer.lora_core[~gone].all()
    step(gone)
    assert layer.lora_core[gone].any()
    step(gone)  # step 4 = 6 - 2 rests on the gradients before it, and its choice is kept
    fixed = torch.tensor(schedule.rank_pattern["up"])
    for _ in range(3):
        step(~fixed)
        assert torch.equal(layer.lora_core != 0, fixed)


@pytest.mark.peft
@pytest.mark.parametrize(
    "times",
    [{}, {"tinit": 0, "tfinal": 0, "deltaT": 1}, {"tinit": 0, "tfinal": 1, "deltaT": 4}],
    ids=str,
)
def test_pefts_whole_run(times):
    import peft

    times = TIMES | times
    said = {"total_step" if name == "total_steps" else name: value for name, value in times.items()}
    said |= {"target_modules": ["up", "down"], "orth_reg_weight": 0.1}
    config = peft.AdaLoraConfig(init_r=R, target_r=2, lora_alpha=6, **said)
    theirs = peft.get_peft_model(Net(), config, autocast_adapter_dtype=False)
    ours = lorafast.adapt(Net(), config)
    layers = {
        name: (getattr(ours, name), getattr(theirs.base_model.model, name))
        for name in ("up", "down")
    }
    with torch.no_grad():
        for layer, other in layers.values():
            for part, name in zip(PARTS, ("lora_A", "lora_E", "lora_B"), strict=True):
                held = getattr(layer, part)
                held.copy_(getattr(other, name)["default"].reshape(held.shape))
    schedule = Schedule(ours, **times, orth_reg_weight=0.1)
    # PEFT's count of triplets, ranknum, would train too where the base is not fp32, and is in none
    # of its files.
    trains = [p for name, p in theirs.named_parameters() if "lora_" in name]
    optimizers = optimizer_of(ours), torch.optim.AdamW(trains, lr=0.03)
    close = {"rtol": 1e-9, "atol": 1e-12}
    for t in range(1, T + 1):
        for optimizer in optimizers:
            optimizer.zero_grad()
        # A PeftModel without a task goes past the tuner's own forward, and so past the penalty.
        found, want = ours(*batch(t)), theirs.base_model(*batch(t))
        torch.testing.assert_close(found.y, want.y, **close)
        loss = found.loss + schedule.penalty()
        torch.testing.assert_close(loss, want.loss, **close)
        loss.backward()
        want.loss.backward()
        for layer, other in layers.values():
            for part, name in zip(PARTS, ("lora_A", "lora_E", "lora_B"), strict=True):
                grad = getattr(layer, part).grad
                torch.testing.assert_close(
                    grad, getattr(other, name)["default"].grad.reshape(grad.shape), **close
                )
        for optimizer in optimizers:
            optimizer.step()
        schedule.step()
        theirs.base_model.update_and_allocate(t)
        for layer, other in layers.values():
            torch.testing.assert_close(layer.lora_core, other.lora_E["default"].flatten(), **close)
            assert torch.equal(layer.lora_core == 0, other.lora_E["default"].flatten() == 0)
        pattern = theirs.peft_config["default"].rank_pattern or {}
        # PEFT has no pattern before its first mask.
        assert {
            f"{n}.lora_E.default": kept
            for n, kept in schedule.rank_pattern.items()
            if pattern or not all(kept)
        } == pattern
    assert sum(map(sum, schedule.rank_pattern.values())) == 4


def test_the_penalty():
    model = model_of(torch.float32)
    schedule = Schedule(model, **TIMES, orth_reg_weight=0.25)
    double = [
        M.detach().double()
        for layer in (model.up, model.down)
        for M in (layer.lora_A, layer.lora_B.t())
    ]
    norms = [torch.linalg.matrix_norm(M @ M.t() - torch.eye(R, dtype=M.dtype)) for M in double]
    with torch.autocast("cpu", torch.bfloat16):
        found, squared = schedule.penalty(), schedule.penalty(squared=True)
    torch.testing.assert_close(found.double(), 0.25 * sum(norms) / 4)
    torch.testing.assert_close(squared.double(), 0.25 * sum(norm**2 for norm in norms))
    found.backward()
    assert all(
        layer.lora_A.grad.any() and layer.lora_core.grad is None for layer in (model.up, model.down)
    )
    with torch.no_grad():  # orthogonal: no penalty, and no NaN for a gradient
        for layer in (model.up, model.down):
            nn.init.orthogonal_(layer.lora_A)
            nn.init.orthogonal_(layer.lora_B)
    model.zero_grad()
    schedule.penalty().backward()
    assert model.up.lora_A.grad.isfinite().all()


def test_a_budget_of_all_takes_nothing():
    model = model_of(target_r=R)
    schedule = Schedule(model, total_steps=4)
    train(model, optimizer_of(model), schedule, 1, 5)
    assert all(all(kept) for kept in schedule.rank_pattern.values())
    assert model.up.lora_core.all()
    assert schedule.resize() == {"up": R, "down": R}


def test_a_state_that_does_not_fit_changes_nothing():
    model = model_of()
    schedule = Schedule(model, **TIMES)
    train(model, optimizer_of(model), schedule, 1, 5)
    good, ended = schedule.state_dict(), trained()[1].state_dict()
    other = copy.deepcopy(good)
    other["layers"]["up"]["sensitivity"]["lora_A"] = torch.zeros(3, K)
    nothing = copy.deepcopy(ended)
    nothing["layers"]["down"]["kept"] = None
    fresh = Schedule(model_of(), **TIMES).state_dict()
    for wrong, message in (
        ({"last_step": 3}, r"\['last_step'\] must hold"),
        (
            good | {"layers": {"up": good["layers"]["up"]}},
            "state is of the layers up, the model has up, down",
        ),
        (good | {"last_step": -1}, "last_step=-1"),
        (good | {"deltaT": 0}, "deltaT=0"),
        (
            good | {"last_step": T},
            r"up has the sensitivity of \['lora_A', 'lora_B', 'lora_core'\] after step 12 of 9",
        ),
        (fresh | {"last_step": 4}, "up has the sensitivity of nothing after step 4"),
        (other, r"up: sensitivity of lora_A \(3, 7\) must be \(5, 7\)"),
        (nothing, "down has not what it keeps, which is fixed after step 9"),
    ):
        with pytest.raises(ValueError, match=message):
            schedule.load_state_dict(wrong)
    assert schedule.last_step == 5
    schedule.load_state_dict(ended)
    schedule.load_state_dict(fresh)
    assert (schedule.last_step, schedule.budget(0)) == (0, 10)


def test_a_resize():
    model, schedule = trained()
    x, target = batch(50)
    want, kept = (
        model(x, target).y,
        {name: sum(pattern) for name, pattern in schedule.rank_pattern.items()},
    )
    assert schedule.resize() == {name: max(1, count) for name, count in kept.items()}
    torch.testing.assert_close(model(x, target).y, want, rtol=1e-13, atol=1e-15)
    for name, count in kept.items():
        layer, r = getattr(model, name), max(1, count)
        assert (layer.r, layer.adapter) == (r, AdaLoRA(r=r, target_r=2, alpha=6, init_r=R))
        assert layer.scaling == layer.adapter.scaling == 6 / (R + 1e-5)
        shapes = {part: getattr(layer, part).shape for part in PARTS}
        assert shapes == {
            part: one.shape for part, one in layer.adapter.tensor_specs(*layer.weight.shape).items()
        }
    merged = copy.deepcopy(model)
    for layer in (merged.up, merged.down):
        layer.merge()
    torch.testing.assert_close(merged(x, target).y, want)
    before = model(x, target).loss
    train(model, optimizer_of(model), schedule, 50, 60)
    assert model(x, target).loss < before
    schedule.load_state_dict(schedule.state_dict())
    assert schedule.rank_pattern == {
        name: [True] * count or [False] for name, count in kept.items()
    }
    assert schedule.resize() == {"up": model.up.r, "down": model.down.r}
    schedule.load_state_dict(
        schedule.state_dict() | {"last_step": 0}
    )  # another run with what is left
    train(model, optimizer_of(model), schedule, 1, T)
    assert sum(map(sum, schedule.rank_pattern.values())) == 4


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_an_optimizer_goes_on_through_a_resize(kind):
    """As if nothing had been dropped, but for rounding: the dropped triplets added nothing."""
    model = model_of()
    optimizer, schedule = (
        kind(lorafast.adapter_parameters(model), lr=0.01),
        Schedule(model, **TIMES, orth_reg_weight=0.0),
    )
    train(model, optimizer, schedule, 1, T - 2)
    masked = copy.deepcopy((model, optimizer, schedule))
    schedule.resize(optimizer)
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(
        lorafast.adapter_parameters(model)
    )
    assert set(optimizer.state) <= set(lorafast.adapter_parameters(model))
    train(model, optimizer, schedule, T - 1, T + 4)
    train(*masked, T - 1, T + 4)
    torch.testing.assert_close(model(*batch(50)).y, masked[0](*batch(50)).y, rtol=1e-10, atol=1e-12)


def test_a_layer_that_keeps_nothing_runs_as_its_base():
    model, schedule = trained()
    state = schedule.state_dict()
    state["layers"]["up"]["kept"] = torch.zeros(R, dtype=torch.bool)
    schedule.load_state_dict(state)
    optimizer = optimizer_of(model)
    train(model, optimizer, schedule, 1, 1)
    assert schedule.resize()["up"] == 1
    train(model, optimizer_of(model), schedule, 2, 3)
    assert model.up.lora_core.tolist() == [0.0]
    x = batch(9)[0]
    torch.testing.assert_close(
        model.up(x), nn.functional.linear(x, model.up.weight, model.up.bias), rtol=0, atol=0
    )
    assert model.up.lora_core.grad.any()


def test_layers_of_fewer_triplets_to_begin_with():
    model = lorafast.adapt(
        Net(), AdaLoRA(r=R, target_r=2, alpha=6), rank_pattern={"down": 3}, seed=1
    )
    assert (model.down.r, model.down.scaling) == (3, model.up.scaling)
    schedule = Schedule(model, **TIMES)
    assert (schedule.budget(0), schedule.budget(T)) == (8, 4)
    train(model, optimizer_of(model), schedule, 1, T)
    assert sum(schedule.resize().values()) == 4


def test_gradients_that_are_missing_or_not_finite():
    model = model_of(torch.float32)
    schedule = Schedule(model, **TIMES)
    with pytest.raises(
        RuntimeError, match=r"up\.lora_A \(5, 7\) has no gradient.*before zero_grad"
    ):
        schedule.step()
    assert schedule.last_step == 0
    model(*batch(1, torch.float32)).loss.backward()
    model.down.lora_core.grad = None
    with torch.no_grad():
        model.up.lora_core.add_(1.0)
    schedule.step()
    felt = schedule.state_dict()["layers"]
    assert not felt["down"]["sensitivity"]["lora_core"].any()
    assert felt["up"]["sensitivity"]["lora_core"].all()
    for wrong in ("inf", "nan"):
        model.up.lora_core.grad[0] = float(wrong)
        schedule.step()
    assert schedule.last_step == 3
    assert str(schedule.state_dict()["layers"]) == str(felt)


def test_half_precision_factors_have_averages_in_fp32():
    model = model_of(torch.float32).bfloat16()
    schedule, optimizer = Schedule(model, **TIMES), optimizer_of(model)
    train(model, optimizer, schedule, 1, 4)
    held = schedule.state_dict()["layers"]["up"]["uncertainty"]
    assert {tensor.dtype for tensor in held.values()} == {torch.float32}
    train(model, optimizer, schedule, 5, T)
    assert sum(map(sum, schedule.rank_pattern.values())) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_steps": 0}, "total_steps=0"),
        ({"total_steps": 2.5}, r"total_steps=2\.5"),
        ({"tinit": -1}, "tinit=-1"),
        ({"tfinal": True}, "tfinal=True"),
        ({"deltaT": 0}, "deltaT=0"),
        ({"beta1": 1.0}, r"beta1=1\.0"),
        ({"beta2": 0}, "beta2=0"),
        ({"orth_reg_weight": -0.1}, r"orth_reg_weight=-0\.1"),
        ({"orth_reg_weight": float("inf")}, "orth_reg_weight=inf"),
        ({"tinit": 9}, "tinit=9 and tfinal=3 leave no step of total_steps=12"),
        ({"tinit": 0, "tfinal": 11}, "tinit=0 and tfinal=11 leave no step"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Schedule(model_of(), **TIMES | settings)


def test_models_it_is_not_for():
    with pytest.raises(TypeError, match="model must be a"):
        Schedule([model_of()], total_steps=5)
    with pytest.raises(ValueError, match="no layer with an AdaLoRA adapter"):
        Schedule(lorafast.adapt(Net(), lorafast.LoRA()), total_steps=5)
    model, schedule = trained()
    early = Schedule(model, **TIMES)
    with pytest.raises(RuntimeError, match=r"fixed after step 9: resize.* after 0 is too early"):
        early.resize()
    model.up.merge()
    with pytest.raises(RuntimeError, match=r"merged: unmerge\(\) before resize"):
        schedule.resize()
    model.up.unmerge()
    schedule.resize()
    small = lorafast.adapt(Net(), AdaLoRA(r=R, target_r=2), rank_pattern={"up|down": 1})
    with pytest.raises(ValueError, match="target_r of 2 layers makes 4 triplets, and they have 2"):
        Schedule(small, total_steps=5)
