"""explain(): the table and its remarks; tests/contracts compares its bytes with what is saved."""

import re

import pytest
import torch
from helpers import tiny_transformers
from helpers.pretended_gpu import take_tensors_for, verdicts
from torch import nn

import lorafast
from lorafast import DoRA, LoRA, testing
from lorafast.engine import dispatch, masks, trial
from lorafast.runtime import devices

triton = pytest.importorskip("lorafast.engine.backends.triton")

pytestmark = pytest.mark.usefixtures("few_tokens_by_op")


@pytest.fixture
def absent(monkeypatch):
    """One backend before eager, and it is not there."""
    monkeypatch.setattr(dispatch, "ORDER", ("absent", "eager"))
    dispatch._routes.cache_clear()
    yield monkeypatch
    dispatch._routes.cache_clear()


def test_an_exact_norm_keeps_for_its_own_gradient():
    layer = lorafast.Linear(20, 12, bias=False, adapter=DoRA(r=4, detach_norm=False, keep="inner"))
    layer.lora_magnitude.requires_grad_(False)
    (row,) = lorafast.explain(layer).rows
    x = torch.randn(7, 20, requires_grad=True)
    saved = testing.saved(lambda: layer(x), {"x": x}, list(layer.parameters()))
    assert saved.own == row.saved * 7 + 4 * 12


@pytest.mark.parametrize("keep", ["output", "inner", "recompute"])
def test_the_problems_asked_about_are_those_of_a_step(monkeypatch, keep):
    layer = lorafast.Linear(20, 12, bias=False, adapter=DoRA(r=4, dropout=0.1, keep=keep))
    asked = []
    real = dispatch.why_not
    monkeypatch.setattr(
        dispatch,
        "why_not",
        lambda backend, *problem: asked.append(problem) or real(backend, *problem),
    )
    lorafast.explain(layer, tokens=7)
    explained = set(asked)
    asked.clear()
    dispatch._routes.cache_clear()
    layer(torch.randn(7, 20, requires_grad=True)).sum().backward()
    assert set(asked) == explained


def test_a_forced_backend_that_cannot_is_told_not_raised(absent):
    absent.setenv("LORAFAST_BACKEND", "absent")
    (row,) = lorafast.explain(lorafast.Linear(6, 5)).rows
    assert set(row.backends.values()) == {"none"}
    assert row.why_not == {
        "absent": ("not written yet (nothing is missing from this installation)",)
    }


def test_the_table_reads(absent):
    model = nn.Sequential(
        lorafast.Linear(20, 12, adapter=LoRA(r=4)),
        nn.ReLU(),
        lorafast.Linear(12, 6, bias=False, adapter=DoRA(r=2)),
    )
    told = lorafast.explain(model)
    assert [row.name for row in told.rows] == ["0", "2"]
    assert [row.method for row in told.rows] == ["LoRA", "DoRA"]
    assert told.rows[0].shape == (12, 20)
    assert "row_norm" not in told.rows[0].backends
    assert told.rows[1].backends["row_norm"] == "eager"
    text = str(told)
    header, first, second, total, *_ = text.splitlines()
    assert header.split() == [
        "layer",
        "n",
        "method",
        "N",
        "x",
        "K",
        "r",
        "own",
        "x",
        "y",
        "backend",
    ]
    assert first.split() == ["0", "1", "LoRA", "12", "x", "20", "4", "16", "80", "-", "eager"]
    assert second.split() == ["2", "1", "DoRA", "6", "x", "12", "2", "8", "48", "24", "eager"]
    assert total.split() == ["total", "2", "24", "128", "24"]
    assert "not absent: not written yet (nothing is missing from this installation)" in text
    assert "no in-place op may follow" in text
    assert str(lorafast.explain(nn.ReLU())) == "no adapted layer"


@pytest.mark.parametrize(
    ("adapter", "remark"),
    [
        (DoRA(r=2, dropout=0.1, dropout_on="both"), "a second base GEMM forward and backward"),
        (DoRA(r=2, keep="inner"), "z, as large as the output, is saved"),
        (DoRA(r=2, keep="recompute"), "one more base GEMM in backward"),
        (DoRA(r=2, axis="in"), "eager backend"),
    ],
    ids=repr,
)
def test_what_a_choice_costs(adapter, remark):
    assert remark in str(lorafast.explain(lorafast.Linear(6, 5, adapter=adapter)))


def test_merged_and_trained_weights_are_told():
    layer = lorafast.Linear(6, 5)
    layer.weight.requires_grad_(True)
    told = lorafast.explain(layer)
    assert "plain autograd" in str(told)
    assert "as torch" in str(told)
    assert (told.rows[0].saved, told.rows[0].referenced, told.rows[0].backends) == (None, (), {})
    layer.merge()
    told = lorafast.explain(layer)
    assert "merged" in str(told)
    assert (told.rows[0].saved, told.rows[0].referenced, told.rows[0].backends) == (0, (), {})


def table_lines(explanation):
    """Return the lines of the printed table, without the remarks below it."""
    return str(explanation).partition("\n\n")[0].splitlines()


def test_layers_of_one_kind_share_a_line_and_the_total_is_the_models():
    model = lorafast.adapt(tiny_transformers.llama(num_hidden_layers=3), LoRA(r=4))
    told = lorafast.explain(model)
    assert [(group.name, len(group.rows)) for group in told.groups] == [
        (f"model.layers.*.{name}", 3)
        for name in (
            *(f"self_attn.{part}_proj" for part in "qkvo"),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
        )
    ]
    assert sum((group.rows for group in told.groups), ()) != told.rows
    assert {row for group in told.groups for row in map(lambda r: r.name, group.rows)} == {
        row.name for row in told.rows
    }
    assert told.saved == 21 * 4 * 4
    assert told.referenced_bytes == {"x": 3 * (6 * 32 + 48) * 4}
    assert table_lines(told)[-1].split() == ["total", "21", str(21 * 16), str(3 * 240 * 4)]


def test_x_has_a_price_where_a_method_needs_it():
    lora, lamda = (
        lorafast.explain(lorafast.Linear(20, 12, adapter=adapter))
        for adapter in (LoRA(r=4), lorafast.LaMDA(r=4))
    )
    assert lora.rows[0].referenced_bytes == {"x": 20 * 4}
    assert (lamda.rows[0].referenced, lamda.rows[0].referenced_bytes) == ((), {})
    assert lora.saved == lamda.saved
    assert str(lora) != str(lamda).replace("LaMDA", "LoRA")
    half = lorafast.Linear(20, 12, adapter=DoRA(r=4, keep="output"), bias=False).bfloat16()
    assert lorafast.explain(half).rows[0].referenced_bytes == {"x": 20 * 2, "y": 12 * 2}


def test_the_table_fits_a_terminal():
    for adapter in (LoRA(r=4), DoRA(r=4, dropout=0.1)):
        model = nn.ModuleDict({"base_model": nn.ModuleDict({"model": tiny_transformers.llama()})})
        told = lorafast.explain(lorafast.adapt(model, adapter, exclude_modules=["lm_head"]))
        lines = table_lines(told)
        assert max(map(len, lines)) <= 80
        assert lines[0] == "layers of base_model.model.model.layers.*"
        assert lines[2].startswith("self_attn.q_proj ")


def test_layers_of_different_ranks_show_which_they_are():
    model = lorafast.adapt(
        tiny_transformers.llama(num_hidden_layers=5),
        LoRA(r=4),
        ["q_proj"],
        rank_pattern={r"layers\.[034]\..*": 2, "layers.1.self_attn.q_proj": 3},
    )
    names = {group.rows[0].r: group.name for group in lorafast.explain(model).groups}
    assert names == {
        2: "model.layers.0,3-4.self_attn.q_proj",
        3: "model.layers.1.self_attn.q_proj",
        4: "model.layers.2.self_attn.q_proj",
    }


def test_a_backend_of_gpus_is_one_short_line_on_the_cpu():
    text = str(lorafast.explain(lorafast.Linear(20, 12)))
    assert "not cuda, triton: for GPUs, and these weights are on the CPU" in text
    assert "not part of this version" not in text
    assert "waits to be asked" not in text
    on_meta = str(lorafast.explain(lorafast.Linear(20, 12, device="meta")))
    assert "not cuda: runs on NVIDIA GPUs; this is meta\n" in on_meta


def test_a_forced_backend_gives_its_reasons_on_the_cpu_too(monkeypatch):
    monkeypatch.setenv("LORAFAST_BACKEND", "cuda")
    text = str(lorafast.explain(lorafast.Linear(20, 12)))
    assert "not cuda: runs on NVIDIA GPUs; this is cpu" in text


def test_a_notebook_shows_a_table_with_every_text_escaped():
    model = nn.Sequential()
    model.add_module("<b>&", lorafast.Linear(20, 12))
    page = lorafast.explain(model)._repr_html_()
    assert "&lt;b&gt;&amp;" in page
    assert re.findall(r"<b>|&[^a-z#]", page) == []
    assert page.count("<tr>") == 3
    assert "<th" in page
    assert "<li>own: bytes per token" in page
    assert lorafast.explain(nn.ReLU())._repr_html_() == "<p>no adapted layer</p>"


@pytest.fixture
def on_h200(monkeypatch):
    """Tensors are taken for those of an H200; the mask's kernel serves where Triton's do."""
    take_tensors_for(devices.Arch("nvidia", "sm_90", 132), monkeypatch)
    monkeypatch.setattr(
        masks, "why_not_kernel", lambda device, dtype: trial.why_not("drop", dtype, 0, device)
    )
    monkeypatch.setattr(triton.triton.knobs.runtime, "interpret", False)
    dispatch._routes.cache_clear()
    yield
    dispatch._routes.cache_clear()


def a_layer(**options):
    return lorafast.Linear(
        1024, 1024, bias=False, dtype=torch.bfloat16, adapter=LoRA(r=16, **options)
    )


@pytest.mark.usefixtures("on_h200")
def test_a_gpus_step_is_modelled_by_what_serves_there():
    (alone,) = lorafast.explain(a_layer(dropout=0.05)).rows
    with trial.assuming(verdicts()):
        found = lorafast.explain(a_layer(dropout=0.05))
        (plain,) = lorafast.explain(a_layer()).rows
    (row,) = found.rows
    assert set(row.backends.values()) == {"triton"}
    assert 1 < plain.modelled < row.modelled < alone.modelled / 3
    table = str(found)
    assert re.search(rf"\b{row.modelled:.2f} ×", table)
    assert "a training step by the frozen layer's, in a model and not measured" in table
    assert "modelled" in found._repr_html_()


@pytest.mark.usefixtures("on_h200")
def test_the_kernel_of_a_gpus_dropout_mask_is_named(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda tensor: False))
    wrong = {"project bfloat16": "is wrong"}
    with trial.assuming(verdicts(wrong)):
        (row,) = lorafast.explain(a_layer(dropout=0.05)).rows
        assert "the dropout mask of project by Triton's drop" in row.notes
    with trial.assuming(verdicts(wrong | {"drop bfloat16": "crashed by SIGSEGV"})):
        (row,) = lorafast.explain(a_layer(dropout=0.05)).rows
        (note,) = (note for note in row.notes if "mask" in note)
        assert note == (
            "the dropout mask of project by torch's operations, not by Triton's drop: "
            "crashed by SIGSEGV"
        )
        assert not any("mask" in note for note in lorafast.explain(a_layer()).rows[0].notes)


def test_a_cpus_step_is_not_modelled():
    found = lorafast.explain(a_layer(dropout=0.05))
    assert found.rows[0].modelled is None
    assert "modelled" not in str(found)
