"""Exact counts of bytes."""

import torch
from torch import nn

from lorafast import testing
from lorafast.bench.measure import memory

CPU = torch.device("cpu")


def test_bytes_of_a_frozen_layer_are_exact():
    M, K, N = 64, 48, 96
    layer = nn.Linear(K, N).requires_grad_(False)
    x, dy = torch.randn(M, K, requires_grad=True), torch.randn(M, N)
    assert memory.measure(lambda: layer(x), CPU) == (M * N * 4, M * N * 4)

    def step():
        layer(x).backward(dy)

    found = memory.measure(step, CPU)
    assert found.held == M * K * 4  # dx
    assert found.peak == M * (N + K) * 4
    assert memory.measure(lambda: None, CPU) == (0, 0)


def test_memory_that_was_allocated_before_is_not_counted():
    held = [torch.ones(1000)]

    def function():
        held.clear()
        return torch.ones(10)

    assert testing.allocated(function) == (40, 40)


def test_saved_tensors_are_counted_once_and_only_while_the_graph_holds_them():
    x, weight = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4)

    def function():
        (x.sigmoid() * 2).detach()  # its graph is gone at the end
        expanded = weight.sum().expand(8, 4)  # 4 bytes, whatever its shape says
        h = x.exp()  # saved once, for the backward of exp and of sin
        return h.sin() * expanded

    saved = testing.saved(function, {"x": x}, [])
    assert saved.own == 4 + 8 * 4 * 4
    assert saved.referenced == frozenset()
