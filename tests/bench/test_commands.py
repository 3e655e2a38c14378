"""The command line: options, files that cannot be written, and what to install."""

import itertools
import json
import re
import runpy
import subprocess
import sys

import pytest
from helpers import bench_records

from lorafast import testing
from lorafast.bench import cli, options, output
from lorafast.bench.cases import choices, recipes
from lorafast.bench.report import record
from lorafast.engine import checks, trial

RESULTS = bench_records.results()


def test_report_prints_tables_and_writes_page_and_plots(tmp_path, capsys):
    file, page, figures = tmp_path / "a.json", tmp_path / "new" / "page.html", tmp_path / "plots"
    RESULTS.write(file)
    words = ["report", str(file), "--html", str(page), "--plots", str(figures)]
    assert cli.main(words) == 0
    assert "one layer 4 → 6" in capsys.readouterr().out
    assert page.read_text().startswith("<!doctype html>")
    assert len(list(figures.glob("*.svg"))) == 3


@pytest.mark.parametrize("text", [None, "{", '{"schema_version": 1}'])
def test_an_invalid_file_is_one_line_of_error(text, tmp_path, capsys):
    file = tmp_path / "a.json"
    if text is not None:
        file.write_text(text)
    assert cli.main(["report", str(file)]) == 2
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
        (["--dropout", "1"], "'1' must be a number in [0, 1)"),
        (["--dropout", "nan"], "'nan' must be a number in [0, 1)"),
        (
            ["--methods", "lora,qlora"],
            "'qlora' is none of lora, dora, lamda, lora-fa, vera, adalora, aflora, nor all",
        ),
        (["--dtype", "fp8"], "'fp8' is none of fp32, bf16, fp16"),
        (["--js", "a.json"], "'--js' is no option; did you mean --json?"),
        (["--tokns=8"], "'--tokns=8' is no option; did you mean --tokens?"),
        (["--qqqq", "8"], "'--qqqq' is no option; lorafast-bench linear --help lists them"),
        (["--impl", "lorafats"], "with +compile; did you mean lorafast?"),
        (["--shape", "llama-8b"], "; did you mean llama3-8b?"),
        (["--methods", "lambda"], "nor all; did you mean lamda?"),
        (["--dropout-on", "boht"], "'boht' is none of adapter, both; did you mean both?"),
        (["--dtype", "bf61"], "; did you mean bf16?"),
        (["--json"], "--json: expected one argument"),
        (["--seconds", "0"], "'0' must be a number above 0"),
    ],
)
def test_an_invalid_option_is_named(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["linear", *words])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lorafast-bench linear: ")
    assert message in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["liner"], "'liner' is none of linear, model, generate"),
        (["raport", "a.json"], "; did you mean report?"),
        (["--help", "modl"], "; did you mean model?"),
        ([], "COMMAND is missing, one of linear, model, generate"),
        (["--vers"], "'--vers' is no option; did you mean --version?"),
        (["--jsno", "linear"], "'--jsno' is no option; lorafast-bench --help lists them"),
    ],
)
def test_an_unknown_command_is_named_with_the_nearest(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lorafast-bench: ")
    assert message in line


def test_a_dropout_that_drops_nothing_is_an_error_before_anything_is_measured(capsys):
    assert cli.main(["linear", "--dropout", "0,1e-9"]) == 2
    assert "--dropout: dropout 1e-09 rounds to 0/65536" in capsys.readouterr().err


def test_the_names_that_options_accept_are_those_of_the_code():
    assert set(choices.DTYPES) == set(testing.SHORT.values()) - {"fp64"}
    assert choices.DROPOUT_ON == checks.DROPOUT_ON
    assert tuple(trial.ENTRIES) == choices.ENTRIES
    assert tuple(recipes.RECIPES) == choices.METHODS
    assert set(choices.LAYERS) < set(choices.METHODS)


def test_lists_are_flat_and_without_duplicates():
    asked = options.parse(
        ["linear", "--shape", "minilm,384x384,8x4", "--tokens", "8,8,4", "--methods", "all"]
    )
    assert asked.shape == ((384, 384), (384, 1536), (1536, 384), (8, 4))
    assert asked.tokens == (8, 4)
    assert asked.methods == choices.LAYERS


def test_torchs_names_of_dtypes_are_known():
    assert options.parse(["linear", "--dtype", "bfloat16"]).dtype == "bf16"


def test_json_on_stdout_has_stdout_for_itself(capsys):
    words = "linear --device cpu --shape 8x8 --tokens 2 --rank 2 --dropout 0 --impl lorafast"
    assert cli.main([*words.split(), "--methods", "lora", "--rounds", "1", "--json", "-"]) == 0
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert record.faults(document) == []
    assert [r["impl"] for r in document["records"]] == ["frozen", "lorafast"]
    assert "one layer 8 → 8" in said.err


def test_html_on_stdout_is_an_error(capsys):
    assert cli.main(["linear", "--html", "-"]) == 2
    assert "--html: - is stdout for --json alone" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_named_by_its_option(tmp_path, capsys):
    file, taken = tmp_path / "a.json", tmp_path / "taken"
    RESULTS.write(file)
    taken.write_text("")
    for words, message in (
        (["--html", str(tmp_path)], "--html: .* is a folder"),
        (["--html", str(taken / "page.html")], "--html: .*taken cannot be written to: File exists"),
        (["--plots", str(taken)], "--plots: .*taken cannot be written to: File exists"),
    ):
        assert cli.main(["report", str(file), *words]) == 2
        assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("command", "option"),
    [
        *itertools.product(("linear", "model", "generate"), ("--json", "--html")),
        ("tune", "--json"),
        ("trial", "--json"),
    ],
)
def test_no_command_measures_for_a_file_that_cannot_be_written(command, option, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.write_text("")
    assert cli.main([command, "--device", "cpu", option, str(taken / "new" / "a")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lorafast-bench {command}: {option}: {taken / 'new'} cannot be written")


def test_a_folder_as_a_file_is_an_error_before_anything_is_measured(tmp_path, capsys):
    assert cli.main(["linear", "--device", "cpu", "--json", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["linear", "--help"], ["model", "--help"]])
def test_help(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 0
    assert ("--batch-sizes" in capsys.readouterr().out) == ("model" in words)


def test_the_stored_command_has_no_output_files():
    words = ["linear", "--json", "/x/a.json", "--rank", "4", "--html=/x/b.html"]
    assert output.command_line(words) == "lorafast-bench linear --rank 4"


def in_new_process(code, words):
    """Run code in a new Python, where `main()` is the command line with these words."""
    program = (
        f"import sys\nfrom lorafast.bench import cli\nmain = lambda: cli.main({words})\n{code}"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.parametrize(
    "words",
    [["--help"], ["linear", "--help"], ["--version"], ["liner"], ["model", "--tokens", "8"], []],
)
def test_help_and_typos_are_answered_without_importing_torch(words):
    code = "try: main()\nfinally: print('torch' in sys.modules, 'rich' in sys.modules)"
    assert in_new_process(code, words).stdout.endswith("False False\n")


def test_a_missing_package_is_named_with_the_extra():
    done = in_new_process("sys.modules['rich'] = None\nsys.exit(main())", ["env"])
    assert done.returncode == 2
    assert re.match(r"lorafast-bench needs rich\S*: pip install '\.\[bench\]'", done.stderr)


def test_the_module_runs_as_the_command_does(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lorafast-bench", "env", "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("lorafast.bench", run_name="__main__")
    assert stop.value.code == 0
    assert '"torch"' in capsys.readouterr().out
