"""Problems in whole numbers: sums are exact in any order, so every result is known to the bit.

What lies around an operand is NaN, so that one number read beside it shows in the result.
"""

import torch

from helpers.triton_interpreter import SEED
from lorafast.engine import philox
from lorafast.engine.precision import low_rank_grad_dtype
from lorafast.engine.problem import BaseTerm, DownProj, LowRankTerm, UpProj, UpProjGradSpec

HALF = 0.5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = ("contiguous", "sliced", "transposed", "apart", "expanded")
NAN = float("nan")


def whole_numbers(rows, columns, dtype, layout="contiguous", most=15):
    """Return whole numbers [rows,columns] up to ±most, laid out as one of LAYOUTS says.

    A matrix of its own, a slice of a wider one, of a transposed one, every second column of one, or
    one row again and again.
    """
    values = torch.randint(-most, most + 1, (rows, columns)).to(dtype)
    if layout == "expanded":
        return values[:1].expand(rows, columns)
    if layout == "contiguous":
        return values
    shape = {
        "sliced": (rows + 2, columns + 5),
        "transposed": (columns + 2, rows + 5),
        "apart": (rows + 2, 2 * columns + 5),
    }[layout]
    around = torch.full(shape, NAN, dtype=dtype)
    inside = (
        around.t() if layout == "transposed" else around[:, ::2] if layout == "apart" else around
    )
    top, left = (3, 1) if layout == "transposed" else (1, 3 if layout == "sliced" else 2)
    view = inside[top : top + rows, left : left + columns]
    view.copy_(values)
    return view


def exact_gains(n):
    """Return gains [n] that multiply exactly: zeros, halves, ones and a negative."""
    return torch.tensor([1.0, 0.5, 0.0, -2.0])[torch.randint(0, 4, (n,))]


def assert_rounded_once(found, exact, dtype=None):
    """Assert that a result is the float64 value, rounded once."""
    torch.testing.assert_close(found, exact.to(dtype or found.dtype), rtol=0, atol=0)


def exact_drop(x, p):
    """Return mask⊙x in float64, unscaled."""
    return (
        x.double() * philox.keep_mask(SEED, p, slice(0, x.shape[0]), x.shape[1])
        if p
        else x.double()
    )


def times_scale(sums, p):
    """Return a sum times the dropout's scale, in fp32 as the contract says."""
    return sums.float() * torch.tensor(philox.scale(p)) if p else sums.float()


def exact_h_core(h, core):
    """Return h' of the rounded h, exactly."""
    h = h.double()
    return h if core is None else h * core.double() if core.dim() == 1 else h @ core.double().t()


def cores(R, dtype, most=1):
    """Return no core, a diagonal one, and a full one of odd strides."""
    return (
        None,
        torch.randint(-most, most + 1, (R,)).to(dtype),
        whole_numbers(R, R, dtype, "apart", most),
    )


def project(backend, dtype, factor, M, N, K, R, layout):
    """h with every kind of core, with dropout and without; several projections in one call."""
    x = whole_numbers(M, K, dtype, layout)
    for p in (0.0, HALF, 0.05):
        A = whole_numbers(R, K, factor, "transposed" if p else layout, most=3)
        # What 0.05 scales by is no whole number, and what is mixed of it no exact sum.
        downs = [
            DownProj(A, core, SEED if p else None, p)
            for core in (cores(R, factor) if p != 0.05 else [None])
        ]
        downs.append(DownProj(whole_numbers(3, K, factor, "sliced", most=3)))
        for (h, mix), down in zip(backend.project(x, downs), downs, strict=True):
            assert_rounded_once(
                h, times_scale(exact_drop(x, down.p) @ down.A.double().t(), down.p), dtype
            )
            assert_rounded_once(mix, exact_h_core(h, down.core), dtype)


def linear(backend, dtype, factor, M, N, K, R, layout):
    """y and z with and without gain and bias; out_scale, tensor scalings, several adapters."""
    x, few = whole_numbers(M, K, dtype, layout, most=1), min(R, 250)
    own, other = (whole_numbers(N, few, factor, kind) for kind in (layout, "transposed"))
    W = whole_numbers(
        N,
        K,
        torch.float32 if factor == torch.float32 else dtype,
        "transposed" if layout == "sliced" else layout,
        most=1,
    )
    h, out_scale, gain, bias = (
        whole_numbers(M, few, dtype, layout),
        exact_gains(N),
        exact_gains(N),
        torch.randint(-15, 16, (N,)).to(factor),
    )
    plain, several = (
        [UpProj(h, own, HALF, out_scale)],
        [UpProj(h, own, torch.tensor(-2.0)), UpProj(h[:, :6], other[:, :6], 1, out_scale)],
    )
    base = x.double() @ W.double().t()
    for ups in (plain, several, []):
        low = sum(
            float(s) * (up.double() @ B.double().t()) * (1 if o is None else o.double())
            for up, B, s, o in ups
        )
        assert_rounded_once(backend.linear(x, W, ups)[0], base + low, dtype)
        assert_rounded_once(
            backend.linear(x, W, ups, None, bias)[0], base + bias.double() + low, dtype
        )
        for add in (None, bias):
            y, z = backend.linear(x, W, ups, gain, add, keep_inner=True)
            assert_rounded_once(z, base + low, dtype)
            assert_rounded_once(
                y, gain.double() * (base + low) + (0 if add is None else add.double()), dtype
            )
    assert y.is_contiguous()


def grad_output(backend, dtype, factor, M, N, K, R, layout):
    """Everything at once of two adapters: every core, gain and out_scale, frozen columns."""
    dy, kept, B = (
        whole_numbers(M, N, dtype, layout),
        whole_numbers(M, N, dtype, layout),
        whole_numbers(N, R, factor, layout, most=3),
    )
    h = whole_numbers(M, R, dtype, layout, most=3)
    for i, core in enumerate(cores(R, factor)):
        gain, out_scale = (None, exact_gains(N))[i % 2], (None, exact_gains(N))[i // 2]
        back = UpProjGradSpec(
            B,
            torch.tensor(2.0) if i else HALF,
            out_scale,
            core,
            h,
            (0, R // 2, R)[i],
            True,
            True,
            core is not None,
        )
        back = back._replace(want_out_scale=out_scale is not None)
        beside = UpProjGradSpec(
            whole_numbers(N, 2, factor, "transposed"),
            h=whole_numbers(M, 2, dtype, "sliced"),
            frozen_columns=2,
            want_B=True,
        )
        sums = backend.grad_output(dy, [back, beside], gain, kept, want_bias=True)
        assert_rounded_once(sums.d_bias, dy.double().sum(0), torch.float32)
        assert_rounded_once(sums.dot, (dy.double() * kept.double()).sum(0), torch.float32)
        assert_up_proj_grads(sums.adapters[0], dy, back, gain)
        assert_up_proj_grads(sums.adapters[1], dy, beside, gain)


def assert_up_proj_grads(found, dy, back, gain):
    """Assert what one adapter gets of dy: every gradient that is needed, None for the others."""
    s, B = float(back.scaling), back.B.double()
    g = dy.double() if gain is None else dy.double() * gain.double()
    out_scale = torch.ones(B.shape[0]) if back.out_scale is None else back.out_scale
    dtype = low_rank_grad_dtype(dy.dtype)
    u = (s * (g * out_scale.double()) @ B).to(dtype)
    core = torch.eye(B.shape[1], dtype=torch.float64) if back.core is None else back.core.double()
    exact = dict.fromkeys(("v", "dB", "d_core", "d_out_scale"))
    if back.want_v:
        exact["v"] = (u.double() * core if core.dim() == 1 else u.double() @ core).to(dtype)
    if back.want_core:
        exact["d_core"] = (
            (u.double() * back.h).sum(0) if core.dim() == 1 else u.double().t() @ back.h.double()
        ).float()
    if back.want_B or back.want_out_scale:
        P = s * g.t() @ exact_h_core(back.h, back.core).to(dy.dtype).double()
        exact["d_out_scale"] = (P * B).sum(1).float() if back.want_out_scale else None
        live = torch.arange(B.shape[1]) >= back.frozen_columns
        exact["dB"] = (P * out_scale.double()[:, None] * live).float() if back.want_B else None
    for name, value in exact.items():
        if value is None:
            assert getattr(found, name) is None
        else:
            assert_rounded_once(getattr(found, name), value, value.dtype)


def grad_input(backend, dtype, factor, M, N, K, R, layout):
    """One base term and two, gains in either operand, weights either way, dropout or none."""
    # Two of the adapters are small: what they add is rounded on the way and has to fit.
    small = [
        LowRankTerm(
            whole_numbers(M, 1, dtype, "sliced", 1),
            whole_numbers(1, K, factor, "apart", 1),
            seed,
            p,
        )
        for seed, p in ((None, 0.0), (SEED, HALF))
    ]
    last = LowRankTerm(
        whole_numbers(M, R, dtype, layout), whole_numbers(R, K, factor, "transposed"), SEED, HALF
    )
    first = BaseTerm(
        whole_numbers(M, N, dtype, layout, 1),
        whole_numbers(N, K, dtype, "transposed", 1),
        exact_gains(N),
    )
    second = BaseTerm(
        whole_numbers(M, 9, dtype, "sliced", 1), whole_numbers(9, K, torch.float32, layout, 1)
    )
    wide = BaseTerm(first.dy, whole_numbers(N, K, dtype, layout, 1), first.gain)
    calls = [
        ([first], []),
        ([first, second], [*small, last]),
        ([wide], [last._replace(p=0.0, seed=None)]),
    ]
    calls.append(([second._replace(gain=exact_gains(9))], [last]))
    for segments, lows in calls:
        exact = sum(
            (s.dy.double() * (1 if s.gain is None else s.gain.double())) @ s.weight.double()
            for s in segments
        )
        exact = exact + sum(
            exact_drop(v.double() @ A.double(), p) * philox.scale(p) for v, A, _, p, _ in lows
        )
        assert_rounded_once(backend.grad_input(segments, lows), exact, dtype)


def grad_project(backend, dtype, factor, M, N, K, R, layout):
    """dA of three adapters in one call, one of them without dropout."""
    x, v = whole_numbers(M, K, dtype, layout), whole_numbers(M, R, dtype, layout)
    lows = [LowRankTerm(v, torch.empty(R, K), SEED if p else None, p) for p in (0.0, HALF, 0.05)]
    for dA, low in zip(backend.grad_project(x, lows), lows, strict=True):
        assert_rounded_once(
            dA, times_scale(v.double().t() @ exact_drop(x, low.p), low.p), torch.float32
        )


def assert_root(found, square):
    """Assert that a result is the root of a whole number, as float64 or as torch.sqrt rounds it.

    On some processors torch's own root in fp32 errs in the last bit.
    """
    assert found.dtype == torch.float32
    rounded, stock = square.sqrt().float(), square.float().sqrt()
    assert torch.equal(found, torch.where(found == stock, stock, rounded))


def row_norm(backend, dtype, factor, M, N, K, R, layout):
    """The norms along both axes, for a weight of any strides."""
    A, B = whole_numbers(R, K, factor, layout, 1), whole_numbers(N, R, factor, "transposed", 1)
    for kind in ("transposed", layout):
        W = whole_numbers(N, K, dtype, kind, 3)
        V = W.double() - 2 * B.double() @ A.double()
        for axis, dim in (("out", 1), ("in", 0)):
            assert_root(backend.row_norm(W, A, B, -2.0, axis), V.square().sum(dim))
        assert_root(backend.row_norm(W, A, B, torch.tensor(-2.0)), V.square().sum(1))


CHECKS = {
    check.__name__: check
    for check in (project, linear, grad_output, grad_input, grad_project, row_norm)
}
