"""Where one NaN among the operands of the six primitives may show, and where not."""

import torch

from helpers.integer_problems import NAN, whole_numbers
from helpers.triton_interpreter import SEED
from lorafast.engine import philox
from lorafast.engine.problem import BaseTerm, DownProj, LowRankTerm, UpProj, UpProjGradSpec

M, N, K, R, HALF = 7, 19, 37, 5, 0.5


def operands(dtype):
    """Return every operand of every primitive, by name; none holds a 0 that would hide another."""
    made = {
        name: whole_numbers(*shape, dtype, most=3) + 0.5
        for name, shape in (
            ("x", (M, K)),
            ("W", (N, K)),
            ("dy", (M, N)),
            ("kept", (M, N)),
            ("h", (M, R)),
        )
    }
    return made | {
        name: torch.rand(shape) + 1
        for name, shape in (
            ("A", (R, K)),
            ("B", (N, R)),
            ("core", (R, R)),
            ("gain", (N,)),
            ("bias", (N,)),
            ("o", (N,)),
        )
    }


def outcome(backend, x, W, dy, kept, h, A, B, core, gain, bias, o):
    """Return the results of all six primitives, by name."""
    (h_, mixed), (dropped, _) = backend.project(
        x, [DownProj(A, core), DownProj(A, None, SEED, HALF)]
    )
    y, z = backend.linear(x, W, [UpProj(h, B, 2.0, o)], gain, bias, keep_inner=True)
    back = UpProjGradSpec(B, 2.0, o, None, h, want_B=True, want_out_scale=True)
    sums = backend.grad_output(
        dy,
        [back, back._replace(core=core, want_core=True, want_out_scale=False)],
        gain,
        kept,
        want_bias=True,
    )
    plain, mixing = sums.adapters
    low = LowRankTerm(h, A, SEED, HALF)
    return {
        "h": h_,
        "mixed": mixed,
        "dropped": dropped,
        "y": y,
        "z": z,
        "u": plain.v,
        "v": mixing.v,
        "dB": plain.dB,
        "d_o": plain.d_out_scale,
        "d_core": mixing.d_core,
        "d_bias": sums.d_bias,
        "dot": sums.dot,
        "dx": backend.grad_input([BaseTerm(dy, W, gain)], [low]),
        "dA": backend.grad_project(x, [low])[0],
        "rows": backend.row_norm(W, A, B),
        "columns": backend.row_norm(W, A, B, axis="in"),
    }


MASK = philox.keep_mask(SEED, HALF, slice(0, M), K)
KEPT, DROPPED = (int((MASK[3] == flag).nonzero()[2]) for flag in (True, False))
ALL = slice(None)
# Where a NaN in one number of an operand shows, and nowhere else.
SPREADS = {
    ("x", (3, KEPT)): {"h": 3, "mixed": 3, "dropped": 3, "y": 3, "z": 3, "dA": (ALL, KEPT)},
    ("x", (3, DROPPED)): {"h": 3, "mixed": 3, "y": 3, "z": 3},
    ("x", (M - 1, K - 1)): {"h": -1, "mixed": -1, "y": -1, "z": -1}
    | ({"dropped": -1, "dA": (ALL, -1)} if MASK[-1, -1] else {}),
    ("W", (4, 9)): {"y": (ALL, 4), "z": (ALL, 4), "dx": (ALL, 9), "rows": 4, "columns": 9},
    ("W", (N - 1, K - 1)): {
        "y": (ALL, -1),
        "z": (ALL, -1),
        "dx": (ALL, -1),
        "rows": -1,
        "columns": -1,
    },
    ("dy", (3, 4)): {
        "u": 3,
        "v": 3,
        "dB": 4,
        "d_o": 4,
        "d_bias": 4,
        "dot": 4,
        "d_core": ALL,
        "dx": 3,
    },
    ("dy", (M - 1, N - 1)): {
        "u": -1,
        "v": -1,
        "dB": -1,
        "d_o": -1,
        "d_bias": -1,
        "dot": -1,
        "d_core": ALL,
        "dx": -1,
    },
    ("kept", (M - 1, N - 1)): {"dot": -1},
    ("h", (3, 1)): {
        "y": 3,
        "z": 3,
        "dB": (ALL, 1),
        "d_o": ALL,
        "d_core": (ALL, 1),
        "dx": (3, MASK[3]),
        "dA": 1,
    },
    ("h", (M - 1, R - 1)): {
        "y": -1,
        "z": -1,
        "dB": (ALL, -1),
        "d_o": ALL,
        "d_core": (ALL, -1),
        "dx": (-1, MASK[-1]),
        "dA": -1,
    },
    ("A", (1, 9)): {
        "h": (ALL, 1),
        "mixed": ALL,
        "dropped": (ALL, 1),
        "dx": (MASK[:, 9], 9),
        "rows": ALL,
        "columns": 9,
    },
    ("B", (4, 1)): {
        "y": (ALL, 4),
        "z": (ALL, 4),
        "u": (ALL, 1),
        "v": ALL,
        "d_o": 4,
        "d_core": 1,
        "rows": 4,
        "columns": ALL,
    },
    ("core", (2, 1)): {"mixed": (ALL, 2), "v": (ALL, 1)},
    ("gain", (4,)): {
        "y": (ALL, 4),
        "u": ALL,
        "v": ALL,
        "dB": 4,
        "d_o": 4,
        "d_core": ALL,
        "dx": ALL,
    },
    ("bias", (N - 1,)): {"y": (ALL, -1)},
    ("o", (4,)): {"y": (ALL, 4), "z": (ALL, 4), "u": ALL, "v": ALL, "dB": 4, "d_core": ALL},
}


def assert_spreads(backend, dtype):
    """Put a NaN into one number at a time; whatever it must not reach keeps its bits."""
    given = operands(dtype)
    clean = outcome(backend, **given)
    assert not any(value.isnan().any() for value in clean.values())
    for (name, at), shows in SPREADS.items():
        spoilt = given[name].clone()
        spoilt[at] = NAN
        for one, value in outcome(backend, **given | {name: spoilt}).items():
            where = torch.zeros(value.shape, dtype=torch.bool)
            if one in shows:
                where[shows[one]] = True
            assert torch.equal(value.isnan(), where), (name, at, one)
            assert torch.equal(value[~where], clean[one][~where]), (name, at, one)
