"""The micro-benchmarks without their clock: every primitive is in, and what is timed runs."""

import pytest
import torch

import lorafast
from lorafast.bench import micro
from lorafast.engine.backends import eager
from lorafast.engine.problem import PRIMITIVES


def test_every_primitive_is_timed_and_dropout_where_it_matters():
    timed = {(case.values[0], case.values[3]) for case in micro.CASES}
    assert {primitive for primitive, _ in timed} == micro.CALLS.keys() == set(PRIMITIVES)
    assert {primitive for primitive, p in timed if p} == set(micro.DROPS)


@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_what_is_timed_runs(primitive, p, monkeypatch):
    monkeypatch.setattr(micro, "M", 5)
    monkeypatch.setattr(micro, "R", 2)
    assert micro.CALLS[primitive](eager, micro.Operands(6, 4, torch.bfloat16), p) is not None


def test_a_call_is_timed_of_every_kind_of_layer():
    x = torch.randn(4, 16)
    frozen, *adapted = [made() for made in micro.LAYERS.values()]
    assert not any(p.requires_grad for p in frozen.parameters())
    assert {type(layer.adapter) for layer in adapted} == {
        lorafast.LoRA,
        lorafast.LaMDA,
        lorafast.DoRA,
    }
    assert all(layer(x).shape == (4, 16) and layer.training for layer in adapted)
