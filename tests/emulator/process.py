"""A process in which Triton compiles, beside pytest's own, which interprets kernels.

    @in_emulator
    def test_a_kernel(capability):
        with driver.emulating(capability):
            ...

The body of such a test runs in the process, which imports the test's file. Its arguments are
pickled. A Fault and an AssertionError are raised in pytest's process too; anything else fails the
test with the traceback of the process. Compiled kernels are shared by all processes of one session.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from emulator.memory import Fault

TESTS = Path(__file__).resolve().parents[1]


def in_emulator(test: Callable) -> Callable:
    """Return a test whose body runs in the process of the fixture `emulator`."""

    def run(emulator: Process, **arguments: object) -> None:
        emulator.run(test, arguments)

    functools.update_wrapper(run, test)
    del run.__wrapped__
    own = inspect.Parameter("emulator", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    run.__signature__ = inspect.Signature([own, *inspect.signature(test).parameters.values()])
    run.body = test
    return run


class Process:
    """The process; it starts with the first test. folder: where it puts compiled kernels."""

    def __init__(self, folder: Path):
        self.folder, self._process = folder, None

    def run(self, test: Callable, arguments: dict[str, object]) -> None:
        """Run the body of a test there."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._started()
        asked = inspect.getfile(test), test.__name__, arguments
        try:
            pickle.dump(asked, self._process.stdin)
            self._process.stdin.flush()
            kind, text = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError):
            pytest.fail(f"the emulator's process ended with {self._process.wait()}", pytrace=False)
        if kind == "fault":
            raise Fault(text)
        if kind == "skip":
            pytest.skip(text)
        if kind == "assertion":
            raise AssertionError(text)
        if kind == "error":
            pytest.fail(text, pytrace=False)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()

    def _started(self) -> subprocess.Popen:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        paths = [str(TESTS), str(TESTS.parent), environment.get("PYTHONPATH", "")]
        environment |= {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "TRITON_CACHE_DIR": str(self.folder),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        return subprocess.Popen(
            [sys.executable, "-m", "emulator.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )


def serve() -> None:
    """Run bodies of tests, asked for on the standard input, until it ends."""
    import torch

    torch.set_num_threads(1)
    # What a test prints goes elsewhere.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            path, name, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        torch.manual_seed(0)
        torch.use_deterministic_algorithms(True)
        pickle.dump(_outcome(path, name, arguments), answers)
        answers.flush()


def _outcome(path: str, name: str, arguments: dict[str, object]) -> tuple[str, str]:
    """Return what became of a test: a word of Process.run, and a text."""
    try:
        getattr(_module(path), name).body(**arguments)
    except pytest.skip.Exception as skipped:
        return "skip", str(skipped)
    except Fault as fault:
        return "fault", str(fault)
    except AssertionError:
        return "assertion", traceback.format_exc()
    except Exception:
        return "error", traceback.format_exc()
    return "passed", ""


@functools.cache
def _module(path: str):
    spec = importlib.util.spec_from_file_location(f"emulated_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    serve()
