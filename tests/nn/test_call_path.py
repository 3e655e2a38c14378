"""The Python path of one layer's call: how many functions and files of lorafast it goes through."""

import sys
from pathlib import Path

import pytest
import torch

import lorafast
from lorafast import DoRA, LoRA

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
    ("adapter", "most_calls", "most_files"), [(LoRA(r=4, alpha=8), 22, 8), (DoRA(r=4), 32, 9)]
)
def test_a_forward_pass_is_a_short_path(adapter, most_calls, most_files, backend, monkeypatch):
    layer, x = lorafast.Linear(16, 16, adapter=adapter), torch.randn(4, 16, requires_grad=True)
    torch.nn.init.normal_(layer.lora_B)
    monkeypatch.setenv("LORAFAST_BACKEND", backend)
    try:
        calls = calls_of(layer, x)
    except RuntimeError as error:
        pytest.skip(str(error))  # no compiler here
    assert 0 < len(calls) <= most_calls, calls
    assert len({path for path, _ in calls}) <= most_files, calls
