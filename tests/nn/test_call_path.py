"""How many functions and files of lorafast one layer's call goes through, in Python and in all."""

import sys
from pathlib import Path

import pytest
import torch
from helpers.cpp_compiler import needs_compiler

import lorafast
from lorafast import DoRA, LaMDA, LoRA, VeRA
from lorafast.engine import host

PACKAGE = Path(lorafast.__file__).parent


def calls_of(layer, x):
    """The functions of lorafast that a forward pass calls, as (file, name)."""
    calls = []

    def record(frame, event, _):
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(str(PACKAGE)):
            calls.append((path, frame.f_code.co_name))

    layer(x)  # the first call chooses the backends
    sys.setprofile(record)
    try:
        layer(x)
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize(
    ("adapter", "most_calls", "most_files"), [(LoRA(r=4, alpha=8), 24, 10), (DoRA(r=4), 35, 11)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_forward_pass_is_a_short_path(
    adapter, most_calls, most_files, bias, backend, monkeypatch, calls_by_python
):
    layer = lorafast.Linear.from_linear(torch.nn.Linear(16, 16, bias=bias), adapter)
    x = torch.randn(4, 16, requires_grad=True)
    torch.nn.init.normal_(layer.lora_B)
    monkeypatch.setenv("LORAFAST_BACKEND", backend)
    try:
        calls = calls_of(layer, x)
    except RuntimeError as error:
        pytest.skip(str(error))  # no compiler here
    assert 0 < len(calls) <= most_calls, calls
    assert len({path for path, _ in calls}) <= most_files, calls


@pytest.mark.parametrize("adapter", [LoRA(r=4, dropout=0.1), LaMDA(r=4), DoRA(r=4), VeRA(r=4)])
@needs_compiler
def test_the_host_path_is_one_call(adapter):
    layer = lorafast.Linear(16, 16, adapter=adapter)
    x = torch.randn(4, 16, requires_grad=True)
    layer(x)
    if not host.is_ready():
        pytest.skip("the host path cannot be built here")
    calls = calls_of(layer, x)
    assert len(calls) <= 4, calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dropout", "most_calls"), [(0.0, 8), (0.1, 18)])
def test_a_call_of_few_tokens_is_shorter(dropout, most_calls, bias, calls_by_python):
    linear = torch.nn.Linear(16, 16, bias=bias)
    layer = lorafast.Linear.from_linear(linear, LoRA(r=4, alpha=8, dropout=dropout))
    calls = calls_of(layer, torch.randn(4, 16, requires_grad=True))
    assert "products" in {name for _, name in calls}
    assert len(calls) <= most_calls, calls
