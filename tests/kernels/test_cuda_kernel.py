"""CudaKernel of csrc/launch: CUDA gets the values it is told, and bad arguments never reach it."""

import struct
from unittest import mock

import pytest
import torch
from emulator import fake_cuda
from helpers.cpp_compiler import needs_compiler

from lorafast.runtime import cuda_driver, extension
from lorafast.runtime.toolchain import Failure

pytestmark = needs_compiler
LETTERS, SIZES = "ppqiif", [8, 8, 8, 4, 4, 4]
STREAM = 0x5EED


@pytest.fixture
def cuda(monkeypatch):
    """The libcuda that launches nothing, loaded in place of CUDA's."""
    found = fake_cuda.load()
    found.noted()
    monkeypatch.setattr(cuda_driver, "_libcuda", lambda: found.library)
    return found


@pytest.fixture
def kernel(cuda):
    """A kernel for tensors of a CPU, which stands for a GPU."""
    module = extension.launcher()
    if isinstance(module, str):
        pytest.skip(module)
    function = cuda_driver.load(b"a cubin", "tiny")
    cuda.tell(function, SIZES)
    stream_of = mock.Mock(return_value=STREAM)
    made = module.CudaKernel(cuda_driver.launch_address(), function, 128, LETTERS, stream_of, "cpu")
    return made, function, stream_of


def test_cuda_is_given_the_grid_the_stream_and_every_value(kernel, cuda):
    run, function, stream_of = kernel
    x = torch.zeros(8)
    assert run((3, 2), x[2:], None, -(2**40), -5, 2**32 - 1, 0.05) is None
    head, values = struct.Struct("=6I I Q I Q"), struct.Struct("=Q Q q i I f")
    noted = cuda.noted()
    assert len(noted) == head.size + values.size
    assert head.unpack(noted[: head.size]) == (3, 2, 1, 128, 1, 1, 0, STREAM, 0, function)
    single = struct.unpack("=f", struct.pack("=f", 0.05))[0]
    wanted = (x.data_ptr() + 8, 0, -(2**40), -5, 2**32 - 1, single)
    assert values.unpack(noted[head.size :]) == wanted
    stream_of.assert_called_once_with(0)


def test_an_empty_grid_launches_nothing(kernel, cuda):
    run, _, stream_of = kernel
    assert run((3, 0), torch.zeros(0), None, 1, 1, True, 1) is None
    assert cuda.noted() == b""
    stream_of.assert_not_called()


@pytest.mark.parametrize(
    ("place", "value", "error", "said"),
    [
        (0, (1, 2, 3, 4), TypeError, "grid has to be a tuple of 1 to 3 ints"),
        (0, [1], TypeError, "grid has to be a tuple"),
        (0, (1.5,), TypeError, "an int of the grid, not float"),
        (0, (1, 65536), OverflowError, "size 1 of the grid is 65536"),
        (0, (-1,), OverflowError, "size 0 of the grid is -1"),
        (1, 3, TypeError, "argument 0 has to be a tensor or None, not int"),
        (1, torch.zeros(1, device="meta"), ValueError, "argument 0 is on meta"),
        (2, torch.zeros(1, device="meta"), ValueError, "argument 1 is on meta"),
        (3, 2.0, TypeError, "argument 2 has to be an int of at most 64 bits, not float"),
        (3, 2**70, TypeError, "argument 2 has to be an int of at most 64 bits"),
        (4, 2**32, OverflowError, "argument 3 has to fit 32 bits, not 4294967296"),
        (4, -(2**31) - 1, OverflowError, "argument 3 has to fit 32 bits"),
        (6, "x", TypeError, "must be real number"),
    ],
)
def test_a_wrong_argument_is_named_and_nothing_is_launched(kernel, cuda, place, value, error, said):
    run, _, _ = kernel
    given = [(1,), torch.zeros(1), None, 1, 1, 1, 1.0]
    given[place] = value
    with pytest.raises(error, match=said):
        run(*given)
    assert cuda.noted() == b""


def test_the_number_of_arguments_and_the_letters_are_checked(kernel, cuda):
    run, function, stream_of = kernel
    with pytest.raises(TypeError, match="takes a grid and 6 arguments, not 1"):
        run((1,))
    with pytest.raises(TypeError, match="takes a grid"):
        run((1,), x=3)
    with pytest.raises(ValueError, match="letters of pqif, not pz"):
        type(run)(cuda_driver.launch_address(), function, 1, "pz", stream_of, "cpu")
    with pytest.raises(RuntimeError):
        type(run)(cuda_driver.launch_address(), function, 1, "p", stream_of, "no device")


def test_a_refusal_of_the_driver_is_an_error(kernel, cuda):
    run, _, _ = kernel
    cuda.refuse(1)
    with pytest.raises(RuntimeError, match="CUDA refuses the launch: error 1"):
        run((1,), torch.zeros(1), None, 1, 1, 1, 1.0)


def test_a_kernel_that_cannot_be_loaded_is_a_reason(cuda, monkeypatch):
    with pytest.raises(Failure, match="does not load the kernel missing: refused"):
        cuda_driver.load(b"a cubin", "missing")
    monkeypatch.undo()
    monkeypatch.setattr("ctypes.CDLL", mock.Mock(side_effect=OSError("no libcuda")))
    with pytest.raises(Failure, match="CUDA's driver cannot be loaded: no libcuda"):
        cuda_driver._libcuda.__wrapped__()
    monkeypatch.setattr("ctypes.CDLL", mock.Mock(return_value=object()))
    with pytest.raises(Failure, match="has no cuModuleLoadData"):
        cuda_driver._libcuda.__wrapped__()
