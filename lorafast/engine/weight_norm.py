"""DoRA's norm: the low-rank part folded to one pair (A, B), the gain it gives, and the cache for eval and accumulation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from lorafast.engine import dispatch
from lorafast.engine.problem import (
    CallOptions,
    GradMask,
    LayerTensors,
    accumulator,
    facts_of_norm,
    scaling_of,
)
from lorafast.engine.row_blocks import row_blocks
from lorafast.runtime import devices


class _Mark(NamedTuple):
    """What tells one state of a tensor from another. While a weak reference lives, no other storage gets its address."""

    storage: StorageWeakRef
    place: tuple


class _Entry(NamedTuple):
    marks: tuple[_Mark | None, ...]
    rest: tuple
    norm: torch.Tensor


# Keyed weakly by the tensor lora_B. An entry sees every replaced tensor or storage, every in-place write that bumps a version and
# every optimizer step. It cannot see a write through `.data` into the same storage: that is what `forget` is for.
_entries: WeakIdKeyDictionary = WeakIdKeyDictionary()
_steps = 0
_listening = False


def row_norm(t: LayerTensors, c: CallOptions, cache: bool = False) -> torch.Tensor:
    """‖W + s·(out_scale⊙B)·core·A‖ along c.axis, fp32 (fp64 for fp64): [N] for "out", [K] for "in". Always a fresh tensor."""
    if not cache or not _cacheable(t):
        return _compute(t, c)
    marks, rest = tuple(map(_mark, _parts(t))), (_count_steps(), c.scaling, c.axis)
    entry = _entries.get(t.lora_B)
    if entry is None or (entry.marks, entry.rest) != (marks, rest):
        entry = _entries[t.lora_B] = _Entry(marks, rest, _compute(t, c))
    return entry.norm.clone()


def forget(lora_B: torch.Tensor | None) -> None:
    """Drop what is cached for this layer's lora_B."""
    if lora_B is not None:
        _entries.pop(lora_B, None)


def gain(magnitude: torch.Tensor | None, norm: torch.Tensor | None) -> torch.Tensor | None:
    """m/norm in the norm's dtype, 0 where the norm is 0; None without a magnitude."""
    if magnitude is None:
        return None
    return divided(magnitude if magnitude.dtype == norm.dtype else magnitude.to(norm.dtype), norm)


def divided(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a/b, 0 where b is 0."""
    return (a / b).masked_fill(b == 0, 0)


def effective_B(t: LayerTensors, dtype: torch.dtype | None = None) -> torch.Tensor:
    """(out_scale⊙B)·core in dtype (default: the accumulator's): the B of the plain LoRA with the same delta, s apart.  [N,R]"""
    wide = dtype or accumulator(t.weight.dtype)
    B = t.lora_B.to(wide)
    if t.core is not None:
        core = t.core.to(wide)
        B = B * core if core.dim() == 1 else B @ core
    return B if t.out_scale is None else B * t.out_scale.to(wide)[:, None]


def row_norm_backward(
    d_norm: torch.Tensor, norm: torch.Tensor, t: LayerTensors, c: CallOptions, w: GradMask
) -> list[torch.Tensor]:
    """The gradients of row_norm for A, B, core and out_scale, in Wants' order.

    With V = W + sB'A, B' = (out_scale⊙B)·core and D = diag(d_norm/norm) V (columns instead of rows for axis="in"):
    dA = s B'ᵀ D and dB' = s D Aᵀ, both gathered in one pass over W.  d_norm, norm [N] or [K]
    """
    wide, s = accumulator(t.weight.dtype), scaling_of(t, c)
    A, B = t.lora_A.to(wide), effective_B(t, wide)
    dA, dB = torch.zeros_like(A), torch.zeros_like(B)
    share = divided(d_norm, norm)
    for rows in row_blocks(t.weight):
        D = torch.addmm(t.weight[rows].to(wide), B[rows] * s, A)
        D *= share[rows, None] if c.axis == "out" else share
        dA += B[rows].t() @ D
        dB[rows] = D @ A.t()
    found = {"lora_A": dA * s, **_unfold(dB * s, t, wide)}
    like = t._asdict()
    return [found[name].to(like[name].dtype) for name in w.names]


def _unfold(
    d_effective: torch.Tensor, t: LayerTensors, wide: torch.dtype
) -> dict[str, torch.Tensor]:
    """Gradients of B, core and out_scale from that of (out_scale⊙B)·core."""
    B, scale = t.lora_B.to(wide), 1 if t.out_scale is None else t.out_scale.to(wide)[:, None]
    d_scaled, found = d_effective, {}
    if t.core is not None:
        core, diagonal = t.core.to(wide), t.core.dim() == 1
        found["core"] = (
            (d_effective * (B * scale)).sum(0) if diagonal else (B * scale).t() @ d_effective
        )
        d_scaled = d_effective * core if diagonal else d_effective @ core.t()
    found["lora_B"] = d_scaled * scale
    if t.out_scale is not None:
        found["out_scale"] = (d_scaled * B).sum(1)
    return found


def _compute(t: LayerTensors, c: CallOptions) -> torch.Tensor:
    plain = t.core is None and t.out_scale is None
    B = t.lora_B if plain else effective_B(t)
    return dispatch.routes(facts_of_norm(t, c))["row_norm"].row_norm(
        t.weight, t.lora_A, B, scaling_of(t, c), c.axis
    )


def _parts(t: LayerTensors) -> tuple[torch.Tensor | None, ...]:
    return t.weight, t.lora_A, t.lora_B, t.core, t.out_scale, t.scale


def _mark(part: torch.Tensor | None) -> _Mark | None:
    if part is None:
        return None
    place = (part.data_ptr(), part._version, part.dtype, tuple(part.shape), part.stride())
    return _Mark(StorageWeakRef(part.untyped_storage()), place)


def _cacheable(t: LayerTensors) -> bool:
    # Inference tensors have no version counter, and what is made in inference mode no autograd may save. A graph's replay must
    # not depend on what ran before its capture.
    inference = torch.is_inference_mode_enabled() or any(
        part is not None and part.is_inference() for part in t
    )
    return not inference and not devices.capturing(t.weight)


def _count_steps() -> int:
    """How many steps all optimizers have made since the first call: fused ones and `.data` writers never bump a version."""
    global _listening
    if not _listening:
        register_optimizer_step_post_hook(_stepped)
        _listening = True
    return _steps


def _stepped(*_: object) -> None:
    global _steps
    _steps += 1
