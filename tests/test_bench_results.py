"""What is kept in bench/results keeps to the schema, and the README says what it says."""

import re
import statistics
from pathlib import Path

import pytest

import lorafast
from lorafast.bench import tables
from lorafast.bench.record import Results

ROOT = Path(lorafast.__file__).resolve().parent.parent
FILES = sorted((ROOT / "bench" / "results").glob("*.json"))
LAYER = Results.read(ROOT / "bench" / "results" / "amd-epyc-2-cores.json").records
ACCELERATED = Results.read(ROOT / "bench" / "results" / "amd-epyc-2-cores-minilm-accelerated.json").records
MODEL = Results.read(ROOT / "bench" / "results" / "amd-epyc-2-cores-minilm.json").records


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_kept_file_keeps_to_the_schema(file):
    results = Results.read(file)
    assert results.records
    assert {"torch", "device_name", "command", "commit", "time"} <= set(results.env)
    assert not results.env["commit"].endswith("+"), "measured on a tree with changes"
    assert "/" not in results.env["command"]


def only(records, label, **fields):
    (r,) = [r for r in records if r.label == label and all(getattr(r, name) == value for name, value in fields.items())]
    return r


def layer_row(label):
    plain, dropping = (only(LAYER, label, M=1024, dropout=p) for p in (0.0, 0.05))
    both = [
        (tables.number(r.ratio_to_frozen, ".2f"), tables.size(r.saved_bytes), tables.size(r.peak_bytes)) for r in (plain, dropping)
    ]
    return [f"{max(plain.error_ratio, dropping.error_ratio):.2f}", *both[0], *both[1]]


def model_row(label):
    trained, stepped = only(MODEL, label, bench="training"), only(MODEL, label, bench="step", batch_size=16)
    first, last = statistics.fmean(trained.losses[:10]), statistics.fmean(trained.losses[-10:])
    return [
        f"{trained.error_ratio:.2f}", f"{first:.2f} → {last:.2f}", f"{trained.accuracy:.2f}", f"{trained.ratio_to_frozen:.2f}",
        tables.size(stepped.peak_bytes),
    ]  # fmt: skip


def accelerated_row(label):
    r = only(ACCELERATED, label, bench="step", batch_size=16)
    sizes = (tables.size(count) for count in (r.saved_bytes, r.activation_bytes, r.peak_bytes))
    return [f"{r.error_ratio:.2f}", tables.number(r.ratio_to_frozen, ".2f"), *sizes]


@pytest.mark.parametrize(
    ("head", "row", "count"),
    [("| one layer |", layer_row, 7), ("| MiniLM |", model_row, 6), ("| PEFT's MiniLM |", accelerated_row, 4)],
    ids=["layer", "model", "accelerated"],
)
def test_the_readme_says_what_was_measured(head, row, count):
    text = (ROOT / "README.md").read_text()
    table = text[text.index(head) :].split("\n\n")[0].splitlines()[2:]
    assert len(table) == count
    for line in table:
        label, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells == row(label)


def test_every_picture_of_the_readme_is_there():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).read_text().lstrip().startswith("<svg")
