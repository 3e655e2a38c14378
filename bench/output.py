"""Where results go: files that are checked before anything is measured, stdout and stderr."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from lorafast.bench.errors import BenchError
from lorafast.bench.options import STDOUT

# The width of tables in a pipe, which has no width of its own.
_PIPED_WIDTH = 80
# The options that name files which a command writes.
_FILES = ("--json", "--html")


def check_files(json: Path | None, html: Path | None) -> None:
    """Make the folders of the files that a command will write.

    Raises BenchError, naming the option, if one cannot be written.
    """
    if html == STDOUT:
        raise BenchError("--html: - is stdout for --json alone; name a file")
    for option, path in zip(_FILES, (json, html), strict=True):
        if path is not None and path != STDOUT:
            _check_writable(option, path)


def _check_writable(option: str, path: Path) -> None:
    if path.is_dir():
        raise BenchError(f"{option}: {path} is a folder")
    path = path.resolve()
    if path.exists() and not os.access(path, os.W_OK):
        raise BenchError(f"{option}: {path} cannot be written to: Permission denied")
    if not path.exists() or path.is_file():
        make_folder(option, path.parent)


def make_folder(option: str, path: Path) -> None:
    """Make a folder. Raises BenchError, naming the option, if nothing can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise BenchError(f"{option}: {path} cannot be written to: {error.strerror}") from error


def write(option: str, path: Path | None, write: Callable[[Path], None]) -> list[str]:
    """Write a file, unless its path is None, and return the error message if that fails."""
    try:
        if path is not None:
            write(path)
    except OSError as error:
        return [f"{option}: {path} is not written: {error.strerror}"]
    return []


def command_line(arguments: list[str]) -> str:
    """Return the command without its output files, which say where and not what."""
    kept, words = [], iter(arguments)
    for word in words:
        if word in _FILES:
            next(words, None)
        elif not word.startswith(tuple(f"{option}=" for option in _FILES)):
            kept.append(word)
    return shlex.join(["lorafast-bench", *kept])


def tables_console(json: Path | None = None) -> Console:
    """Return the console of the tables: stdout, or stderr where stdout gets the JSON."""
    console = Console(highlight=False, stderr=json == STDOUT)
    if not console.is_terminal:
        console.width = _PIPED_WIDTH
    return console


def print_json(text: str) -> None:
    """Write a JSON document to stdout, with nothing else."""
    sys.stdout.write(text)
    sys.stdout.flush()


def complain(message: str, style: str | None = "bold red") -> None:
    """Print a message on stderr."""
    Console(stderr=True, soft_wrap=True).print(message, style=style, markup=False, highlight=False)
