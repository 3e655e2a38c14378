"""The C++ of csrc, built on first use and loaded: one module per instruction set.

Every failure is a reason in words, never a traceback.

A module is named after a hash of its sources, its flags and Python's ABI. The compiler and pybind11
that made it are not part of the name, so that a module built ahead (`make build`) serves where
neither is installed; the log beside it names them.
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
    """Return the module of the CPU kernels, or why there is none.

    The first call may compile, and blocks meanwhile; every answer is kept for the life of the
    process.

    isa: one of ISAS, or "auto" for the best that this machine runs; None reads LORAFAST_CPU_ISA.
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
            return _load(Module.of(one, sources, cache, extra), cxx)
        except UnknownFlags as unknown:
            # An old compiler still serves the instruction sets it knows.
            reason = str(unknown)
        except Failure as failure:
            return str(failure)
    return reason


class Module(NamedTuple):
    """One module: the file at path, made of these sources by these flags."""

    isa: str
    sources: Path
    flags: tuple[str, ...]
    cache: Path
    name: str

    @classmethod
    def of(cls, isa: str, sources: Path, cache: str, extra: str) -> Module:
        """Return the module's name and place; needs no compiler, ninja or pybind11.

        A Failure if it cannot be built here.
        """
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
        # The name differs from every other in this process, because pybind11 returns the module it
        # made first for a name it has seen.
        name = f"lorafast_cpu_{isa}_{digest}"
        return cls(isa, sources, flags, Path(cache).absolute(), name)

    @property
    def path(self) -> Path:
        """The file of the module."""
        return self.cache / f"{self.name}{sysconfig.get_config_var('EXT_SUFFIX')}"


def machine_flags(isa: str) -> tuple[str, ...]:
    """Return the compiler's flags for an instruction set."""
    return tuple(f"-m{feature.replace('_', '')}" for feature in devices.ISAS[isa])


def _load(module: Module, cxx: str) -> ModuleType:
    with _cache_errors(module.cache):
        stale = is_complete(module.path)
        if stale:
            # Complete and yet unusable, such as one built for a newer C library in a home folder
            # that two machines share: it is built again here.
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
    """Build the module, unless another process has just done so."""
    module.cache.mkdir(parents=True, exist_ok=True)
    with _locked(module.cache / f"{module.name}.lock"):
        if not again and is_complete(module.path):
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
    """Append the file's hash, which the loader of shared objects ignores."""
    content = path.read_bytes()
    path.write_bytes(content + hashlib.sha256(content).digest())


def is_complete(path: Path) -> bool:
    """True if the file exists and ends with its hash.

    A file that a full disk or a crash has cut short would kill the process that loads it.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock among processes, and among threads too, since each opens the file itself."""
    # Not on every system, while lorafast is imported on all.
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Closing is not enough: a process forked meanwhile holds the file open too.
            fcntl.flock(file, fcntl.LOCK_UN)


@contextlib.contextmanager
def _cache_errors(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Failure(
            f"{env.CACHE.name}: {cache} cannot be used: {error.strerror or error}"
        ) from error


def main() -> int:
    """Build the module of every instruction set that the compiler knows; print one line each.

    Returns 1 if one of them could not be built.
    """
    failed = False
    for isa in ISAS:
        try:
            module = Module.of(isa, SOURCES, env.cache(), env.cxxflags())
            with _cache_errors(module.cache):
                if not is_complete(module.path):
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
