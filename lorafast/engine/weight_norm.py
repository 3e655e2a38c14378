"""When DoRA's norm is computed and when it comes from the cache: the one place that decides.

The norm depends on W, A and B, and no counter of torch notices every write to them: not one through
`.data`, a storage, dlpack or a collective of torch.distributed. So nothing is cached unless the
user asks for it, who then vouches for the writes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from lorafast.engine import formula
from lorafast.engine.problem import CallOptions, LayerTensors
from lorafast.runtime import devices, torch_internals


class NormPolicy(NamedTuple):
    """How a call gets its norm.

    detach: no gradient flows through the norm (arXiv:2402.09353 §4.3). cache: the last result is
    used again until a write that raises a version counter, a replaced tensor or a step of an
    optimizer.
    """

    detach: bool = True
    cache: bool = False


def policy_of(detach_norm: bool, cache_norm: bool) -> NormPolicy:
    """The policy of a layer's call: exact where it is asked for and gradients are recorded.

    The norm is computed at every call, in evaluation too, unless cache_norm is True.
    """
    exact = not detach_norm and torch.is_grad_enabled()
    return NormPolicy(not exact, cache_norm and not exact and not torch.compiler.is_compiling())


class _State(NamedTuple):
    """One state of a tensor. While the weak reference lives, no other storage has its address."""

    storage: StorageWeakRef
    place: tuple


class _Entry(NamedTuple):
    states: tuple[_State | None, ...]
    rest: tuple
    norm: torch.Tensor


# Keyed weakly by the tensor lora_B. An entry notices every replaced tensor or storage, every
# in-place write that raises a version counter, and every step of a torch.optim.Optimizer. After
# any other write the user has to call train(), which calls `forget`.
_entries: WeakIdKeyDictionary = WeakIdKeyDictionary()
_steps = 0
_counting = False


def row_norm(tensors: LayerTensors, options: CallOptions, cache: bool = False) -> torch.Tensor:
    """Return ‖W + s·(out_scale⊙B)·core·A‖ along options.axis, always as a fresh tensor.

    fp32 (fp64 for fp64): [N] for axis="out", [K] for axis="in".
    """
    if not cache or not _may_cache(tensors):
        return formula.row_norm(tensors, options)
    parts = (
        tensors.weight, tensors.lora_A, tensors.lora_B, tensors.core, tensors.out_scale,
        tensors.scale,
    )  # fmt: skip
    states, rest = tuple(map(_state, parts)), (_step_count(), options.scaling, options.axis)
    entry = _entries.get(tensors.lora_B)
    if entry is None or (entry.states, entry.rest) != (states, rest):
        entry = _Entry(states, rest, formula.row_norm(tensors, options))
        _entries[tensors.lora_B] = entry
    return entry.norm.clone()


def forget(lora_B: torch.Tensor | None) -> None:
    """Drop the cached norm of this layer's lora_B."""
    if lora_B is not None:
        _entries.pop(lora_B, None)


def _state(part: torch.Tensor | None) -> _State | None:
    if part is None:
        return None
    version = torch_internals.version_of(part)
    place = (part.data_ptr(), version, part.dtype, tuple(part.shape), part.stride())
    return _State(StorageWeakRef(part.untyped_storage()), place)


def _may_cache(tensors: LayerTensors) -> bool:
    # Inference tensors have no version counter, and autograd may not save a tensor made in
    # inference mode. The replay of a CUDA graph must not depend on what ran before its capture.
    if torch.is_inference_mode_enabled():
        return False
    if any(part is not None and part.is_inference() for part in tensors):
        return False
    return not devices.capturing(tensors.weight)


def _step_count() -> int:
    """The steps of all optimizers since the first call: fused ones raise no version counter."""
    global _counting
    if not _counting:
        register_optimizer_step_post_hook(_count_step)
        _counting = True
    return _steps


def _count_step(*_: object) -> None:
    global _steps
    _steps += 1
