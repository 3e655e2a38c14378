"""lorafast-bench model --base: rows on quantised weights, and those that cannot be there."""

import importlib.util
import json

import pytest
import torch
from helpers import bench_runs
from helpers.bench_runs import run_model as run
from torch import nn

from lorafast.bench import options
from lorafast.bench.cases import choices, quantised_base
from lorafast.bench.report import record
from lorafast.quantised import formats
from lorafast.quantised.bitsandbytes_4bit import BitsAndBytes4Bit

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

# They need PEFT, transformers and the weights of the encoder.
pytestmark = pytest.mark.peft

QUANTISED = [name for name in choices.BASE_FORMATS if name != choices.DENSE]
KINDS = {
    "nf4": "bitsandbytes nf4, double quantisation",
    "nf4-plain": "bitsandbytes nf4, single quantisation",
    "int8": "bitsandbytes int8",
}


@pytest.fixture
def one_layer(monkeypatch):
    bench_runs.shorten_encoder(monkeypatch, words=1000)


@pytest.mark.parametrize("base_format", QUANTISED)
def test_a_dense_copy_computes_what_the_quantised_model_does(base_format):
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32))
    x = torch.randn(3, 128, requires_grad=True)
    quantised_base.quantise(model, base_format)
    assert [formats.of(model[i]).kind for i in (0, 2)] == [KINDS[base_format]] * 2
    assert not any(parameter.requires_grad for parameter in model.parameters())
    y = model(x)
    bytes_held = sum(t.numel() * t.itemsize for t in quantised_base.statistics(model))
    assert 0 < bytes_held < 4 * (128 * 64 + 64 * 32)
    quantised_base.make_dense(model)
    assert all(type(model[i]) is nn.Linear for i in (0, 2))
    assert quantised_base.statistics(model) == []
    torch.testing.assert_close(model(x), y)


@pytest.mark.slow
@pytest.mark.usefixtures("one_layer")
def test_every_base_has_its_rows(tmp_path):
    words = "--impl full,lorafast,accelerated,peft --methods lora,dora --batch-sizes 1"
    bases = ",".join(choices.BASE_FORMATS)
    status, rows = run(tmp_path, f"{words} --steps 3 --train-batch 2 --base {bases}")
    assert status == 0
    assert record.faults(json.loads((tmp_path / "out.json").read_text())) == []
    found = {(r.bench, r.base_format, r.impl, r.method): r for r in rows}
    assert len(found) == len(rows) == 2 * 8 * len(choices.BASE_FORMATS)
    for (bench, base_format, impl, method), r in found.items():
        dense = found[bench, "dense", impl, method]
        if impl == "full" and base_format != "dense":
            assert (r.status, r.reason) == ("unsupported", "a quantised weight does not train")
            continue
        assert r.status == "ok", r.reason
        assert r.error_ratio <= 2
        assert r.peak_bytes > 0
        if base_format != "dense":
            assert r.label.endswith(f" on {base_format}")
            assert r.weight_bytes < dense.weight_bytes
            assert r.saved_bytes == dense.saved_bytes
            assert r.losses is None or r.losses != dense.losses


@pytest.mark.usefixtures("one_layer")
def test_a_weight_that_is_dequantised_wrongly_is_found(monkeypatch, tmp_path, capsys):
    right = BitsAndBytes4Bit.whole
    monkeypatch.setattr(
        BitsAndBytes4Bit, "whole", lambda weight, out: right(weight, out).mul_(1.01)
    )
    options = "--impl lorafast,peft --methods lora --batch-sizes 1 --steps 0 --base nf4"
    status, rows = run(tmp_path, options)
    assert status == 1
    statuses = {r.label: r.status for r in rows}
    assert statuses == {
        "frozen on nf4": "ok",
        "lorafast lora on nf4": "wrong",
        "peft lora on nf4": "ok",
    }
    assert "WRONG lorafast lora on nf4" in capsys.readouterr().err


@pytest.mark.usefixtures("one_layer")
def test_methods_that_a_quantised_weight_cannot_have_are_unsupported(tmp_path):
    methods = "lamda,lora-ga,galore"
    status, rows = run(
        tmp_path, f"--impl lorafast --methods {methods} --batch-sizes 1 --steps 0 --base nf4-plain"
    )
    assert status == 0
    reasons = {r.method: (r.status, r.reason) for r in rows if r.method != "none"}
    for method, why in {
        "lamda": "LaMDA(init='zero')",
        "lora-ga": "has no gradient to start from",
        "galore": "does not train",
    }.items():
        assert reasons[method][0] == "unsupported"
        assert why in reasons[method][1]


@pytest.mark.usefixtures("one_layer")
def test_without_bitsandbytes_the_rows_are_missing(monkeypatch, tmp_path, capsys):
    right = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "bitsandbytes" else right(name, *more),
    )
    words = "--impl lorafast --methods lora --batch-sizes 1 --steps 1 --train-batch 1"
    status, rows = run(tmp_path, f"{words} --base dense,int8")
    assert status == 0
    for r in rows:
        assert r.status == ("ok" if r.base_format == "dense" else "missing")
    assert "bitsandbytes is not installed: pip install '.[quant]'" in capsys.readouterr().out


def test_an_unknown_base_is_refused_by_name(capsys):
    with pytest.raises(SystemExit) as ended:
        options.parse(["model", "--base", "nf5"])
    assert ended.value.code == 2
    assert "nf4-plain" in capsys.readouterr().err
