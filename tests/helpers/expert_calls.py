"""Calls of a module of experts with a given routing, and the same by a loop over experts."""

from typing import NamedTuple

import torch

from lorafast.engine import philox

TOKENS, TOP_K = 21, 2


class Call(NamedTuple):
    """The arguments of a module of experts, and the gradient of its output."""

    x: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor
    dy: torch.Tensor


def call(experts, dtype, unused=(1,)):
    """Return a call in which these experts get no token, with numbers that all dtypes hold."""
    generator = torch.Generator().manual_seed(11)
    H = experts.hidden_size if hasattr(experts, "hidden_size") else experts.hidden_dim
    chosen = torch.tensor([e for e in range(experts.num_experts) if e not in unused])
    order = torch.rand(TOKENS, len(chosen), generator=generator).argsort(1)
    x, dy = (torch.randn(TOKENS, H, generator=generator).bfloat16() for _ in range(2))
    weights = torch.rand(TOKENS, TOP_K, generator=generator).bfloat16()
    return Call(
        x.to(dtype).requires_grad_(), chosen[order[:, :TOP_K]],
        weights.to(dtype).requires_grad_(), dy.to(dtype),
    )  # fmt: skip


def results(forward, made, parameters):
    """Return the output of a forward of a call, and the gradients of x, weights and parameters."""
    y = forward(made.x, made.index, made.weights)
    grads = torch.autograd.grad(y, [made.x, made.weights, *parameters], made.dy)
    return [y.detach(), *grads]


def loop(experts, layers, made, seeds=(None, None)):
    """Return the output of experts by a loop, on plain autograd.

    layers: those of the first projection and of the last. seeds: what they drop with.
    """
    x, index, weights, _ = made
    out = torch.zeros_like(x)
    for e in range(experts.num_experts):
        tokens, slots = torch.where(index == e)
        if not len(tokens):
            continue
        rows = tokens * TOP_K + slots
        h = _linear(layers[0], e, x[tokens], rows, seeds[0])
        h = experts._apply_gate(h) if experts.has_gate else experts.act_fn(h)
        y = _linear(layers[1], e, h, rows, seeds[1])
        out = out.index_add(0, tokens, (y * weights[tokens, slots, None]).to(out.dtype))
    return out


def _linear(layer, e, x, rows, seed):
    A, B, W = layer.lora_A[e].to(x.dtype), layer.lora_B[e].to(x.dtype), layer._W()[e]
    p = layer.adapter.dropout
    dropped = x
    if p:
        mask = philox.keep_mask_of_rows(seed, p, rows, x.shape[1])
        dropped = torch.where(mask, x * philox.scale(p), 0.0)
    h = dropped @ A.t()
    if layer.core is not None:
        h = h @ layer.core[e].to(x.dtype).t()
    y = x @ W.t() + layer.scaling * (h @ B.t())
    if layer.magnitude is not None:
        wide = layer.magnitude.dtype
        delta = layer.scaling * layer.lora_B[e] @ layer.lora_A[e]
        norm = (W.to(wide) + delta).norm(dim=1).detach()
        y = (layer.magnitude[e] / norm).to(x.dtype) * y
    return y if layer.bias is None else y + layer.bias[e]
