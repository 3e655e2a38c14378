"""What is asked of a backend: the tensors and settings of one call, the parts of each primitive, and the problem's key.

Sizes: M tokens, K in, N out, R rank.  x [M,K] (any leading dims), weight [N,K], lora_A [R,K], lora_B [N,R].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lorafast import arch

PRIMITIVES = ("project", "linear", "grad_output", "grad_input", "grad_project", "row_norm")

Scaling = float | torch.Tensor


class Tensors(NamedTuple):
    """Every tensor of one adapted layer but x. seed: int64 [1]; scale: a 0-d factor on top of Settings.scaling."""

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


class Settings(NamedTuple):
    """Every plain number and word of one call. keep: none, output, inner or recompute (already resolved)."""

    scaling: float = 1.0
    dropout: float = 0.0
    axis: str = "out"
    dropout_on: str = "adapter"
    keep: str = "none"
    frozen_columns: int = 0


class Wants(NamedTuple):
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


class Down(NamedTuple):
    """One way down: h = drop(x) Aᵀ, h' = core(h).  A [R,K], core [R,R], [R] or None."""

    A: torch.Tensor
    core: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    p: float = 0.0


class Up(NamedTuple):
    """One way up: h' (scaling · out_scale ⊙ B)ᵀ.  h' [M,R], B [N,R], out_scale [N] or None."""

    h: torch.Tensor
    B: torch.Tensor
    scaling: Scaling = 1.0
    out_scale: torch.Tensor | None = None


class Return(NamedTuple):
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


class Returned(NamedTuple):
    """v = u·core [M,R] in dy's dtype, s included; the other sums are in the accumulator's dtype, None if not asked for."""

    v: torch.Tensor | None
    B: torch.Tensor | None
    core: torch.Tensor | None
    out_scale: torch.Tensor | None


class OutputGrads(NamedTuple):
    """adapters: one Returned each; bias = Σ dy [N]; dot = Σ dy⊙kept [N]."""

    adapters: list[Returned]
    bias: torch.Tensor | None
    dot: torch.Tensor | None


class Segment(NamedTuple):
    """One summand (gain⊙dy) W of dx.  dy [...,N], weight [N,K], gain [N] or None."""

    dy: torch.Tensor
    weight: torch.Tensor
    gain: torch.Tensor | None = None


class LowRank(NamedTuple):
    """One summand mask⊙(v A) of dx, and the way down whose dA = vᵀ drop(x) is asked for.  v [M,R], A [R,K]."""

    v: torch.Tensor
    A: torch.Tensor
    seed: torch.Tensor | None = None
    p: float = 0.0


@dataclass(frozen=True, slots=True)
class Problem:
    """The key a backend is chosen by: device, shapes, dtypes and flags, no tensors. N and R have one entry per sibling."""

    arch: arch.Arch
    dtype: torch.dtype
    M: int
    K: int
    N: tuple[int, ...]
    R: tuple[int, ...]
    weight_dtype: torch.dtype
    factor_dtype: torch.dtype
    transposed: bool = False
    dense_x: bool = True
    core: str = "none"
    dropout: float = 0.0
    dropout_on: str = "adapter"
    gain: str = "none"
    keep: str = "none"
    out_scale: bool = False

    @classmethod
    def of(cls, x: torch.Tensor, t: Tensors, c: Settings) -> Problem:
        """The problem of one layer's call; x may be any activation [..., K] or, in backward, dy [..., N]."""
        N, K = t.weight.shape
        return cls(
            arch=arch.of(x.device),
            dtype=x.dtype,
            M=tokens(x),
            K=K,
            N=(N,),
            R=(t.lora_A.shape[0],),
            weight_dtype=t.weight.dtype,
            factor_dtype=t.lora_A.dtype,
            transposed=t.weight.stride(0) == 1 and N != 1 and K != 1,
            dense_x=x.is_contiguous(),
            core="none" if t.core is None else "diagonal" if t.core.dim() == 1 else "full",
            dropout=c.dropout,
            dropout_on=c.dropout_on,
            gain="none" if t.magnitude is None else c.axis,
            keep=c.keep,
            out_scale=t.out_scale is not None,
        )


def tokens(x: torch.Tensor) -> int:
    """M, the product of all dims but the last."""
    return math.prod(x.shape[:-1])


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums run in: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def activation_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype a call runs in: autocast's if it is on for x's device and x is not fp64, else x's own."""
    device = x.device.type
    if x.dtype != torch.float64 and x.is_floating_point() and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype
