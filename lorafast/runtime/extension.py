"""The C++ of csrc, built on first use and loaded: the CPU kernels, one module per instruction set,
and the host path, one module per version of torch.

Every failure is a reason in words, never a traceback.

A module is named after a hash of its sources, its flags and Python's ABI. The compiler that made it
is not part of the name, so that a module built ahead (`python -m lorafast build`) serves where none
is installed; the log beside it names it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from lorafast.runtime import build_cache, env, fallback, instruction_sets, symlinks, toolchain
from lorafast.runtime.build_cache import is_complete
from lorafast.runtime.fallback import Remediable
from lorafast.runtime.toolchain import Failure, Toolchain, UnknownFlags

SOURCES = Path(__file__).parent.parent / "engine" / "csrc" / "cpu"
HOST_SOURCES = SOURCES.parent / "host"
# The headers of other folders that the host path includes.
_HOST_INCLUDES = ("kernels.h", "types.h")
# What a compiler needs for a module on one core, to say how long a build will take.
_KERNEL_SECONDS, _HOST_SECONDS = 25, 120
# torch's headers ask for C++20; the last -std counts.
_HOST_FLAGS = ("-O2", "-std=c++20")


class NeverBuilt(Failure):
    """No kernels are built on this platform, whatever the user does."""


def cpu(isa: str | None = None, sources: Path = SOURCES) -> ModuleType | str:
    """Return the module of the CPU kernels, or why there is none.

    The first call may compile, and blocks meanwhile; every answer is kept for the life of the
    process. A reason that the user can remove is a Remediable. ValueError and RuntimeError for an
    instruction set that is unknown or that this machine lacks.

    isa: a name in instruction_sets.ISAS, or "auto" for the best that this machine runs; None reads
        LORAFAST_CPU_ISA.
    """
    candidates = instruction_sets.candidates(isa or env.cpu_isa())
    return _cpu(candidates, sources, env.cache(), env.cxx(), env.cxxflags())


@functools.cache
def host(sources: Path = HOST_SOURCES) -> ModuleType | str:
    """Return the module of the host path, or why there is none; as cpu, which it needs."""
    try:
        return _load(Module.of_host(sources, env.cache(), env.cxxflags()), env.cxx())
    except NeverBuilt as failure:
        return str(failure)
    except Failure as failure:
        return Remediable(failure)


def launcher() -> ModuleType | str:
    """Return the module of the host path for launches on a GPU, or why they are made in Python."""
    from lorafast.runtime import torch_internals

    if not env.host():
        return f"{env.HOST.name}=0 is set"
    # The module reads tensors by torch's C++ API.
    if not torch_internals.enabled:
        return "the host path is not tested with this torch"
    return host()


@functools.cache
def _cpu(
    candidates: tuple[str, ...], sources: Path, cache: str, cxx: str, extra: str
) -> ModuleType | str:
    reason = ""
    for isa in candidates:
        try:
            return _load(Module.of(isa, sources, cache, extra), cxx)
        except NeverBuilt as failure:
            return str(failure)
        except UnknownFlags as unknown:
            # An old compiler still serves the instruction sets it knows.
            reason = str(unknown)
        except Failure as failure:
            return Remediable(failure)
    return Remediable(reason)


class Module(NamedTuple):
    """One module: the file at path, made of these sources by these flags.

    isa: the instruction set of kernels, or "host" for the host path, which calls torch's C++.
    """

    isa: str
    sources: Path
    flags: tuple[str, ...]
    cache: Path
    name: str

    @classmethod
    def of(cls, isa: str, sources: Path, cache: str, extra: str) -> Module:
        """Return the name and place of a module of kernels; needs no compiler and no ninja.

        A Failure if it cannot be built here.
        """
        own = (*toolchain.FLAGS, *instruction_sets.compiler_flags(isa))
        return cls._of(f"cpu_{isa}", isa, sources, own, cache, extra)

    @classmethod
    def of_host(cls, sources: Path, cache: str, extra: str) -> Module:
        """Return the name and place of the module of the host path, as of does."""
        import torch

        own = (*toolchain.FLAGS, *_HOST_FLAGS)
        # Built against one torch, it serves no other.
        version = f"{torch.__version__} {torch.version.git_version}"
        headers = [sources.parent / "cpu" / name for name in _HOST_INCLUDES]
        headers = [path for path in headers if path.exists()]
        return cls._of("host", "host", sources, own, cache, extra, headers, version)

    @classmethod
    def _of(
        cls,
        label: str,
        isa: str,
        sources: Path,
        own: tuple[str, ...],
        cache: str,
        extra: str,
        headers: Sequence[Path] = (),
        version: str = "",
    ) -> Module:
        if sys.platform != "linux":
            raise NeverBuilt(f"the C++ kernels are built on Linux only, not on {sys.platform}")
        try:
            flags = (*own, *shlex.split(extra))
        except ValueError as error:
            raise Failure(
                f"{env.CXXFLAGS.name}={extra} cannot be read: {error}; correct or unset it"
            ) from error
        files = sorted(path for path in sources.glob("*") if path.suffix in (".cpp", ".h"))
        if not any(path.suffix == ".cpp" for path in files):
            why = f"there is no C++ in {sources}: install lorafast again"
            raise Failure(symlinks.why_missing("csrc") or why)
        files += headers
        try:
            contents = [
                (path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files
            ]
        except OSError as error:
            why = f"the C++ sources cannot be read: {error}; install lorafast again"
            raise Failure(why) from error
        runtime = toolchain.mangled_openmp()
        parts = (
            flags,
            contents,
            sysconfig.get_platform(),
            sysconfig.get_config_var("EXT_SUFFIX"),
            runtime and runtime.name,
            *([version] if version else []),
        )
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        # The function that makes the module has this name too, so that no other module of this
        # process can be taken for it.
        name = f"lorafast_{label}_{digest}"
        # Without a home folder it stays as it is, for `build` to refuse.
        folder = Path(cache) if cache.startswith("~") else Path(cache).absolute()
        return cls(isa, sources, flags, folder, name)

    @property
    def is_host(self) -> bool:
        """True for the host path."""
        return self.isa == "host"

    @property
    def path(self) -> Path:
        """The file of the module."""
        return self.cache / f"{self.name}{sysconfig.get_config_var('EXT_SUFFIX')}"

    def beside(self, suffix: str) -> Path:
        """A file of the module's name with another suffix."""
        return self.cache / f"{self.name}{suffix}"


def build(module: Module, cxx: str, again: bool = False, retry: bool = False) -> None:
    """Build the module into its cache, unless another process has just done so.

    Failure if it cannot be built, OSError if the cache cannot be written.

    again: build it even if it is there. retry: build it even if these tools have failed before.
    """
    if str(module.cache).startswith("~"):
        raise FileNotFoundError(2, "there is no home folder")
    module.cache.mkdir(parents=True, exist_ok=True)
    with build_cache.locked(module.beside(".lock")):
        if not again and is_complete(module.path):
            return
        for left in module.cache.glob(f"{module.name}.build-*"):
            shutil.rmtree(left, ignore_errors=True)
        tools, record = Toolchain.find(cxx), module.beside(".failed")
        torch = toolchain.Torch.find() if module.is_host else None
        needed = _HOST_FLAGS if module.is_host else instruction_sets.compiler_flags(module.isa)
        if needed:
            tools.check(needed)
        reason = None if retry else build_cache.remembered_failure(record, tools.fingerprint)
        if reason:
            raise Failure(f"{reason} (it failed before; to try again, delete {record})")
        try:
            _compile(module, tools, torch)
        except Failure as failure:
            build_cache.remember_failure(record, tools.fingerprint, str(failure))
            raise
        record.unlink(missing_ok=True)


def _compile(module: Module, tools: Toolchain, torch: toolchain.Torch | None) -> None:
    cores = len(os.sched_getaffinity(0))
    what = "host path" if module.is_host else f"CPU kernels for {module.isa}"
    seconds = _HOST_SECONDS if module.is_host else _KERNEL_SECONDS
    _say(
        f"compiling its {what}, once, into {module.cache} (about {-(-seconds // min(cores, 4))} s)"
    )
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(
        prefix=f"{module.name}.build-", dir=module.cache, ignore_cleanup_errors=True
    ) as folder:
        made = Path(folder) / "module.so"
        named = f"-DLORAFAST_MODULE={module.name}"
        tools.compile(module.sources, (*module.flags, named), made, module.beside(".log"), torch)
        build_cache.seal(made)
        made.replace(module.path)
    _say(f"compiled in {time.monotonic() - begin:.1f} s")


def _say(line: str) -> None:
    print(f"lorafast: {line}", file=sys.stderr, flush=True)


def _load(module: Module, cxx: str) -> ModuleType:
    """Return the module from its cache, or from a temporary folder where that is unusable."""
    try:
        return _load_from_cache(module, cxx)
    except OSError as error:
        unusable = f"{env.CACHE.name}: {module.cache} cannot be used: {error.strerror or error}"
    remedy = f"set {env.CACHE.name} to a folder that can be written and lasts"
    try:
        temporary = module._replace(cache=build_cache.temporary_folder())
        new = not is_complete(temporary.path)
        if new:
            _say(f"{unusable}; a temporary folder serves")
        loaded = _load_from_cache(temporary, cxx)
    except OSError as error:
        raise Failure(
            f"{unusable}, and neither can a temporary folder: {error.strerror or error}; {remedy}"
        ) from error
    except Failure as failure:
        raise type(failure)(f"{failure} ({unusable})") from failure
    if new:
        fallback.warn_once(
            f"{unusable}. lorafast's C++ was compiled into {temporary.cache}, and will be "
            f"again when that is emptied: {remedy}."
        )
    return loaded


def _load_from_cache(module: Module, cxx: str) -> ModuleType:
    stale = is_complete(module.path)
    if stale:
        # Complete and yet unusable, such as one built for a newer C library in a home folder that
        # two machines share: it is built again here.
        with contextlib.suppress(Failure):
            return import_module(module)
    build(module, cxx, again=stale)
    try:
        return import_module(module)
    except Failure as failure:
        tools = Toolchain.find(cxx).fingerprint
        build_cache.remember_failure(module.beside(".failed"), tools, str(failure))
        raise


def import_module(module: Module) -> ModuleType:
    """Return the module at its path; a Failure if it cannot be loaded."""
    loader = importlib.machinery.ExtensionFileLoader(module.name, str(module.path))
    try:
        loaded = importlib.util.module_from_spec(
            importlib.util.spec_from_loader(module.name, loader)
        )
        loader.exec_module(loaded)
    except Exception as error:
        why = " ".join(str(error).split())
        raise Failure(
            f"{module.path} cannot be loaded: {why}; set CXX to another compiler"
        ) from error
    return loaded
