"""The implementation "eager": the chain of stock torch operations, timed like the others."""

import pytest
import torch
from helpers.bench_runs import K, N, R, run

from lorafast.bench.cases import (
    candidate,
    choices,
    expected_grads,
    implementations,
    recipes,
    train_task,
)
from lorafast.bench.cases.candidate import Problem
from lorafast.bench.errors import Unavailable

EAGER = implementations.parse("eager")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_its_error_ratio_is_one_and_it_drops_by_torch(dtype, tmp_path, monkeypatch):
    right, drops = expected_grads.F.dropout, []

    def dropout(x, p, training):
        drops.append(p)
        return right(x, p, training)

    monkeypatch.setattr(expected_grads.F, "dropout", dropout)
    options = f"--dropout 0,0.3 --impl eager --methods all --dtype {dtype} --rounds 1 --tokens 8"
    status, rows, _ = run(tmp_path, options)
    assert status == 0
    e = 4 if dtype == "fp32" else 2
    for r in rows:
        assert (r.status, r.route) == ("ok", "torch")
        # Beside fp32 factors, the chain in fp32 is a yardstick too.
        most = 1 if dtype == "fp32" else 2
        assert 1 <= r.error_ratio <= most
        if r.method in ("lora", "lamda"):
            # h, core(h), the casts of the adapter's parameters, and with dropout x and its mask.
            least = 4 * r.M * R * e + 3 * (K + N + R) * R * e
            assert r.saved_bytes < least + (2 * r.M * K * e if r.dropout else 0)
    assert set(drops) == {0.3}


@pytest.mark.parametrize(("p", "dropout_on"), [(0.0, "adapter"), (0.3, "both")])
@pytest.mark.parametrize("method", choices.LAYERS)
def test_it_trains_what_the_papers_say(method, p, dropout_on):
    weight = torch.randn(N, K)
    problem = Problem(K, N, R, 8, p, torch.float32, torch.device("cpu"))
    fields = {"init": "zero"} if method == "lamda" else {}
    adapter = recipes.spec(method, R, p, "both", **fields)
    built = candidate.build(EAGER, method, adapter, problem, weight, None)
    assert set(built.trained) == {"x"} | expected_grads.TRAINED[method]
    assert not built.wrongly_trained
    assert built.parameters["weight"].data_ptr() == weight.data_ptr()
    if method == "dora":
        assert built.case.form.dropout_on == dropout_on


def test_it_does_not_exist_for_a_whole_model():
    adapter = recipes.spec("lora", R, 0.0)
    with pytest.raises(Unavailable, match="one layer by hand") as raised:
        train_task.build(EAGER, "lora", adapter, None, 0, 1e-3, 0)
    assert raised.value.status == "missing"
