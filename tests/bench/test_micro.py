"""The micro-benchmarks without pytest-benchmark: all primitives are covered, and the calls run."""

import pytest
import torch

import lorafast
from lorafast.bench import micro
from lorafast.engine.backends import eager
from lorafast.engine.problem import PRIMITIVES


def test_every_primitive_is_timed_with_dropout_where_it_draws_a_mask():
    timed = {(case.values[0], case.values[3]) for case in micro.CASES}
    assert {primitive for primitive, _ in timed} == micro.CALLS.keys() == set(PRIMITIVES)
    assert {primitive for primitive, p in timed if p} == set(micro.DROPS)


@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_the_timed_calls_run(primitive, p, monkeypatch):
    monkeypatch.setattr(micro, "M", 5)
    monkeypatch.setattr(micro, "R", 2)
    assert micro.CALLS[primitive](eager, micro.Operands(6, 4, torch.bfloat16), p) is not None


def test_every_kind_of_layer_is_called():
    x = torch.randn(4, 16)
    frozen, *adapted = [make() for make in micro.LAYERS.values()]
    assert not any(p.requires_grad for p in frozen.parameters())
    kinds = {type(layer.adapter) for layer in adapted}
    assert kinds == {lorafast.LoRA, lorafast.LaMDA, lorafast.DoRA}
    assert all(layer(x).shape == (4, 16) and layer.training for layer in adapted)
