"""The command line of python -m lorafast, which builds the C++ kernels ahead of their first use."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from lorafast.runtime import env, extension, instruction_sets
from lorafast.runtime.build_cache import is_complete
from lorafast.runtime.extension import Module
from lorafast.runtime.toolchain import Failure, UnknownFlags

_BUILD = f"""\
Build the C++ ahead of its first use, for example in the image of a container or on a node that has
a compiler: the kernels of the CPU backend, and the host path, which makes the calls of layers, for
the torch installed. A build that failed before is tried again.

{env.CACHE.name} is the folder that they go to ({env.CACHE.default} unless set), CXX names the
compiler, and {env.CXXFLAGS.name} adds flags. The run that uses them needs the same folder and
flags, and no compiler."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m lorafast", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser(
        "build",
        help="build the C++ kernels",
        description=_BUILD,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = build.add_mutually_exclusive_group()
    which.add_argument(
        "--isa",
        choices=("auto", *instruction_sets.ISAS),
        help="the instruction set; auto is the best that this machine runs; "
        f"{env.CPU_ISA.name} says it where this does not",
    )
    which.add_argument(
        "--all", action="store_true", help="every instruction set that the compiler knows"
    )
    options = parser.parse_args(arguments)
    if options.all:
        return build_all() or build_host()
    # Another machine may run what is named here; what the environment names is for this one.
    if options.isa not in (None, "auto"):
        return build_first((options.isa,)) or build_host()
    try:
        isas = instruction_sets.candidates(options.isa or env.cpu_isa())
    except (ValueError, RuntimeError) as error:
        build.error(str(error))
    return build_first(isas) or build_host()


def build_host() -> int:
    """Build the host path for the torch installed; return 1 if that fails."""
    # It takes seconds to import.
    from lorafast.engine import host

    if not host.is_used():
        print("host: not used on this torch, or turned off")
        return 0
    try:
        print(_built("host"))
    except Failure as failure:
        print(f"host: {failure}")
        return 1
    return 0


def build_all() -> int:
    """Build every instruction set; return 1 if one failed that the compiler knows."""
    status = 0
    for isa in instruction_sets.ISAS:
        try:
            print(_built(isa))
        except UnknownFlags as unknown:
            print(f"{isa}: {unknown}")
        except Failure as failure:
            print(f"{isa}: {failure}")
            status = 1
    return status


def build_first(isas: tuple[str, ...]) -> int:
    """Build the first instruction set that the compiler knows; return 1 if that fails."""
    for isa in isas:
        try:
            print(_built(isa))
            return 0
        except UnknownFlags as unknown:
            print(f"{isa}: {unknown}")
        except Failure as failure:
            print(f"{isa}: {failure}")
            return 1
    return 1


def _built(isa: str) -> str:
    """Build the kernels of one instruction set, or "host", and return a line that says where it is
    and how long it took.
    """
    begin = time.monotonic()
    if isa == "host":
        module = Module.of_host(extension.HOST_SOURCES, env.cache(), env.cxxflags())
    else:
        module = Module.of(isa, extension.SOURCES, env.cache(), env.cxxflags())
    try:
        complete = is_complete(module.path)
        there = complete and not _why_unusable(module)
        if not there:
            extension.build(module, env.cxx(), again=complete, retry=True)
            if why := _why_unusable(module):
                raise Failure(why)
    except OSError as error:
        raise Failure(
            f"{env.CACHE.name}: {module.cache} cannot be used: {error.strerror or error}; "
            f"set {env.CACHE.name} to a folder that can be written"
        ) from error
    took = "built before" if there else f"built in {time.monotonic() - begin:.1f} s"
    return f"{isa}: {module.path} ({took})"


def _why_unusable(module: Module) -> str:
    """Return why this machine cannot load the module; "" if it can, or lacks the instructions."""
    if not module.is_host and module.isa not in instruction_sets.available():
        return ""
    # The module's OpenMP runtime may be one that only torch's wheel has.
    import torch  # noqa: F401

    # A new name each time: the loader takes a name that it knows for the file it has loaded, even
    # where a build has replaced that.
    with tempfile.TemporaryDirectory() as folder:
        link = module._replace(cache=Path(folder))
        link.path.symlink_to(module.path)
        try:
            extension.import_module(link)
        except Failure as failure:
            return str(failure).replace(folder, str(module.cache))
    return ""


if __name__ == "__main__":
    sys.exit(main())
