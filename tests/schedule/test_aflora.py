"""AFLoRA: the formula, its saved bytes, scores against a plain implementation, freezing."""

import copy
import itertools
import json

import pytest
import torch
from helpers import tiny_transformers
from torch import nn

import lorafast
from lorafast import AFLoRA, testing
from lorafast.schedule import AFLoRA as Freezing
from lorafast.schedule import aflora

K, N, R, M = 10, 13, 3, 7
T = 60
SETTINGS = {"total_steps": T, "warmup": 8, "final": 12, "deltaT": 4}


def model_of(dtype=torch.float32, **fields):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(K, N, dtype=dtype),
        nn.Tanh(),
        nn.Linear(N, 6, bias=False, dtype=dtype),
        nn.Linear(6, 5, dtype=dtype),
    )
    return lorafast.adapt(net, AFLoRA(**{"r": R} | fields), seed=1)


def optimizer_of(model, **settings):
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.3, **settings
    )


def backward(model, step):
    torch.manual_seed(100 + step)
    model(torch.randn(8, K, dtype=model[0].weight.dtype)).sub(1).square().mean().backward()


def train(model, optimizer, schedule, steps, first=0, set_to_none=True):
    for step in range(first, first + steps):
        backward(model, step)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none)


def matrices(model):
    return {n: p for n, p in model.named_parameters() if n.endswith(("lora_A", "lora_B"))}


@pytest.mark.parametrize("frozen", [(), ("lora_A",), ("lora_B",), ("lora_A", "lora_B")], ids=str)
@pytest.mark.parametrize(("bias", "shape"), [(True, (M,)), (False, (2, 1, 3))])
def test_the_formula_and_its_gradients(frozen, bias, shape):
    layer = lorafast.Linear(K, N, bias, AFLoRA(r=R), dtype=torch.float64)
    nn.init.normal_(layer.lora_out_scale)
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    x = torch.randn(*shape, K, dtype=torch.float64, requires_grad=True)
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad} | {"x": x}
    assert trained.keys() == {"x", "lora_core", "lora_out_scale", "lora_A", "lora_B"} - set(frozen)
    low = ((x @ layer.lora_A.t()) * layer.core) @ layer.lora_B.t()
    want = nn.functional.linear(x, layer.weight, layer.bias) + layer.out_scale * low
    y = layer(x)
    torch.testing.assert_close(y, want, rtol=1e-13, atol=1e-13)
    dy = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(z, list(trained.values()), dy) for z in (y, want))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_is_kept_before_and_after_A_freezes(dtype, dropout):
    layer = lorafast.Linear(K, N, adapter=AFLoRA(r=R, dropout=dropout), dtype=dtype)
    x = torch.randn(M, K, dtype=dtype, requires_grad=True)
    own = M * R * dtype.itemsize + (8 if dropout else 0)
    for frozen, referenced in ((None, {"x"}), ("lora_B", {"x"}), ("lora_A", set())):
        if frozen:
            getattr(layer, frozen).requires_grad_(False)
        assert testing.saved(lambda: layer(x), {"x": x}, layer.parameters()) == testing.Saved(
            own, frozenset(referenced)
        )


def test_the_start():
    weight = torch.randn(50, 400)
    start = AFLoRA().init_tensors(weight)
    for name, fan_in in (("lora_A", 400), ("lora_B", 4)):
        bound = (6 / fan_in) ** 0.5
        assert 0.9 * bound < start[name].abs().max() <= bound
    assert torch.equal(start["lora_core"], torch.ones(4))
    assert not start["lora_out_scale"].any()
    assert torch.equal(
        AFLoRA(d_initial=0.1).init_tensors(weight)["lora_core"], torch.full((4,), 0.1)
    )
    model, plain, x = model_of(), nn.Linear(K, N), torch.randn(M, K)
    plain.load_state_dict({"weight": model[0].weight, "bias": model[0].bias})
    assert torch.equal(model[0](x), plain(x))
    assert (AFLoRA().r, AFLoRA().scaling, AFLoRA.paper) == (4, 1.0, "arXiv 2403.13269")


@pytest.mark.parametrize(
    "wrong",
    [
        {"d_initial": float("nan")},
        {"d_initial": True},
        {"d_initial": "1"},
        {"r": 0},
        {"dropout": 2.0},
    ],
)
def test_bad_fields(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AFLoRA(**wrong)
    with pytest.raises(TypeError, match="made for linears"):
        lorafast.Embedding(9, 4, adapter=AFLoRA())


def test_the_ratio_falls_from_one_to_nothing():
    schedule = Freezing(model_of(), 1000, warmup=100, final=300)
    ratios = [schedule.keep(step) for step in range(1001)]
    assert ratios[:101] == [1.0] * 101
    assert ratios[700:] == [0.0] * 301
    assert all(a > b for a, b in itertools.pairwise(ratios[100:701]))
    assert ratios[400] == 0.5**3
    assert ratios[101] == pytest.approx((1 - 1 / 600) ** 3, rel=1e-15)
    default = Freezing(model_of(), 200)
    assert (default.keep(10), default.keep(11) < 1, default.keep(59) > 0, default.keep(60)) == (
        1.0,
        True,
        True,
        0.0,
    )


@pytest.mark.parametrize("keep", [0.999, 0.5, 0.25, 1 / 3, 1e-9])
def test_the_threshold_leaves_its_share_above(keep):
    class Scored:
        def __init__(self, scores):
            self.scores = lambda: scores

    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(100, generator=generator, dtype=torch.float64)
    live = [Scored(part) for part in scores.split(20)]
    k = int(100 * (1 - keep))
    found = aflora._below_threshold(live, keep)
    if not k:
        assert found == []
        return
    threshold = sorted(scores.tolist())[k - 1]
    assert sum(score < threshold for score in scores.tolist()) == k - 1
    assert found == [one for one in live if sum(one.scores().tolist()) / 20 < threshold]
    # What lies on the threshold stays.
    assert aflora._below_threshold([Scored(torch.ones(5)), Scored(torch.ones(7))], keep) == []


class Plain:
    """The rules again, element by element."""

    def __init__(self, names):
        self.names, self.live = names, list(names)
        self.seen = {name: [] for name in names}
        self.I = {name: None for name in names}
        self.U = {name: None for name in names}

    def step(self, t, gradients, beta1=0.85, beta2=0.95):
        dt, w, f = SETTINGS["deltaT"], SETTINGS["warmup"], SETTINGS["final"]
        for name in self.live:
            if t % dt == 0 and t:
                window = [
                    sum(column) / dt for column in zip(*self.seen[name][t - dt : t], strict=True)
                ]
                old = self.I[name] or [0.0] * len(window)
                self.I[name] = [
                    beta1 * i + (1 - beta1) * new for i, new in zip(old, window, strict=True)
                ]
                gaps = [abs(new - i) for new, i in zip(window, self.I[name], strict=True)]
                old = self.U[name] or [0.0] * len(window)
                self.U[name] = [
                    beta2 * u + (1 - beta2) * gap for u, gap in zip(old, gaps, strict=True)
                ]
            self.seen[name].append([abs(g) for g in gradients[name].flatten().tolist()])
        if t <= w or (t < T - f and t % dt):
            return
        v = 0.0 if t >= T - f else (1 - (t - w) / (T - w - f)) ** 3
        scores = {
            name: [i * u for i, u in zip(self.I[name], self.U[name], strict=True)]
            for name in self.live
        }
        everything = sorted(score for name in self.live for score in scores[name])
        if k := int(len(everything) * (1 - v)):
            threshold = everything[k - 1]
            self.live = [
                name
                for name in self.live
                if sum(scores[name]) / len(scores[name]) >= threshold and v
            ]


def test_scores_and_freezing_are_those_of_a_slow_plain_implementation():
    model = model_of(torch.float64)
    optimizer, schedule = optimizer_of(model), Freezing(model, **SETTINGS)
    plain, counts = Plain(list(matrices(model))), set()
    for t in range(T):
        backward(model, t)
        gradients = {
            name: p.grad.clone() for name, p in matrices(model).items() if p.grad is not None
        }
        optimizer.step()
        schedule.step()
        plain.step(t, gradients)
        optimizer.zero_grad()
        assert schedule.frozen == [name for name in plain.names if name not in plain.live]
        counts.add(len(schedule.frozen))
        scores = schedule.state_dict()["scores"]
        assert list(scores) == plain.live
        for name in plain.live if t >= SETTINGS["deltaT"] else ():
            for ours, theirs in (("sensitivity", plain.I), ("uncertainty", plain.U)):
                own = scores[name][ours].flatten()
                torch.testing.assert_close(
                    own, torch.tensor(theirs[name], dtype=torch.float64), rtol=1e-12, atol=0
                )
    assert len(counts) > 3  # they froze at several times
    assert max(counts) == 6


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize(
    "settings", [{"fused": True}, {"foreach": True}, {"foreach": False, "amsgrad": True}], ids=str
)
def test_what_froze_stays_as_it_is_to_the_bit(settings, set_to_none):
    model = model_of()
    optimizer, schedule, held = optimizer_of(model, **settings), Freezing(model, **SETTINGS), {}
    for step in range(T):
        before = tiny_transformers.copied_tensors(model)
        train(model, optimizer, schedule, 1, step, set_to_none)
        for name, parameter in matrices(model).items():
            assert parameter.requires_grad == (name not in schedule.frozen)
            assert torch.equal(parameter, before[name]) == (name in held)
            if name in schedule.frozen:
                assert parameter.grad is None
                held.setdefault(name, parameter.detach().clone())
                assert torch.equal(parameter, held[name])
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_core", "lora_out_scale")):
                assert not torch.equal(parameter, before[name])
        if step <= SETTINGS["warmup"]:
            assert not held
    assert len(held) == 6
    assert not schedule.state_dict()["scores"]


def test_once_all_are_frozen_there_is_nothing_more_to_do():
    model = model_of()
    optimizer, schedule = optimizer_of(model), Freezing(model, 4, warmup=0, final=1, deltaT=1)
    train(model, optimizer, schedule, 4)
    assert len(schedule.frozen) == 6
    optimizer.zero_grad()
    schedule.step()  # no gradient is missed
    assert schedule.last_step == 5


def test_resume_is_exact():
    def made():
        model = model_of()
        return model, optimizer_of(model), Freezing(model, **SETTINGS)

    straight, seen = made(), 0
    states = []
    for step in range(T):
        states.append(copy.deepcopy([part.state_dict() for part in straight]))
        train(*straight, 1, step)
    for start, order in ((22, (0, 1, 2)), (35, (2, 0, 1)), (50, (2, 1, 0))):
        resumed = made()
        for index in order:
            resumed[index].load_state_dict(states[start][index])
        seen += 0 < len(resumed[2].frozen) < 6
        train(*resumed, T - start, start)
        assert resumed[2].frozen == straight[2].frozen
        for name, value in straight[0].state_dict().items():
            assert torch.equal(value, resumed[0].state_dict()[name])
    assert seen


def test_a_rewind_lets_what_the_schedule_froze_train_again():
    model = model_of()
    model[0].lora_A.requires_grad_(False)
    schedule = Freezing(model, 4, warmup=0, final=1, deltaT=1)
    early = copy.deepcopy(schedule.state_dict())
    train(model, optimizer_of(model), schedule, 4)
    assert schedule.frozen == [
        name for name in matrices(model) if name != "0.lora_A"
    ]  # frozen by hand, it is not judged
    schedule.load_state_dict(early)
    assert {n for n, p in matrices(model).items() if p.requires_grad} == matrices(model).keys() - {
        "0.lora_A"
    }
    assert schedule.frozen == []


def test_a_gradient_that_is_not_finite_counts_nothing():
    model = model_of()
    schedule = Freezing(model, **SETTINGS)
    for value in (float("inf"), float("nan"), 3.0, -1.0, 0.0):
        for parameter in matrices(model).values():
            parameter.grad = torch.full_like(parameter, value)
        schedule.step()
    for score in schedule.state_dict()["scores"].values():
        torch.testing.assert_close(
            score["sensitivity"], torch.full_like(score["sensitivity"], 0.15 * 1.0)
        )


def test_half_precision_factors_have_scores_in_fp32_and_a_layer_without_a_gradient_waits():
    model = tiny_transformers.perturb(model_of(torch.bfloat16))
    layers = [layer.to(torch.bfloat16) for layer in model if isinstance(layer, lorafast.Linear)]
    schedule = Freezing(model, **SETTINGS)
    for step in range(9):
        backward(model, step)
        layers[1].lora_A.grad = layers[1].lora_B.grad = None
        schedule.step()
    scores = schedule.state_dict()["scores"]
    assert {score["window"].dtype for score in scores.values()} == {torch.float32}
    assert [bool(score["sensitivity"].any()) for score in scores.values()] == [
        True,
        True,
        False,
        False,
        True,
        True,
    ]


def test_a_step_after_zero_grad_is_refused():
    model = model_of()
    optimizer, schedule = optimizer_of(model), Freezing(model, **SETTINGS)
    backward(model, 0)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"after backward\(\) and before zero_grad"):
        schedule.step()
    assert schedule.last_step == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_steps": 0}, "total_steps=0"),
        ({"total_steps": 1.5}, r"total_steps=1\.5"),
        ({"deltaT": 0}, "deltaT=0"),
        ({"beta1": 1}, "beta1=1 must be a number in"),
        ({"beta2": -0.1}, r"beta2=-0\.1"),
        ({"warmup": 1.0}, r"warmup=1\.0 must be a count of steps, or a share"),
        ({"warmup": -1}, "warmup=-1"),
        ({"final": True}, "final=True"),
        ({"warmup": 0.5, "final": 0.5}, r"warmup=0\.5 and final=0\.5 leave none of total_steps=60"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Freezing(model_of(), **SETTINGS | settings)


def test_models_without_such_layers():
    with pytest.raises(TypeError, match="model must be a"):
        Freezing([model_of()], 5)
    for model in (nn.Linear(2, 2), lorafast.Linear(2, 2)):
        with pytest.raises(
            ValueError, match=r"model Linear has no layer with a lorafast\.AFLoRA adapter"
        ):
            Freezing(model, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("frozen"), "must hold"),
        (lambda s: s["frozen"].append("7.lora_A"), r"this one has no 7\.lora_A"),
        (lambda s: s["scores"].update({"x": {}}), "this one has no x"),
        (lambda s: s["scores"]["0.lora_A"].pop("count"), "a score .* must hold"),
        (
            lambda s: s["scores"]["2.lora_A"].update(window=torch.zeros(2, 2)),
            r"window \(2, 2\) of the state must be \(3, 13\)",
        ),
        (lambda s: s.update(deltaT=0), "deltaT=0"),
    ],
)
def test_a_state_that_is_none_changes_nothing(change, message):
    model = model_of()
    schedule = Freezing(model, **SETTINGS)
    train(model, optimizer_of(model), schedule, 6)
    before = copy.deepcopy(schedule.state_dict())
    wrong = copy.deepcopy(before)
    wrong["last_step"] = 99
    change(wrong)
    with pytest.raises(ValueError, match=message):
        schedule.load_state_dict(wrong)
    assert str(schedule.state_dict()) == str(before)


@pytest.mark.peft
def test_disk(tmp_path):
    import peft

    model = lorafast.adapt(
        tiny_transformers.llama(),
        AFLoRA(r=3, d_initial=0.2),
        rank_pattern={"q_proj": 5, r"1\.mlp\.up_proj": 2},
        seed=1,
    )
    tiny_transformers.perturb(model)
    schedule = Freezing(model, 10)
    next(iter(schedule._matrices.values())).freeze()
    want = tiny_transformers.outputs(model)
    lorafast.save_adapter(model, tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (said["peft_type"], said["r"], said["d_initial"]) == ("LORAFAST_AFLORA", 3, 0.2)
    assert said["peft_type"] not in {kind.value for kind in peft.PeftType}
    loaded = lorafast.load_adapter(tiny_transformers.llama(), tmp_path, trainable=True)
    assert torch.equal(tiny_transformers.outputs(loaded), want)
    assert {layer.r for layer in loaded.modules() if isinstance(layer, lorafast.Linear)} == {
        2,
        3,
        5,
    }
    # On the model that trains, what the schedule froze stays frozen.
    (name,) = schedule.frozen
    tiny_transformers.perturb(model)
    lorafast.load_adapter(model, tmp_path, trainable=True)
    assert [n for n, p in model.named_parameters() if "lora_" in n and not p.requires_grad] == [
        name
    ]
    assert torch.equal(tiny_transformers.outputs(model), want)
    lorafast.save_adapter(model, tmp_path / "lora", as_lora=True)
    torch.testing.assert_close(
        tiny_transformers.outputs(
            tiny_transformers.loaded_by_peft(tiny_transformers.llama(), tmp_path / "lora")
        ),
        want,
        rtol=1e-4,
        atol=2e-5,
    )


def test_merge_in_float64():
    model = tiny_transformers.perturb(model_of(torch.float64))
    x = torch.randn(M, K, dtype=torch.float64)
    want = model(x)
    weights = [
        layer.weight
        + layer.out_scale[:, None] * (layer.lora_B @ (layer.core[:, None] * layer.lora_A))
        for layer in model
        if isinstance(layer, lorafast.Linear)
    ]
    merged = lorafast.merge(model)
    assert not any(isinstance(layer, lorafast.Linear) for layer in merged)
    torch.testing.assert_close(merged(x), want, rtol=1e-13, atol=1e-13)
    for layer, weight in zip((merged[0], merged[2], merged[3]), weights, strict=True):
        torch.testing.assert_close(layer.weight, weight, rtol=1e-14, atol=1e-15)
