"""The file format: every key of the contract, and errors for files that depart from it."""

import json
import os
import stat

import pytest
from helpers import bench_records

from lorafast.bench.errors import BenchError
from lorafast.bench.report import record
from lorafast.bench.report.record import Results

# The keys of the contract.
PROMISED = [
    *("impl", "method", "device", "dtype", "adapter_dtype", "M", "N", "K", "R", "dropout"),
    *("dropout_on", "fwd_ms", "bwd_ms", "step_ms", "ratio_to_frozen", "saved_bytes"),
    *("activation_bytes", "peak_bytes", "tokens_per_s", "error_ratio", "status", "reason"),
    *("route", "compile", "cuda_graph", "checkpointing", "rounds", "warmup", "seed", "model"),
    *("batch_size", "seq", "optimizer", "weight_bytes", "grad_bytes", "optimizer_bytes"),
]


def document(*records, **env):
    """Return what a file of these records holds."""
    return json.loads(json.dumps(Results({"torch": "2"} | env, list(records)).document()))


def test_every_promised_key_is_written_and_times_have_percentiles():
    written = set(document(bench_records.linear())["records"][0])
    assert set(PROMISED) <= written
    for time in ("fwd_ms", "bwd_ms", "step_ms", "ratio_to_frozen"):
        assert {f"{time}_p20", f"{time}_p80"} <= written
    # `run` is written in compact files alone.
    assert written == set(record.KEYS) - {"run"}


def test_a_file_is_read_as_it_was_written(tmp_path):
    file = tmp_path / "new" / "a.json"
    records = [bench_records.linear(), bench_records.training()]
    records.append(bench_records.linear(M=16).fail("oom", "no room"))
    written = Results({"torch": "2"}, records)
    written.write(file)
    read = Results.read(file)
    assert (read.env, read.records) == (written.env, written.records)
    assert [path.name for path in file.parent.iterdir()] == ["a.json"]


def test_a_write_that_fails_keeps_the_old_file(tmp_path):
    file = tmp_path / "a.json"
    Results({}, [bench_records.linear()]).write(file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="Out of range float"):
        Results({}, [bench_records.linear(step_ms=float("nan"))]).write(file)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "real" / "a.json")
    Results({}, [bench_records.linear()]).write(link)
    assert link.is_symlink()
    assert len(Results.read(tmp_path / "real" / "a.json").records) == 1


def test_a_pipe_is_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    Results({}, [bench_records.linear()]).write(pipe)
    assert len(json.loads(os.read(reader, 1 << 20))["records"]) == 1
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def drop(name):
    return lambda d: d["records"][0].pop(name)


def put(**fields):
    return lambda d: d["records"][0].update(fields)


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        *((drop(name), f"records[0]: {name} is missing") for name in PROMISED),
        (put(speed=3), "records[0]: speed is unknown"),
        (put(M="8"), "records[0]: M is '8'"),
        (put(M=8.5), "records[0]: M is 8.5"),
        (put(M=True), "records[0]: M is True"),
        (put(compile=1), "records[0]: compile is 1"),
        (put(dtype=None), "records[0]: dtype is None"),
        (put(floor="1.1"), "records[0]: floor is '1.1'"),
        (
            put(status="oom", reason="no room", ratio_high=1.1),
            "records[0]: ratio_high is shown, status is oom",
        ),
        (put(bench="speed"), "records[0]: bench is 'speed'"),
        (put(status="fine"), "records[0]: status is 'fine'"),
        (put(status="wrong", reason="y errs"), "records[0]: step_ms is shown, status is wrong"),
        (put(status="wrong"), "records[0]: status is wrong without a reason"),
        (put(run="layer"), "records[0]: run 'layer' is none of env's runs"),
        (lambda d: d.update(schema_version=2), "schema_version 2 is not 1"),
        (lambda d: d.update(more=1), "must hold schema_version, env and records"),
        (lambda d: d.update(records={}), "env must be an object and records a list"),
        (lambda d: d["env"].update(runs=[]), "env's runs must be an object"),
        (lambda d: d["records"].append(3), "records[1]: is no object"),
    ],
)
def test_a_departure_from_the_schema_is_named(spoil, fault, tmp_path):
    spoilt = document(bench_records.linear())
    assert record.faults(spoilt) == []
    spoil(spoilt)
    assert fault in record.faults(spoilt)
    file = tmp_path / "a.json"
    file.write_text(json.dumps(spoilt))
    with pytest.raises(BenchError, match=r"a\.json: "):
        Results.read(file)


def test_a_file_from_before_a_key_was_added_is_read(tmp_path):
    old = document(bench_records.linear(), bench_records.linear().fail("oom", "no room"))
    for row in old["records"]:
        for name in record.LATER:
            row.pop(name, None)
    file = tmp_path / "a.json"
    file.write_text(json.dumps(old))
    first, second = Results.read(file).records
    assert (first, second.status) == (bench_records.linear(), "oom")
    assert not set(record.LATER) & set(PROMISED)


def test_a_record_of_a_compact_file_may_lack_keys_with_defaults():
    compact = document(bench_records.linear(run="layer"), runs={"layer": {}})
    drop("peak_bytes")(compact)
    drop("status")(compact)
    assert record.faults(compact) == []
    drop("M")(compact)
    put(run="other")(compact)
    assert record.faults(compact) == ["records[0]: M is missing"]
    put(M=8)(compact)
    assert record.faults(compact) == ["records[0]: run 'other' is none of env's runs"]
    drop("run")(compact)
    assert record.faults(compact) == ["records[0]: run is missing"]


def test_text_that_is_not_json_is_named(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("{")
    with pytest.raises(BenchError, match=r"a\.json: not JSON"):
        Results.read(file)


def test_a_failed_row_has_no_speed():
    row = bench_records.linear().fail("wrong", "y errs")
    assert all(getattr(row, name) is None for name in record.SPEEDS)
    assert (row.status, row.reason, row.saved_bytes) == ("wrong", "y errs", 96)
