"""The flops that torch's counter sees in an adapted layer: those of the same formula in torch."""

import dataclasses
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lorafast
from lorafast import functional, testing
from lorafast.engine import flop_formulas
from lorafast.engine.multi_adapter import Factors
from lorafast.testing import FORMS, GRADIENTS, Case

M, N, K, R = 5, 7, 11, 3
# The norm of a form with a core multiplies it into B, and the eager chain into A.
COUNTED = [form for form in FORMS if not (form.magnitude and form.core == "full")]
LORA, LAMDA = (next(form for form in FORMS if form.name == name) for name in ("lora", "lamda"))


def flops(function):
    """Return the flops that torch counts in a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def of_form(form, p=0.0):
    case = Case(form, M, N, K, R, torch.float32, p)
    return case, testing.make(case)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("form", COUNTED, ids=lambda form: form.name)
def test_every_form_counts_as_the_eager_chain(form, p):
    case, t = of_form(form, p)
    if not case.works:
        pytest.skip("keep='output' with a mask on the base term")
    # Without dropout the second base product of the chain is the first one again.
    on = form.dropout_on if p else "adapter"
    plain = dataclasses.replace(case, form=dataclasses.replace(form, dropout_on=on))
    with torch.no_grad():
        expected = flops(lambda: testing.chain(plain, t))
        assert flops(lambda: testing.ours(case, t)) == expected
    expected = flops(lambda: testing.run(testing.chain, plain, t))
    recomputed = 2 * M * N * (K + R) if form.keep == "recompute" else 0
    assert flops(lambda: testing.run(testing.ours, case, t)) == expected + recomputed


@pytest.mark.parametrize(
    ("form", "trained"),
    [
        (LORA, ("x",)),
        (LORA, ("lora_A",)),
        (LORA, ("lora_B",)),
        (LORA, ("lora_A", "lora_B")),
        (LORA, ("bias", "lora_B")),
        (LAMDA, ("core",)),
        (LAMDA, ("x", "core")),
        (LAMDA, ("x", "core", "lora_B")),
    ],
)
def test_gradients_that_are_not_needed_count_nothing(form, trained):
    case, t = of_form(form)
    expected = flops(lambda: testing.run(testing.chain, case, t, trained=trained))
    assert flops(lambda: testing.run(testing.ours, case, t, trained=trained)) == expected


def test_frozen_columns_of_B_get_no_gradient_and_count_nothing():
    _, t = of_form(LAMDA)
    t = {name: testing.leaf(name, value, False, GRADIENTS) for name, value in t.items()}
    names = ("x", "weight", "bias", "lora_A", "lora_B", "core")

    def backward(frozen):
        y = functional.linear(**{name: t[name] for name in names}, frozen_columns=frozen)
        return flops(lambda: y.backward(t["dy"]))

    assert backward(0) - backward(2) == 2 * M * N * 2


@pytest.mark.parametrize("trained", [GRADIENTS, ("lora_B",), ("x", "lora_A")])
def test_several_adapters_count_as_their_sum(trained):
    case, first = of_form(LORA)
    second = testing.make(dataclasses.replace(case, R=R + 1), seed=1)
    leaves = [
        {name: testing.leaf(name, value, False, trained) for name, value in t.items()}
        for t in (first, second)
    ]
    x, weight, bias, dy = (leaves[0][name] for name in ("x", "weight", "bias", "dy"))
    factors = [(t["lora_A"], t["lora_B"]) for t in leaves]

    def chain():
        low_rank = sum(F.linear(F.linear(x, A), B) for A, B in factors)
        (F.linear(x, weight, bias) + low_rank).backward(dy)

    def ours():
        functional.several(x, weight, bias, [Factors(A, B) for A, B in factors]).backward(dy)

    assert flops(ours) == flops(chain) > 0


@pytest.mark.parametrize(
    "form", [form for form in COUNTED if form.axis == "out"], ids=lambda form: form.name
)
def test_experts_count_as_their_rows_in_layers(form):
    case = testing.ExpertsCase(Case(form, 0, N, K, R, torch.float32), (2, 0, 4))
    one = testing.make(dataclasses.replace(case.case, M=case.S))
    many = testing.make_experts(case)

    def step(function, case, made):
        t = {name: testing.leaf(name, value) for name, value in made.items()}
        y = function(case, t)
        return flops(lambda: function(case, t)), flops(lambda: y.backward(t["dy"]))

    forward, backward = step(testing.ours, dataclasses.replace(case.case, M=case.S), one)
    experts_forward, experts_backward = step(testing.ours_experts, case, many)
    if form.detach_norm:
        assert experts_backward == backward
        norms = 0 if not form.magnitude else (len(case.counts) - 1) * 2 * N * K * R
        assert experts_forward == forward + norms > 0


def test_the_ops_of_lorafast_have_a_formula_each():
    defined = {
        op.partition("::")[2]
        for op in torch._C._dispatch_get_all_op_names()
        if op.startswith("lorafast::")
    }
    assert defined == set(flop_formulas.FORMULAS)


@pytest.mark.peft
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_an_adapted_model_counts_as_pefts(p):
    peft = pytest.importorskip("peft")
    x = torch.randn(2, 4, 8)

    def step(model):
        return flops(lambda: model(x).sum().backward())

    def base():
        return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6))

    config = peft.LoraConfig(r=4, lora_dropout=p, target_modules=["0", "2"])
    expected = step(peft.get_peft_model(base(), config))
    adapted = lorafast.adapt(base(), lorafast.LoRA(r=4, dropout=p))
    assert step(adapted) == expected > 0
    accelerated = peft.get_peft_model(base(), config)
    lorafast.accelerate(accelerated)
    assert step(accelerated) == expected


@pytest.mark.parametrize(
    "first", [pytest.param("torch.utils.flop_counter", marks=pytest.mark.slow), "lorafast"]
)
def test_formulas_are_registered_whichever_is_imported_first(first):
    program = f"""
import importlib.util, sys, torch, {first}, lorafast
layer = lorafast.Linear(4, 3, adapter=lorafast.LoRA(r=2))
before = "{first}" == "lorafast" and "torch.utils.flop_counter" in sys.modules
assert importlib.util.find_spec("torch.utils.flop_counter") is not None
import torch.utils.flop_counter as counter
with counter.FlopCounterMode(display=False) as mode:
    layer(torch.randn(5, 4))
print(before, mode.get_total_flops(), counter.__spec__.loader.get_filename())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    imported, counted, file = done.stdout.split()
    assert (imported, int(counted)) == ("False", 2 * 5 * (4 * 3 + 2 * (4 + 3)))
    assert file.endswith("flop_counter.py")
