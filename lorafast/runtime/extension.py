"""The C++ of csrc, built on first use and loaded: the CPU kernels, one module per instruction set;
the host path and the launcher, one module of each per version of torch.

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
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from lorafast.runtime import build_cache, env, fallback, instruction_sets, symlinks, toolchain
from lorafast.runtime.build_cache import is_complete
from lorafast.runtime.fallback import Remediable
from lorafast.runtime.toolchain import Failure, Toolchain, UnknownFlags

SOURCES = Path(__file__).parent.parent / "engine" / "csrc" / "cpu"
# What a compiler needs for the kernels on one core, to say how long a build will take.
_KERNEL_SECONDS = 25
# torch's headers ask for C++20; the last -std counts.
_TORCH_FLAGS: tuple[str, ...] = ("-O2", "-std=c++20")
# The headers in csrc that modules beside their own include.
_SHARED_HEADERS = (
    "cpu/kernels.h", "cpu/module_name.h", "cpu/types.h", "launch/cuda_driver.h", "launch/key.h",
)  # fmt: skip


class NeverBuilt(Failure):
    """No kernels are built on this platform, whatever the user does."""


class Part(NamedTuple):
    """A module whose sources call torch's C++.

    seconds: what a compiler needs for it, on however many cores.
    """

    label: str
    what: str
    seconds: int
    sources: Path


HOST = Part("host", "host path", 35, SOURCES.parent / "host")
LAUNCHER = Part("launch", "launcher", 25, SOURCES.parent / "launch")


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


def host() -> ModuleType | str:
    """Return the module of the host path, or why calls are made in Python; as cpu."""
    return why_unused() or _of_torch(HOST, env.cache(), env.cxx(), env.cxxflags())


def launcher() -> ModuleType | str:
    """Return the module that launches Triton's kernels on NVIDIA's GPUs, or why that is done in
    Python.
    """
    return why_unused() or _of_torch(LAUNCHER, env.cache(), env.cxx(), env.cxxflags())


def why_unused() -> str:
    """Return why no C++ that calls torch's is used in this process; "" if it is."""
    from lorafast.runtime import torch_internals

    if not env.host():
        return f"{env.HOST.name}=0 is set"
    if not torch_internals.enabled or env.RAW is None:
        return "it is not tested with this torch"
    return ""


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


@functools.cache
def _of_torch(part: Part, cache: str, cxx: str, extra: str) -> ModuleType | str:
    try:
        return _load(Module.of_torch(part, cache, extra), cxx)
    except NeverBuilt as failure:
        return str(failure)
    except Failure as failure:
        return Remediable(failure)


class Module(NamedTuple):
    """One module: the file at path, made of these sources by these flags.

    what: it is, for the user. seconds: about what a build takes here. isa: the instruction set of
    kernels; None for a module that calls torch's C++. name: also that of the function that makes
    the module, so that no other module of this process can be taken for it.
    """

    what: str
    seconds: int
    isa: str | None
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
        flags, digest = _identity(sources, [], own, extra)
        what, seconds = (
            f"CPU kernels for {isa}",
            -(-_KERNEL_SECONDS // min(len(os.sched_getaffinity(0)), 4)),
        )
        name = f"lorafast_cpu_{isa}_{digest}"
        return cls(what, seconds, isa, sources, flags, _folder(cache), name)

    @classmethod
    def of_torch(cls, part: Part, cache: str, extra: str) -> Module:
        """Return the name and place of a module that calls torch's C++, as of does."""
        import torch

        own = (*toolchain.FLAGS, *_TORCH_FLAGS)
        # Built against one torch, it serves no other.
        version = f"{torch.__version__} {torch.version.git_version}"
        headers = [SOURCES.parent / name for name in _SHARED_HEADERS]
        flags, digest = _identity(part.sources, headers, own, extra, version)
        name = f"lorafast_{part.label}_{digest}"
        return cls(part.what, part.seconds, None, part.sources, flags, _folder(cache), name)

    @property
    def path(self) -> Path:
        """The file of the module."""
        return self.cache / f"{self.name}{sysconfig.get_config_var('EXT_SUFFIX')}"

    def beside(self, suffix: str) -> Path:
        """A file of the module's name with another suffix."""
        return self.cache / f"{self.name}{suffix}"


def _identity(
    sources: Path, headers: list[Path], own: tuple[str, ...], extra: str, version: str = ""
) -> tuple[tuple[str, ...], str]:
    """Return all flags of a module, and a hash of what it is made of.

    headers: those of other folders, where they are there.
    """
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
    files += [path for path in headers if path.exists()]
    try:
        contents = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
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
        version,
    )
    return flags, hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _folder(cache: str) -> Path:
    # Without a home folder it stays as it is, for `build` to refuse.
    return Path(cache) if cache.startswith("~") else Path(cache).absolute()


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
        torch = toolchain.Torch.find() if module.isa is None else None
        needed = instruction_sets.compiler_flags(module.isa) if module.isa else _TORCH_FLAGS
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
    build_cache.say(
        f"compiling its {module.what}, once, into {module.cache} (about {module.seconds} s)"
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
    build_cache.say(f"compiled its {module.what} in {time.monotonic() - begin:.1f} s")


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
            build_cache.say(f"{unusable}; a temporary folder serves")
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
