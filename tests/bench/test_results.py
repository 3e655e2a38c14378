"""The files in bench/results keep to the schema, and hold what the pages say about training."""

import statistics
from pathlib import Path

import pytest

import lorafast
from lorafast.bench.cases import recipes
from lorafast.bench.report import plots
from lorafast.bench.report.compact import RUN_FACTS
from lorafast.bench.report.record import Results

RESULTS = Path(lorafast.__file__).resolve().parent.parent / "bench" / "results"
FILES = {file.name: Results.read(file) for file in sorted(RESULTS.glob("*.json"))}
DEVICE = FILES["amd-epyc-2-cores.json"]


def run(name):
    """Return the rows of one run by label; a row of training, if there is one."""
    rows = [r for r in DEVICE.records if r.run == name]
    return {r.label: r for r in sorted(rows, key=lambda r: r.bench == "training")}


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_compact_and_names_its_runs(name):
    results = FILES[name]
    assert {"torch", "device_name"} <= set(results.env)
    assert {r.run for r in results.records} == set(results.env["runs"])
    for facts in results.env["runs"].values():
        assert set(facts) == set(RUN_FACTS)
        assert not facts["commit"].endswith("+"), "measured on a tree with changes"
        assert "/" not in facts["command"]


def test_there_is_one_small_file_for_each_device():
    devices = [results.env["device_name"] for results in FILES.values()]
    assert len(devices) == len(set(devices))
    assert all((RESULTS / name).stat().st_size < 200_000 for name in FILES)


def test_no_row_is_wrong_except_those_of_compiled_peft():
    wrong = [r for results in FILES.values() for r in results.records if not r.ok]
    assert {r.label for r in wrong} <= {"peft+compile dora"}


def test_every_method_learns():
    rows = run("minilm-methods")
    frozen = statistics.fmean(rows["frozen"].losses[-10:])
    for method in recipes.RECIPES:
        r = rows[f"lorafast {method}"]
        assert (r.bench, r.status, len(r.losses)) == ("training", "ok", 200)
        first, last = statistics.fmean(r.losses[:10]), statistics.fmean(r.losses[-10:])
        assert last < 0.8 * first
        # The head alone learns too; a method that trained nothing else would end like it.
        assert last < 0.8 * frozen
        assert all((r.accuracy, r.trainable, r.step_ms, r.peak_bytes, r.lr))


@pytest.mark.parametrize(
    ("name", "impl"), [("minilm", "lorafast"), ("minilm-accelerated", "accelerated")]
)
def test_losses_equal_pefts_to_1e5(name, impl):
    rows = run(name)
    for method in ("lora", "dora"):
        assert rows[f"{impl} {method}"].loss_gap(rows[f"peft {method}"])[0] <= 1e-5


def test_no_layer_is_slower_than_pefts():
    """From 64 tokens on never, below by at most 5 %: few tokens, whole models and generation."""
    results = FILES["amd-epyc-avx512bf16-2-threads.json"]
    ours = ("lorafast", "lorafast-mlp", "accelerated")
    measured = [r for r in results.records if r.bench != "training"]

    def problem(r):
        return (
            r.run, r.bench, r.method, r.dtype, r.M, r.N, r.K, r.dropout, r.batch_size, r.inference,
            r.base_format, r.routing,
        )  # fmt: skip

    peft = {problem(r): r.ratio_to_frozen for r in measured if r.impl == "peft"}
    compared = [r for r in measured if r.impl in ours and problem(r) in peft]
    kinds = {"linear", "step", "generate", "experts", "block"}
    assert {r.bench for r in compared} == kinds
    assert {r.M for r in compared if r.bench == "linear"} >= {1, 8, 16, 64, 2048}
    for r in compared:
        tokens = r.M if r.bench == "linear" else (r.batch_size or 1) * (r.seq or 1)
        limit = 1.0 if tokens >= 64 else 1.05
        assert r.ratio_to_frozen <= limit * peft[problem(r)], problem(r)


def test_the_memory_of_bart_large_is_drawn_by_method():
    rows = [r for r in FILES["lamda-memory.json"].records if r.run == "lamda-memory"]
    titles = {"peft": "PEFT", "lorafast": "lorafast"}
    peft, ours = plots.memory_by_method(rows, titles).axes
    assert [panel.get_title() for panel in (peft, ours)] == ["PEFT", "lorafast"]
    curves = {line.get_label(): line for line in ours.get_lines()}
    assert list(curves) == ["full", "lora", "lora-fa", "vera", "adalora", "dora", "lamda"]
    assert len(peft.get_lines()) == len(curves) - 1  # PEFT has no LaMDA
    xs, ys = curves["lamda"].get_data()
    assert list(xs) == [1, 2, 4, 8, 16, 32, 64]
    found = {r.batch_size: r.total_bytes / 2**30 for r in rows if r.label == "lorafast lamda"}
    assert list(ys) == [found[x] for x in xs]


def test_lamda_takes_less_memory_than_lora_and_pefts_lora_more():
    at_64 = {
        r.label: r.total_bytes
        for r in FILES["lamda-memory.json"].records
        if r.batch_size == 64 and r.ok
    }
    assert at_64["lorafast lamda"] < at_64["lorafast lora"] < at_64["lorafast dora"]
    assert at_64["lorafast lora"] < at_64["peft lora"]
    assert at_64["lorafast dora"] < at_64["peft-bf16 dora"] < at_64["peft dora"]
