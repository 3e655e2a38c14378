"""lorafast-bench tune, in Triton's interpreter: it checks before it times, and says what the table should."""

import json

import pytest
import torch

from lorafast.bench import cli, jobs, tune
from lorafast.engine.kernels import gemm_routing
from lorafast.engine.kernels.gemm_routing import Key, Route, Row

SIZES = jobs.Sizes(5, 24, 16, 4, 0.25)
SIZED = ["--shape", "24x16", "--tokens", "5", "--rank", "4", "--dropout", "0.25"]
ASKED = ["tune", "--device", "cpu", *SIZED, "--rounds", "1", "--warmup", "1"]


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setenv("LORAFAST_BACKEND", "triton")


def test_without_a_gpu_it_refuses(capsys):
    assert cli.main(ASKED) == 2
    assert "need a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_a_job_by_our_kernels_is_what_stock_torch_makes_of_it(p, dtype):
    found = jobs.jobs(SIZES._replace(p=p), dtype, torch.device("cpu"), 0)
    assert len(found) == jobs.JOBS
    for job in found:
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        for found, truth in zip(job.run(), job.chain(torch.float64), strict=True):
            torch.testing.assert_close(found.double(), truth, rtol=tolerance, atol=tolerance)


def test_every_route_is_timed_beside_the_frozen_product(interpreted, capsys, tmp_path):
    assert cli.main([*ASKED, "--json", str(tmp_path / "tune.json")]) == 0
    written = json.loads((tmp_path / "tune.json").read_text())
    of_linear = [
        one for one in written["timings"] if (one["primitive"], one["variant"]) == ("linear", "")
    ]
    asked = gemm_routing.Asked(5, 16, (24,), 4, torch.float32, "cpu")
    assert {one["route"] for one in of_linear} == {
        tune.FROZEN,
        *map(str, gemm_routing.candidates(asked)),
    }
    for one in written["timings"]:
        assert one["ms"] > 0
        assert one["rounds"] == 1
        if one["route"] != tune.FROZEN:
            assert one["repeats"]
            assert one["error_ratio"] <= 2
    assert {one["primitive"] for one in written["timings"]} == {*jobs.PRODUCTS, *jobs.STREAMS}
    assert str(tmp_path) not in json.dumps(written)
    # What is printed is what the file of routes would hold.
    line = next(line for line in capsys.readouterr().out.splitlines() if "N=16" in line)
    key, row = line.strip().rstrip(",").split(": ", 1)
    assert eval(key, {"Key": Key}) == gemm_routing.key(asked)
    assert eval(row, {"Row": Row, "Tile": gemm_routing.Tile}) in [
        route.row for route in gemm_routing.candidates(asked)
    ]


def test_a_route_that_errs_or_differs_shows_no_speed(interpreted):
    job = jobs.jobs(SIZES, torch.float32, torch.device("cpu"), 0)[0]
    assert job.primitive == "linear"
    right, noise = job.run, iter((0.0, 1e-3))
    broken = {
        "errs": job._replace(run=lambda: [right()[0] * 1.001]),
        "differ": job._replace(run=lambda: [right()[0] + 1e-9 + next(noise, 0.0)]),
        "RuntimeError: no such kernel": job._replace(
            run=lambda: (_ for _ in ()).throw(RuntimeError("no such kernel"))
        ),
    }
    for reason, job in broken.items():
        timings = tune._measure(
            job, torch.float32, tune.Clock(torch.device("cpu")), tune.Pace(1, 1, 9.0)
        )
        first = next(way for way in timings if isinstance(way, Route))
        assert timings[first].status == "wrong", reason
        assert reason in timings[first].reason
        assert timings[first].ms is None
        assert first.row not in tune._chosen(job, timings).values()
        assert reason in str(tune.table(list(timings.values())))
