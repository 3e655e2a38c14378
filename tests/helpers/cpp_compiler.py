"""A mark for tests that need a C++ compiler, and the instruction sets that they run on."""

import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

from lorafast.runtime import instruction_sets

ABLE = (
    sys.platform == "linux"
    and shutil.which("c++")
    and Path(sysconfig.get_path("include"), "Python.h").exists()
)
needs_compiler = pytest.mark.skipif(
    not ABLE, reason="needs Linux, a C++ compiler and Python's headers"
)
# The best one of this machine, which every other test of the C++ kernels runs on, and the others.
BEST, *OTHERS = instruction_sets.available()
ISAS = [BEST, *(pytest.param(isa, marks=pytest.mark.slow) for isa in OTHERS)]
