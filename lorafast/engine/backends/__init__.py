"""The backend protocol: what a module in this folder offers, primitive by primitive."""

from __future__ import annotations

from typing import Protocol

import torch

from lorafast.engine.problem import (
    BaseTerm,
    DownProj,
    LowRankTerm,
    OutputGrads,
    Problem,
    Scaling,
    UpProj,
    UpProjGradSpec,
)


class Backend(Protocol):
    """The six primitives, dropout itself, and the reasons for which a backend cannot serve.

    Each function makes one pass over its large operand, never one per adapter. h is rounded once
    to the activation's dtype, and so are u and v, but not to fp16: they are fp32 there. Sums over
    tokens stay in the accumulator's dtype (fp32; fp64 for fp64). Outputs are fresh tensors.
    Operands may have any strides and no rows. A backend may lack a primitive; another one then
    computes it. It may have a kernel of its own for formula's gain_of and gain_grads, as functions
    of these names. Where LINEAR_DIVIDES or GRAD_OUTPUT_DIVIDES is true, linear or grad_output may
    get a problem.Gain for a gain.
    """

    def why_not(self, primitive: str, problem: Problem) -> tuple[str, ...]:
        """Return every reason why it cannot compute the primitive, in words; empty if it can.

        It depends on its arguments alone, so that it can be asked on any machine, and on a GPU
        that no backend was forced for on the verdict of the device's trial. A Provisional reason is
        not remembered.
        """
        ...

    def project(
        self, x: torch.Tensor, downs: list[DownProj]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return h = drop(x) Aᵀ and h' = core(h) for each down projection.

        x [...,K] -> h, h' [M,R] in x's dtype; h' is computed from the rounded h.
        """
        ...

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        ups: list[UpProj],
        gain: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        keep_inner: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return y = gain⊙z + bias, z = x Wᵀ + Σ h' (s·out_scale⊙B)ᵀ; and z if keep_inner.

        x [...,K], weight [N,K], gain and bias [N] -> y [...,N], z [M,N] or None. keep_inner is
        only asked for with a gain.
        """
        ...

    def grad_output(
        self,
        dy: torch.Tensor,
        specs: list[UpProjGradSpec],
        gain: torch.Tensor | None = None,
        kept: torch.Tensor | None = None,
        want_bias: bool = False,
    ) -> OutputGrads:
        """Return, for each adapter, v, dB, d_core and d_out_scale; and Σ dy and Σ dy⊙kept.

        u = s(gain⊙out_scale⊙dy)B, v = u·core, d_core = uᵀh, P = s(gain⊙dy)ᵀh', dB = out_scale⊙P,
        d_out_scale = Σ P⊙B. dy, kept [...,N], gain [N]. The first frozen_columns columns of dB
        are zero and cost nothing. Sums are the same bits from run to run.
        """
        ...

    def grad_input(self, bases: list[BaseTerm], low_ranks: list[LowRankTerm]) -> torch.Tensor:
        """Return dx = Σ (gain⊙dy) W + Σ mask⊙(v A).  dy [...,N] -> dx [...,K]"""
        ...

    def grad_project(self, x: torch.Tensor, low_ranks: list[LowRankTerm]) -> list[torch.Tensor]:
        """Return dA = vᵀ drop(x) for each term.  x [...,K], v [M,R] -> [R,K]"""
        ...

    def row_norm(
        self,
        weight: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        scaling: Scaling = 1.0,
        axis: str = "out",
    ) -> torch.Tensor:
        """Return ‖W + sBA‖ per row (axis="out", [N]) or per column (axis="in", [K]).

        Where BA is zero it is torch's own norm, with which PEFT starts its magnitudes: the gain
        of a fresh DoRA layer is then exactly 1.
        """
        ...

    def drop(self, x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
        """Return drop(x), with the bits of lorafast.engine.philox.  x [...,K] -> fresh, dense"""
        ...
