"""The choice between our GEMM and torch's products: legal routes, the model, and measured rows."""

import threading

import pytest
import torch

from lorafast.engine.kernels import configs, gemm_routing
from lorafast.engine.kernels.gemm_routing import Route, RouteQuery, Row, Tile
from lorafast.engine.kernels.gpu_specs import device
from lorafast.runtime.devices import Arch


def nvidia(name, multiprocessors=0):
    return Arch("nvidia", name, multiprocessors)


BASE = RouteQuery(8192, 4096, (4096,), 16, torch.bfloat16, nvidia("sm_90"))


def forms(query):
    return {route.form for route in gemm_routing.candidates(query)}


def test_torchs_products_are_always_a_candidate():
    for query in (
        BASE,
        BASE._replace(fusable=False),
        BASE._replace(arch=Arch("amd", "gfx942")),
        BASE._replace(dtype=torch.float32),
    ):
        assert "base first" in forms(query)


@pytest.mark.parametrize(
    ("changes", "lacking"),
    [
        ({"arch": nvidia("sm_80")}, "tma"),
        ({"arch": nvidia("sm_89")}, "tma"),
        ({"arch": nvidia("sm_120")}, "tma"),
        ({"aligned": False}, "tma"),
        ({"dtype": torch.float32}, "tma"),
        ({"dtype": torch.float32}, "low first"),
        ({"fusable": False}, "pointers"),
        ({"R": 0}, "low first"),
    ],
)
def test_an_impossible_route_is_no_candidate(changes, lacking):
    assert lacking in forms(BASE)
    assert lacking not in forms(BASE._replace(**changes))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("K", [(1,), (4096,), (14336,), (4096, 1024, 1024)])
@pytest.mark.parametrize("M", [0, 1, 16, 65, 8192])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_every_route_covers_the_sum_once(arch, dtype, M, K, masked):
    query = BASE._replace(
        M=M, K=K, dtype=dtype, arch=nvidia(arch), masked=masked, many_summands=len(K) > 1
    )
    for route in gemm_routing.candidates(query):
        assert gemm_routing.modelled_seconds(query, route) > 0
        if not route.fused:
            continue
        steps = sum(-(-length // route.tile.BLOCK_K) for length in (*K, query.R))
        assert (
            route.splits * route.steps_per_split
            >= steps
            > (route.splits - 1) * route.steps_per_split
        )
        assert route.splits == 1 or (route.tile.BLOCK_M <= configs.SPLIT_ROWS and not masked)
        assert route.tile in configs.gemm(route.form, dtype, masked, len(K) > 1)
        assert "tma" not in route.form or arch != "sm_80"


def test_the_sum_of_few_rows_is_split_to_fill_the_device():
    few = gemm_routing.pick(BASE._replace(M=8, N=1024))
    assert few.fused
    assert few.tile.BLOCK_M == 16
    assert few.splits > 1


def test_torchs_gemm_is_chosen_where_the_low_rank_part_costs_little():
    """The two are equal at an efficiency of 1/(1 + (367 - R_pad)/K).

    The assumed one is above it at K = 1024 and below it at K = 14336.
    """
    assert gemm_routing.pick(BASE._replace(K=(1024,), N=1024)).fused
    assert not gemm_routing.pick(BASE._replace(K=(14336,))).fused


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_the_model_knows_the_logic_of_the_dropout_mask(arch):
    """Where a pass is bound by it, the pass is as slow; beside a slower memory it is hidden."""
    plain = BASE._replace(arch=nvidia(arch))
    masked, specs = plain._replace(masked=True), device(plain.arch)
    elements = plain.M * plain.N
    for route in gemm_routing.candidates(masked):
        form = "fused" if route.fused else route.form
        logic = gemm_routing.MASK[form] * elements / (64 * specs.multiprocessors * specs.clock)
        passes = {"fused": 0, "low first": 1, "base first": 2}[form]
        hidden = min(logic, 2 * passes * elements / specs.bandwidth)
        more = gemm_routing.modelled_seconds(masked, route) - gemm_routing.modelled_seconds(
            plain, route
        )
        assert more == pytest.approx(logic - hidden, abs=1e-9)


def test_a_measured_row_decides(monkeypatch):
    tile = configs.gemm("tma", torch.bfloat16, False, False)[1]
    for row in (Row("tma", tile), Row("base first")):
        monkeypatch.setattr(gemm_routing, "TABLE", {gemm_routing.key(BASE): row})
        gemm_routing._picked.cache_clear()
        assert gemm_routing.pick(BASE._replace(M=8000)).row == row
    # A row with an illegal tile is ignored.
    monkeypatch.setattr(
        gemm_routing, "TABLE", {gemm_routing.key(BASE): Row("tma", Tile(1, 1, 1, 1, 1, 1))}
    )
    gemm_routing._picked.cache_clear()
    assert gemm_routing.pick(BASE).form in forms(BASE)
    gemm_routing._picked.cache_clear()


def test_a_row_decides_its_whole_range_of_M(monkeypatch):
    """A row says that the sum is split; the number of splits follows from the exact M."""
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


def test_queries_that_may_be_measured_separately_have_separate_keys():
    queries = [
        BASE,
        BASE._replace(by_row=False),
        BASE._replace(masked=True),
        BASE._replace(epilogue_passes=1),
        BASE._replace(R=32),
        BASE._replace(arch=nvidia("sm_90", 114)),
    ]
    assert len({gemm_routing.key(query) for query in queries}) == len(queries)


def test_a_route_can_be_forced():
    with gemm_routing.forcing(Route("base first")):
        assert gemm_routing.pick(BASE) == Route("base first")
        with gemm_routing.forcing(Route("low first")):
            assert gemm_routing.pick(BASE) == Route("low first")
        assert gemm_routing.pick(BASE) == Route("base first")
    assert gemm_routing.pick(BASE).row in [route.row for route in gemm_routing.candidates(BASE)]


def test_a_forced_route_reaches_a_backward_pass_in_another_thread():
    """On a GPU autograd runs backward in threads of its own."""
    seen = []

    class Recording(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            seen.append(gemm_routing.pick(BASE))
            return dy

    x = torch.ones(3, requires_grad=True)
    loss = Recording.apply(x).sum()
    with gemm_routing.forcing(Route("base first")):
        other = threading.Thread(target=loss.backward)
        other.start()
        other.join()
    assert seen == [Route("base first")]


def test_programs_and_splits_follow_from_the_gpus_own_multiprocessors():
    """With 132 programs a GPU of 114 multiprocessors would run 18 of them after all others."""
    for count in (60, 78, 114, 132):
        query = BASE._replace(arch=nvidia("sm_90", count))
        programs = {r.programs for r in gemm_routing.candidates(query) if r.form == "tma"}
        assert programs == {count}
        few = query._replace(M=8, N=1024)
        for route in gemm_routing.candidates(few):
            if route.fused and route.splits > 1:
                tiles = -(-few.N // route.tile.BLOCK_N)
                assert tiles * route.splits <= max(count, tiles)
    assert gemm_routing.pick(BASE._replace(arch=nvidia("sm_90", 132))) == gemm_routing.pick(BASE)


def test_rows_of_the_table_are_legal():
    for key, row in gemm_routing.TABLE.items():
        query = RouteQuery(
            key.M,
            key.N,
            key.K,
            key.R,
            getattr(torch, key.dtype),
            nvidia(key.arch, key.multiprocessors),
            key.by_row,
            key.masked,
            epilogue_passes=key.epilogue_passes,
        )
        assert gemm_routing.key(query) == key
        assert row in [route.row for route in gemm_routing.candidates(query)]


def test_few_rows_in_fp32_take_torchs_products():
    """A tile of ours sums in one chain, and errs up to three times what a library's sums do."""
    for arch in (Arch("cpu", "cpu"), nvidia("sm_80"), nvidia("sm_90")):
        for M in (1, 2, 15):
            for masked in (False, True):
                query = BASE._replace(M=M, dtype=torch.float32, arch=arch, masked=masked)
                assert not gemm_routing.pick(query).fused
    query = BASE._replace(M=16, dtype=torch.float32, arch=Arch("cpu", "cpu"))
    assert gemm_routing.pick(query).fused


def test_the_interpreter_chooses_our_gemm():
    assert (
        gemm_routing.pick(BASE._replace(arch=Arch("cpu", "cpu"), dtype=torch.float32)).form
        == "pointers"
    )
    assert gemm_routing.pick(BASE._replace(arch=Arch("cpu", "cpu"), fusable=False)) in (
        Route("low first"),
        Route("base first"),
    )
