"""The host path and autograd: saved tensors, hooks, writes in place, observers, second order."""

import pytest
import torch
from helpers.cpp_compiler import needs_compiler
from helpers.host_path import LAYERS, assert_same_bits, lora, step

import lorafast

pytestmark = needs_compiler


@pytest.mark.compile
@pytest.mark.parametrize("keep", [None, "output", "inner"])
def test_compiled_autograd_traces_the_op(keep, served):
    from torch._dynamo import compiled_autograd

    adapter = lorafast.LoRA(r=4, dropout=0.3) if keep is None else lorafast.DoRA(r=4, keep=keep)
    layer, x = lora(adapter=adapter), torch.randn(5, 16)
    plain = step(layer, x)
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with compiled_autograd._enable(torch.compile(backend=backend)):
        assert_same_bits(step(layer, x), plain)
    assert any("linear_backward" in target for target in seen)
    assert served == [True, True]


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_tensors_are_packed_and_unpacked_in_the_same_order(make, served, by_python):
    def packed():
        seen = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: seen.append((t.dtype, t.shape, t.clone())) or t,
            lambda t: seen.append((t.dtype, t.shape, t.clone())) or t,
        )
        torch.manual_seed(3)
        with hooks:
            layer(x).sum().backward()
        return seen

    layer, x = make(), torch.randn(5, 16, requires_grad=True)
    ours = packed()
    assert any(served)
    by_python()
    theirs = packed()
    assert [one[:2] for one in ours] == [one[:2] for one in theirs]
    assert all(torch.equal(one[2], same[2]) for one, same in zip(ours, theirs, strict=True))


def test_hooks_may_move_what_is_saved(served):
    layer, x = lora(), torch.randn(5, 16)
    plain = step(layer, x)
    with torch.autograd.graph.save_on_cpu():
        assert_same_bits(step(layer, x), plain)
    assert served == [True, True]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_mask(reentrant, served):
    layer, x = lora(dropout=0.3), torch.randn(5, 16)
    plain = step(layer, x)

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)

    torch.manual_seed(3)
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = checkpointed(x)
    y.square().sum().backward()
    assert torch.equal(y, plain["y"])
    assert torch.equal(x.grad, plain["x"])
    assert torch.equal(layer.lora_A.grad, plain["lora_A"])
    assert all(served)


@pytest.mark.parametrize("keep", ["output", "inner"])
@pytest.mark.parametrize("dropped", [False, True])
def test_an_output_modified_in_place(dropped, keep, served):
    layer = lora(adapter=lorafast.DoRA(r=4, keep=keep))
    y = layer(torch.randn(5, 16, requires_grad=True))
    loss = y.relu_().sum()
    if dropped:
        del y
    if keep == "inner":
        loss.backward()
    else:
        with pytest.raises(RuntimeError, match=r"weight \(24, 16\): its output was modified"):
            loss.backward()
    assert served == [True]


def test_an_output_modified_where_hooks_keep_it(served):
    """Nothing else knows of the write: the output is gone, and under hooks torch checks nothing."""
    layer = lora(adapter=lorafast.DoRA(r=4, keep="output"))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        loss = layer(torch.randn(5, 16, requires_grad=True)).mul_(2).sum()
    with pytest.raises(RuntimeError, match="its output was modified"):
        loss.backward()
    assert served == [True]


def test_a_second_backward_and_second_derivatives_are_refused(served):
    layer, x = lora(), torch.randn(5, 16, requires_grad=True)
    y = layer(x)
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="double backward unsupported"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError), match="batched gradients"):
        torch.autograd.grad(layer(x), x, torch.ones(2, 5, 24), is_grads_batched=True)
    assert all(served)


def test_gradients_of_any_layout_and_of_some_inputs(served):
    layer, x = lora(), torch.randn(5, 16, requires_grad=True)
    (whole,) = torch.autograd.grad(layer(x), x, torch.ones(5, 24))
    (expanded,) = torch.autograd.grad(layer(x).sum(), x)
    (strided,) = torch.autograd.grad(layer(x), x, torch.ones(24, 5).t())
    assert torch.equal(whole, expanded)
    assert torch.equal(whole, strided)
    (alone,) = torch.autograd.grad(layer(x).sum(), layer.lora_A)
    assert alone.shape == layer.lora_A.shape
    assert all(served)


def test_observers_see_ops(served, few_tokens_by_op):
    from torch.utils.flop_counter import FlopCounterMode

    layer, x = lora(), torch.randn(5, 16, requires_grad=True)
    y = layer(x)
    assert served == [True]
    with FlopCounterMode(display=False) as counted:
        y.sum().backward()
    assert any("linear_backward" in str(op) for op in counted.flop_counts["Global"])
    with FlopCounterMode(display=False) as counted:
        layer(x)
    assert any("lorafast" in str(op) for op in counted.flop_counts["Global"])
    assert served == [True, False]


def test_exact_norms_reach_the_host_path(served):
    layer = lora(adapter=lorafast.DoRA(r=4, detach_norm=False))
    layer(torch.randn(5, 16, requires_grad=True)).sum().backward()
    assert served[-1]
