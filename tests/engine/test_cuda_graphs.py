"""A training step captured as a CUDA graph: it replays with fresh masks. Runs where a GPU is."""

import pytest
import torch

import lorafast

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
ADAPTERS = {
    "lora": lorafast.LoRA(r=8, dropout=0.5),
    "dora": lorafast.DoRA(r=8, dropout=0.5),
    "lamda": lorafast.LaMDA(r=8, dropout=0.5),
}


def captured(adapter, M=48):
    """A layer, the graph of one forward and backward, and y and the gradients that it writes."""
    torch.use_deterministic_algorithms(False)
    layer = lorafast.Linear(64, 96, adapter=adapter, device="cuda")
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(M, 64, device="cuda", requires_grad=True)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def step():
        y = layer(x)
        return y, *torch.autograd.grad(y.square().sum(), leaves)

    # What is compiled, tried and allocated once is so before the capture.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    return layer, graph, made


def replayed(graph, made):
    graph.replay()
    torch.cuda.synchronize()
    return [tensor.clone() for tensor in made]


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_replays_draw_fresh_masks(adapter):
    _, graph, made = captured(adapter)
    first, second = replayed(graph, made), replayed(graph, made)
    assert all(torch.isfinite(tensor).all() for tensor in first + second)
    assert not torch.equal(first[0], second[0])
    torch.cuda.manual_seed(7)
    third = replayed(graph, made)
    torch.cuda.manual_seed(7)
    for one, same in zip(third, replayed(graph, made), strict=True):
        assert torch.equal(one, same)


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_a_replay_reads_what_an_optimizer_has_written(adapter):
    """DoRA's norm among it, which belongs to the factors as they are."""
    layer, graph, made = captured(type(adapter)(r=8))
    before = replayed(graph, made)[0]
    with torch.no_grad():
        layer.lora_B.mul_(2)
    assert not torch.equal(replayed(graph, made)[0], before)
