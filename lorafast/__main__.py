"""The command line of python -m lorafast: build kernels, run programs, export adapters."""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lorafast.integrations import built_by_peft, run_script
from lorafast.runtime import command_line, env, extension, instruction_sets
from lorafast.runtime.build_cache import is_complete
from lorafast.runtime.command_line import Command, one_of
from lorafast.runtime.extension import Module
from lorafast.runtime.toolchain import Failure, UnknownFlags

_BUILD = f"""\
Build the C++ ahead of its first use, for example in the image of a container or on a node that has
a compiler: the kernels of the CPU backend, and for the torch installed the host path, which makes
the calls of layers, and, if torch is built for CUDA, the launcher of kernels. A build that failed
before is tried again.

{env.CACHE.name} is the folder that they go to ({env.CACHE.default} unless set), CXX names the
compiler, and {env.CXXFLAGS.name} adds flags. The run that uses them needs the same folder and
flags, and no compiler."""


_RUN = """\
Run a Python program, unchanged, with every LoRA layer that PEFT builds in it on lorafast's
operations, as lorafast.accelerate(model) would put it there. sys.argv, sys.path, __main__, exit
status and tracebacks are what python gives. After the first step of an optimizer, or else at the
end, rank 0 prints on stderr how many layers are served, and why others are not.

Below a launcher: torchrun ... -m lorafast run train.py, accelerate launch ... -m lorafast run
train.py, deepspeed ... --module lorafast run train.py."""


_EXPORT = """\
Write the adapter in a folder, PEFT's or lorafast's, in a form that serving engines read alike:
plain LoRA of one rank whose scaling is 1. rsLoRA, rank and alpha patterns and LaMDA's core go into
B, exactly. DoRA needs the base model's weights, and gets the best approximation of a rank; its
error is printed. lorafast-bench check says what an engine makes of a folder."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = Command("python -m lorafast", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    build = _add_build(commands)
    run = _add_run(commands)
    export = _add_export(commands)
    words = sys.argv[1:] if arguments is None else arguments
    program: list[str] = []
    if words[:1] == ["run"]:
        own, program = command_line.split_at_program(run, words[1:])
        words = ["run", *own]
    parsers = {"build": build, "run": run, "export": export}
    options = command_line.parse(parser, parsers, words)
    if options.command == "run":
        if not program:
            run.error("the script, or -m and a module, is missing")
        return _run(options, program)
    if options.command == "export":
        return _export(options, export)
    isas = instruction_sets.ISAS
    if not options.all:
        try:
            isas = _asked(options.isa)
        except (ValueError, RuntimeError) as error:
            build.error(str(error))
    return _build(isas, options.all)


def _add_build(commands: Any) -> Command:
    build = commands.add_parser(
        "build",
        help="build the C++ kernels",
        description=_BUILD,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = build.add_mutually_exclusive_group()
    isas = ("auto", *instruction_sets.ISAS)
    which.add_argument(
        "--isa",
        type=one_of(isas),
        metavar="NAME",
        help=f"the instruction set, one of {', '.join(isas)}; auto is the best that this machine "
        f"runs; {env.CPU_ISA.name} says it where this does not",
    )
    which.add_argument(
        "--all", action="store_true", help="every instruction set that the compiler knows"
    )
    return build


def _add_run(commands: Any) -> Command:
    run = commands.add_parser(
        "run",
        help="run a program with PEFT's layers on lorafast's operations",
        usage="python -m lorafast run [options] (script.py | -m module) [its arguments]",
        description=_RUN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument(
        "--dropout-on",
        type=one_of(("both", "adapter")),
        metavar="WORD",
        help="DoRA's dropout, as in lorafast.accelerate: both (PEFT's reading) or adapter",
    )
    run.add_argument(
        "--keep",
        type=one_of(("inner", "output", "recompute")),
        default="inner",
        metavar="WORD",
        help="what DoRA keeps for its magnitude, as in lorafast.accelerate: inner, output or "
        "recompute",
    )
    run.add_argument("--quiet", action="store_true", help="print no report")
    return run


def _run(options: argparse.Namespace, program: list[str]) -> int:
    accelerator = built_by_peft.Accelerator(options.dropout_on, options.keep, options.quiet)
    accelerator.install()
    try:
        run_script.run(program)
    except run_script.NoProgram as error:
        accelerator.silence()
        print(f"python -m lorafast run: {error}", file=sys.stderr)
        return error.status
    return 0


def _add_export(commands: Any) -> Command:
    export = commands.add_parser(
        "export",
        help="write an adapter as plain LoRA",
        description=_EXPORT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = export.add_argument
    add("folder", metavar="DIR", help="the adapter's folder; no pickle is opened")
    add("--to", type=one_of(("lora", "gguf")), required=True, help="lora, or gguf")
    add("--out", required=True, type=Path, help="the folder, or the GGUF file, to write")
    add("--rank", type=int, metavar="R", help="truncate to this rank (default: the file's largest)")
    help_text = "folder of the base model: its weights for DoRA and VeRA, its config.json for gguf"
    add("--base", metavar="FOLDER", help=help_text)
    add("--dtype", type=one_of(("fp32", "fp16")), default="fp32", help="fp32 or fp16, of gguf")
    return export


def _export(options: argparse.Namespace, export: Command) -> int:
    """Export an adapter. Returns the exit status."""
    # Only here, because it takes seconds.
    from lorafast.checkpoint import files, gguf_file, portable

    if options.to == "gguf" and options.base is None:
        export.error("--base: a GGUF file has the names of the base, which its config.json decides")
    weights = options.base if options.base and Path(options.base).is_dir() else None
    try:
        made = portable.plain_lora(options.folder, options.rank, weights)
        if options.to == "gguf":
            gguf_file.write(made, options.out, options.base, options.dtype)
        else:
            files.write_adapter(options.out, made.tensors, made.config, {})
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        print(f"{export.prog}: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {made}")
    return 0


def _build(isas: tuple[str, ...], all_of_them: bool) -> int:
    """Build the kernels of these instruction sets, and the host path, and return the status."""
    # Side by side, they take as long as the host path alone.
    with ThreadPoolExecutor(2) as threads:
        builds = (
            threads.submit(build_kernels, isas, all_of_them),
            threads.submit(build_parts),
        )
        status = 0
        for done in builds:
            for line, failed in done.result():
                print(line, flush=True)
                status |= failed
    return status


def _asked(isa: str | None) -> tuple[str, ...]:
    """Return the instruction sets that a name stands for, as instruction_sets.candidates does."""
    # Another machine may run what is named here; what the environment names is for this one.
    if isa not in (None, "auto"):
        return (isa,)
    return instruction_sets.candidates(isa or env.cpu_isa())


def build_kernels(isas: tuple[str, ...], all_of_them: bool) -> list[tuple[str, bool]]:
    """Build the first instruction set that the compiler knows, or all that it knows.

    Returns a line for each, and whether it is a failure.
    """
    said = []
    for isa in isas:
        try:
            said.append(_built(isa, functools.partial(Module.of, isa, extension.SOURCES)))
            if not all_of_them:
                break
        except UnknownFlags as unknown:
            # No failure while another may be known.
            failed = isa == isas[-1] and not all_of_them
            said.append((f"{isa}: {unknown}", failed))
    return said


def build_parts() -> list[tuple[str, bool]]:
    """Build what calls torch's C++: the host path, and the launcher where torch knows CUDA.

    Returns what build_kernels does.
    """
    # Only here, because it takes seconds.
    import torch

    if why := extension.why_unused():
        return [(f"host path: not built, because {why}", False)]
    parts = [extension.HOST, *([extension.LAUNCHER] if torch.version.cuda else [])]
    return [_built(part.what, functools.partial(Module.of_torch, part)) for part in parts]


def _built(what: str, module_of: Callable[[str, str], Module]) -> tuple[str, bool]:
    """Build a module, and return a line that says where it is and how long it took, or why there
    is none, and whether that is a failure. UnknownFlags are for the caller.
    """
    begin = time.monotonic()
    try:
        module = module_of(env.cache(), env.cxxflags())
        complete = is_complete(module.path)
        there = complete and not _why_unusable(module)
        if not there:
            extension.build(module, env.cxx(), again=complete, retry=True)
            if why := _why_unusable(module):
                raise Failure(why)
    except UnknownFlags:
        raise
    except Failure as failure:
        return f"{what}: {failure}", True
    except OSError as error:
        unusable = f"{env.CACHE.name}: {module.cache} cannot be used: {error.strerror or error}"
        return f"{what}: {unusable}; set {env.CACHE.name} to a folder that can be written", True
    took = "built before" if there else f"built in {time.monotonic() - begin:.1f} s"
    return f"{what}: {module.path} ({took})", False


def _why_unusable(module: Module) -> str:
    """Return why this machine cannot load the module; "" if it can, or lacks the instructions."""
    if module.isa and module.isa not in instruction_sets.available():
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
