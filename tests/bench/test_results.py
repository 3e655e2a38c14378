"""What is kept in bench/results keeps to the schema, and the README says what it says."""

import re
import statistics
from pathlib import Path

import pytest

import lorafast
from lorafast.bench import tables
from lorafast.bench.record import Results

ROOT = Path(lorafast.__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
FILES = sorted(RESULTS.glob("*.json"))
LAYER = Results.read(RESULTS / "amd-epyc-2-cores.json").records
ACCELERATED = Results.read(RESULTS / "amd-epyc-2-cores-minilm-accelerated.json").records
MODEL = Results.read(RESULTS / "amd-epyc-2-cores-minilm.json").records
METHODS = Results.read(RESULTS / "amd-epyc-2-cores-minilm-methods.json").records


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_kept_file_keeps_to_the_schema(file):
    results = Results.read(file)
    assert results.records
    assert {"torch", "device_name", "command", "commit", "time"} <= set(results.env)
    assert not results.env["commit"].endswith("+"), "measured on a tree with changes"
    assert "/" not in results.env["command"]


def only(records, label, **fields):
    (r,) = [
        r
        for r in records
        if r.label == label and all(getattr(r, name) == value for name, value in fields.items())
    ]
    return r


def layer_row(label):
    plain, dropping = (only(LAYER, label, M=1024, dropout=p) for p in (0.0, 0.05))
    both = [
        (
            tables.number(r.ratio_to_frozen, ".2f"),
            tables.size(r.saved_bytes),
            tables.size(r.peak_bytes),
        )
        for r in (plain, dropping)
    ]
    return [f"{max(plain.error_ratio, dropping.error_ratio):.2f}", *both[0], *both[1]]


def model_row(label):
    trained, stepped = (
        only(MODEL, label, bench="training"),
        only(MODEL, label, bench="step", batch_size=16),
    )
    first, last = statistics.fmean(trained.losses[:10]), statistics.fmean(trained.losses[-10:])
    return [
        f"{trained.error_ratio:.2f}", f"{first:.2f} → {last:.2f}", f"{trained.accuracy:.2f}", f"{trained.ratio_to_frozen:.2f}",
        tables.size(stepped.peak_bytes),
    ]  # fmt: skip


def accelerated_row(label):
    r = only(ACCELERATED, label, bench="step", batch_size=16)
    sizes = (tables.size(count) for count in (r.saved_bytes, r.activation_bytes, r.peak_bytes))
    return [f"{r.error_ratio:.2f}", tables.number(r.ratio_to_frozen, ".2f"), *sizes]


def dropping_row(label):
    """The median of three runs' ratios, and the highest upper end of their intervals."""
    shape, dtype = label.split(", ")
    K, N = map(int, shape.split(" → "))
    runs = [
        Results.read(RESULTS / f"amd-epyc-2-cores-dropout-{dtype}-{run}.json").records
        for run in (1, 2, 3)
    ]
    cells = []
    for name in (
        "lorafast lora",
        "lorafast lamda",
        "lorafast dora",
        "eager lora",
        "eager dora",
        "peft lora",
        "peft dora",
    ):
        rows = [
            only(records, name, K=K, N=N, M=2048, dropout=0.05, dtype=dtype) for records in runs
        ]
        ratio, high = (
            statistics.median(r.ratio_to_frozen for r in rows),
            max(r.ratio_high for r in rows),
        )
        cells.append(
            f"{ratio:.2f} (≤ {high:.2f})" if name.startswith("lorafast") else f"{ratio:.2f}"
        )
    return [
        *cells,
        f"{max(r.floor for records in runs for r in records if r.label == 'lorafast lora' and (r.K, r.N) == (K, N)):.2f}",
    ]


def tokens_row(label):
    shape, dtype, method = label.split(", ")
    K, N = map(int, shape.split(" → "))
    records = Results.read(RESULTS / f"amd-epyc-2-cores-tokens-{dtype}.json").records
    return [
        tables.number(only(records, f"lorafast {method}", K=K, N=N, M=M).ratio_to_frozen, ".2f")
        for M in (64, 512, 8192)
    ] + [
        tables.number(only(records, f"peft {method}", K=K, N=N, M=M).ratio_to_frozen, ".2f")
        for M in (64, 512, 8192)
    ]


def method_row(label):
    r = only(METHODS, label if label == "frozen" else f"lorafast {label}", bench="training")
    first, last = statistics.fmean(r.losses[:10]), statistics.fmean(r.losses[-10:])
    return [
        "" if r.lr is None else f"{r.lr:g}", f"{first:.2f} → {last:.2f}", f"{r.accuracy:.2f}", tables.number(r.trainable, ",d"),
        f"{r.ratio_to_frozen:.2f}", tables.size(r.optimizer_bytes), tables.size(r.peak_bytes),
    ]  # fmt: skip


def test_every_method_learns():
    trained = {r.method: r for r in METHODS if r.bench == "training" and r.impl == "lorafast"}
    assert list(trained) == [method.name for method in lorafast.list_methods()]
    for r in trained.values():
        assert (r.status, len(r.losses)) == ("ok", 200)
        assert statistics.fmean(r.losses[-10:]) < 0.8 * statistics.fmean(r.losses[:10])
        # A head alone learns too: so much less that an encoder that stood still would be seen.
        assert statistics.fmean(r.losses[-10:]) < 0.8 * statistics.fmean(
            only(METHODS, "frozen", bench="training").losses[-10:]
        )
        assert all((r.accuracy, r.trainable, r.step_ms, r.peak_bytes, r.lr))


@pytest.mark.parametrize(
    ("head", "row", "count"),
    [
        ("| one layer |", layer_row, 7),
        ("| MiniLM |", model_row, 6),
        ("| PEFT's MiniLM |", accelerated_row, 4),
        ("| M = 2048 |", dropping_row, 4),
        ("| other M |", tokens_row, 8),
        ("| MiniLM, every method |", method_row, 19),
    ],
    ids=["layer", "model", "accelerated", "dropping", "tokens", "methods"],
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
