"""The choice between a GEMM of ours and torch's products: pure, legal, and measured where it has been measured."""

import pytest
import torch

from lorafast.engine.kernels import configs, gemm_routing
from lorafast.engine.kernels.gemm_routing import Asked, Route, Row, Tile
from lorafast.engine.kernels.gpu_specs import DEVICES, device

BASE = Asked(8192, 4096, (4096,), 16, torch.bfloat16, "sm_90")


def forms(asked):
    return {route.form for route in gemm_routing.candidates(asked)}


def test_torch_can_always_do_it():
    for asked in (
        BASE,
        BASE._replace(fusable=False),
        BASE._replace(arch="gfx942"),
        BASE._replace(dtype=torch.float32),
    ):
        assert "base first" in forms(asked)


@pytest.mark.parametrize(
    ("changes", "lacking"),
    [
        ({"arch": "sm_80"}, "tma"),
        ({"arch": "sm_89"}, "tma"),
        ({"arch": "sm_120"}, "tma"),
        ({"aligned": False}, "tma"),
        ({"dtype": torch.float32}, "tma"),
        ({"dtype": torch.float32}, "low first"),
        ({"fusable": False}, "pointers"),
        ({"R": 0}, "low first"),
    ],
)
def test_what_cannot_be_is_no_candidate(changes, lacking):
    assert lacking in forms(BASE)
    assert lacking not in forms(BASE._replace(**changes))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("K", [(1,), (4096,), (14336,), (4096, 1024, 1024)])
@pytest.mark.parametrize("M", [0, 1, 16, 65, 8192])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_every_route_covers_the_sum_once(arch, dtype, M, K, masked):
    asked = BASE._replace(M=M, K=K, dtype=dtype, arch=arch, masked=masked, many=len(K) > 1)
    for route in gemm_routing.candidates(asked):
        assert gemm_routing.seconds(asked, route) > 0
        if not route.fused:
            continue
        steps = sum(-(-length // route.tile.BLOCK_K) for length in (*K, asked.R))
        assert route.splits * route.share >= steps > (route.splits - 1) * route.share
        assert route.splits == 1 or (route.tile.BLOCK_M <= configs.SPLIT_ROWS and not masked)
        assert route.tile in configs.gemm(route.form, dtype, masked, len(K) > 1)
        assert "tma" not in route.form or arch != "sm_80"


def test_few_rows_are_split_until_the_device_is_full():
    few = gemm_routing.pick(BASE._replace(M=8, N=1024))
    assert few.fused
    assert few.tile.BLOCK_M == 16
    assert few.splits > 1


def test_an_unproven_gemm_is_left_for_torchs_where_the_low_rank_part_costs_little():
    """Break-even is an efficiency of 1/(1 + (367 - R_pad)/K): what is assumed passes it at K = 1024 and not at 14336."""
    assert gemm_routing.pick(BASE._replace(K=(1024,), N=1024)).fused
    assert not gemm_routing.pick(BASE._replace(K=(14336,))).fused


def test_a_measured_row_decides(monkeypatch):
    tile = configs.gemm("tma", torch.bfloat16, False, False)[1]
    for row in (Row("tma", tile), Row("base first")):
        monkeypatch.setattr(gemm_routing, "TABLE", {gemm_routing.key(BASE): row})
        gemm_routing._picked.cache_clear()
        assert gemm_routing.pick(BASE._replace(M=8000)).row == row
    # A row that is not legal here is none.
    monkeypatch.setattr(
        gemm_routing, "TABLE", {gemm_routing.key(BASE): Row("tma", Tile(1, 1, 1, 1, 1, 1))}
    )
    gemm_routing._picked.cache_clear()
    assert gemm_routing.pick(BASE).form in forms(BASE)
    gemm_routing._picked.cache_clear()


def test_a_row_is_found_all_over_its_bucket(monkeypatch):
    """How many programs share a sum follows from the exact number of rows; that they do is what was measured."""
    at_256 = BASE._replace(M=256, N=768, K=(1024,))
    (split,) = [
        route
        for route in gemm_routing.candidates(at_256)
        if route.tile and route.tile[:3] == (64, 64, 64) and route.splits > 1
    ]
    monkeypatch.setattr(gemm_routing, "TABLE", {gemm_routing.key(at_256): split.row})
    for M in (129, 160, 200, 255):
        gemm_routing._picked.cache_clear()
        assert gemm_routing.pick(at_256._replace(M=M)).row == split.row
    gemm_routing._picked.cache_clear()


def test_what_may_be_measured_apart_has_a_key_of_its_own():
    apart = [
        BASE,
        BASE._replace(by_row=False),
        BASE._replace(masked=True),
        BASE._replace(ends=1),
        BASE._replace(R=32),
    ]
    assert len({gemm_routing.key(asked) for asked in apart}) == len(apart)


def test_a_route_can_be_taken_for_a_while():
    with gemm_routing.taking(Route("base first")):
        assert gemm_routing.pick(BASE) == Route("base first")
    assert gemm_routing.pick(BASE).row in [route.row for route in gemm_routing.candidates(BASE)]


def test_rows_of_the_table_are_legal():
    for key, row in gemm_routing.TABLE.items():
        asked = Asked(
            key.M,
            key.N,
            key.K,
            key.R,
            getattr(torch, key.dtype),
            key.arch,
            key.by_row,
            key.masked,
            ends=key.ends,
        )
        assert gemm_routing.key(asked) == key
        assert row in [route.row for route in gemm_routing.candidates(asked)]


def test_an_unknown_device_is_taken_for_a_known_one():
    assert device("sm_87") == device("cpu") == DEVICES["sm_80"]


def test_the_interpreter_takes_ours():
    assert gemm_routing.pick(BASE._replace(arch="cpu", dtype=torch.float32)).form == "pointers"
    assert gemm_routing.pick(BASE._replace(arch="cpu", fusable=False)) in (
        Route("low first"),
        Route("base first"),
    )
