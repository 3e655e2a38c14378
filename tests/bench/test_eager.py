"""The chain as one types it, beside everybody else: its own yardstick, torch's own dropout."""

import pytest
import torch
from helpers.bench_runs import K, N, R, run

from lorafast.bench import contender, recipes, textbook, trainee
from lorafast.bench import impl as impls
from lorafast.bench.contender import Problem
from lorafast.bench.refusal import Unable


def test_the_chain_by_hand_is_its_own_yardstick_and_drops_by_torch(tmp_path, monkeypatch):
    right, drops = textbook.F.dropout, []
    monkeypatch.setattr(
        textbook.F, "dropout", lambda x, p, training: drops.append(p) or right(x, p, training)
    )
    asked = ["--dropout", "0,0.3", "--impl", "eager", "--methods", "all", "--dtype", "bf16"]
    status, rows, _ = run(tmp_path, *asked)
    assert status == 0
    e = 2
    for r in rows:
        assert (r.status, r.error_ratio, r.route) == ("ok", 1.0, "torch")
        if r.method in ("lora", "lamda"):
            # Beside h (and core(h)), the factors' casts and a dropped x with its mask, nothing of an activation's size.
            assert (
                r.saved_bytes
                < 4 * r.M * R * e + 3 * (K + N + R) * R * e + (r.dropout > 0) * 2 * r.M * K * e
            )
    assert set(drops) == {0.3}


def test_by_hand_trains_what_the_papers_say_in_one_reading_of_dropout(tmp_path):
    weight, device = torch.randn(N, K), torch.device("cpu")
    for method in recipes.LAYERS:
        for p, read in ((0.0, "adapter"), (0.3, "both")):
            problem = Problem(K, N, R, 8, p, torch.float32, device)
            adapter = recipes.spec(
                method, R, p, "both", **({"init": "zero"} if method == "lamda" else {})
            )
            one = contender.build(impls.parse("eager"), method, adapter, problem, weight, None)
            assert set(one.trained) == {"x"} | textbook.TRAINS[method]
            assert not one.astray
            assert one.parameters["weight"].data_ptr() == weight.data_ptr()
            if method == "dora":
                assert one.case.form.dropout_on == read


def test_no_whole_model_is_written_by_hand():
    with pytest.raises(Unable, match="one layer by hand") as refused:
        trainee.build(impls.parse("eager"), "lora", recipes.spec("lora", R, 0.0), None, 0, 1e-3, 0)
    assert refused.value.status == "missing"
