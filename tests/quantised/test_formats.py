"""Which format a module's weight is, without importing the libraries."""

import subprocess
import sys

import torch
from torch import nn

from lorafast.quantised import formats
from lorafast.quantised.weight import QuantisedWeight

PROBE = """
import sys, torch
import lorafast
from lorafast.quantised import formats

layer = torch.nn.Linear(4, 4)
assert formats.of(layer) is None
layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), False)
layer.weight_scale = torch.ones(())
assert formats.of(layer).whole(torch.empty(4, 4)).isfinite().all()
print(*({"bitsandbytes", "torchao", "hqq", "awq", "gptqmodel"} & {*sys.modules}))
"""


def test_no_library_is_imported():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_plain_modules_have_none():
    for module in (nn.Linear(2, 2), nn.Embedding(2, 2), nn.LayerNorm(2), nn.Identity()):
        assert formats.of(module) is None
    # An FP8 tensor that belongs to no linear layer.
    module = nn.Module()
    module.weight = torch.zeros(2, 2, dtype=torch.float8_e4m3fn)
    assert formats.of(module) is None


def test_every_format_says_all_of_it():
    assert len({*formats.FORMATS}) == len(formats.FORMATS) == 5
    for weight_format in formats.FORMATS:
        assert issubclass(weight_format, QuantisedWeight)
        assert not weight_format.__abstractmethods__
