"""lorafast-bench tune, in Triton's interpreter: checks before times, and rows for the table."""

import json
import subprocess
import sys

import pytest
import torch

from lorafast.bench import cli, tune
from lorafast.bench.measure import timing
from lorafast.engine import kernel_cases
from lorafast.engine.kernels import gemm_routing
from lorafast.engine.kernels.gemm_routing import Key, Route, Row
from lorafast.runtime.devices import Arch

# Fewer tokens are so few numbers that a correct kernel may err twice as much as eager by chance.
SIZES = kernel_cases.Sizes(37, 24, 16, 4, 0.25)
SIZED = ["--shape", "24x16", "--tokens", "37", "--rank", "4", "--dropout", "0.25"]
ASKED = ["tune", "--device", "cpu", *SIZED, "--rounds", "1", "--warmup", "1"]
CPU = torch.device("cpu")


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setenv("LORAFAST_BACKEND", "triton")


@pytest.fixture
def no_repeats(monkeypatch):
    """Without repeats within a sample, which the short frozen product would ask for."""
    monkeypatch.setattr(timing, "MIN_SAMPLE_MS", 0.0)


def test_without_a_gpu_it_is_an_error(capsys):
    assert cli.main(ASKED) == 2
    assert "need a GPU" in capsys.readouterr().err


def test_without_triton_the_extra_is_named():
    probe = "import sys; sys.modules['triton'] = None; from lorafast.bench import cli; cli.main(%r)"
    done = subprocess.run([sys.executable, "-c", probe % ASKED], capture_output=True, text=True)
    assert done.stderr.startswith(
        "lorafast-bench tune: its kernels cannot be loaded: this needs tri"
    )
    assert "pip install '.[triton]' in a checkout" in done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_a_case_by_our_kernels_equals_stock_torch(p, dtype):
    cases = kernel_cases.kernel_cases(SIZES._replace(p=p), dtype, CPU, 0)
    assert len(cases) == kernel_cases.CASES_PER_LAYER
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for case in cases:
        for found, truth in zip(case.run(), case.chain(torch.float64), strict=True):
            torch.testing.assert_close(found.double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("interpreted", "no_repeats")
def test_every_route_is_timed_next_to_the_frozen_product(capsys, tmp_path):
    assert cli.main([*ASKED, "--json", str(tmp_path / "tune.json")]) == 0
    written = json.loads((tmp_path / "tune.json").read_text())
    timings = written["timings"]
    plain = [one for one in timings if (one["primitive"], one["variant"]) == ("linear", "")]
    query = gemm_routing.RouteQuery(SIZES.M, 16, (24,), 4, torch.float32, Arch("cpu", "cpu"))
    routes = gemm_routing.candidates(query)
    assert {one["route"] for one in plain} == {tune.FROZEN, *map(str, routes)}
    for one in timings:
        assert one["ms"] > 0
        assert one["rounds"] == 1
        if one["route"] != tune.FROZEN:
            assert one["repeats"]
            assert one["error_ratio"] <= 2
    primitives = {*kernel_cases.PRODUCTS, *kernel_cases.STREAMS}
    assert {one["primitive"] for one in timings} == primitives
    assert str(tmp_path) not in json.dumps(written)
    # A printed line is a row of the table of routes.
    line = next(line for line in capsys.readouterr().out.splitlines() if "N=16" in line)
    key, row = line.strip().rstrip(",").split(": ", 1)
    assert eval(key, {"Key": Key}) == gemm_routing.key(query)
    names = {"Row": Row, "Tile": gemm_routing.Tile}
    assert eval(row, names) in [route.row for route in routes]


@pytest.mark.usefixtures("interpreted", "no_repeats")
@pytest.mark.parametrize("reason", ["errs", "differ", "RuntimeError: no such kernel"])
def test_a_route_that_errs_or_differs_shows_no_speed(reason):
    case = kernel_cases.kernel_cases(SIZES, torch.float32, CPU, 0)[0]
    assert case.primitive == "linear"
    right, noise = case.run, iter((0.0, 1e-3))

    def fail():
        raise RuntimeError("no such kernel")

    runs = {
        "errs": lambda: [right()[0] * 1.001],
        "differ": lambda: [right()[0] + 1e-9 + next(noise, 0.0)],
        "RuntimeError: no such kernel": fail,
    }
    broken = case._replace(run=runs[reason])
    timings = tune._measure(broken, torch.float32, tune.Timer(CPU), tune.Pace(1, 1, 9.0))
    first = next(route for route in timings if isinstance(route, Route))
    assert timings[first].status == "wrong"
    assert reason in timings[first].reason
    assert timings[first].ms is None
    assert first.row not in tune._chosen(broken, timings).values()
    assert reason in str(tune.table(list(timings.values())))
