"""A script or a module run as Python runs it, for python -m lorafast run.

Imports neither torch nor PEFT: the script may set up the environment before it does.
"""

from __future__ import annotations

import builtins
import importlib.util
import io
import os
import sys
from importlib.machinery import SourceFileLoader
from types import CodeType, ModuleType, TracebackType
from typing import NamedTuple


class Program(NamedTuple):
    """What is to run as __main__: its module without a name yet, its code, and sys.argv."""

    module: ModuleType
    code: CodeType
    argv: list[str]


class NoProgram(Exception):
    """There is nothing to run. str() is the line to print, status the exit status of Python."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def run(words: list[str]) -> None:
    """Run [script.py, *arguments] or ["-m", module, *arguments] as python would.

    sys.argv, sys.path[0] and the module __main__ are what they are there, and stay so afterwards.
    What the program raises leaves this function, and sys.excepthook does not see lorafast's frames.

    Raises:
        NoProgram: there is no such script or module.
    """
    is_module = words[0] == "-m"
    if not is_module and not sys.flags.safe_path:
        # The folder that Python put there for -m lorafast is the current one.
        sys.path[0] = os.path.dirname(os.path.realpath(words[0]))
    sys.argv = words[1:] if is_module else words
    _hide_frames()
    _execute(words)


def _execute(words: list[str]) -> None:
    # In the frame that tracebacks are cut at, for errors of syntax and of a package's import.
    program = _module(words[1:]) if words[0] == "-m" else _script(words)
    sys.argv = program.argv
    sys.modules["__main__"] = program.module
    exec(program.code, vars(program.module))


def _script(words: list[str]) -> Program:
    path = words[0]
    try:
        with io.open_code(os.path.abspath(path)) as file:
            source = file.read()
    except OSError as error:
        raise NoProgram(
            f"can't open file {os.path.abspath(path)!r}: [Errno {error.errno}] {error.strerror}", 2
        ) from error
    where = os.path.abspath(path)
    code = compile(source, where, "exec", dont_inherit=True)
    loader = SourceFileLoader("__main__", where)
    return Program(_main_module(__file__=where, __loader__=loader), code, words)


def _module(words: list[str]) -> Program:
    if not words:
        raise NoProgram("-m: the name of a module is missing", 2)
    name = words[0]
    spec = _find(name)
    if spec is not None and spec.submodule_search_locations is not None:
        name, spec = f"{name}.__main__", _find(f"{name}.__main__")
        if spec is None:
            raise NoProgram(
                f"No module named {name}; {words[0]!r} is a package and cannot be directly "
                "executed",
                1,
            )
    get_code = getattr(getattr(spec, "loader", None), "get_code", None)
    if spec is None or get_code is None:
        raise NoProgram(f"No module named {words[0]}", 1)
    code = get_code(spec.name)
    if code is None:
        raise NoProgram(f"No code object available for {name}", 1)
    module = _main_module(
        __file__=spec.origin, __loader__=spec.loader, __spec__=spec, __package__=spec.parent,
        __cached__=spec.cached,
    )  # fmt: skip
    return Program(module, code, [spec.origin or name, *words[1:]])


def _find(name: str) -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError) as error:
        # A package above it that cannot be imported says so itself, as under python -m.
        missing = isinstance(error, ModuleNotFoundError) and error.name is not None
        if missing and name.startswith(error.name):
            return None
        if isinstance(error, ValueError):
            return None
        raise


def _main_module(**attributes: object) -> ModuleType:
    module = ModuleType("__main__")
    defaults = {"__builtins__": builtins, "__spec__": None, "__package__": None, "__cached__": None}
    vars(module).update(defaults | attributes)
    return module


def _hide_frames() -> None:
    """Let what prints an uncaught exception see the program's own frames alone."""
    default = sys.excepthook

    def hook(kind: type[BaseException], value: BaseException, tb: TracebackType | None) -> None:
        value.__traceback__ = _own_frames(tb)
        default(kind, value, value.__traceback__)

    sys.excepthook = hook


def _own_frames(tb: TracebackType | None) -> TracebackType | None:
    """Return a traceback from the program's first frame on: None if it has none."""
    frame = tb
    while frame is not None and frame.tb_frame.f_code is not _execute.__code__:
        frame = frame.tb_next
    if frame is None:
        return tb
    while frame is not None and frame.tb_frame.f_code.co_filename == __file__:
        frame = frame.tb_next
    return frame
