"""The variants of primitives that GPU kernels are tried and timed on: what each computes of random
operands by a backend, and the same by stock torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from lorafast.engine import philox
from lorafast.engine.backends import Backend
from lorafast.engine.problem import BaseTerm, DownProj, Gain, LowRankTerm, UpProj, UpProjGradSpec

KEPT = "gain, core and dot"
GAINED, INNER, DIVIDED = "gain and bias", "gain, bias and z", "m and norm"
# What the problem of a variant differs in.
FLAGS: dict[str, dict[str, Any]] = {
    "core": {"core": "full"},
    INNER: {"gain": "out", "keep": "inner"},
    KEPT: {"gain": "out", "keep": "output", "core": "full"},
    "by column": {"gain": "in"},
    "transposed": {"transposed": True},
    GAINED: {"gain": "out"},
    DIVIDED: {"gain": "out"},
}


class Variant(NamedTuple):
    """The part of a KernelCase that differs between the variants of a layer.

    run: computes it by a backend.
    """

    primitive: str
    variant: str
    run: Callable[[Backend], list[torch.Tensor]]
    chain: Callable[[torch.dtype], list[torch.Tensor]]


class Operands(NamedTuple):
    """Random operands of one layer; adapter parameters are usually fp32, as in training."""

    x: torch.Tensor
    dy: torch.Tensor
    W: torch.Tensor
    transposed: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    core: torch.Tensor
    h: torch.Tensor
    v: torch.Tensor
    y: torch.Tensor
    gain: torch.Tensor
    bias: torch.Tensor
    seed: torch.Tensor | None
    p: float

    def drop(self, t: torch.Tensor) -> torch.Tensor:
        """Return drop(t) with the mask of these operands."""
        return philox.drop(t, self.seed, self.p) if self.p else t

    def h_of(self, dtype: torch.dtype) -> torch.Tensor:
        """Return drop(x) Aᵀ."""
        return F.linear(self.drop(self.x.to(dtype)), self.A.to(dtype))

    def inner(self, dtype: torch.dtype, weight: torch.Tensor) -> torch.Tensor:
        """Return x Wᵀ + h Bᵀ."""
        base = F.linear(self.x.to(dtype), weight.to(dtype))
        return base + F.linear(self.h.to(dtype), self.B.to(dtype))

    def merged(self, dtype: torch.dtype) -> torch.Tensor:
        """Return W + BA."""
        return self.W.to(dtype) + self.B.to(dtype) @ self.A.to(dtype)

    def grad_output_chain(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Return v, dB, d_core and Σ dy⊙y of a layer with a gain and a core."""
        dy, core, h = self.dy.to(dtype), self.core.to(dtype), self.h.to(dtype)
        dz = self.gain.to(dtype) * dy
        u = dz @ self.B.to(dtype)
        dot = (dy * self.y.to(dtype)).sum(0)
        return [u @ core, dz.t() @ F.linear(h, core), u.t() @ h, dot]

    def grad_output(self, backend: Backend) -> list[torch.Tensor]:
        """Return the same by a backend."""
        spec = UpProjGradSpec(self.B, core=self.core, h=self.h, want_B=True, want_core=True)
        grads = backend.grad_output(self.dy, [spec], self.gain, self.y)
        return [*grads.adapters[0][:3], grads.dot]


def usual(o: Operands) -> list[Variant]:
    """Return the variants that a LoRA layer, DoRA, LaMDA and Conv1D need."""
    return [*_products(o), *_streams(o)]


def further(o: Operands) -> list[Variant]:
    """Return those for which the cuda backend has forms of their own."""
    return [*_more_products(o), *_more_streams(o), *_gains(o)]


def _products(o: Operands) -> list[Variant]:
    """Return the primitives that contain a base product."""
    up, low_rank = [UpProj(o.h, o.B)], [LowRankTerm(o.v, o.A, o.seed, o.p)]

    def with_gain(dtype: torch.dtype) -> list[torch.Tensor]:
        z = o.inner(dtype, o.W)
        return [o.gain.to(dtype) * z + o.bias.to(dtype), z]

    def grad_input(dtype: torch.dtype) -> list[torch.Tensor]:
        low = o.drop(o.v.to(dtype) @ o.A.to(dtype))
        return [o.dy.to(dtype) @ o.W.to(dtype) + low]

    return [
        Variant(
            "linear",
            "",
            lambda backend: [backend.linear(o.x, o.W, up)[0]],
            lambda dtype: [o.inner(dtype, o.W)],
        ),
        Variant(
            "linear",
            "transposed",
            lambda backend: [backend.linear(o.x, o.transposed, up)[0]],
            lambda dtype: [o.inner(dtype, o.transposed)],
        ),
        Variant(
            "linear",
            INNER,
            lambda backend: list(backend.linear(o.x, o.W, up, o.gain, o.bias, keep_inner=True)),
            with_gain,
        ),
        Variant(
            "grad_input",
            "",
            lambda backend: [backend.grad_input([BaseTerm(o.dy, o.W)], low_rank)],
            grad_input,
        ),
    ]


def _streams(o: Operands) -> list[Variant]:
    """Return the primitives whose time is that of reading their operands."""
    plain = UpProjGradSpec(o.B, h=o.h, want_B=True)
    down, low_rank = DownProj(o.A, None, o.seed, o.p), [LowRankTerm(o.v, o.A, o.seed, o.p)]

    def grad_output(dtype: torch.dtype) -> list[torch.Tensor]:
        dy = o.dy.to(dtype)
        return [dy @ o.B.to(dtype), dy.t() @ o.h.to(dtype)]

    return [
        Variant(
            "project",
            "",
            lambda backend: [backend.project(o.x, [down])[0][0]],
            lambda dtype: [o.h_of(dtype)],
        ),
        Variant(
            "project",
            "core",
            lambda backend: [backend.project(o.x, [down._replace(core=o.core)])[0][1]],
            lambda dtype: [F.linear(o.h_of(dtype), o.core.to(dtype))],
        ),
        Variant(
            "grad_output",
            "",
            lambda backend: list(backend.grad_output(o.dy, [plain]).adapters[0][:2]),
            grad_output,
        ),
        Variant("grad_output", KEPT, o.grad_output, o.grad_output_chain),
        Variant(
            "grad_project",
            "",
            lambda backend: backend.grad_project(o.x, low_rank),
            lambda dtype: [o.v.to(dtype).t() @ o.drop(o.x.to(dtype))],
        ),
        Variant(
            "row_norm",
            "",
            lambda backend: [backend.row_norm(o.W, o.A, o.B)],
            lambda dtype: [o.merged(dtype).norm(dim=1)],
        ),
        Variant(
            "row_norm",
            "by column",
            lambda backend: [backend.row_norm(o.W, o.A, o.B, axis="in")],
            lambda dtype: [o.merged(dtype).norm(dim=0)],
        ),
    ]


def _more_products(o: Operands) -> list[Variant]:
    """Return further products, for which the cuda backend has forms of their own."""
    up, term = [UpProj(o.h, o.B)], LowRankTerm(o.v, o.A, o.seed, o.p)

    def gained(dtype: torch.dtype) -> list[torch.Tensor]:
        return [o.gain.to(dtype) * o.inner(dtype, o.W) + o.bias.to(dtype)]

    def twice_added(dtype: torch.dtype) -> list[torch.Tensor]:
        return [o.dy.to(dtype) @ o.W.to(dtype) + 2 * o.drop(o.v.to(dtype) @ o.A.to(dtype))]

    return [
        Variant(
            "linear",
            "bias",
            lambda backend: [backend.linear(o.x, o.W, up, None, o.bias)[0]],
            lambda dtype: [o.inner(dtype, o.W) + o.bias.to(dtype)],
        ),
        Variant(
            "linear",
            GAINED,
            lambda backend: [backend.linear(o.x, o.W, up, o.gain, o.bias)[0]],
            gained,
        ),
        Variant(
            "grad_input",
            "two adapters",
            lambda backend: [backend.grad_input([BaseTerm(o.dy, o.W)], [term, term])],
            twice_added,
        ),
    ]


def _more_streams(o: Operands) -> list[Variant]:
    """Return further streams, for which the cuda backend has forms of their own."""
    P = UpProjGradSpec(o.B, h=o.h, want_v=False, want_B=True)
    both = P._replace(want_v=True)

    def grads(
        specs: list[UpProjGradSpec], kept: torch.Tensor | None = None, want_bias: bool = True
    ) -> Callable[[Backend], list[torch.Tensor]]:
        """Return the run that yields dB of each spec, Σ dy, and Σ dy⊙kept if something is kept."""

        def run(backend: Backend) -> list[torch.Tensor]:
            found = backend.grad_output(o.dy, specs, None, kept, want_bias)
            every = [*(one.dB for one in found.adapters), found.d_bias, found.dot]
            return [one for one in every if one is not None]

        return run

    def scaled(backend: Backend) -> list[torch.Tensor]:
        # A factor that lies across, as that of one rank does.
        across = o.B.t().contiguous().t()
        spec = UpProjGradSpec(across, 0.5, o.gain, h=o.h, want_B=True, want_out_scale=True)
        grads = backend.grad_output(o.dy, [spec]).adapters[0]
        return [grads[0], grads[1], grads[3]]

    def scaled_chain(dtype: torch.dtype) -> list[torch.Tensor]:
        dy, B, out_scale = o.dy.to(dtype), o.B.to(dtype), o.gain.to(dtype)[:, None]
        P = 0.5 * dy.t() @ o.h.to(dtype)
        return [0.5 * dy @ (out_scale * B), out_scale * P, (P * B).sum(1)]

    def chain(dtype: torch.dtype) -> list[torch.Tensor]:
        dy = o.dy.to(dtype)
        return [dy.t() @ o.h.to(dtype), dy.sum(0), (dy * o.y.to(dtype)).sum(0)]

    drop = Variant(
        "drop",
        "",
        lambda backend: [backend.drop(o.x, o.seed, o.p)],
        lambda dtype: [o.drop(o.x.to(dtype))],
    )
    return [
        *([drop] if o.p else []),
        Variant("grad_output", "out_scale", scaled, scaled_chain),
        Variant("grad_output", "B", grads([P], want_bias=False), lambda d: chain(d)[:1]),
        Variant("grad_output", "B and bias", grads([P]), lambda d: chain(d)[:2]),
        Variant("grad_output", "B, bias and dot", grads([P], o.y), chain),
        Variant("grad_output", "bias", grads([both]), lambda d: chain(d)[:2]),
        Variant("grad_output", "bias alone", grads([]), lambda d: chain(d)[1:2]),
        Variant("grad_output", "bias and dot", grads([], o.y), lambda d: chain(d)[1:]),
    ]


def _gains(o: Operands) -> list[Variant]:
    """Return what the cuda backend has beside primitives, with each that may ask for it."""

    # About 1 and more, so that no gain is near 0 and no single quotient decides what errs most.
    m, norm = o.gain, o.bias.float().abs() + 1

    def by_backend(backend: Any) -> list[torch.Tensor]:
        # Functions that this backend has beside the protocol's.
        gain = backend.gain_of(m, norm)
        return [gain, *backend.gain_grads(o.bias.float(), gain, norm, True, True)]

    def of(dtype: torch.dtype, d_gain: torch.Tensor) -> list[torch.Tensor]:
        # In fp32 where a dtype is smaller, as in a layer.
        wide = torch.promote_types(dtype, torch.float32)
        gain = m.to(wide) / norm.to(wide)
        d_magnitude = d_gain.to(wide) / gain / norm.to(wide)
        return [gain, d_magnitude, -d_magnitude * gain]

    # Kernels that divide m by the norm themselves.
    spec = UpProjGradSpec(o.B, h=o.h, want_B=True)

    def linear(backend: Backend) -> list[torch.Tensor]:
        gain: Any = Gain(m, norm)
        return [backend.linear(o.x, o.W, [UpProj(o.h, o.B)], gain)[0]]

    def linear_chain(dtype: torch.dtype) -> list[torch.Tensor]:
        gain = of(dtype, o.bias)[0]
        return [(gain * o.inner(dtype, o.W)).to(dtype)]

    def grad_output(backend: Any) -> list[torch.Tensor]:
        gain = Gain(m, norm, by_gain=True, want_norm=True)
        found = backend.grad_output(o.dy, [spec], gain, o.y)
        grads = found.of_gain
        if grads is None:
            grads = backend.gain_grads(found.dot, found.gain, norm, True, True)
        return [*found.adapters[0][:2], found.gain, *grads]

    def grad_output_chain(dtype: torch.dtype) -> list[torch.Tensor]:
        dy = o.dy.to(dtype)
        gain, *grads = of(dtype, (dy * o.y.to(dtype)).sum(0))
        dz = (gain * dy).to(dtype)
        return [dz @ o.B.to(dtype), dz.t() @ o.h.to(dtype), gain, *grads]

    return [
        *(
            Variant(name, "gain", by_backend, lambda dtype: of(dtype, o.bias))
            for name in ("project", "linear", "grad_output")
        ),
        Variant("linear", DIVIDED, linear, linear_chain),
        Variant("grad_output", DIVIDED, grad_output, grad_output_chain),
    ]
