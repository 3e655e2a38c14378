"""Records and results for tests of what reads them."""

from lorafast.bench.report.record import Record, Results

TIMES = ("fwd_ms", "bwd_ms", "step_ms", "ratio_to_frozen")


def linear(impl="lorafast", method="lora", M=8, dropout=0.0, **fields):
    """Return a correct row of one layer; `fields` overrides its values."""
    known = {f"{time}{tail}": 2.0 for time in TIMES for tail in ("", "_p20", "_p80")}
    known |= {
        "N": 6,
        "K": 4,
        "bias": False,
        "tokens_per_s": 4000.0,
        "saved_bytes": 96,
        "saved_by_reference": {"x": 128},
        "activation_bytes": 192,
        "peak_bytes": 4096,
        "error_ratio": 1.25,
        "error_name": "y",
        "rounds": 7,
        "warmup": 1,
    }
    return Record("linear", impl, method, "cpu", "fp32", 0, M, 2, dropout, **(known | fields))


def training(impl="lorafast", method="lora", losses=(3.0, 2.0), **fields):
    """Return a correct row of a trained model; `fields` overrides its values."""
    known = {"N": None, "K": None, "model": "minilm", "batch_size": 2, "seq": 4, "accuracy": 0.5}
    row = linear(impl, method, losses=list(losses), **(known | fields))
    row.bench = "training"
    return row


def results():
    """Return one file's results: a layer with and without dropout, and a trained model."""
    records = [
        linear("frozen", "none", ratio_to_frozen=1.0),
        linear(),
        linear(M=16, step_ms=123.4, peak_bytes=3 << 20),
        linear("frozen", "none", M=16),
        linear("peft", "dora", dropout=0.1, dropout_on="both"),
        linear("peft", "lamda").fail("missing", "PEFT has no LaMDA"),
        linear("full", "none", M=16).fail("oom", "no room"),
        training(losses=[3.0, 2.5] * 10),
        training("peft", losses=[3.0, 2.75] * 10),
        training("frozen", "none", losses=[3.0] * 20),
    ]
    return Results({"device_name": "a CPU & more", "torch": "2"}, records)
