"""torch.compile as the bench uses it: one graph per size, and no silent fallback to eager code."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

# The candidates of a model share its code, and each needs graphs of its own; LaMDA's schedule adds
# a few.
MAX_GRAPHS = 64


def compile_module(module: nn.Module, torch_random: bool = False) -> nn.Module:
    """Return the module through torch.compile.

    torch_random: random numbers come from torch's generator in the order in which eager code draws
    them.
    """
    options = {"fallback_random": True} if torch_random else None
    return torch.compile(module, dynamic=False, options=options)


def reset() -> None:
    """Drop all compiled graphs, because one generalised over two sizes runs at another speed."""
    torch._dynamo.reset()


def strict(any_compiled: bool) -> contextlib.AbstractContextManager:
    """Return a context in which a call beyond dynamo's limit of graphs raises.

    torch would run eager code instead. Without a compiled candidate the context does nothing.
    """
    if not any_compiled:
        return contextlib.nullcontext()
    return torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS, fail_on_recompile_limit_hit=True)
