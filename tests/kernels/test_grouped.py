"""The grouped kernels in Triton's interpreter: the map of rows, errors, masks, sums of long blocks.

tests/engine/test_grouped.py has whole layers of experts.
"""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from helpers.against_eager import tensors_in
from helpers.grouped_rule import Errors, groups_of
from helpers.rotations import thinned
from helpers.triton_interpreter import DTYPES, SEED, far_apart, strided

from lorafast.engine import philox
from lorafast.engine.grouped import triton as backend
from lorafast.engine.grouped.groups import Groups
from lorafast.engine.kernels.expert_blocks import (
    blocks,
    expert_of_block,
    experts_held,
    part_of_block,
    parts_held,
)
from lorafast.engine.kernels.grouped_drop import grouped_gain
from lorafast.engine.kernels.grouped_grad_project import grouped_grad_project
from lorafast.engine.kernels.grouped_low_rank_add import grouped_low_rank_add
from lorafast.engine.problem import BaseTerm, DownProj, LowRankTerm, UpProj, UpProjGradSpec

# Rows of each expert. Blocks of a sum have 256 rows at least.
COUNTS = [(0, 1, 70, 0), (9,), (0, 0, 12), (130, 0, 3, 33, 16, 1, 0, 64)]
LAYOUTS = ("contiguous", "sliced", "transposed")


@triton.jit
def map_kernel(offsets_ptr, map_ptr, experts, rows, EXPERTS: tl.constexpr):
    """Write each block's expert, first row and end, and the place of its part."""
    block = tl.program_id(0)
    expert, first, end = expert_of_block(offsets_ptr, experts, block, rows, EXPERTS)
    start = tl.load(offsets_ptr + expert)
    tl.store(map_ptr + 4 * block, expert)
    tl.store(map_ptr + 4 * block + 1, first)
    tl.store(map_ptr + 4 * block + 2, end)
    tl.store(map_ptr + 4 * block + 3, part_of_block(start, first, rows))


@pytest.mark.parametrize(
    ("experts", "rows"), thinned(itertools.product((1, 3, 32, 33, 150), (16, 1, 64, 100)), 7)
)
def test_every_row_is_in_one_block_of_its_expert(experts, rows):
    for most in (0, 3, 2 * rows + 1, 5 * rows):
        counts = torch.randint(0, most + 1, (experts,)).tolist()
        offsets = groups_of(counts).offsets
        number = blocks(sum(counts), offsets, rows)
        found = torch.full((number, 4), -1)
        map_kernel[(number,)](offsets, found, experts, rows, EXPERTS=experts_held(offsets))
        held, places = [], []
        for expert, first, end, place in found.tolist():
            assert 0 <= expert < experts
            assert end == offsets[expert + 1]
            held += [(row, expert) for row in range(first, min(first + rows, end))]
            if first < end and counts[expert] > rows:
                places.append(place)
            # Blocks of an expert begin a number of rows apart.
            assert (first - int(offsets[expert])) % rows == 0
        assert held == list(enumerate(Groups(offsets).of_all_rows(sum(counts)).tolist()))
        # Parts of experts with several blocks.
        assert len({*places}) == len(places)
        assert max(places, default=0) < parts_held(sum(counts), rows)


CASES = [
    (dtype, counts, *shape, LAYOUTS[i % 3], shared)
    for i, (dtype, counts, shape, shared) in enumerate(
        itertools.product(
            DTYPES, COUNTS, [(72, 40, 6), (33, 70, 17), (131, 24, 1), (40, 33, 100)], ("", "A", "B")
        )
    )
]


@pytest.mark.parametrize(("dtype", "counts", "K", "N", "R", "layout", "shared"), thinned(CASES, 17))
def test_every_primitive(dtype, counts, K, N, R, layout, shared):
    errors = Errors(dtype)
    # The rounding of few numbers says nothing.
    for _ in range(2 if sum(count > 0 for count in counts) * R >= 64 else 8):
        for form in ((True, True, True), (False, False, False), (True, False, False)):
            add_every_primitive(errors, dtype, counts, K, N, R, layout, shared, *form)
    errors.check()


def add_every_primitive(errors, dtype, counts, K, N, R, layout, shared, drops, full, sorted_again):
    """Add the results of one draw. full: of the core, with two adapters and frozen columns."""
    E, S = len(counts), sum(counts)
    groups = groups_of(counts, sorted_again)
    x, dy, kept = (strided(S, width, dtype, layout) for width in (K, N, N))
    weight = torch.randn(E, N, K).to(dtype) / K**0.5
    A, B = torch.randn(E, K, R).transpose(1, 2) / K**0.5, torch.randn(E, N, R) / R**0.5
    A, B = A[0] if shared == "A" else A, B[0] if shared == "B" else B
    core = torch.randn(E, R, R) / R**0.5 if full else torch.randn(E, R)
    gain, scale, bias = (torch.randn(E, N) for _ in range(3))
    h = torch.randn(S, R).to(dtype)
    seed, p = (SEED, 0.3) if drops else (None, 0.0)

    def add(label, primitive, *operands):
        errors.add((label, drops, full), primitive, groups, *operands)

    add("h", "project", x, [DownProj(A, core, seed, p), DownProj(A.clone(), None, seed, p)])
    ups = [UpProj(h, B, 1.5, scale), UpProj(h, B, torch.tensor(0.5))]
    add("y", "linear", x, weight, ups[: 1 + full], gain if drops else None, bias, drops)
    # Beside fp16 eager's u is fp32, and so is what a core makes of it: the tests of layers have
    # that, against the chain of stock ops. The gradient of a short core is too few numbers.
    own_core = None if dtype == torch.float16 or R < 16 else core
    spec = UpProjGradSpec(
        B, 1.5 if full else torch.tensor(0.7), None if drops else scale, own_core, h,
        R // 2 if full else 0, want_v=True, want_B=True, want_core=own_core is not None,
        want_out_scale=not drops,
    )  # fmt: skip
    add("u and P", "grad_output", dy, [spec], gain, kept if drops else None, not full)
    only_P = spec._replace(want_v=False, want_core=False)
    add("two", "grad_output", dy, [only_P, only_P._replace(want_B=False, want_v=True)])
    terms = [LowRankTerm(h, A, seed, p)]
    add("dx", "grad_input", [BaseTerm(dy, weight, gain if full else None)], terms)
    add("dA", "grad_project", x, terms)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sums_of_an_expert_of_many_blocks(dtype):
    """They are added in order: their bits do not depend on where the expert's rows lie."""
    counts, K, R = (3, 1500, 300, 0), 40, 5
    groups, S = groups_of(counts), sum(counts)
    x, v = strided(S, K, dtype, "sliced"), torch.randn(S, R).to(dtype)
    A = torch.empty(4, R, K)
    errors = Errors(dtype)
    errors.add("dA", "grad_project", groups, x, [LowRankTerm(v, A, SEED, 0.3)])
    spec = UpProjGradSpec(torch.randn(4, K, R), 1.5, h=v, want_v=True, want_B=True)
    errors.add("u and P", "grad_output", groups, x, [spec], None, x.flip(1), True)
    many = groups_of((1, 255, 257, 700, 0, 300, 2, 9, 279))
    errors.add("many", "grad_project", many, x, [LowRankTerm(v, torch.empty(9, R, K), SEED, 0.3)])
    errors.check()
    found = grouped_grad_project(x, v, groups.offsets)
    moved = torch.arange(S).roll(-3)
    offsets = groups_of((1500, 300, 3)).offsets
    assert torch.equal(found[1], grouped_grad_project(x[moved], v[moved], offsets)[0])
    assert not found[3].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sorted_again", [True, False])
def test_dropped_elements_are_those_of_the_rows_given(dtype, sorted_again):
    """Every kernel that drops is shown the mask itself: products with ones and unit vectors."""
    counts, K = (5, 0, 80, 1), 130
    groups, S, E = groups_of(counts, sorted_again), 86, 4
    for seed, p in ((SEED, 0.25), (torch.tensor([2**63 - 2]), 0.5)):
        mask = groups.keep_mask(seed, p, slice(0, S), K)
        kept = torch.where(mask, torch.tensor(philox.scale(p)), 0.0)
        x, A = torch.ones(S, K, dtype=dtype), torch.eye(K)
        ((h, _),) = backend.project(groups, x, [DownProj(A, None, seed, p)])
        term = LowRankTerm(torch.eye(S).to(dtype), torch.empty(E, S, K), seed, p)
        (dA,) = backend.grad_project(groups, x, [term])
        base = BaseTerm(torch.zeros(S, 8, dtype=dtype), torch.zeros(E, 8, K, dtype=dtype))
        dx = backend.grad_input(groups, [base], [LowRankTerm(x[:, :1], torch.ones(1, K), seed, p)])
        dropped = backend.drop(groups, x, seed, p)
        for found in (h, dA.sum(0), dx, dropped):
            assert torch.equal(found, kept.to(found.dtype))


def test_nothing_outside_its_place_is_written():
    """Outputs lie between guards, and rows of an expert beside those of another."""
    counts, K, R = (3, 0, 65), 40, 4
    groups, S = groups_of(counts), sum(counts)
    whole = torch.full((S + 2, K + 5), 7.0)
    out = whole[1:-1, 2 : K + 2]
    v, A = torch.randn(S, R), torch.randn(3, R, K)
    grouped_low_rank_add(out, v, A, groups.offsets, SEED, 0.3, groups.rows)
    part = torch.cat([v[rows] @ A[e] for e, rows in groups.slices()])
    mask = groups.keep_mask(SEED, 0.3, slice(0, S), K)
    torch.testing.assert_close(out, 7 + torch.where(mask, part * philox.scale(0.3), 0.0))
    out.fill_(7.0)
    assert (whole == 7).all()


def test_gain_and_bias_are_those_of_each_rows_expert():
    """Whole numbers, which nothing rounds."""
    counts, K = (3, 0, 70, 1), 40
    groups, S, E = groups_of(counts), sum(counts), len(counts)
    gain, bias = (torch.arange(E * K).view(E, K).float() + i for i in (1, 1000))
    x, A = torch.arange(S * K).view(S, K) % 9 - 4.0, torch.ones(E, 1, K)
    out, inner = x.clone(), torch.full_like(x, torch.nan)
    v = torch.full((S, 1), 2.0)
    grouped_low_rank_add(out, v, A, groups.offsets, gain=gain, bias=bias, inner=inner)
    own_gain, own_bias = groups.of_rows(gain, S), groups.of_rows(bias, S)
    assert torch.equal(inner, x + 2)
    assert torch.equal(out, own_gain * (x + 2) + own_bias)
    assert torch.equal(grouped_gain(x, gain, groups.offsets), own_gain * x)


def test_rows_beyond_element_2_to_the_31(tmp_path):
    far, near = far_apart(tmp_path, 18, 16)
    groups = groups_of((4, 0, 14))
    A, v = torch.randn(3, 3, 16), torch.randn(18, 3).half()
    for seed, p in ((None, 0.0), (SEED, 0.3)):
        h = [backend.project(groups, x, [DownProj(A, None, seed, p)])[0][0] for x in (far, near)]
        dA = [backend.grad_project(groups, x, [LowRankTerm(v, A, seed, p)])[0] for x in (far, near)]
        assert torch.equal(*h)
        assert torch.equal(*dA)
    spec = UpProjGradSpec(torch.randn(3, 16, 3), 1.0, h=v, want_v=True, want_B=True)
    found = [
        tensors_in(backend.grad_output(groups, dy, [spec], None, dy, True)) for dy in (far, near)
    ]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize(("counts", "K", "N"), [((0, 0), 8, 16), ((2, 1), 0, 4), ((2, 1), 8, 0)])
def test_no_rows_no_inputs_no_outputs(counts, K, N):
    groups, S, R = groups_of(counts), sum(counts), 2
    x, dy, h = torch.randn(S, K), torch.randn(S, N), torch.randn(S, R)
    A, B, weight = torch.randn(2, R, K), torch.randn(2, N, R), torch.randn(2, N, K)
    ((found, _),) = backend.project(groups, x, [DownProj(A, None, SEED, 0.3)])
    assert found.shape == (S, R)
    assert K or not found.any()
    spec = UpProjGradSpec(B, 1.0, h=h, want_v=True, want_B=True)
    (grads,), d_bias, dot = backend.grad_output(groups, dy, [spec], None, dy, True)[:3]
    assert [one.shape for one in (grads.v, grads.dB, d_bias, dot)] == [
        (S, R), (2, N, R), (2, N), (2, N)
    ]  # fmt: skip
    assert S or not (grads.dB.any() or d_bias.any() or dot.any())
    (dA,) = backend.grad_project(groups, x, [LowRankTerm(h, A, SEED, 0.3)])
    assert dA.shape == (2, R, K)
    assert S or not dA.any()
    dx = backend.grad_input(groups, [BaseTerm(dy, weight)], [LowRankTerm(h, A, SEED, 0.3)])
    assert dx.shape == (S, K)
