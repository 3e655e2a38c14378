"""The backends that the contract runs over, and whether this machine can run them."""

import importlib

import pytest
import torch

from helpers.cpp_compiler import needs_compiler
from helpers.cuda_compiler import needs_nvcc
from lorafast.engine.problem import Problem
from lorafast.runtime.devices import Arch

HALVES = (torch.bfloat16, torch.float16)
# The dtypes in which a test on CPU tensors can run each; Triton's interpreter has no bf16. On the
# emulator, which takes its time, one: tests/kernels/test_cuda_primitives.py has the others.
DTYPES = {
    "eager": (torch.float32, *HALVES),
    "cpu": (torch.float32, *HALVES),
    "triton": (torch.float32, torch.float16),
    "cuda": (torch.bfloat16,),
}
MARKS = {"cpu": (needs_compiler,), "cuda": (pytest.mark.slow, needs_nvcc)}
# Those whose kernels address memory by themselves.
KERNELS = ("cpu", "triton")


def each(names=tuple(DTYPES)):
    """Parametrize a test over backends, as modules."""
    return pytest.mark.parametrize("backend", [_parameter(name) for name in names])


def each_name(names):
    """Parametrize a test over the names of backends, to be forced by LORAFAST_BACKEND."""
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=MARKS.get(name, ())) for name in names]
    )


def each_with_dtype(names=tuple(DTYPES)):
    """Parametrize a test over backends and their dtypes."""
    pairs = [_parameter(name, dtype) for name in names for dtype in DTYPES[name]]
    return pytest.mark.parametrize(("backend", "dtype"), pairs)


def each_with_dtype_and_shape(shapes):
    """Parametrize a test over backends, their dtypes, and the shapes listed for each backend."""
    values = [
        _parameter(name, dtype, shape)
        for name, dtypes in DTYPES.items()
        for dtype in dtypes
        for shape in shapes[name]
    ]
    return pytest.mark.parametrize(("backend", "dtype", "shape"), values)


def module(name):
    """Return the module of a backend."""
    return importlib.import_module(f"lorafast.engine.backends.{name}")


def _parameter(name, *more):
    label = "-".join([name, *(str(value).removeprefix("torch.") for value in more)])
    return pytest.param(module(name), *more, id=label, marks=MARKS.get(name, ()))


def problem(**fields):
    """Return a problem in bf16 on a CPU, with some fields changed."""
    known = {
        "arch": Arch("cpu", "cpu"),
        "dtype": torch.bfloat16,
        "M": 64,
        "K": 32,
        "N": (32,),
        "R": (8,),
        "weight_dtype": torch.bfloat16,
        "factor_dtype": torch.float32,
    }
    return Problem(**(known | fields))
