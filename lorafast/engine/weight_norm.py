"""When DoRA's norm is computed and when it comes from the cache: the one place that decides."""

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
    used again while no factor has been replaced or written and no optimizer has made a step.
    """

    detach: bool = True
    cache: bool = False


def policy_of(detach_norm: bool, cache_norm: bool, training: bool) -> NormPolicy:
    """The policy of a layer's call: exact where it is asked for and gradients are recorded.

    With gradients recorded the norm is computed at every call, which is cheap. The cache serves
    evaluation without gradients, and other calls only for cache_norm=True, with which the user
    promises not to write the factors through `.data`.
    """
    grad = torch.is_grad_enabled()
    exact = grad and not detach_norm
    cache = not exact and (cache_norm or not (training or grad))
    return NormPolicy(not exact, cache and not torch.compiler.is_compiling())


class _State(NamedTuple):
    """One state of a tensor. While the weak reference lives, no other storage has its address."""

    storage: StorageWeakRef
    place: tuple


class _Entry(NamedTuple):
    states: tuple[_State | None, ...]
    rest: tuple
    norm: torch.Tensor


# Keyed weakly by the tensor lora_B. An entry notices every replaced tensor or storage, every
# in-place write that raises a version counter, and every optimizer step. It cannot notice a write
# through `.data` into the same storage: for that there is `forget`.
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
