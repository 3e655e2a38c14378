"""The cuda backend's reasons, its sums in parts, and a form from its source to a launch."""

import contextlib
import struct
from unittest import mock

import pytest
import torch
from emulator import fake_cuda
from helpers.cpp_compiler import needs_compiler

from lorafast.engine import cuda_forms, cuda_kernels
from lorafast.engine.backends import cuda as backend
from lorafast.engine.cuda_forms import Form
from lorafast.engine.problem import Problem
from lorafast.runtime import cubins, cuda_compiler, cuda_driver, devices, extension
from lorafast.runtime.toolchain import Failure

BF16 = torch.bfloat16


def problem(arch=("nvidia", "sm_90"), dtype=BF16, R=16, factor=torch.float32):
    return Problem(devices.Arch(*arch), dtype, 64, 128, (96,), (R,), dtype, factor)


@pytest.fixture
def asked(monkeypatch):
    """LORAFAST_BACKEND=cuda, where kernels can be compiled and launched."""
    monkeypatch.setenv("LORAFAST_BACKEND", "cuda")
    monkeypatch.setattr(cuda_compiler, "find", lambda: cuda_compiler.Compiler("NVRTC 13.0", None))
    monkeypatch.setattr(extension, "launcher", mock.Mock)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"arch": ("nvidia", "sm_80")}, None),
        ({"arch": ("nvidia", "sm_120")}, None),
        ({"dtype": torch.float32, "R": 256}, None),
        ({"arch": ("cpu", "cpu")}, "runs on NVIDIA GPUs; this is cpu"),
        ({"arch": ("amd", "gfx942")}, "runs on NVIDIA GPUs; this is gfx942"),
        ({"arch": ("nvidia", "sm_75")}, "runs on sm_80 and later; this is sm_75"),
        ({"dtype": torch.float64}, "x is torch.float64; the kernels compute in torch.bfloat16"),
        ({"factor": torch.float64}, "a factor is torch.float64"),
        ({"R": 257}, "R=257 exceeds 256"),
    ],
)
def test_what_it_serves_when_it_is_asked_for(changed, said, asked):
    reasons = backend.why_not("linear", problem(**changed))
    assert any(said in reason for reason in reasons) if said else not reasons


def test_it_is_not_used_untried(monkeypatch):
    monkeypatch.delenv("LORAFAST_BACKEND", raising=False)
    monkeypatch.setattr(extension, "launcher", mock.Mock(side_effect=AssertionError("built")))
    assert backend.why_not("linear", problem()) == ("is tried on GPUs, and none is here",)


def test_what_is_missing_is_a_reason(asked, monkeypatch):
    monkeypatch.setattr(extension, "launcher", lambda: "no compiler")
    assert backend.why_not("linear", problem()) == ("no compiler",)
    monkeypatch.setattr(cuda_compiler, "find", lambda: "there is no NVRTC")
    assert backend.why_not("linear", problem()) == ("there is no NVRTC",)
    with pytest.raises(Failure, match=r"launched in C\+\+ alone: no compiler"):
        cuda_forms.loaded.__wrapped__(Form("drop", BF16), torch.device("cpu"))


@pytest.mark.parametrize("blocks", [0, 1, 7, 300])
@pytest.mark.parametrize("steps", [0, 1, 3, 4, 130, 4097])
def test_the_parts_of_a_sum_cover_it_and_none_is_empty(blocks, steps):
    parts, each = cuda_kernels.split(blocks, steps, torch.device("cpu"))
    assert parts >= 1
    assert parts * each >= steps
    assert (parts - 1) * each < max(steps, 1)
    # No part is shorter than what a block of threads is worth.
    assert parts == 1 or each >= 4
    assert parts == 1 or parts * blocks <= 2 * 108 + blocks


@needs_compiler
def test_a_form_from_its_source_to_the_driver(tmp_path, monkeypatch):
    """All but the driver is real: compiler, cache, module of C++. The device is a CPU's."""
    if isinstance(why := cuda_compiler.find(), str):
        pytest.skip(why)
    if isinstance(module := extension.launcher(), str):
        pytest.skip(module)
    cuda, x = fake_cuda.load(), torch.ones(6, 16, dtype=BF16)
    made = mock.Mock(wraps=cubins.cubin)
    with contextlib.ExitStack() as stubs:
        for where, name, value in (
            (cuda_driver, "_libcuda", lambda: cuda.library),
            (devices, "of", lambda device: devices.Arch("nvidia", "sm_90")),
            (cuda_forms, "LAUNCHED_TENSORS", "cpu"),
            (cuda_forms.torch_internals, "raw_stream", lambda: lambda index: 0x5EED),
            (cubins, "cubin", made),
            (cuda_forms, "loaded", cuda_forms.loaded.__wrapped__),
            (extension, "launcher", lambda: module),
        ):
            stubs.enter_context(mock.patch.object(where, name, value))
        monkeypatch.setenv("LORAFAST_CACHE", str(tmp_path))
        cuda.tell(cuda_driver.load(b"", "drop"), [8, 8, 8, *[8] * 6, 4, 4, 4])
        cuda.noted()
        out = torch.empty_like(x)
        cuda_kernels.drop_into(out, x, torch.tensor([5]), 0.5)
    (call,) = made.call_args_list
    source, architecture, options = call.args
    assert (source.name, architecture) == ("drop.cu", "sm_90")
    assert "-DLORAFAST_FLAGS=2" in options
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".lock", ".cubin"]
    noted = cuda.noted()
    assert struct.unpack("=6I", noted[:24]) == (1, 1, 1, 256, 1, 1)
    head = struct.calcsize("=6I I Q I Q")
    x_at, _, out_at, first_row, M = struct.unpack("=5q", noted[head : head + 40])
    assert (x_at, out_at, first_row, M) == (x.data_ptr(), out.data_ptr(), 0, 6)
    groups, K, threshold, scale = struct.unpack("=q2If", noted[-20:])
    assert (groups, K, threshold, scale) == (2, 16, 0x80008000, 2.0)
