"""The forward of transformers' experts with adapters: lorafast's implementation in its registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from lorafast.engine.grouped.groups import Groups
from lorafast.nn import stacked_linear
from lorafast.nn.expert_parameter import CONTAINER, IMPLEMENTATION, is_transposed

# The type of transformers' registry of implementations.
_REGISTRY = ("transformers.integrations.moe", "ExpertsInterface")
# The output [S,N] of one projection for rows [S,K] that are sorted by expert.
Projection = Callable[[torch.Tensor, Groups], torch.Tensor]


class Routing(NamedTuple):
    """The (token, slot) pairs of a call, sorted by expert.

    groups: the rows of each expert; its rows are the index token·top_k + slot of each. tokens: the
    token of each row, [S].
    """

    groups: Groups
    tokens: torch.Tensor


def forward(
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Return the output of a module of experts, as transformers' grouped implementation does.

    Projections with an adapter are lorafast's, others the frozen grouped product.

    Args:
        experts: the module of experts.
        hidden_states: tokens [M,H].
        top_k_index: the experts of each token, [M,top_k].
        top_k_weights: their weights, [M,top_k].

    Returns:
        The weighted sum over each token's experts, [M,H].
    """
    adapters = experts._modules.get(CONTAINER, {})
    if adapters and all(layer.runs_as_base for layer in adapters.values()):
        implementation = adapters.base_config._experts_implementation
        base = _registry(experts).get(implementation, type(experts).forward.__wrapped__)
        if implementation != IMPLEMENTATION:
            return base(experts, hidden_states, top_k_index, top_k_weights)

    def projection(name: str) -> Projection:
        if name in adapters:
            layer = adapters[name]
            return lambda x, groups: layer(x, *groups)
        return frozen_projection(experts, name)

    return run(experts, hidden_states, top_k_index, top_k_weights, projection)


def frozen_projection(experts: Any, name: str) -> Projection:
    """Return the projection of a Parameter without an adapter."""
    weight, bias = getattr(experts, name), bias_of(experts, name)
    weight = weight.transpose(1, 2) if is_transposed(experts) else weight
    return lambda x, groups: stacked_linear.product(x, groups, weight, bias)


def bias_of(experts: Any, name: str) -> torch.Tensor | None:
    """Return the biases [E,N] of a projection, or None."""
    return getattr(experts, f"{name}_bias") if experts.has_bias else None


def up_name(experts: Any) -> str:
    """Return the name of the first projection's Parameter."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def run(
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    projection: Callable[[str], Projection],
) -> torch.Tensor:
    """Return the output of experts whose projections are given by the name of their Parameter."""
    if experts._is_expert_parallel:
        raise RuntimeError(
            "adapters on experts that are spread over processes (expert parallelism) are not "
            "served: adapt a model whose processes hold all experts"
        )
    (M, top_k), H = top_k_index.shape, hidden_states.shape[-1]
    groups, tokens = route(top_k_index, experts.num_experts)
    x = hidden_states[tokens]
    # Under autocast a projection casts; elsewhere transformers' implementations cast to the weight.
    weight = getattr(experts, up_name(experts))
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        x = x.to(weight.dtype)
    x = projection(up_name(experts))(x, groups)
    x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
    x = projection("down_proj")(x, groups)
    if experts.has_post_expert_norm:
        x = experts.post_expert_norm(x)
    x = x * top_k_weights.reshape(-1)[groups.rows, None]
    # The order of the slots of a token is that of the router, whatever the order of experts.
    place = torch.empty_like(groups.rows)
    place[groups.rows] = torch.arange(place.shape[0], device=place.device)
    return x[place].view(M, top_k, H).sum(1).to(hidden_states.dtype)


def route(top_k_index: torch.Tensor, num_experts: int) -> Routing:
    """Return the (token, slot) pairs sorted by expert. The host waits for nothing.

    Args:
        top_k_index: the experts of each token, [M,top_k].
        num_experts: E.
    """
    sorted_experts, rows = torch.sort(top_k_index.reshape(-1), stable=True)
    bounds = torch.arange(num_experts + 1, device=rows.device, dtype=sorted_experts.dtype)
    offsets = torch.searchsorted(sorted_experts, bounds, out_int32=True)
    return Routing(Groups(offsets, rows), rows // top_k_index.shape[1])


def why_not_experts(module: nn.Module) -> str | None:
    """Return why lorafast has no forward for a module of experts, or None.

    Imports nothing of transformers that the module has not.
    """
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if _registry(module) is None:
        return (
            f"is a {kind}, whose forward does not go by transformers' registry of experts' "
            "implementations"
        )
    if "forward" in vars(module):
        return f"is a {kind} whose forward has been replaced (offloading, kernels of the hub)"
    if module._is_expert_parallel:
        return f"is a {kind} that is spread over processes (expert parallelism)"
    return None


def _registry(module: nn.Module) -> Any:
    """Return transformers' registry if the module's forward looks its implementation up there."""
    cells = getattr(type(module).forward, "__closure__", None) or ()
    for cell in cells:
        kind = type(cell.cell_contents)
        if (kind.__module__, kind.__name__) == _REGISTRY:
            return cell.cell_contents
    return None
