"""The compilation of a folder of C++ into one shared object.

It needs a compiler, ninja and Python's headers; a missing one is a Failure.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

# No code reads errno or the floating-point flags after these loops; saying so lets sqrt and selects
# vectorise. Not -ffast-math: NaN, infinity and the order of sums are promised.
FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-pthread",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
)


# What to do about a compiler that does not serve.
_ANOTHER = "install g++ or set CXX to another compiler"


class Failure(Exception):
    """No module could be made; the message says why, and what to do about it, in one line."""


class UnknownFlags(Failure):
    """The compiler does not know the flags: it is too old, or for another processor."""


@functools.cache
def mangled_openmp(packages: Path | None = None) -> Path | None:
    """The libgomp that torch's wheel has renamed (libgomp-a1b2c3.so.1), or None.

    packages: the folder that torch is installed in; None looks for it without importing torch.
    """
    if packages is None:
        packages = Path(importlib.util.find_spec("torch").origin).parent.parent
    return next(
        (
            path
            for folder in ("torch/lib", "torch.libs")
            for path in sorted(packages.glob(f"{folder}/libgomp-*.so*"))
        ),
        None,
    )


class Torch(NamedTuple):
    """What sources that call torch's C++ are compiled with and linked against."""

    includes: tuple[str, ...]
    libraries: tuple[str, ...]

    @classmethod
    def find(cls) -> Torch:
        """Return the headers and libraries of the torch that Python imports.

        A Failure if it came without them.
        """
        folder = Path(importlib.util.find_spec("torch").origin).parent
        includes = (folder / "include", folder / "include/torch/csrc/api/include")
        # A shared object names them by soname, and the process has loaded them before it.
        libraries = tuple(
            folder / "lib" / f"lib{name}.so" for name in ("torch_python", "torch_cpu", "c10")
        )
        missing = [path for path in (*includes, *libraries) if not path.exists()]
        if missing:
            raise Failure(f"this torch came without {missing[0].name}: install torch's own wheel")
        return cls(tuple(map(str, includes)), tuple(map(str, libraries)))


class Toolchain(NamedTuple):
    """What a build needs.

    identity: the first line of the compiler's --version.
    """

    cxx: tuple[str, ...]
    ninja: str
    includes: tuple[str, ...]
    identity: str

    @classmethod
    def find(cls, cxx: str) -> Toolchain:
        """Return the tools of this machine; a Failure names the first that is missing.

        cxx: the value of CXX.
        """
        command = _compiler(cxx)
        python = dict.fromkeys(sysconfig.get_path(name) for name in ("include", "platinclude"))
        if not any((Path(folder) / "Python.h").is_file() for folder in python):
            raise Failure(
                f"there is no Python.h in {next(iter(python))}: "
                "install Python's headers (python3-dev)"
            )
        version = _run([*command, "--version"])
        if version.returncode:
            raise Failure(
                f"the compiler {shlex.join(command)} does not run: {_first_line(version.stdout)}; "
                f"{_ANOTHER}"
            )
        return cls(command, _ninja(), tuple(python), _first_line(version.stdout))

    @property
    def fingerprint(self) -> str:
        """One line that changes with the compiler: its path, size, age and version."""
        program = shutil.which(self.cxx[0]) or self.cxx[0]
        try:
            found = os.stat(program)
            file = f"{found.st_size} bytes of {found.st_mtime_ns}"
        except OSError:
            file = "no file"
        return f"{program} ({file}), {shlex.join(self.cxx)}, {self.identity}"

    def check(self, flags: tuple[str, ...]) -> None:
        """Raise UnknownFlags if the compiler does not take the flags."""
        done = _run([*self.cxx, *flags, "-x", "c++", "-E", os.devnull])
        if done.returncode:
            raise UnknownFlags(
                f"the compiler {shlex.join(self.cxx)} does not take {shlex.join(flags)}: "
                f"{_error_line(done.stdout)}; {_ANOTHER}"
            )

    def compile(
        self,
        sources: Path,
        flags: tuple[str, ...],
        target: Path,
        log: Path,
        torch: Torch | None = None,
    ) -> None:
        """Compile every .cpp of sources and link them into target.

        Object files and build.ninja go to the folder of target. torch: the C++ of torch, for
        sources that call it. Those are compiled as one file: each by itself, they would take three
        times as long, nearly all of it for torch's headers.
        """
        files = sorted(sources.absolute().glob("*.cpp"))
        if torch:
            together = target.parent / "all.cpp"
            together.write_text("".join(f'#include "{path}"\n' for path in files))
            files = [together]
        build_file = self._build_file(files, flags, target, torch or Torch((), ()))
        (target.parent / "build.ninja").write_text(build_file)
        # Errors are looked for by their English name.
        done = _run(["env", "LC_ALL=C", self.ninja, "-C", str(target.parent)])
        log.write_text(f"{shlex.join(self.cxx)}: {self.identity}\n{done.stdout}")
        if done.returncode:
            why = _error_line(done.stdout)
            # The option, the header, the library or gcc's libgomp.spec, whichever is missed first.
            if re.search(r"fopenmp|\bomp\.h|gomp|-li?omp", why):
                why = (
                    f"the compiler {shlex.join(self.cxx)} has no OpenMP "
                    f"(install libgomp, or libomp for clang): {why}"
                )
            else:
                why = f"the compiler {shlex.join(self.cxx)} fails: {why}"
            raise Failure(f"{why} (all of it: {log}); {_ANOTHER}")

    def _build_file(
        self, files: list[Path], flags: tuple[str, ...], target: Path, torch: Torch
    ) -> str:
        folders = (*torch.includes, *self.includes)
        includes = [word for folder in folders for word in ("-isystem", folder)]
        compiling = shlex.join([*self.cxx, *flags, *includes]).replace("$", "$$")
        # The libraries last: many a linker drops one that nothing before it asked for.
        linking = shlex.join(
            [*self.cxx, "-shared", *(flag for flag in flags if flag != "-fopenmp")]
        ).replace("$", "$$")
        runtime = shlex.join([self._openmp(), *torch.libraries]).replace("$", "$$")
        objects = [_escaped(f"{path.stem}.o") for path in files]
        return "\n".join(
            [
                f"rule compile\n command = {compiling} -c $in -o $out",
                f"rule link\n command = {linking} $in {runtime} -o $out",
                *(
                    f"build {one}: compile {_escaped(str(path))}"
                    for one, path in zip(objects, files, strict=True)
                ),
                f"build {_escaped(target.name)}: link {' '.join(objects)}\n",
            ]
        )

    def _openmp(self) -> str:
        """Return the option that links the OpenMP runtime of torch.

        Two runtimes would each run threads of their own on the same cores.

        A shared object names its libraries by soname, and torch is loaded first, so libgomp.so.1 is
        torch's where its wheel has not renamed it (or ships none and takes the system's). A renamed
        one has to be linked by its file, which still records its new soname alone. clang calls
        libomp, which no wheel of torch has: there the threads are not shared.
        """
        renamed = None if "clang" in self.identity else mangled_openmp()
        return str(renamed or "-fopenmp")


def _compiler(cxx: str) -> tuple[str, ...]:
    try:
        asked = shlex.split(cxx)
    except ValueError as error:
        raise Failure(f"CXX={cxx} cannot be read: {error}; {_ANOTHER}") from error
    if asked:
        if not shutil.which(asked[0]):
            raise Failure(f"CXX={cxx}: there is no such program; {_ANOTHER}")
        return tuple(asked)
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return (found,)
    raise Failure(
        "there is no C++ compiler: CXX is not set, and none of c++, g++, clang++ is on the PATH; "
        "install g++ (apt install g++, dnf install gcc-c++), or set CXX"
    )


def _ninja() -> str:
    try:
        # A dependency of ours; its program need not be on the PATH.
        import ninja

        found = shutil.which("ninja", path=ninja.BIN_DIR)
    except (ImportError, AttributeError):
        found = None
    if not (found := found or shutil.which("ninja")):
        raise Failure("there is no ninja: pip install ninja")
    return found


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise Failure(f"{command[0]} does not run: {error.strerror}") from error


def _first_line(output: str) -> str:
    return output.strip().partition("\n")[0] or "it says nothing"


def _error_line(output: str) -> str:
    """Return the line of a compiler's, linker's or ninja's output that names the error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it says nothing"]
    for line in lines:
        if re.search(r"\berror:|cannot find -l|undefined reference", line):
            return line
    for line, command, said in zip(lines, lines[1:], lines[2:], strict=False):
        # ninja's own lines: what failed, its command, then what that has said.
        if line.startswith("FAILED:") and command:
            silent = said.startswith(("[", "FAILED:", "ninja:"))
            return "it stops without a message" if silent else said
    return lines[-1]


def _escaped(path: str) -> str:
    """Return a path as ninja's build lines spell it."""
    return re.sub(r"([$ :])", r"$\1", path)
