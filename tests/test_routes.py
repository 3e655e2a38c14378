"""The choice between a GEMM of ours and torch's products: pure, legal, and measured where it has been measured."""

import pytest
import torch

from lorafast.kernels import configs, routes
from lorafast.kernels.routes import Asked, Route, Row, Tile

BASE = Asked(8192, 4096, (4096,), 16, torch.bfloat16, "sm_90")


def forms(asked):
    return {route.form for route in routes.candidates(asked)}


def test_torch_can_always_do_it():
    for asked in (BASE, BASE._replace(fusable=False), BASE._replace(arch="gfx942"), BASE._replace(dtype=torch.float32)):
        assert "base first" in forms(asked)


@pytest.mark.parametrize(
    ("changes", "lacking"),
    [
        ({"arch": "sm_80"}, "tma"),
        ({"arch": "sm_89"}, "tma"),
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
@pytest.mark.parametrize("M", [1, 16, 65, 8192])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_every_route_covers_the_sum_once(arch, dtype, M, K, masked):
    asked = BASE._replace(M=M, K=K, dtype=dtype, arch=arch, masked=masked)
    for route in routes.candidates(asked):
        assert routes.seconds(asked, route) > 0
        if not route.fused:
            continue
        steps = sum(-(-length // route.tile.BLOCK_K) for length in (*K, asked.R))
        assert route.splits * route.share >= steps > (route.splits - 1) * route.share
        assert route.splits == 1 or (route.tile.BLOCK_M <= configs.SPLIT_ROWS and not masked)
        assert route.tile in configs.gemm(route.form, dtype, masked, len(K) > 1)


def test_few_rows_are_split_until_the_device_is_full():
    few = routes.pick(BASE._replace(M=8, N=1024))
    assert few.fused
    assert few.tile.BLOCK_M == 16
    assert few.splits > 1


def test_an_unproven_gemm_is_left_for_torchs_where_the_low_rank_part_costs_little():
    """Break-even is an efficiency of 1/(1 + (367 - R_pad)/K): what is assumed passes it at K = 1024 and not at 14336."""
    assert routes.pick(BASE._replace(K=(1024,), N=1024)).fused
    assert not routes.pick(BASE._replace(K=(14336,))).fused


def test_a_measured_row_decides(monkeypatch):
    tile = configs.gemm("tma", torch.bfloat16, False, False)[1]
    for row in (Row("tma", tile), Row("base first")):
        monkeypatch.setattr(routes, "TABLE", {routes.key(BASE): row})
        routes._picked.cache_clear()
        assert routes.pick(BASE._replace(M=8000)).row == row
    # A row that is not legal here is none.
    monkeypatch.setattr(routes, "TABLE", {routes.key(BASE): Row("tma", Tile(1, 1, 1, 1, 1, 1))})
    routes._picked.cache_clear()
    assert routes.pick(BASE).form in forms(BASE)
    routes._picked.cache_clear()


def test_a_route_can_be_taken_for_a_while():
    with routes.taking(Route("base first")):
        assert routes.pick(BASE) == Route("base first")
    assert routes.pick(BASE).row in [route.row for route in routes.candidates(BASE)]


def test_rows_of_the_table_are_legal():
    for key, row in routes.TABLE.items():
        asked = Asked(key.M, key.N, key.K, key.R, getattr(torch, key.dtype), key.arch, key.masked)
        assert routes.key(asked) == key
        assert row in [route.row for route in routes.candidates(asked)]


def test_an_unknown_device_is_taken_for_a_known_one():
    assert routes.device("sm_87") == routes.DEVICES["sm_86"]
    assert routes.device("sm_103") in routes.DEVICES.values()
    assert routes.device("cpu") == routes.DEVICES["sm_80"]


def test_the_interpreter_takes_ours():
    assert routes.pick(BASE._replace(arch="cpu", dtype=torch.float32)).form == "pointers"
    assert routes.pick(BASE._replace(arch="cpu", fusable=False)) in (Route("low first"), Route("base first"))
