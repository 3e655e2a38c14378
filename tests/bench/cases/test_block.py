"""lorafast-bench block: every implementation of a Llama's block beside the frozen one."""

import json

import pytest
from helpers.bench_runs import by_label, run_block

from lorafast.bench.cases import block
from lorafast.bench.report import record

H, I, M, R = 64, 96, 12, 4  # noqa: E741


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_method_is_checked_and_timed(dtype, tmp_path, capsys):
    options = f"--dtype {dtype} --impl lorafast,lorafast-mlp --methods lora,dora --dropout 0,0.3"
    status, rows, out = run_block(tmp_path, options)
    assert status == 0
    assert record.faults(json.loads(out.read_text())) == []
    assert len(rows) == 2 * (1 + 4)
    for r in rows:
        assert (r.status, r.bench, r.M, r.model) == ("ok", "block", M, f"llama-block-{H}x{I}")
        assert r.error_ratio <= 2
    e = 4 if dtype == "fp32" else 2
    for dropout in (0.0, 0.3):
        found = by_label(rows, dropout=dropout)
        # Neither the product nor act(gate).
        spared = found["lorafast lora"].saved_bytes - found["lorafast-mlp lora"].saved_bytes
        assert spared == 2 * M * I * e
        assert found["lorafast-mlp lora"].peak_bytes <= found["lorafast lora"].peak_bytes
    assert f"llama-block-{H}x{I}, {M} tokens, R=4" in capsys.readouterr().out


@pytest.mark.peft
def test_pefts_layers(tmp_path):
    options = "--impl accelerated,accelerated-mlp,peft --methods lora --dropout 0"
    status, rows, _ = run_block(tmp_path, options)
    assert (status, {r.status for r in rows}) == (0, {"ok"})
    found = by_label(rows)
    mlp, plain = found["accelerated-mlp lora"], found["accelerated lora"]
    assert plain.saved_bytes - mlp.saved_bytes == 2 * M * I * 4
    assert found["peft lora"].error_ratio <= 2


def test_a_fault_makes_its_rows_wrong(monkeypatch, tmp_path):
    right = block.lorafast.Linear.forward
    monkeypatch.setattr(block.lorafast.Linear, "forward", lambda layer, x: right(layer, x) * 1.001)
    status, rows, _ = run_block(tmp_path, "--impl lorafast --methods lora --dropout 0")
    assert (status, by_label(rows)["lorafast lora"].status) == (1, "wrong")
