"""What is made of rows: tables, figures, one self-contained page; and the command line's own complaints."""

import io
import re
import subprocess
import sys

import pytest
import torch
from helpers import bench_records
from rich.console import Console

from lorafast.bench import cli, commands, options, plots, recipes, report, tables
from lorafast.bench.progress import Progress
from lorafast.bench.record import Results

RECORDS = [
    bench_records.linear("frozen", "none", ratio_to_frozen=1.0),
    bench_records.linear(),
    bench_records.linear(M=16, step_ms=123.4, peak_bytes=3 << 20),
    bench_records.linear("frozen", "none", M=16),
    bench_records.linear("peft", "dora", dropout=0.1, dropout_on="both"),
    bench_records.linear("peft", "lamda").fail("missing", "PEFT has no LaMDA"),
    bench_records.linear("full", "none", M=16).fail("oom", "no room"),
    bench_records.training(losses=[3.0, 2.5] * 10),
    bench_records.training("peft", losses=[3.0, 2.75] * 10),
    bench_records.training("frozen", "none", losses=[3.0] * 20),
]
RESULTS = [Results({"device_name": "a CPU & more", "torch": "2"}, RECORDS)]


def test_rows_of_one_problem_share_a_table_with_sections_by_tokens():
    first, second, third = tables.tables(RESULTS)
    assert first.title == "one layer 4 → 6, R=2, fp32, dropout 0, on a CPU & more"
    assert [row[:3] for row in first.rows] == [
        ("8", "frozen", ""), ("8", "lorafast", "lora"), ("16", "lorafast", "lora"), ("16", "frozen", ""), ("16", "full", ""),
    ]  # fmt: skip
    assert first.sections == {1, 4}
    assert first.notes == ("peft lamda: missing: PEFT has no LaMDA", "M=16, full: oom: no room")
    assert first.rows[4][3:6] == ("1.25", "oom", tables.NOTHING)
    assert first.rows[2][first.heads.index("step ms")] == "123"
    assert second.rows[0][2] == "dora (both)"
    assert "lorafast lora: the loss is at most 0.25 from PEFT's at any of 20 steps" in third.notes


def test_a_table_in_a_pipe_is_not_squeezed():
    file = io.StringIO()
    tables.show(tables.tables(RESULTS), Console(file=file, width=170))
    assert "1.25" in file.getvalue()
    assert "…" not in file.getvalue()
    assert tables.LEGEND[0] in " ".join(file.getvalue().split())


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (None, "–"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (3 << 20, "3.0 MiB"),
        (5 << 30, "5.0 GiB"),
    ],
)
def test_sizes(count, shown):
    assert tables.size(count) == shown


def test_figures_have_axes_units_and_a_legend():
    figures = plots.figures(RESULTS)
    assert list(figures) == [
        "linear-4x6-r2-fp32-ratio",
        "linear-4x6-r2-fp32-peak",
        "training-minilm-r2-fp32-loss",
    ]
    ratio = figures["linear-4x6-r2-fp32-ratio"]
    assert [panel.get_title() for panel in ratio.axes] == [
        "lora, dropout 0", "dora, dropout 0", "lora, dropout 0.1", "dora, dropout 0.1",
    ]  # fmt: skip
    assert ratio.axes[0].get_ylabel() == "step time ÷ frozen layer's"
    assert ratio.axes[2].get_xlabel() == "tokens per batch M"
    assert {text.get_text() for text in ratio.legends[0].get_texts()} == {
        "frozen",
        "lorafast",
        "peft",
    }
    assert figures["linear-4x6-r2-fp32-peak"].axes[0].get_ylabel() == "peak memory of a step, MiB"
    for panel in ratio.axes:
        bottom, top = panel.get_ylim()
        assert bottom == 0
        assert top >= panel.dataLim.ymax or not panel.has_data()


def test_rows_of_two_machines_never_share_a_figure():
    other = [Results({"device_name": "another"}, RECORDS[:2])]
    assert "linear-4x6-r2-fp32-ratio-2" in plots.figures(RESULTS + other)


def test_the_page_stands_alone():
    page = report.page(RESULTS)
    assert page.count("<svg") == 3
    assert page.count("<table") == 3
    assert "a CPU &amp; more" in page
    links = set(re.findall(r"https?://[^\s\"'<]+", page))
    assert all(
        link.startswith(
            (
                "http://www.w3.org/",
                "http://purl.org/",
                "http://creativecommons.org",
                "https://matplotlib.org",
            )
        )
        for link in links
    )
    assert not re.search(r"<(script|img|link|iframe)\b", page)


def test_the_page_is_the_same_for_the_same_rows():
    assert report.page(RESULTS) == report.page(RESULTS)


def test_report_prints_tables_and_writes_page_and_plots(tmp_path, capsys):
    file, page = tmp_path / "a.json", tmp_path / "new" / "page.html"
    RESULTS[0].write(file)
    assert (
        commands.main(
            ["report", str(file), "--html", str(page), "--plots", str(tmp_path / "plots")]
        )
        == 0
    )
    assert "one layer 4 → 6" in capsys.readouterr().out
    assert page.read_text().startswith("<!doctype html>")
    assert len(list((tmp_path / "plots").glob("*.svg"))) == 3


@pytest.mark.parametrize("text", [None, "{", '{"schema_version": 1}'])
def test_a_file_that_is_none_is_refused_in_a_line(text, tmp_path, capsys):
    file = tmp_path / "a.json"
    if text is not None:
        file.write_text(text)
    assert commands.main(["report", str(file)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("lorafast-bench report: ")
    assert "a.json" in line


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            ["--impl", "peft,speedy"],
            "'speedy' is none of frozen, full, lorafast, accelerated, eager, peft, peft-bf16",
        ),
        (["--impl", "peft+jit"], "'peft+jit' is none of"),
        (
            ["--shape", "4096"],
            "'4096' is no INxOUT such as 4096x14336, and none of minilm, bart-large, llama3-8b",
        ),
        (["--shape", "0x4"], "'0x4' is no INxOUT"),
        (["--tokens", "8,0"], "'0' must be a whole number of at least 1"),
        (["--rank", "two"], "'two' must be a whole number of at least 1"),
        (["--dropout", "1"], "dropout 1.0 must be in [0, 1)"),
        (["--dropout", "nan"], "dropout nan must be in [0, 1)"),
        (["--dropout", "1e-9"], "dropout"),
        (
            ["--methods", "lora,qlora"],
            "'qlora' is none of lora, dora, lamda, lora-fa, vera, adalora, aflora, nor all",
        ),
        (["--dtype", "fp8"], "'fp8' is none of fp32, bf16, fp16"),
        (["--js", "a.json"], "unrecognized arguments: --js a.json"),
        (["--seconds", "0"], "'0' must be a number above 0"),
    ],
)
def test_words_that_mean_nothing_are_refused_by_name(words, complaint, capsys):
    with pytest.raises(SystemExit) as stop:
        commands.main(["linear", *words])
    assert stop.value.code == 2
    assert complaint in " ".join(capsys.readouterr().err.split())


def test_lists_are_laid_flat_and_nothing_comes_twice():
    asked = options.parser().parse_args(
        ["linear", "--shape", "minilm,384x384,8x4", "--tokens", "8,8,4", "--methods", "all"]
    )
    assert asked.shape == ((384, 384), (384, 1536), (1536, 384), (8, 4))
    assert asked.tokens == (8, 4)
    assert asked.methods == recipes.LAYERS


def test_torchs_names_of_dtypes_are_known():
    assert options.parser().parse_args(["linear", "--dtype", "bfloat16"]).dtype == torch.bfloat16


def test_a_narrow_console_gets_speeds_and_bytes_one_after_the_other():
    for width in (80, 130):
        file = io.StringIO()
        tables.show(tables.tables(RESULTS), Console(file=file, width=width))
        shown = file.getvalue()
        assert "…" not in shown
        assert all(head in shown for head in ("step ms", "tokens/s", "activations", "peak"))
        assert max(map(len, shown.splitlines())) <= width


def test_files_that_measured_the_same_are_told_apart():
    first, second = (
        Results({"device_name": "a", "commit": "1"}, RECORDS[:2]),
        Results({"device_name": "a", "commit": "2"}, RECORDS[:2]),
    )
    one, two = tables.tables([first, second])
    assert len(one.rows) == len(two.rows) == 2
    assert one.title != two.title
    assert "(2, " in two.title


def test_the_interval_and_the_floors_stand_beside_the_ratio():
    told = bench_records.linear(ratio_low=1.874, ratio_high=2.126, floor=1.0449, fused_floor=1.0151)
    (table,) = tables.tables([Results({}, [told, bench_records.linear(fused_floor=1.0151)])])
    at = table.heads.index("× frozen")
    assert table.heads[at : at + 4] == ("× frozen", "its 95 %", "floor", "fused")
    assert [row[at : at + 4] for row in table.rows] == [
        ("2.00", "1.87–2.13", "1.04", "1.02"), ("2.00", tables.NOTHING, tables.NOTHING, "1.02"),
    ]  # fmt: skip


def test_the_floor_is_drawn_where_there_is_one():
    records = [bench_records.linear(M=M, floor=1 + M / 64) for M in (16, 8)] + [
        bench_records.linear("peft", M=8, floor=2.3)
    ]
    (ratio, peak) = plots.figures([Results({}, records)]).values()
    (line,) = [line for line in ratio.axes[0].get_lines() if line.get_label() == "floor"]
    assert line.get_xydata().tolist() == [[8, 1.125], [16, 1.25]]
    assert not [line for line in peak.axes[0].get_lines() if line.get_label() == "floor"]


def test_outputs_that_cannot_be_are_refused_by_option(tmp_path, capsys):
    file, taken = tmp_path / "a.json", tmp_path / "taken"
    RESULTS[0].write(file)
    taken.write_text("")
    for words, complaint in (
        (["--html", str(tmp_path)], "--html: .* is a folder"),
        (["--html", str(taken / "page.html")], "--html: .*taken cannot be written to: File exists"),
        (["--plots", str(taken)], "--plots: .*taken cannot be written to: File exists"),
    ):
        assert commands.main(["report", str(file), *words]) == 2
        assert re.search(complaint, capsys.readouterr().err)


def test_help_shows_without_a_machine(capsys):
    for words in (["--help"], ["linear", "--help"], ["model", "--help"]):
        with pytest.raises(SystemExit) as stop:
            commands.main(words)
        assert stop.value.code == 0
    assert "--batch-sizes" in capsys.readouterr().out


def test_a_folder_as_a_file_is_refused_before_anything_is_measured(tmp_path, capsys):
    assert commands.main(["linear", "--device", "cpu", "--json", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_what_was_run_is_kept_without_the_files_it_wrote():
    words = ["linear", "--json", "/x/a.json", "--rank", "4", "--html=/x/b.html"]
    assert commands._command(words) == "lorafast-bench linear --rank 4"


def test_a_missing_extra_says_what_to_install(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith(("rich", "lorafast.bench."))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.delattr("lorafast.bench.commands", raising=False)
    assert cli.main(["env"]) == 2
    assert "pip install 'lorafast[bench]'" in capsys.readouterr().err


def test_the_module_runs_as_the_command_does():
    done = subprocess.run(
        [sys.executable, "-m", "lorafast.bench", "env", "--device", "cpu"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert '"torch"' in done.stdout


def test_a_terminal_gets_a_bar_and_no_lines():
    file = io.StringIO()
    with Progress(2, Console(file=file, force_terminal=True, width=80)) as progress:
        progress.begin("one")
        progress.begin("two")
    assert "[1/2]" not in file.getvalue()
    assert "1/2" in file.getvalue() or "two" in file.getvalue()
