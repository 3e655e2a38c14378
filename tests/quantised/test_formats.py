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


def _fp8(device="cpu"):
    layer = nn.Linear(5, 3, device=device)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    layer.weight_scale = torch.full((3, 1), 0.5, device=device)
    return formats.of(layer)


def test_a_dense_weight_is_a_new_tensor():
    weight = _fp8()
    for dtype in (None, *weight.DTYPES):
        dense = weight.dense(dtype)
        assert dense.dtype == (dtype or weight.dtype)
        assert torch.equal(dense, (weight.packed.float() * 0.5).to(dense.dtype))
    meta = _fp8("meta").dense()
    assert (meta.shape, meta.dtype, meta.is_meta) == ((3, 5), torch.float32, True)


def test_a_stand_in_has_the_memory_of_a_row():
    weight = _fp8()
    one = weight.stand_in()
    assert (one.shape, one.dtype, one.device) == ((3, 5), weight.dtype, weight.device)
    assert one.untyped_storage().nbytes() == 5 * 4
    weight.module.weight_scale = None
    assert weight.stand_in().dtype == torch.float32
