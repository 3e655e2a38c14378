"""Compact files: several runs in one file, repeats as one record, one line per record."""

import json

import pytest
from helpers import bench_records

from lorafast.bench.errors import BenchError
from lorafast.bench.report import compact
from lorafast.bench.report.record import Results


def write(path, *records, **env):
    known = {"torch": "2", "commit": "abc", "command": "lorafast-bench linear", "time": "now"}
    Results(known | env, list(records)).write(path)
    return path


def layer(**fields):
    return bench_records.linear(ratio_low=1.9, ratio_high=2.1, **fields)


def test_runs_of_one_machine_become_one_file(tmp_path):
    first = write(tmp_path / "a.json", layer(step_ms=1.23456), layer(M=16))
    missing = bench_records.linear("peft", "lamda").fail("missing", "PEFT has no LaMDA")
    second = write(tmp_path / "b.json", layer(bias=True), missing, commit="def")
    out = tmp_path / "out.json"
    compact.main([str(out), f"plain={first}", f"bias={second}"])
    results = Results.read(out)
    assert [(r.run, r.M, r.bias) for r in results.records] == [
        ("plain", 8, False),
        ("plain", 16, False),
        ("bias", 8, True),
    ]
    r = results.records[0]
    assert (r.step_ms, r.ratio_low, r.saved_bytes, r.status) == (1.235, 1.9, 96, "ok")
    assert (r.fwd_ms_p20, r.error_name, r.tokens_per_s) == (None, None, None)
    assert results.env["torch"] == "2"
    assert results.env["runs"]["bias"]["commit"] == "def"
    lines = [line for line in out.read_text().splitlines() if line.startswith('{"run"')]
    assert len(lines) == 3
    assert "status" not in json.loads(lines[0].rstrip(","))


def test_repeats_become_one_record(tmp_path):
    files = []
    for i, (ratio, low, high) in enumerate([(1.2, 1.1, 1.3), (1.5, 1.0, 1.6), (1.1, 1.05, 1.2)]):
        row = bench_records.linear(ratio_to_frozen=ratio, ratio_low=low, ratio_high=high)
        files.append(str(write(tmp_path / f"{i}.json", row, time=str(i))))
    out = tmp_path / "out.json"
    compact.main([str(out), f"repeated={','.join(files)}"])
    results = Results.read(out)
    (r,) = results.records
    assert (r.ratio_to_frozen, r.ratio_low, r.ratio_high) == (1.2, 1.0, 1.6)
    assert results.env["runs"]["repeated"]["time"] == ["0", "1", "2"]


def test_losses_keep_their_digits_only_next_to_pefts(tmp_path):
    losses = [3.123456, 2.0]
    rows = [bench_records.training(method=method, losses=losses) for method in ("lora", "vera")]
    file = write(tmp_path / "a.json", *rows, bench_records.training("peft", losses=losses))
    out = tmp_path / "out.json"
    compact.main([str(out), f"minilm={file}"])
    found = {r.label: r.losses[0] for r in Results.read(out).records}
    assert found == {"lorafast lora": 3.123456, "lorafast vera": 3.123, "peft lora": 3.123456}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"env": {"torch": "3"}}, "measured in different environments"),
        ({"env": {"commit": "def"}}, "its files differ in commit or command"),
        ({"rows": 2}, "its files differ in their number of rows"),
        ({"fields": {"saved_bytes": 97}}, "repeats differ in saved_bytes: 96, 97"),
    ],
)
def test_runs_that_do_not_belong_together_are_an_error(changed, message, tmp_path):
    first = write(tmp_path / "a.json", bench_records.linear())
    rows = [bench_records.linear(**changed.get("fields", {}))] * changed.get("rows", 1)
    second = write(tmp_path / "b.json", *rows, **changed.get("env", {}))
    with pytest.raises(BenchError, match=message):
        compact.main([str(tmp_path / "out.json"), f"run={first},{second}"])
    assert not (tmp_path / "out.json").exists()
