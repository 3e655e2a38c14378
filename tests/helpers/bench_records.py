"""Rows for tests of what reads them."""

from lorafast.bench.record import Record


def linear(impl="lorafast", method="lora", M=8, dropout=0.0, **fields):
    """A row of one layer that went well."""
    times = {
        f"{name}{tail}": 2.0
        for name in ("fwd_ms", "bwd_ms", "step_ms", "ratio_to_frozen")
        for tail in ("", "_p20", "_p80")
    }
    known = {
        "N": 6,
        "K": 4,
        "bias": False,
        "tokens_per_s": 5.0,
        "saved_bytes": 96,
        "saved_by_reference": {"x": 128},
    }
    known |= {
        "activation_bytes": 192,
        "peak_bytes": 4096,
        "error_ratio": 1.25,
        "error_name": "y",
        "rounds": 7,
        "warmup": 1,
    }
    return Record(
        "linear", impl, method, "cpu", "fp32", 0, M, 2, dropout, **(times | known | fields)
    )


def training(impl="lorafast", method="lora", losses=(3.0, 2.0), **fields):
    """A row of a trained model."""
    row = linear(
        impl,
        method,
        N=None,
        K=None,
        model="minilm",
        batch_size=2,
        seq=4,
        losses=list(losses),
        accuracy=0.5,
        **fields,
    )
    row.bench = "training"
    return row
