"""list_methods: every method with its facts, and the code that uses it."""

import ast
import re

import pytest

import lorafast
from lorafast import registry
from lorafast.bench.cases import expected_grads, recipes

METHODS = {method.name: method for method in lorafast.list_methods()}
# What a method's code may speak of without having made it.
GIVEN = {"torch", "model", "lr", "total_steps", "batches", "loss_fn"}


def test_every_method_is_there_once_with_its_facts():
    assert len(METHODS) == len(registry.METHODS)
    for method in METHODS.values():
        assert method.kind in registry.KINDS
        assert re.fullmatch(r"arXiv \d{4}\.\d{5}|kexue.fm 9590", method.paper)
        assert method.trains
        assert method.keeps
        assert (
            method.adapter is None or getattr(lorafast, method.adapter.__name__) is method.adapter
        )


def test_every_adapter_optimizer_and_schedule_is_some_methods():
    asked = " ".join(method.ask for method in METHODS.values())
    for name in (*lorafast.optim.__all__, *lorafast.schedule.__all__):
        assert name in asked
    for name in lorafast.__all__:
        if isinstance(getattr(lorafast, name), type) and issubclass(
            getattr(lorafast, name), lorafast.methods.adapter.Adapter
        ):
            assert name in asked


@pytest.mark.parametrize("name", METHODS)
def test_how_to_ask_is_code_of_names_there_are(name):
    for node in ast.walk(ast.parse(METHODS[name].ask.replace("…", "..."))):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in ("optim", "schedule")
        ):
            assert hasattr(getattr(lorafast, node.value.id), node.attr)
        elif isinstance(node, ast.Name):
            assert hasattr(lorafast, node.id) or node.id in GIVEN


def test_the_bench_knows_how_each_trains():
    assert recipes.RECIPES.keys() == METHODS.keys()
    with_adapter = {name for name, method in METHODS.items() if method.adapter}
    assert expected_grads.TRAINED.keys() == with_adapter
    for name, method in METHODS.items():
        spec = recipes.spec(name, 4, 0.1, "both")
        assert type(spec) is (method.adapter or type(None))
        if spec is not None and not recipes.RECIPES[name].needs_gradients:
            held = lorafast.Linear(12, 10, adapter=spec)
            trained = {
                part.removeprefix("lora_") for part, p in held.named_parameters() if p.requires_grad
            }
            assert trained == {part.removeprefix("lora_") for part in expected_grads.TRAINED[name]}
