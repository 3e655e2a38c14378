"""The command line: options, files that cannot be written, and what to install."""

import re
import runpy
import sys

import pytest
import torch
from helpers import bench_records

from lorafast.bench import cli, commands, options
from lorafast.bench.cases import recipes

RESULTS = bench_records.results()


def test_report_prints_tables_and_writes_page_and_plots(tmp_path, capsys):
    file, page, figures = tmp_path / "a.json", tmp_path / "new" / "page.html", tmp_path / "plots"
    RESULTS.write(file)
    words = ["report", str(file), "--html", str(page), "--plots", str(figures)]
    assert commands.main(words) == 0
    assert "one layer 4 → 6" in capsys.readouterr().out
    assert page.read_text().startswith("<!doctype html>")
    assert len(list(figures.glob("*.svg"))) == 3


@pytest.mark.parametrize("text", [None, "{", '{"schema_version": 1}'])
def test_an_invalid_file_is_one_line_of_error(text, tmp_path, capsys):
    file = tmp_path / "a.json"
    if text is not None:
        file.write_text(text)
    assert commands.main(["report", str(file)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("lorafast-bench report: ")
    assert "a.json" in line


@pytest.mark.parametrize(
    ("words", "message"),
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
def test_an_invalid_option_is_named(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        commands.main(["linear", *words])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_lists_are_flat_and_without_duplicates():
    asked = options.parser().parse_args(
        ["linear", "--shape", "minilm,384x384,8x4", "--tokens", "8,8,4", "--methods", "all"]
    )
    assert asked.shape == ((384, 384), (384, 1536), (1536, 384), (8, 4))
    assert asked.tokens == (8, 4)
    assert asked.methods == recipes.LAYERS


def test_torchs_names_of_dtypes_are_known():
    assert options.parser().parse_args(["linear", "--dtype", "bfloat16"]).dtype == torch.bfloat16


def test_a_file_that_cannot_be_written_is_named_by_its_option(tmp_path, capsys):
    file, taken = tmp_path / "a.json", tmp_path / "taken"
    RESULTS.write(file)
    taken.write_text("")
    for words, message in (
        (["--html", str(tmp_path)], "--html: .* is a folder"),
        (["--html", str(taken / "page.html")], "--html: .*taken cannot be written to: File exists"),
        (["--plots", str(taken)], "--plots: .*taken cannot be written to: File exists"),
    ):
        assert commands.main(["report", str(file), *words]) == 2
        assert re.search(message, capsys.readouterr().err)


def test_a_folder_as_a_file_is_an_error_before_anything_is_measured(tmp_path, capsys):
    assert commands.main(["linear", "--device", "cpu", "--json", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["linear", "--help"], ["model", "--help"]])
def test_help(words, capsys):
    with pytest.raises(SystemExit) as stop:
        commands.main(words)
    assert stop.value.code == 0
    assert ("--batch-sizes" in capsys.readouterr().out) == ("model" in words)


def test_the_stored_command_has_no_output_files():
    words = ["linear", "--json", "/x/a.json", "--rank", "4", "--html=/x/b.html"]
    assert commands._command(words) == "lorafast-bench linear --rank 4"


def test_a_missing_package_is_named_with_the_extra(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("rich")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.delitem(sys.modules, "lorafast.bench.commands")
    monkeypatch.delattr("lorafast.bench.commands")
    assert cli.main(["env"]) == 2
    assert re.match(
        r"lorafast-bench needs rich\S*: pip install '\.\[bench\]'", capsys.readouterr().err
    )


def test_the_module_runs_as_the_command_does(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lorafast-bench", "env", "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("lorafast.bench", run_name="__main__")
    assert stop.value.code == 0
    assert '"torch"' in capsys.readouterr().out
