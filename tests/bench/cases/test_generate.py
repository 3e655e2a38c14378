"""lorafast-bench generate: every implementation generates text beside the same base model."""

import json

import pytest
import torch
from helpers.bench_runs import by_label, run_generate
from torch import nn

from lorafast.bench import cli
from lorafast.bench.cases import generate_task, recipes
from lorafast.bench.cases.generate_task import Size
from lorafast.bench.cases.implementations import Impl
from lorafast.bench.report import record

SIZE = Size(1, 64)
PROMPT = torch.arange(5)[None]


def llama():
    return generate_task.llama(SIZE, torch.float32, torch.device("cpu"), 0)


@pytest.mark.peft
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_every_implementation_is_checked_and_timed(dtype, tmp_path, capsys):
    page = tmp_path / "page.html"
    options = f"--dtype {dtype} --html {page} --impl lorafast,accelerated,peft,peft-bf16,merged"
    status, rows, out = run_generate(tmp_path, options)
    assert status == 0
    assert record.faults(json.loads(out.read_text())) == []
    found = by_label(rows)
    assert len(found) == 1 + 5 * 3
    for label, r in found.items():
        if label in ("peft lamda", "accelerated lamda", "peft-bf16 lamda"):
            assert r.status == "missing"
        elif r.impl == "peft-bf16" and dtype == "fp32":
            assert r.status == "unsupported"
        else:
            assert (label, r.status) == (label, "ok")
            assert r.error_ratio <= 2
            assert (r.bench, r.M, r.seq, r.model) == ("generate", 3, 5, "llama-1x64")
            assert r.inference
            assert (r.bwd_ms, r.saved_bytes) == (None, None)
            assert r.tokens_per_s == pytest.approx(3 / r.step_ms * 1e3)
            assert r.peak_bytes > 0
    assert found["frozen"].ratio_to_frozen == 1
    title = f"llama-1x64 generates 3 tokens after 5, one text, R=4, {dtype}"
    assert title in capsys.readouterr().out
    assert title in page.read_text()


def test_a_fault_of_lorafast_makes_its_rows_wrong(monkeypatch, tmp_path):
    right = generate_task.lorafast.Linear.forward
    monkeypatch.setattr(
        generate_task.lorafast.Linear, "forward", lambda layer, x: right(layer, x) * 1.001
    )
    status, rows, _ = run_generate(tmp_path, "--impl lorafast,merged --methods lora")
    assert status == 1
    expected = {"frozen": "ok", "lorafast lora": "wrong", "merged lora": "ok"}
    assert {r.label: r.status for r in rows} == expected
    assert by_label(rows)["lorafast lora"].error_name == "logits"


def test_a_merge_that_loses_the_adapter_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(generate_task.lorafast, "merge", generate_task.lorafast.unload)
    status, rows, _ = run_generate(tmp_path, "--impl merged --methods lora")
    assert (status, by_label(rows)["merged lora"].status) == (1, "wrong")


def test_the_truth_computes_in_float64_throughout():
    adapter = recipes.spec("lora", 4, 0.0)
    task = generate_task.build(Impl("lorafast"), "lora", adapter, llama(), 0)
    assert {p.dtype for p in task.truth.parameters()} == {torch.float64}
    norms = [m for m in task.truth.modules() if "Norm" in type(m).__name__]
    assert len(norms) == 3
    assert all(type(m) is nn.RMSNorm for m in norms)
    task.model.double()
    with torch.no_grad():
        found, expected = (model(PROMPT).logits for model in (task.model, task.truth))
    # transformers' norms compute in fp32 whatever the dtype.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_as_many_tokens_are_made_as_asked_for():
    task = generate_task.build(Impl("frozen"), "none", None, llama(), 0)
    assert task.generate(PROMPT, 40).shape == (1, 45)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--impl", "eager"], "'eager' is none of frozen, lorafast, accelerated, peft"),
        (["--hidden", "100"], "'100' must be a multiple of 64"),
    ],
)
def test_an_invalid_option_is_named(words, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", *words])
    assert message in capsys.readouterr().err
