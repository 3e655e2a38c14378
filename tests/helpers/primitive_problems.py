"""A problem in normal numbers for each primitive: a backend's result, and the formula in torch."""

import torch
import torch.nn.functional as F

from helpers.triton_interpreter import SEED, P, dropped, strided
from lorafast.engine.problem import BaseTerm, DownProj, LowRankTerm, UpProj, UpProjGradSpec

S = 1.7
LAYOUTS = ("contiguous", "sliced", "transposed")
# Sums over tokens, which leave in fp32: a kernel that sums in fp32 owes them fp32's own error.
SUMS = ("dA", "dB", "d_bias", "dot")


def project(backend, dtype, M, N, K, R, layout):
    """h and h' with dropout and a full core."""
    x = strided(M, K, dtype, layout)
    A, core = strided(R, K, torch.float32, layout) / K**0.5, torch.randn(R, R) / R**0.5
    ((h, h_core),) = backend.project(x, [DownProj(A, core, SEED, P)])

    def formula(cast):
        h = F.linear(dropped(x.to(cast), P).to(cast), A.to(cast))
        return h, F.linear(h, core.to(cast))

    return {"h": h, "h_core": h_core}, formula


def linear(backend, dtype, M, N, K, R, layout):
    """y and z with gain, bias and out_scale, and y of two adapters without them."""
    x, W, h = (strided(*shape, dtype, layout) for shape in ((M, K), (N, K), (M, R)))
    B, gain, bias, out_scale = (
        torch.randn(N, R),
        torch.rand(N) + 0.5,
        torch.randn(N),
        torch.randn(N),
    )
    y, z = backend.linear(x, W, [UpProj(h, B, S, out_scale)], gain, bias, keep_inner=True)
    other = B[:, :1].expand(N, R)
    plain, _ = backend.linear(x, W, [UpProj(h, B, S), UpProj(h, other, -0.3)])

    def formula(cast):
        x_, W_, B_, h_, gain_, bias_, o_ = (t.to(cast) for t in (x, W, B, h, gain, bias, out_scale))
        z = F.linear(x_, W_) + S * (o_ * F.linear(h_, B_))
        both = F.linear(x_, W_) + S * F.linear(h_, B_) - 0.3 * F.linear(h_, other.to(cast))
        return gain_ * z + bias_, z, both

    return {"y": y, "z": z, "plain": plain}, formula


def grad_output(backend, dtype, M, N, K, R, layout):
    """u, v, every gradient but d_out_scale, and both sums over tokens, of two adapters."""
    dy, kept, h = (strided(*shape, dtype, layout) for shape in ((M, N), (M, N), (M, R)))
    B, gain, core = torch.randn(N, R), torch.rand(N) + 0.5, torch.randn(R, R) / R**0.5
    specs = [
        UpProjGradSpec(B, S, h=h, want_B=True),
        UpProjGradSpec(B, S, core=core, h=h, want_core=True),
    ]
    sums = backend.grad_output(dy, specs, gain, kept, want_bias=True)

    def formula(cast):
        dy_, kept_, h_, B_, gain_, core_ = (t.to(cast) for t in (dy, kept, h, B, gain, core))
        u = S * ((gain_ * dy_) @ B_)
        dB = S * ((gain_ * dy_).t() @ h_)
        return u, u @ core_, u.t() @ h_, dB, dy_.sum(0), (dy_ * kept_).sum(0)

    plain, cored = sums.adapters
    found = {"u": plain.v, "v": cored.v, "d_core": cored.d_core, "dB": plain.dB}
    return found | {"d_bias": sums.d_bias, "dot": sums.dot}, formula


def grad_input(backend, dtype, M, N, K, R, layout):
    """dx through a gain and an adapter with dropout."""
    dy, W, v = (strided(*shape, dtype, layout) for shape in ((M, N), (N, K), (M, R)))
    A, gain = torch.randn(R, K), torch.randn(N)
    dx = backend.grad_input([BaseTerm(dy, W, gain)], [LowRankTerm(v, A, SEED, P)])

    def formula(cast):
        low = dropped(v.to(cast) @ A.to(cast), P).to(cast)
        return ((gain.to(cast) * dy.to(cast)) @ W.to(cast) + low,)

    return {"dx": dx}, formula


def grad_project(backend, dtype, M, N, K, R, layout):
    """dA under dropout."""
    x, v = strided(M, K, dtype, layout), strided(M, R, dtype, layout)
    (dA,) = backend.grad_project(x, [LowRankTerm(v, torch.empty(R, K), SEED, P)])
    return {"dA": dA}, lambda cast: (v.to(cast).t() @ dropped(x.to(cast), P).to(cast),)


def row_norm(backend, dtype, M, N, K, R, layout):
    """The norms along both axes, one with a number for a scaling and one with a tensor."""
    W, A, B = strided(N, K, dtype, layout), torch.randn(R, K), torch.randn(N, R)
    found = {
        "out": backend.row_norm(W, A, B, S, "out"),
        "in": backend.row_norm(W, A, B, torch.tensor(S), "in"),
    }

    def formula(cast):
        V = W.to(cast) + S * (B.to(cast) @ A.to(cast))
        return V.norm(dim=1), V.norm(dim=0)

    return found, formula


PROBLEMS = {
    make.__name__: make
    for make in (project, linear, grad_output, grad_input, grad_project, row_norm)
}
