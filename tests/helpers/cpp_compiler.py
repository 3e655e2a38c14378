"""A mark for tests that need a C++ compiler."""

import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

ABLE = (
    sys.platform == "linux"
    and shutil.which("c++")
    and Path(sysconfig.get_path("include"), "Python.h").exists()
)
needs_compiler = pytest.mark.skipif(
    not ABLE, reason="needs Linux, a C++ compiler and Python's headers"
)
