"""Estimated memory: against steps that are taken, by batch size, and on cards."""

import json

import pytest
import torch
from helpers import small_presets

from lorafast.bench import cli
from lorafast.bench.cases import cards, estimate, estimated_model, model_presets
from lorafast.bench.cases.implementations import Impl
from lorafast.bench.errors import BenchError
from lorafast.bench.report import record
from lorafast.bench.report.progress import Progress
from lorafast.bench.report.record import Results

SEQ, BATCH = 256, 4
# By how much an estimate may be off.
TOLERANCE = 0.02
CANDIDATES = [
    ("frozen", "none"),
    ("full", "none"),
    ("lorafast", "lora"),
    ("lorafast", "dora"),
    ("lorafast", "lamda"),
    ("peft", "lora"),
    ("peft", "dora"),
]
PRESETS = [name for name in model_presets.PRESETS if name != "qwen3-moe"]
QUICK = [("llama3-8b", *CANDIDATES[3], False), ("deberta-v3-base", *CANDIDATES[5], True)]
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in (
        (name, *candidate, on) for name in PRESETS for candidate in CANDIDATES for on in (0, 1)
    )
]


def plan(preset, **fields):
    known = {
        "name": "small",
        "preset": preset,
        "impls": (),
        "methods": (),
        "batch_sizes": (BATCH,),
        "seq": SEQ,
        "target": SEQ // 2,
        "card": cards.CPU,
        "dtype": torch.float32,
        "R": 8,
        "dropout": 0.0,
        "checkpointing": (False,),
        "base_formats": ("dense",),
        "reserve": 1 << 30,
    }
    return estimate.Plan(**(known | fields))


def both(asked, impl, method, checkpointing):
    """Return the peaks of one step: estimated, and taken."""
    counted = estimate._Estimate(asked, Impl(impl), method)
    row = estimate._record(asked, Impl(impl), method, BATCH, bool(checkpointing))
    counted.fill(row, bool(checkpointing))
    return row.peak_bytes, estimate.measured(asked, Impl(impl), method, row)


@pytest.mark.parametrize(("name", "impl", "method", "checkpointing"), CASES)
def test_an_estimate_is_the_peak_of_a_step_that_is_taken(name, impl, method, checkpointing):
    estimated, taken = both(plan(small_presets.small(name)), impl, method, checkpointing)
    assert estimated == pytest.approx(taken, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3-8b", "qwen3-moe"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("impl", "method"),
    [
        ("frozen", "none"),
        ("full", "none"),
        ("lorafast", "lora"),
        ("lorafast", "lamda"),
        ("peft", "lora"),
        ("peft", "dora"),
        ("peft", "vera"),
        ("peft", "adalora"),
        ("peft", "lora-fa"),
        ("peft-bf16", "lora"),
        ("peft-bf16", "dora"),
        ("peft-bf16", "vera"),
        ("peft-bf16", "adalora"),
    ],
)
def test_so_it_is_in_half_precision(name, impl, method, checkpointing):
    asked = plan(small_presets.small(name), dtype=torch.bfloat16)
    estimated, taken = both(asked, impl, method, checkpointing)
    assert estimated == pytest.approx(taken, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vera", "adalora", "lora-fa"])
def test_so_it_is_of_pefts_other_methods(method):
    estimated, taken = both(plan(small_presets.small("bart-large")), "peft", method, False)
    assert estimated == pytest.approx(taken, rel=TOLERANCE)


# Published numbers of parameters.
PARAMETERS = {
    "llama3-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama2-7b": 6_738_415_616,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-moe": 30_532_122_624,
    "mistral-7b": 7_248_023_552,
    "gpt2": 124_439_808,
    "roberta-base": 124_647_170,
    "deberta-v3-base": 184_423_682,
    "bart-large": 406_291_456,
}


@pytest.mark.parametrize("name", model_presets.PRESETS)
def test_a_preset_has_the_published_number_of_parameters(name):
    preset = model_presets.PRESETS[name]
    model = estimated_model.base_model(preset, torch.bfloat16, torch.device("meta"))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_a_largest_batch_fits_and_one_text_more_does_not():
    asked = plan(small_presets.small("llama3-8b"), card="l4-24g", batch_sizes=(1, 3))
    counted = estimate._Estimate(asked, Impl("lorafast"), "lora")
    memory = 100 << 20
    most = counted.largest_batch(False, memory)
    assert most > 3

    def total(size):
        return counted.weights + counted.state + counted.step(size, False).peak

    assert total(most) <= memory < total(most + 1)
    assert counted.largest_batch(False, total(1) - 1) == 0


def rows(*checkpointing, **fields):
    asked = plan(
        small_presets.small("llama3-8b"),
        card="h100-80g",
        dtype=torch.bfloat16,
        impls=(Impl("full"), Impl("lorafast"), Impl("peft"), Impl("peft-bf16")),
        methods=("lora",),
        checkpointing=checkpointing,
        **fields,
    )
    with Progress(1) as progress:
        found = [row for group in estimate.run(asked, progress) for row in group]
    return {(r.impl, r.batch_size, r.checkpointing, r.base_format): r for r in found}


def test_rows_have_the_order_that_the_implementations_have():
    found = rows(False, True, batch_sizes=(1, 4))
    assert all(r.ok and r.modelled_ms > 0 for r in found.values())

    def total(impl, size=4, on=False):
        return found[impl, size, on, "dense"].total_bytes

    assert total("frozen") < total("lorafast") < total("peft")
    assert total("peft-bf16") < total("peft")
    assert total("lorafast") < total("full")
    for impl in ("full", "lorafast", "peft"):
        assert total(impl, on=True) < total(impl)
        assert total(impl, 1) < total(impl, 4)
    one = found["lorafast", 4, False, "dense"]
    assert one.total_bytes == one.weight_bytes + one.optimizer_bytes + one.peak_bytes
    assert 0 < one.head_bytes < one.activation_bytes < one.peak_bytes
    assert found["frozen", 4, False, "dense"].optimizer_bytes == 0


def test_a_quantised_base_is_smaller_and_does_not_train():
    found = rows(False, base_formats=("dense", "nf4", "fp8"))
    dense, nf4, fp8 = (found["lorafast", 4, False, one] for one in ("dense", "nf4", "fp8"))
    assert nf4.weight_bytes < fp8.weight_bytes < dense.weight_bytes
    # One weight at a time is dequantised: the largest is that of an MLP.
    assert nf4.peak_bytes - dense.peak_bytes == 2 * 256 * 512
    for one in (dense, nf4, fp8):
        assert one.weight_formats[one.base_format] == one.weight_bytes
        assert one.total_bytes == one.weight_bytes + one.optimizer_bytes + one.peak_bytes
    assert found["full", 4, False, "nf4"].status == "unsupported"


def test_a_gpu_drops_with_a_mask_of_bytes_and_a_cpu_with_noise():
    preset = small_presets.small("gpt2")
    sizes = []
    for card in ("cpu", "h100-80g"):
        counted = estimate._Estimate(plan(preset, card=card), Impl("full"), "none")
        sizes.append(counted.step(BATCH, False).activations)
    assert sizes[1] < 0.9 * sizes[0]


def test_experts_are_computed_in_bf16_alone():
    with pytest.raises(BenchError, match="bf16 alone"):
        estimate._Estimate(plan(small_presets.small("qwen3-moe")), Impl("frozen"), "none")


def test_a_config_of_ones_own_is_a_folder_or_a_file(tmp_path, capsys):
    config = small_presets.small("llama3-8b").config | {"architectures": ["LlamaForCausalLM"]}
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out.json"
    words = ["estimate", "--model", str(folder), "--methods", "lora", "--impl", "lorafast"]
    words += ["--seq", "32", "--batch-sizes", "2", "--checkpointing", "off", "--json", str(out)]
    assert cli.main(words) == 0
    assert record.faults(json.loads(out.read_text())) == []
    assert [r.model for r in Results.read(out).records] == ["mine", "mine"]
    assert "estimate of mine, 32 tokens a text" in capsys.readouterr().out


def test_a_mixtures_adapters_are_on_attention_which_is_said(tmp_path, capsys):
    config = small_presets.small("qwen3-moe").config
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"architectures": ["Qwen3MoeForCausalLM"]})
    )
    words = ["estimate", "--model", str(tmp_path), "--impl", "lorafast", "--methods", "lora"]
    words += ["--seq", "16", "--batch-sizes", "1", "--checkpointing", "off", "--json", "-"]
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert "adapters on q_proj, k_proj, v_proj, o_proj; experts are frozen" in said.err
    (row,) = (r for r in json.loads(said.out)["records"] if r["impl"] == "lorafast")
    # A and B of rank 16 on four layers of two blocks: 256 -> 256 twice, 256 -> 64 twice.
    assert row["trainable"] == 2 * 16 * (2 * (256 + 256) + 2 * (256 + 64))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "lama3-8b"], "did you mean llama3-8b?"),
        (["--device", "h100"], "did you mean h100-80g?"),
        (["--impl", "eager"], "'eager' is none of frozen, full, lorafast"),
        (["--base", "int8"], "'int8' is none of dense, nf4, fp8"),
        (["--experiment", "lambda-memory"], "did you mean lamda-memory?"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["estimate", *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_config_that_makes_no_model_is_one_line(tmp_path, capsys):
    file = tmp_path / "x.json"
    file.write_text('{"model_type": "no-such-model"}')
    assert cli.main(["estimate", "--model", str(file)]) == 2
    assert "transformers makes no model of the config" in capsys.readouterr().err
