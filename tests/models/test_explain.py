"""explain(): the table and its remarks; tests/contracts compares its bytes with what is saved."""

import pytest
import torch
from torch import nn

import lorafast
from lorafast import DoRA, LoRA, testing
from lorafast.engine import dispatch


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
    assert row.why_not == {"absent": ("not part of this version of lorafast",)}


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
    assert text.splitlines()[0].split() == [
        "layer",
        "method",
        "N",
        "x",
        "K",
        "r",
        "saved",
        "B/token",
        "by",
        "reference",
        "backend",
    ]
    assert "not absent: not part of this version of lorafast" in text
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
