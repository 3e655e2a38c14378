"""Bytes that autograd keeps, and bytes that a call allocates."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lorafast.engine.backends import cpu
from lorafast.runtime import env, torch_internals


@dataclass(frozen=True)
class Saved:
    """The tensors autograd keeps: bytes made for it, and names of tensors kept by reference.

    Those by reference are inputs and the output.
    """

    own: int
    referenced: frozenset[str]


class _Kept:
    """An object the graph holds instead of a tensor: while it lives, autograd keeps the tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        # Detached: an output would hold the graph that holds it.
        self.tensor = tensor.detach()


def saved(
    function: Callable[[], torch.Tensor],
    named: dict[str, torch.Tensor],
    constant: Iterable[torch.Tensor],
) -> Saved:
    """Return what the graph of function() keeps, as saved_tensors_hooks see it.

    Counted is what the graph still holds once function has returned: numel·itemsize once per
    data_ptr, and no more of a storage than it has (views and expanded tensors count once).

    constant: parameters and buffers, which are left out.
    named: tensors that are kept by reference, as the output "y" is.
    """
    packed: list[weakref.ref[_Kept]] = []

    def pack(tensor: torch.Tensor) -> _Kept:
        kept = _Kept(tensor)
        packed.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        y = function()
    storages: dict[int, dict[int, torch.Tensor]] = {}
    for kept in filter(None, (reference() for reference in packed)):
        views = storages.setdefault(torch_internals.storage_key(kept.tensor), {})
        largest = views.get(kept.tensor.data_ptr())
        if largest is None or largest.numel() < kept.tensor.numel():
            views[kept.tensor.data_ptr()] = kept.tensor
    names = {torch_internals.storage_key(t): name for name, t in (named | {"y": y}).items()}
    left_out = {torch_internals.storage_key(t) for t in constant}
    own = 0
    for storage, views in storages.items():
        if storage not in names and storage not in left_out:
            whole = next(iter(views.values())).untyped_storage().nbytes()
            own += min(whole, sum(t.numel() * t.itemsize for t in views.values()))
    return Saved(own, frozenset(names[storage] for storage in storages if storage in names))


class Allocated(NamedTuple):
    """Bytes that a function allocated.

    held: alive when it has returned, its result among them. peak: the most at one time.
    """

    held: int
    peak: int


def allocated(function: Callable[[], object]) -> Allocated:
    """Return the bytes that function() allocates on the CPU.

    They are counted from the events of torch's allocator, so that workspaces inside ops and
    compiled code are seen too. The largest workspace of lorafast's C++ kernels, which is not
    torch's, is added to the peak.
    """
    env.silence_profiler()
    cpu.workspace()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = function()
    events = torch_internals.allocations(profile)
    del kept
    alive: dict[int, int] = {}
    now = peak = 0
    for _, address, size in events:
        if size > 0:
            alive[address] = size
            now += size
        else:  # what was there before does not count
            now -= alive.pop(address, 0)
        peak = max(peak, now)
    return Allocated(now, peak + cpu.workspace())
