"""Fixtures: which calls the host path served, and how to keep it out; the C++ kernels of every
instruction set; a GPU that is not there.
"""

import pytest
from helpers import host_path
from helpers.cpp_compiler import ISAS
from helpers.pretended_gpu import Pretended

from lorafast.engine import host, trial
from lorafast.engine.backends import cpu
from lorafast.runtime import env, extension, instruction_sets
from lorafast.runtime.toolchain import Toolchain, UnknownFlags


@pytest.fixture
def served(monkeypatch):
    """A list with an entry for every call of the host path: True if it served."""
    calls, linear = [], host_path.ready()

    def counted(*args):
        y = linear(*args)
        calls.append(y is not None)
        return y

    monkeypatch.setattr(host, "linear", counted)
    return calls


@pytest.fixture
def by_python(monkeypatch):
    """A function that keeps all later calls in Python, on the op."""
    from lorafast.engine import plain_products

    def turn():
        monkeypatch.setattr(host, "linear", host._declined)
        monkeypatch.setattr(plain_products, "MOST_ELEMENTS", -1)
        monkeypatch.setattr(plain_products, "MOST_ELEMENTS_COPIED", -1)

    return turn


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU that is not there, without a verdict."""
    monkeypatch.setattr(trial, "_assumed", [])
    monkeypatch.delenv("LORAFAST_TRIAL", raising=False)
    return Pretended(monkeypatch, tmp_path)


@pytest.fixture(params=ISAS)
def compiled(request, monkeypatch):
    """The backend on this instruction set's kernels."""
    try:
        Toolchain.find(env.cxx()).check(instruction_sets.compiler_flags(request.param))
    except UnknownFlags as unknown:
        pytest.skip(str(unknown))
    module = extension.cpu(request.param)
    assert getattr(module, "ISA", module) == request.param
    monkeypatch.setattr(cpu, "library", lambda: module)
