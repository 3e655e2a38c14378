"""The C++ of csrc, built on first use and loaded: one module per instruction set. What goes wrong is a reason, never a traceback.

A module is named after a hash of what it has to be: sources, flags, Python's ABI. What made it, compiler and pybind11, is no part
of the name, so that a module built ahead (`make build`) serves where neither is left; the log beside it tells them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.machinery
import importlib.util
import shlex
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from lorafast.runtime import devices, env, symlinks, toolchain
from lorafast.runtime.toolchain import Failure, Toolchain, UnknownFlags

ISAS = tuple(devices.ISAS)
SOURCES = Path(__file__).parent.parent / "engine" / "csrc" / "cpu"


def cpu(isa: str | None = None, sources: Path = SOURCES) -> ModuleType | str:
    """The CPU kernels for one of ISAS or `auto`, the best this machine runs (None: what LORAFAST_CPU_ISA says), or why not.

    The first call may compile, and blocks meanwhile; every answer is kept for the life of the process.
    """
    return _cpu(isa or env.cpu_isa(), sources, env.cache(), env.cxx(), env.cxxflags())


@functools.cache
def _cpu(isa: str, sources: Path, cache: str, cxx: str, extra: str) -> ModuleType | str:
    here = devices.isas()
    if isa not in ("auto", *ISAS):
        return f"{env.CPU_ISA.name}={isa} is not one of auto, {', '.join(ISAS)}"
    if isa not in ("auto", *here):
        return f"{env.CPU_ISA.name}={isa}: this machine has {', '.join(here)}"
    reason = ""
    for one in here if isa == "auto" else (isa,):
        try:
            return _loaded(Module.of(one, sources, cache, extra), cxx)
        except UnknownFlags as unknown:
            # An old compiler still serves the instruction sets it knows.
            reason = str(unknown)
        except Failure as failure:
            return str(failure)
    return reason


class Module(NamedTuple):
    """One module to be had: the file at path, of these sources by these flags."""

    isa: str
    sources: Path
    flags: tuple[str, ...]
    cache: Path
    name: str

    @classmethod
    def of(cls, isa: str, sources: Path, cache: str, extra: str) -> Module:
        """The module's name and place, told without compiler, ninja or pybind11. A Failure if there can be none."""
        if sys.platform != "linux":
            raise Failure(f"the C++ kernels are built on Linux only, not on {sys.platform}")
        if cache.startswith("~"):
            raise Failure(f"there is no home folder to keep builds in: set {env.CACHE.name}")
        try:
            flags = (*toolchain.FLAGS, *machine_flags(isa), *shlex.split(extra))
        except ValueError as error:
            raise Failure(f"{env.CXXFLAGS.name}={extra} cannot be read: {error}") from error
        files = sorted(path for path in sources.glob("*") if path.suffix in (".cpp", ".h"))
        if not any(path.suffix == ".cpp" for path in files):
            raise Failure(symlinks.why_missing("csrc") or f"there is no C++ in {sources}")
        try:
            contents = [
                (path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files
            ]
        except OSError as error:
            raise Failure(f"the C++ sources cannot be read: {error}") from error
        runtime = toolchain.mangled_openmp()
        parts = (
            flags,
            contents,
            sysconfig.get_platform(),
            sysconfig.get_config_var("EXT_SUFFIX"),
            runtime and runtime.name,
        )
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        # Unlike any other of this process, because pybind11 answers a name it has seen with the module it made then.
        return cls(isa, sources, flags, Path(cache).absolute(), f"lorafast_cpu_{isa}_{digest}")

    @property
    def path(self) -> Path:
        """The file."""
        return self.cache / f"{self.name}{sysconfig.get_config_var('EXT_SUFFIX')}"


def machine_flags(isa: str) -> tuple[str, ...]:
    """The compiler's flags for an instruction set."""
    return tuple(f"-m{feature.replace('_', '')}" for feature in devices.ISAS[isa])


def _loaded(module: Module, cxx: str) -> ModuleType:
    with _reasons_of(module.cache):
        stale = whole(module.path)
        if stale:
            # Whole and yet unusable: built where the C library is newer, say, in a home two machines share. Once more, here.
            with contextlib.suppress(Failure):
                return _import(module)
        _build(module, cxx, again=stale)
        return _import(module)


def _import(module: Module) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(module.name, str(module.path))
    try:
        loaded = importlib.util.module_from_spec(
            importlib.util.spec_from_loader(module.name, loader)
        )
        loader.exec_module(loaded)
    except Exception as error:
        raise Failure(f"{module.path} cannot be loaded: {' '.join(str(error).split())}") from error
    return loaded


def _build(module: Module, cxx: str, again: bool = False) -> None:
    """Put the module in its place, unless another process just did."""
    module.cache.mkdir(parents=True, exist_ok=True)
    with _alone(module.cache / f"{module.name}.lock"):
        if not again and whole(module.path):
            return
        for left in module.cache.glob(f"{module.name}.build-*"):
            shutil.rmtree(left, ignore_errors=True)
        tools = Toolchain.find(cxx)
        if flags := machine_flags(module.isa):
            tools.check(flags)
        print(
            f"lorafast: compiling its CPU kernels for {module.isa}, once, into {module.cache}",
            file=sys.stderr,
            flush=True,
        )
        with tempfile.TemporaryDirectory(
            prefix=f"{module.name}.build-", dir=module.cache, ignore_cleanup_errors=True
        ) as folder:
            made = Path(folder) / "module.so"
            named = f"-DLORAFAST_MODULE={module.name}"
            tools.compile(
                module.sources, (*module.flags, named), made, module.cache / f"{module.name}.log"
            )
            seal(made)
            made.replace(module.path)


def seal(path: Path) -> None:
    """Append the file's hash, which the loader of shared objects does not look at."""
    content = path.read_bytes()
    path.write_bytes(content + hashlib.sha256(content).digest())


def whole(path: Path) -> bool:
    """Whether the file is there and sealed. One that a full disk or a crash cut short would kill the process that loads it."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One at a time: processes, and threads as well, since each opens the file for itself."""
    # Not everywhere, and lorafast is imported everywhere.
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Closing would not do: a process forked meanwhile holds the file open too.
            fcntl.flock(file, fcntl.LOCK_UN)


@contextlib.contextmanager
def _reasons_of(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Failure(
            f"{env.CACHE.name}: {cache} cannot be used: {error.strerror or error}"
        ) from error


def main() -> int:
    """Build every instruction set the compiler knows, other machines' too; one line each. 1 if one of them could not be built."""
    failed = False
    for isa in ISAS:
        try:
            module = Module.of(isa, SOURCES, env.cache(), env.cxxflags())
            with _reasons_of(module.cache):
                if not whole(module.path):
                    _build(module, env.cxx())
            print(f"{isa}: {module.path}")
        except UnknownFlags as unknown:
            print(f"{isa}: {unknown}")
        except Failure as failure:
            failed = True
            print(f"{isa}: {failure}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
