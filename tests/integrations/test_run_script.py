"""python -m lorafast run: a program sees what it sees under python, and ends as it does there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lorafast

ROOT = Path(lorafast.__file__).resolve().parent.parent
RUN = ("-m", "lorafast", "run", "--quiet")
STATE = """
import sys, __main__
print(sys.argv, __name__, __file__, sys.path[0], __package__, vars(__main__) is globals())
print(None if __spec__ is None else __spec__.name, __builtins__.len("ab"), __doc__)
print(sorted(set(globals()) - {"__annotations__", "__cached__", "__loader__"}))
print("torch" in sys.modules, "peft" in sys.modules)
"""
RAISES = '''"""A docstring."""
def inner():
    raise KeyError("inside")
try:
    inner()
except KeyError as error:
    raise ValueError("outside") from error
'''
HOOK = """
import sys, traceback
before = sys.excepthook
def hook(kind, value, tb):
    print("hook", kind.__name__, len(traceback.extract_tb(value.__traceback__)))
    before(kind, value, tb)
sys.excepthook = hook
raise ValueError("x")
"""
SPAWNS = """
import multiprocessing
def square(n):
    return n * n
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(square, [3]))
"""
PICKLES = """
import pickle
class Thing:
    pass
print(type(pickle.loads(pickle.dumps(Thing()))) is Thing)
"""


def outcome(words, folder, **variables):
    """What a process of Python prints, and its exit status."""
    settings = {"PYTHONPATH": str(ROOT), "LORAFAST_HOST": "0"} | variables
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=os.environ | settings, capture_output=True,
        text=True, timeout=100,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "source",
    [
        STATE,
        RAISES,
        "x = (\n",
        "import sys; sys.exit(7)",
        "import sys; sys.exit('words')",
        "raise SystemExit",
        "raise KeyboardInterrupt",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        "import atexit; atexit.register(print, 'last')",
        "# -*- coding: latin-1 -*-\nprint(ascii('\u00e9'))",
        SPAWNS,
        PICKLES,
        "import neighbour; print(neighbour.__file__)",
        "import argparse; argparse.ArgumentParser().parse_args()",
    ],
    ids=lambda source: source.strip()[:24].replace("\n", " "),
)
def test_a_script_is_as_under_python(source, tmp_path):
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "neighbour.py").write_text("")
    (folder / "a.py").write_bytes(source.encode("latin-1"))
    words = ["scripts/a.py", "--lr", "3", "-m", "run", "--help"]
    want = outcome(words, tmp_path)
    assert outcome([*RUN, *words], tmp_path) == want
    assert want[1:] != ("", "") or want[0] or "SystemExit" in source


@pytest.mark.parametrize("flags", [["-P"], ["-O"], ["-X", "utf8"]], ids=" ".join)
def test_python_s_own_options_apply(flags, tmp_path):
    (tmp_path / "a.py").write_text(STATE + "print(__debug__, sys.flags.utf8_mode, sys.path[:2])")
    want = outcome([*flags, "a.py"], tmp_path)
    assert outcome([*flags, *RUN, "a.py"], tmp_path) == want


def test_a_script_behind_a_link_finds_its_neighbours(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.py").write_text(STATE)
    (tmp_path / "link.py").symlink_to("there/a.py")
    assert outcome([*RUN, "link.py"], tmp_path) == outcome(["link.py"], tmp_path)


def test_a_module_and_a_package_are_as_under_python(tmp_path):
    package = tmp_path / "pack"
    package.mkdir()
    (package / "__init__.py").write_text("print('imported')")
    for name in ("part", "__main__"):
        (package / f"{name}.py").write_text(STATE + "from . import __name__ as n; print(n)")
    for name in ("pack", "pack.part"):
        words = ["-m", name, "-m", "--x"]
        assert outcome([*RUN, *words], tmp_path) == outcome(words, tmp_path)
    (package / "fails.py").write_text("1 / 0")
    status, _, error = outcome([*RUN, "-m", "pack.fails"], tmp_path)
    assert status == 1
    assert error.count("File ") == 1
    assert error.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (
            ["nope.py"],
            2,
            "python -m lorafast run: can't open file '{0}/nope.py': [Errno 2] No such",
        ),
        (["."], 2, "python -m lorafast run: can't open file '{0}': [Errno 21] Is a directory"),
        (["-m", "nope"], 1, "python -m lorafast run: No module named nope\n"),
        (["-m", "nope.part"], 1, "python -m lorafast run: No module named nope.part\n"),
        (["-m", "empty"], 1, "No module named empty.__main__; 'empty' is a package and cannot be"),
        (["-m"], 2, "python -m lorafast run: -m: the name of a module is missing"),
        ([], 2, "python -m lorafast run: the script, or -m and a module, is missing"),
        (["--kep", "inner"], 2, "run: '--kep' is no option; did you mean --keep?"),
        (["--keep", "iner", "a.py"], 2, "run: --keep: 'iner' is none of inner, output, recompute"),
        (["--no-group", "a.py"], 2, "run: '--no-group' is no option"),
    ],
)
def test_what_cannot_run_is_one_line(words, status, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "__init__.py").write_text("")
    found = outcome(["-m", "lorafast", "run", *words], tmp_path)
    assert found[:2] == (status, "")
    assert message.format(tmp_path) in found[2]
    assert len(found[2].splitlines()) == 1


def test_a_hook_for_exceptions_of_the_program_is_called(tmp_path):
    (tmp_path / "a.py").write_text(HOOK)
    status, printed, error = outcome([*RUN, "a.py"], tmp_path)
    assert (status, printed.split()[:2]) == (1, ["hook", "ValueError"])
    assert error == outcome(["a.py"], tmp_path)[2]


def test_the_options_may_come_before_the_program_alone(tmp_path):
    (tmp_path / "a.py").write_text("import sys; print(sys.argv)")
    options = ["--dropout-on", "adapter", "--keep=output", "--quiet"]
    status, printed, _ = outcome(["-m", "lorafast", "run", *options, "a.py", "--quiet"], tmp_path)
    assert (status, printed) == (0, "['a.py', '--quiet']\n")
