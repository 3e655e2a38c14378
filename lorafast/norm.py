"""DoRA's norm: the low-rank part folded to one pair (A, B), the gain it gives, and the cache for eval and accumulation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from lorafast import arch, dispatch
from lorafast.problem import Problem, Scaling, Settings, Tensors, Wants, accumulator


class _Entry(NamedTuple):
    stamp: tuple
    norm: torch.Tensor


# Keyed weakly by the tensor lora_B. A stamp sees every in-place write that bumps a version, every replaced storage and every
# optimizer step; `forget` covers what is left (`.data` writers).
_entries: WeakIdKeyDictionary = WeakIdKeyDictionary()
_steps = 0
_PANEL_ROWS = 512
_listening = False


def row_norm(t: Tensors, c: Settings, cache: bool = False) -> torch.Tensor:
    """‖W + s·(out_scale⊙B)·core·A‖ along c.axis, fp32 (fp64 for fp64): [N] for "out", [K] for "in"."""
    if not cache or not _cacheable(t):
        return _compute(t, c)
    stamp, entry = _stamp(t, c), _entries.get(t.lora_B)
    if entry is None or entry.stamp != stamp:
        entry = _entries[t.lora_B] = _Entry(stamp, _compute(t, c))
    return entry.norm


def forget(lora_B: torch.Tensor | None) -> None:
    """Drop what is cached for this layer's lora_B."""
    if lora_B is not None:
        _entries.pop(lora_B, None)


def gain(magnitude: torch.Tensor | None, norm: torch.Tensor | None) -> torch.Tensor | None:
    """m/norm in the norm's dtype, 0 where the norm is 0; None without a magnitude."""
    if magnitude is None:
        return None
    return divided(magnitude.to(norm.dtype), norm)


def divided(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a/b, 0 where b is 0."""
    return torch.where(b == 0, torch.zeros_like(b), a / b)


def effective_B(t: Tensors, dtype: torch.dtype | None = None) -> torch.Tensor:
    """(out_scale⊙B)·core in dtype (default: the accumulator's): the B of the plain LoRA with the same delta, s apart.  [N,R]"""
    wide = dtype or accumulator(t.weight.dtype)
    B = t.lora_B.to(wide)
    if t.core is not None:
        core = t.core.to(wide)
        B = B * core if core.dim() == 1 else B @ core
    return B if t.out_scale is None else B * t.out_scale.to(wide)[:, None]


def scaling(t: Tensors, c: Settings) -> Scaling:
    """s, a float unless a tensor scale rides on it."""
    return c.scaling if t.scale is None else t.scale * c.scaling


def row_norm_backward(d_norm: torch.Tensor, norm: torch.Tensor, t: Tensors, c: Settings, w: Wants) -> list[torch.Tensor]:
    """The gradients of row_norm for A, B, core and out_scale, in Wants' order.

    With V = W + sB'A, B' = (out_scale⊙B)·core and D = diag(d_norm/norm) V (columns instead of rows for axis="in"):
    dA = s B'ᵀ D and dB' = s D Aᵀ, both gathered in one pass over W.  d_norm, norm [N] or [K]
    """
    wide, s = accumulator(t.weight.dtype), scaling(t, c)
    A, B = t.lora_A.to(wide), effective_B(t, wide)
    dA, dB = torch.zeros_like(A), torch.zeros_like(B)
    share = divided(d_norm, norm)
    for start in range(0, t.weight.shape[0], _PANEL_ROWS):
        rows = slice(start, start + _PANEL_ROWS)
        D = torch.addmm(t.weight[rows].to(wide), B[rows] * s, A)
        D *= share[rows, None] if c.axis == "out" else share
        dA += B[rows].t() @ D
        dB[rows] = D @ A.t()
    found = {"lora_A": dA * s, **_unfold(dB * s, t, wide)}
    like = t._asdict()
    return [found[name].to(like[name].dtype) for name, wanted in zip(w._fields, w, strict=True) if wanted]


def _unfold(d_effective: torch.Tensor, t: Tensors, wide: torch.dtype) -> dict[str, torch.Tensor]:
    """Gradients of B, core and out_scale from that of (out_scale⊙B)·core."""
    B, scale = t.lora_B.to(wide), 1 if t.out_scale is None else t.out_scale.to(wide)[:, None]
    d_scaled, found = d_effective, {}
    if t.core is not None:
        core, diagonal = t.core.to(wide), t.core.dim() == 1
        found["core"] = (d_effective * (B * scale)).sum(0) if diagonal else (B * scale).t() @ d_effective
        d_scaled = d_effective * core if diagonal else d_effective @ core.t()
    found["lora_B"] = d_scaled * scale
    if t.out_scale is not None:
        found["out_scale"] = (d_scaled * B).sum(1)
    return found


def _compute(t: Tensors, c: Settings) -> torch.Tensor:
    plain = t.core is None and t.out_scale is None
    B = t.lora_B if plain else effective_B(t)
    backend = dispatch.pick("row_norm", Problem.of(t.weight, t, c))
    return backend.row_norm(t.weight, t.lora_A, B, scaling(t, c), c.axis)


def _cacheable(t: Tensors) -> bool:
    # Inference tensors have no version counter, and a graph replay must not depend on what ran before its capture.
    return not any(part is not None and part.is_inference() for part in t) and not arch.capturing(t.weight)


def _stamp(t: Tensors, c: Settings) -> tuple:
    global _listening
    if not _listening:
        # Fused optimizers and `.data` writers never bump a version, so every step of any optimizer counts.
        register_optimizer_step_post_hook(_count_step)
        _listening = True
    parts = (t.weight, t.lora_A, t.lora_B, t.core, t.out_scale, t.scale)
    marks = tuple(None if part is None else (part.data_ptr(), part._version) for part in parts)
    return _steps, c.scaling, c.axis, marks


def _count_step(*_: object) -> None:
    global _steps
    _steps += 1
