"""Copies of the checkout, the wheels they build, and commands that run outside of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import lorafast

ROOT = Path(lorafast.__file__).resolve().parent.parent
# The suite may itself run under make, in an environment and with a path of its own.
_NOT_PASSED_ON = ("PYTHONPATH", "VIRTUAL_ENV", "MAKELEVEL", "MAKEFLAGS", "MFLAGS")


def run(*command, cwd, check=True, **environment):
    """Return the finished process of a command, which by itself finds nothing of this checkout."""
    kept = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=kept | {name: str(value) for name, value in environment.items()},
    )
    assert not check or done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done


def copy_checkout(folder):
    """Copy the checkout into a new folder, links as links, and return the folder."""
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "*.egg-info", "build", "dist", "__pycache__", ".*_cache"
    )
    return shutil.copytree(ROOT, folder, symlinks=True, ignore=ignored)


def build_wheel(source, out, check=True):
    """Build the wheel of a source folder into `out` and return the finished process.

    Not isolated: the build needs setuptools alone.
    """
    options = ("--quiet", "--no-deps", "--no-build-isolation")
    command = (sys.executable, "-m", "pip", "wheel", *options, "-w", out, source)
    return run(*command, cwd=out.parent, check=check)


def wheel_of(source, out):
    """Return the wheel of a source folder, built into `out`."""
    build_wheel(source, out)
    (wheel,) = out.glob("*.whl")
    return wheel
