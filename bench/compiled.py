"""torch.compile as the bench runs it: every graph for one size, and no eager code under the name of a compiled one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
from torch import nn

from lorafast.bench.impl import Impl

# Contenders of a model share its code, and each is a graph of its own; LaMDA's schedule asks for a few more.
GRAPHS = 64


def compiled(module: nn.Module, torchs_draws: bool = False) -> nn.Module:
    """The module through torch.compile. torchs_draws: random numbers come from torch's generator, in the order eager code asks."""
    return torch.compile(
        module, dynamic=False, options={"fallback_random": True} if torchs_draws else None
    )


def forget() -> None:
    """Compile whatever comes from scratch: a graph made general for two sizes would be timed otherwise."""
    torch._dynamo.reset()


def strict(impls: Iterable[Impl]) -> contextlib.AbstractContextManager:
    """Past dynamo's limit of graphs a call raises, where torch would go on with eager code. Nothing if none is compiled."""
    if not any(impl.compile for impl in impls):
        return contextlib.nullcontext()
    return torch._dynamo.config.patch(recompile_limit=GRAPHS, fail_on_recompile_limit_hit=True)
