"""The bytes of meta tensors alive at once, beside what torch's allocator counts of real ones."""

import pytest
import torch
import torch.nn.functional as F

from lorafast import testing
from lorafast.bench.measure.fused_ops import fused_ops
from lorafast.bench.measure.live_memory import LiveMemory


def count(function, device):
    """Return the peak of function(x) on tensors of one device."""
    x = torch.empty(64, 32, device=device, requires_grad=True)
    if device == "cpu":
        return testing.allocated(lambda: function(x)).peak
    with LiveMemory(on_gpu=False) as live:
        live.ignore([x])
        function(x)
    return live.peak


def chained(x):
    y = (x * 2).relu()
    y = y + 1
    return y.sum()


def trained(x):
    F.linear(x, torch.ones(16, 32, device=x.device)).tanh().square().sum().backward()
    x.grad = None


def gathered(x):
    index = torch.zeros(64, 4, dtype=torch.int64, device=x.device)
    x.gather(1, index).sum().backward()
    x.grad = None


def mixed(x):
    return (x.detach().to(torch.bfloat16) + x).sum()


@pytest.mark.parametrize("function", [chained, trained, gathered, mixed])
def test_meta_tensors_take_the_bytes_that_real_ones_do(function):
    assert count(function, "meta") == pytest.approx(count(function, "cpu"), abs=64)


def test_a_storage_counts_once_until_it_is_freed():
    with LiveMemory() as live:
        x = torch.empty(10, device="meta")
        views = [x.view(2, 5), x[:3], x.t()]
        assert live.now == 40
        del x
        assert live.now == 40
        del views
        assert live.now == 0
    assert live.peak == 40


def test_attention_keeps_its_output_and_one_number_a_row():
    q, k, v = (torch.empty(2, 4, 128, 16, device="meta", requires_grad=True) for _ in range(3))
    with fused_ops(on_gpu=True), LiveMemory() as live:
        live.ignore([q, k, v])
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert live.now == q.numel() * 4 + 2 * 4 * 128 * 4
        y.backward(y)
        assert q.grad.shape == q.shape
    assert F.scaled_dot_product_attention.__module__ != fused_ops.__module__


def test_attention_has_fewer_flops_under_a_causal_mask():
    noted = []
    q = torch.empty(1, 2, 8, 4, device="meta")
    with fused_ops(True, lambda *one: noted.append(one)):
        for causal in (False, True):
            F.scaled_dot_product_attention(q, q, q, is_causal=causal)
    assert [flops for _, flops, _ in noted] == [4 * 2 * 8 * 8 * 4, 2 * 2 * 8 * 8 * 4]
