"""Tables of rows, on wide and on narrow consoles."""

import io

import pytest
from helpers import bench_records
from rich.console import Console

from lorafast.bench.report import tables
from lorafast.bench.report.record import Results
from lorafast.bench.report.tables import NOTHING, Table

RESULTS = bench_records.results()


def shown(found, width):
    file = io.StringIO()
    tables.show(found, Console(file=file, width=width))
    return file.getvalue()


def test_rows_of_one_problem_are_one_table_with_sections_by_tokens():
    first, second, third = tables.tables([RESULTS])
    assert first.title == "one layer 4 → 6, R=2, fp32, dropout 0, on a CPU & more"
    assert [row[:3] for row in first.rows] == [
        ("8", "frozen", ""),
        ("8", "lorafast", "lora"),
        ("16", "lorafast", "lora"),
        ("16", "frozen", ""),
        ("16", "full", ""),
    ]
    assert first.sections == {1, 4}
    assert first.notes == ("peft lamda: missing: PEFT has no LaMDA", "M=16, full: oom: no room")
    assert first.rows[4][3:7] == ("oom", "4.0 KiB", NOTHING, "1.25")
    assert first.rows[2][first.heads.index("step ms")] == "123"
    assert first.rows[0][first.heads.index("tokens/s")] == "4,000"
    assert second.rows[0][2] == "dora (both)"
    assert "lorafast lora: the loss is at most 0.25 from PEFT's at any of 20 steps" in third.notes


def test_a_table_in_a_pipe_is_not_truncated():
    text = shown(tables.tables([RESULTS]), 170)
    assert "1.25" in text
    assert "…" not in text
    assert tables.LEGEND[0] in " ".join(text.split())


@pytest.mark.parametrize("width", [80, 130])
def test_a_table_wider_than_the_console_is_split(width):
    text = shown(tables.tables([RESULTS]), width)
    assert "…" not in text
    assert all(head in text for head in ("step ms", "tokens/s", "activations", "peak"))
    assert max(map(len, text.splitlines())) <= width


def test_a_table_without_methods_is_split_too():
    row = ("pointers 64x64x64", "wrong: " + "x" * 30, "1.0")
    text = shown([Table("tiles", ("route", "ms", "GB/s"), (row,), frozenset(), ())], 60)
    assert text.count("pointers 64x64x64") == 2
    assert "GB/s" in text


def test_the_same_problem_in_two_files_is_told_apart_by_commit():
    files = [
        Results({"device_name": "a", "commit": commit}, RESULTS.records[:2]) for commit in "12"
    ]
    one, two = tables.tables(files)
    assert len(one.rows) == len(two.rows) == 2
    assert one.title != two.title
    assert "(2, " in two.title


def test_every_base_is_a_table_of_its_own_and_named():
    rows = [
        bench_records.training(impl, base_format=base_format, losses=[3.0, loss] * 10)
        for base_format in ("dense", "nf4")
        for impl, loss in (("lorafast", 2.5), ("peft", 2.75))
    ]
    dense, packed = tables.tables([Results({}, rows)])
    assert dense.title.startswith("minilm, 20 steps")
    assert packed.title.startswith("minilm in nf4, 20 steps")
    assert len(dense.rows) == len(packed.rows) == 2
    assert "lorafast lora on nf4: the loss is at most 0.25" in packed.notes[0]


def test_runs_of_a_compact_file_are_tables_of_their_own():
    records = [bench_records.linear(run=run) for run in ("a", "b", "a")]
    one, two = tables.tables([Results({"runs": {"a": {}, "b": {}}}, records)])
    assert (len(one.rows), len(two.rows)) == (2, 1)
    assert one.title.endswith("(a)")
    assert two.title.endswith("(b)")


def test_the_interval_and_the_lower_bounds_are_columns():
    bounds = {"ratio_low": 1.874, "ratio_high": 2.126, "floor": 1.0449, "fused_floor": 1.0151}
    rows = [bench_records.linear(**bounds), bench_records.linear(fused_floor=1.0151)]
    (table,) = tables.tables([Results({}, rows)])
    columns = [table.heads.index(h) for h in ("× frozen", "95 % interval", "floor", "fused")]
    assert [tuple(row[at] for at in columns) for row in table.rows] == [
        ("2.00", "1.87–2.13", "1.04", "1.02"),
        ("2.00", NOTHING, NOTHING, "1.02"),
    ]


def test_ratio_and_peak_come_first_and_fit_80_columns():
    for table in tables.tables([RESULTS]):
        at = table.heads.index("method")
        assert table.heads[at + 1 : at + 3] == ("× frozen", "peak")
    wide = {"M": 131072, "peak_bytes": (1 << 40) - 1, "ratio_low": 10.01, "ratio_high": 20.02}
    text = shown(
        tables.tables([Results({}, [bench_records.linear("peft-bf16", "adalora", **wide)])]), 80
    )
    first = next(line for line in text.splitlines() if "× frozen" in line)
    assert "err ratio" in first
    assert max(map(len, text.splitlines())) <= 80


def test_rows_of_a_busy_machine_are_grey_with_a_note():
    rows = [bench_records.linear(frozen_spread=spread) for spread in (1.5, 1.75)]
    (table,) = tables.tables([Results({}, rows)])
    assert table.busy == {1}
    assert "this machine was busy. The frozen step's time scatters up to ×1.75" in table.notes[0]
    file = io.StringIO()
    tables.show(
        [table], Console(file=file, force_terminal=True, width=200, color_system="standard")
    )
    quiet, busy = [line for line in file.getvalue().splitlines() if "lorafast" in line][:2]
    assert "\x1b[90m" in busy
    assert "\x1b[90m" not in quiet
    (quiet,) = tables.tables([Results({}, rows[:1])])
    assert (quiet.busy, quiet.notes) == (frozenset(), ())


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "–"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (3 << 20, "3.0 MiB"),
        (5 << 30, "5.0 GiB"),
    ],
)
def test_sizes(count, text):
    assert tables.size(count) == text
