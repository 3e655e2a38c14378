"""lorafast-bench experts: every implementation beside torch's grouped product."""

import json

import pytest
import torch
from helpers.bench_runs import K, N, R, by_label, run_experts

from lorafast.bench.cases import experts
from lorafast.bench.report import record


def problem(**changes):
    device = torch.device("cpu")
    given = (K, N, R, 20, 8, 2, "balanced", 0.0, torch.float32, device)
    return experts.Problem(*given)._replace(**changes)


def test_routings():
    assert problem().counts == (5,) * 8
    skewed = problem(routing="skewed").counts
    assert sum(skewed) == 40
    assert list(skewed) == sorted(skewed, reverse=True)
    assert skewed[0] > 2 * skewed[4] > 0
    assert problem(routing="empty").counts == (20, 0, 0, 0, 20, 0, 0, 0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_method_is_checked_and_timed(dtype, tmp_path, capsys):
    options = f"--dtype {dtype} --impl lorafast --methods lora,dora,lamda,lora-fa --dropout 0,0.3"
    status, rows, out = run_experts(tmp_path, options)
    assert status == 0
    assert record.faults(json.loads(out.read_text())) == []
    assert len(rows) == 3 * 2 * (1 + 4)
    sizes, e = 40, 4 if dtype == "fp32" else 2
    for r in rows:
        assert (r.status, r.bench, r.experts, r.top_k, r.M) == ("ok", "experts", 8, 2, 20), r.reason
        assert r.error_ratio <= 2
        seed = 8 * bool(r.dropout)
        own = 0 if r.impl == "frozen" else sizes * R * e + seed
        if r.method == "dora":
            own += 8 * N * 4
        assert r.saved_bytes == own
        by_reference = {"frozen": [], "lora": ["x"], "dora": ["x", "y"]}.get(r.method, [])
        assert sorted(r.saved_by_reference) == by_reference
    assert "experts of 24 → 40, top 2, R=4" in capsys.readouterr().out


@pytest.mark.peft
def test_pefts_rows(tmp_path):
    _, rows, _ = run_experts(
        tmp_path, "--impl peft --methods lora,dora,lamda --dropout 0,0.3 --routing empty"
    )
    plain, dropping = by_label(rows, dropout=0.0), by_label(rows, dropout=0.3)
    assert plain["peft lora"].status == "ok"
    assert plain["peft lora"].error_ratio <= 2
    # PEFT writes the adapted weights of all experts.
    assert plain["peft lora"].saved_bytes >= 8 * K * N * 4
    assert plain["peft dora"].status == "unsupported"
    assert dropping["peft lora"].status == "unsupported"
    assert "lora_dropout" in dropping["peft lora"].reason
    assert plain["peft lamda"].status == "missing"


def test_a_fault_makes_its_rows_wrong(monkeypatch, tmp_path):
    right = experts.lorafast.Experts.forward
    monkeypatch.setattr(
        experts.lorafast.Experts, "forward", lambda layer, *given: right(layer, *given) * 1.001
    )
    status, rows, _ = run_experts(tmp_path, "--impl lorafast --methods lora --routing skewed")
    assert status == 1
    assert by_label(rows)["lorafast lora"].status == "wrong"
    assert by_label(rows)["frozen"].ok


def test_what_has_no_experts_is_unsupported():
    weight = torch.zeros(2, N, K)
    with pytest.raises(experts.Unavailable, match="experts has no full"):
        experts.build(experts.Impl("full"), "none", problem(experts=2), weight)
