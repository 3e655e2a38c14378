"""The arguments of a call, the arguments of each primitive, and the key a backend is chosen by.

Sizes: M tokens, K in_features, N out_features, R rank.
x [M,K] (any leading dims), weight [N,K], lora_A [R,K], lora_B [N,R].
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
    """The tensors of one adapted layer, x apart.

    seed is int64 [1]; scale is the scaling s where it is a tensor of one element.
    """

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
    """The numbers and words of one call.

    scaling is s; inside an op it is a number, 1 beside LayerTensors.scale. In an op, keep is
    resolved (see formula.resolve_keep).
    """

    scaling: Scaling = 1.0
    dropout: float = 0.0
    axis: str = "out"
    dropout_on: str = "adapter"
    keep: str = "none"
    frozen_columns: int = 0

    @property
    def drops_base(self) -> bool:
        """True if dropout reaches DoRA's correction of the base term, as in PEFT."""
        return self.dropout > 0 and self.dropout_on == "both"


class GradMask(NamedTuple):
    """The gradients that are needed, in the order in which they are returned."""

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
        """True if the gradient of the gain is needed: Σ dy⊙z, or its equal per input column."""
        return self.magnitude or self.norm

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the gradients that are needed, in order."""
        return tuple(name for name, need in zip(self._fields, self, strict=True) if need)


class SavedMask(NamedTuple):
    """The activations that backward needs: x and y by reference, h and z made by the call."""

    x: bool
    h: bool
    y: bool
    z: bool


class DownProj(NamedTuple):
    """One down projection: h = drop(x) Aᵀ and h' = core(h).  A [R,K], core [R,R], [R] or None"""

    A: torch.Tensor
    core: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    p: float = 0.0


class UpProj(NamedTuple):
    """One up projection: h' (scaling · out_scale ⊙ B)ᵀ.

    h_core is h' [M,R], B [N,R], out_scale [N] or None.
    """

    h_core: torch.Tensor
    B: torch.Tensor
    scaling: Scaling = 1.0
    out_scale: torch.Tensor | None = None


def as_one(ups: list[UpProj], x: torch.Tensor, N: int) -> UpProj:
    """Several up projections side by side as one; for none, one of rank 1 that adds nothing."""
    if not ups:
        return UpProj(x.new_zeros(tokens(x), 1), x.new_zeros(N, 1))
    factors = []
    for _, B, scaling, out_scale in ups:
        factor = B.float() * scaling
        factors.append(factor if out_scale is None else factor * out_scale.float()[:, None])
    return UpProj(torch.cat([up.h_core for up in ups], 1), torch.cat(factors, 1))


class UpProjGradSpec(NamedTuple):
    """What one adapter needs of dy.  h [M,R] is the saved one, before the core; None: v alone."""

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
    """v = u·core [M,R], with s, in the dtype of precision.low_rank_grad_dtype; sums in the
    accumulator's dtype; None: not needed.
    """

    v: torch.Tensor | None
    dB: torch.Tensor | None
    d_core: torch.Tensor | None
    d_out_scale: torch.Tensor | None


class Gain(NamedTuple):
    """A gain m/norm for a backend that divides in its kernels, 0 where the norm is 0.

    magnitude, norm [N]; without a norm the magnitude is the gain. by_gain: the gradients of both
    are those of Σ dy⊙kept alone, with kept = gain⊙z (True) or z (False); None: they are not needed,
    or contain more than this sum. want_norm: that of the norm is needed, too.
    """

    magnitude: torch.Tensor
    norm: torch.Tensor | None = None
    by_gain: bool | None = None
    want_norm: bool = False


class OutputGrads(NamedTuple):
    """adapters: one UpProjGrads each; d_bias = Σ dy [N]; dot = Σ dy⊙kept [N].

    What a backend that divides may have made of a Gain, else None: gain, the tensor; of_gain, the
    gradients of magnitude and norm.
    """

    adapters: list[UpProjGrads]
    d_bias: torch.Tensor | None
    dot: torch.Tensor | None
    gain: torch.Tensor | None = None
    of_gain: tuple[torch.Tensor, torch.Tensor | None] | None = None


class BaseTerm(NamedTuple):
    """One summand (gain⊙dy) W of dx.  dy [...,N], weight [N,K], gain [N] or None"""

    dy: torch.Tensor
    weight: torch.Tensor
    gain: torch.Tensor | None = None


class SharedMask:
    """Where one primitive of a backward leaves the mask that another one needs too."""

    __slots__ = ("mask",)

    def __init__(self) -> None:
        self.mask: torch.Tensor | None = None


class LowRankTerm(NamedTuple):
    """One summand mask⊙(v A) of dx, and the down projection whose dA = vᵀ drop(x).

    v [M,R], A [R,K]. shared: for a backend whose mask is a tensor; None: it makes the mask anew.
    """

    v: torch.Tensor
    A: torch.Tensor
    seed: torch.Tensor | None = None
    p: float = 0.0
    shared: SharedMask | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """The key a backend is chosen by: device, sizes, dtypes and flags, no tensors.

    N has an entry per weight, R one per adapter. transposed: the weight lies in memory as [K,N].
    row_norm, which reads no activation, has M = 0.
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


def tokens(x: torch.Tensor) -> int:
    """M, the product of all dims but the last."""
    shape = x.shape
    return shape[0] if len(shape) == 2 else math.prod(shape[:-1])


def split_scaling(scaling: Scaling) -> tuple[float, torch.Tensor | None]:
    """CallOptions.scaling and LayerTensors.scale of a scaling that may be a number or a tensor."""
    if isinstance(scaling, torch.Tensor):
        # 0-d, so that it takes part in no type promotion.
        return 1.0, scaling.reshape(())
    return float(scaling), None


def scaling_of(tensors: LayerTensors, options: CallOptions) -> Scaling:
    """s: the tensor if it is one, else the number."""
    return options.scaling if tensors.scale is None else tensors.scale
