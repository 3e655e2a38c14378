"""Activation checkpointing of both kinds replays the same dropout and gives the same gradients."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lorafast


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "adapter",
    [
        lorafast.LoRA(r=4, dropout=0.3),
        lorafast.DoRA(r=4, dropout=0.3),
        lorafast.DoRA(r=4, dropout=0.3, dropout_on="both"),
        lorafast.LaMDA(r=4, dropout=0.3),
    ],
    ids=repr,
)
def test_checkpoint(adapter, reentrant):
    block = torch.nn.Sequential(
        lorafast.Linear(16, 16, bias=False, adapter=adapter),
        torch.nn.GELU(),
        lorafast.Linear(16, 8, adapter=adapter),
    )
    with torch.no_grad():
        for layer in (block[0], block[2]):
            layer.lora_B.normal_()
    x = torch.randn(5, 16, requires_grad=True)
    trained = [x, *(p for p in block.parameters() if p.requires_grad)]
    grads = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        torch.manual_seed(7)
        y = run(x)
        grads.append([y.detach(), *_backward(y, trained)])
    for plain, again in zip(*grads, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("how", ["checkpoint", "hooks", "plain"])
def test_an_in_place_op_on_a_kept_output_is_never_silent(how):
    layer = lorafast.Linear(16, 16, bias=False, adapter=lorafast.DoRA(r=4, keep="output"))
    x = torch.randn(5, 16, requires_grad=True)

    def follow(x):
        return layer(x).sigmoid_()

    if how == "checkpoint":
        loss = checkpoint(follow, x, use_reentrant=False).sum()
    elif how == "hooks":
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            loss = follow(x).sum()
    else:
        loss = follow(x).sum()
    with pytest.raises(
        RuntimeError, match=r"weight \(16, 16\): its output was modified in place.*keep='inner'"
    ):
        loss.backward()


def _backward(y, leaves):
    for leaf in leaves:
        leaf.grad = None
    y.square().sum().backward()
    return [leaf.grad.clone() for leaf in leaves]
