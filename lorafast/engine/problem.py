"""What is asked of a backend: the tensors and settings of one call, the parts of each primitive, and the problem's key.

Sizes: M tokens, K in, N out, R rank.  x [M,K] (any leading dims), weight [N,K], lora_A [R,K], lora_B [N,R].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lorafast.runtime import devices

PRIMITIVES = ("project", "linear", "grad_output", "grad_input", "grad_project", "row_norm")

Scaling = float | torch.Tensor


class LayerTensors(NamedTuple):
    """Every tensor of one adapted layer but x. seed: int64 [1]; scale: s itself where it is a tensor, of one element."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    lora_A: torch.Tensor | None = None
    lora_B: torch.Tensor | None = None
    core: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    norm: torch.Tensor | None = None
    out_scale: torch.Tensor | None = None
    lora_bias: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    scale: torch.Tensor | None = None


class CallOptions(NamedTuple):
    """Every plain number and word of one call. scaling: s, or 1 beside Tensors.scale. keep: resolved, or none."""

    scaling: float = 1.0
    dropout: float = 0.0
    axis: str = "out"
    dropout_on: str = "adapter"
    keep: str = "none"
    frozen_columns: int = 0

    @property
    def drops_base(self) -> bool:
        """Whether dropout reaches DoRA's correction of the base term (PEFT's and the authors' reading)."""
        return self.dropout > 0 and self.dropout_on == "both"


class GradMask(NamedTuple):
    """Which gradients are asked for; also the order they are returned in."""

    x: bool = False
    bias: bool = False
    lora_A: bool = False
    lora_B: bool = False
    core: bool = False
    magnitude: bool = False
    norm: bool = False
    out_scale: bool = False
    lora_bias: bool = False

    @property
    def gain(self) -> bool:
        """Whether Σ dy⊙z (or its twin per input column) is needed."""
        return self.magnitude or self.norm

    @property
    def names(self) -> tuple[str, ...]:
        """The gradients asked for, in order."""
        return tuple(name for name, wanted in zip(self._fields, self, strict=True) if wanted)


class SavedMask(NamedTuple):
    """What one call keeps for backward beside its parameters, seed and norm: x and y by reference, h and z of its own."""

    x: bool
    h: bool
    y: bool
    z: bool


class DownProj(NamedTuple):
    """One way down: h = drop(x) Aᵀ, h' = core(h).  A [R,K], core [R,R], [R] or None."""

    A: torch.Tensor
    core: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    p: float = 0.0


class UpProj(NamedTuple):
    """One way up: h' (scaling · out_scale ⊙ B)ᵀ.  mixed is h' [M,R], B [N,R], out_scale [N] or None."""

    mixed: torch.Tensor
    B: torch.Tensor
    scaling: Scaling = 1.0
    out_scale: torch.Tensor | None = None


class UpProjGradSpec(NamedTuple):
    """One way up, backwards: what one adapter asks of dy.  h [M,R] is the saved, unmixed one; None asks for v alone."""

    B: torch.Tensor
    scaling: Scaling = 1.0
    out_scale: torch.Tensor | None = None
    core: torch.Tensor | None = None
    h: torch.Tensor | None = None
    frozen_columns: int = 0
    want_v: bool = True
    want_B: bool = False
    want_core: bool = False
    want_out_scale: bool = False


class UpProjGrads(NamedTuple):
    """v = u·core [M,R] in dy's dtype, s included; the other sums are in the accumulator's dtype, None if not asked for."""

    v: torch.Tensor | None
    dB: torch.Tensor | None
    d_core: torch.Tensor | None
    d_out_scale: torch.Tensor | None


class OutputGrads(NamedTuple):
    """adapters: one Returned each; d_bias = Σ dy [N]; dot = Σ dy⊙kept [N]."""

    adapters: list[UpProjGrads]
    d_bias: torch.Tensor | None
    dot: torch.Tensor | None


class BaseTerm(NamedTuple):
    """One summand (gain⊙dy) W of dx.  dy [...,N], weight [N,K], gain [N] or None."""

    dy: torch.Tensor
    weight: torch.Tensor
    gain: torch.Tensor | None = None


class LowRankTerm(NamedTuple):
    """One summand mask⊙(v A) of dx, and the way down whose dA = vᵀ drop(x) is asked for.  v [M,R], A [R,K]."""

    v: torch.Tensor
    A: torch.Tensor
    seed: torch.Tensor | None = None
    p: float = 0.0


@dataclass(frozen=True, slots=True)
class Problem:
    """The key a backend is chosen by: device, shapes, dtypes and flags, no tensors. N has an entry per weight, R one per adapter.

    transposed: the weight lies in memory as [K,N]. row_norm, which sees no activation, is asked with M = 0.
    """

    arch: devices.Arch
    dtype: torch.dtype
    M: int
    K: int
    N: tuple[int, ...]
    R: tuple[int, ...]
    weight_dtype: torch.dtype
    factor_dtype: torch.dtype
    transposed: bool = False
    core: str = "none"
    dropout: float = 0.0
    dropout_on: str = "adapter"
    gain: str = "none"
    keep: str = "none"
    out_scale: bool = False

    @classmethod
    def of(cls, x: torch.Tensor, t: LayerTensors, c: CallOptions) -> Problem:
        """The problem of one layer's call; x may be any activation [..., K] or, in backward, dy [..., N]."""
        return cls(*facts(x, t, c))

    @classmethod
    def of_norm(cls, t: LayerTensors, c: CallOptions) -> Problem:
        """The problem of row_norm, which the weight alone decides."""
        return cls(*facts_of_norm(t, c))


def facts(
    x: torch.Tensor, t: LayerTensors, c: CallOptions, R: tuple[int, ...] | None = None
) -> tuple:
    """The fields of Problem.of(x, t, c) in order: as good a key, and quicker to make and to hash. R: the ranks, if several."""
    weight, A, core = t.weight, t.lora_A, t.core
    N, K = weight.shape
    return (
        devices.of(x.device), x.dtype, tokens(x), K, (N,), R or (A.shape[0],), weight.dtype, A.dtype,
        weight.stride(0) == 1 and N != 1 and K != 1,
        "none" if core is None else "diagonal" if core.dim() == 1 else "full",
        c.dropout, c.dropout_on, "none" if t.magnitude is None else c.axis, c.keep, t.out_scale is not None,
    )  # fmt: skip


def facts_of_norm(t: LayerTensors, c: CallOptions) -> tuple:
    """The fields of Problem.of_norm(t, c) in order."""
    weight, A = t.weight, t.lora_A
    N, K = weight.shape
    return (
        devices.of(weight.device), weight.dtype, 0, K, (N,), (A.shape[0],), weight.dtype, A.dtype,
        weight.stride(0) == 1 and N != 1 and K != 1, "none", 0.0, "adapter", c.axis, "none", False,
    )  # fmt: skip


def tokens(x: torch.Tensor) -> int:
    """M, the product of all dims but the last."""
    shape = x.shape
    return shape[0] if len(shape) == 2 else math.prod(shape[:-1])


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums run in: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def activation_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype a call runs in: autocast's if it is on for x's device and x is not fp64, else x's own."""
    device = "cpu" if x.is_cpu else x.device.type
    if (
        device != "meta"
        and torch.is_autocast_enabled(device)
        and x.dtype != torch.float64
        and x.is_floating_point()
    ):
        return torch.get_autocast_dtype(device)
    return x.dtype


def split_scaling(scaling: Scaling) -> tuple[float, torch.Tensor | None]:
    """Settings.scaling and Tensors.scale of a scaling that may be either."""
    # 0-d, so that it takes part in no type promotion.
    return (
        (1.0, scaling.reshape(())) if isinstance(scaling, torch.Tensor) else (float(scaling), None)
    )


def scaling_of(t: LayerTensors, c: CallOptions) -> Scaling:
    """s, the tensor if it is one."""
    return c.scaling if t.scale is None else t.scale


def resolved_keep(
    keep: str, c: CallOptions, trains_gain: bool, unbiased: bool, dtype: torch.dtype
) -> str:
    """What is kept for d_magnitude, "none" if it is not asked for.

    "auto" is "output" where that is exact enough (without a bias, in bf16 and fp32), since y is free where its consumer saves it.
    """
    if not trains_gain or c.axis == "in":
        return "none"
    if keep != "auto":
        return keep
    return (
        "output"
        if unbiased and not c.drops_base and dtype in (torch.bfloat16, torch.float32)
        else "inner"
    )


def saves(w: GradMask, c: CallOptions, has_gain: bool) -> SavedMask:
    """What backward needs for the gradients asked for. c.keep is resolved."""
    if not has_gain:
        return SavedMask(w.lora_A, w.lora_B or w.core or w.out_scale, False, False)
    by_row = w.gain and c.axis == "out"
    by_column = w.gain and c.axis == "in"
    remade = by_row and c.keep == "recompute"
    return SavedMask(
        x=w.lora_A or remade or by_column,
        h=w.lora_B or w.core or w.out_scale or remade,
        y=by_row and c.keep == "output",
        z=by_row and c.keep == "inner",
    )
