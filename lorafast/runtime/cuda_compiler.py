"""The compilation of CUDA C++ into a cubin: by NVRTC, which torch's CUDA wheels bring, or by nvcc.

Neither needs a GPU, and NVRTC no toolkit and no C++ compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorafast.runtime.toolchain import Failure

_STANDARD = "-std=c++17"
# Older ones do not know the instructions of every architecture that the kernels are for.
_OLDEST = 12


class Compiler(NamedTuple):
    """A compiler of CUDA C++.

    name: it and its version, such as "NVRTC 13.0". run: as the function compile.
    """

    name: str
    run: Any

    def compile(self, source: Path, architecture: str, options: Sequence[str] = ()) -> bytes:
        """Return the cubin of a .cu, whose headers are the .cuh of its folder.

        A Failure with the compiler's first error if it cannot be compiled. architecture: such as
        sm_90. options: such as -DNAME=1.
        """
        return self.run(source, architecture, options)


@functools.cache
def find() -> Compiler | str:
    """Return the compiler of this process, or why there is none: NVRTC, else nvcc."""
    try:
        return _nvrtc()
    except Failure as failure:
        why = str(failure)
    program = shutil.which("nvcc")
    if program is None:
        return f"{why}, and there is no nvcc on the PATH"
    return Compiler(_nvcc_name(program), functools.partial(_by_nvcc, program))


def _nvrtc() -> Compiler:
    library = _library()
    major, minor = ctypes.c_int(), ctypes.c_int()
    if library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)):
        raise Failure("NVRTC does not tell its version")
    if major.value < _OLDEST:
        raise Failure(f"NVRTC {major.value}.{minor.value} is older than {_OLDEST}.0")
    name = f"NVRTC {major.value}.{minor.value}"
    return Compiler(name, functools.partial(_by_nvrtc, library, name))


def _library() -> ctypes.CDLL:
    """Return NVRTC: the one that torch loads, or one that is installed beside it."""
    for path in _places():
        with contextlib.suppress(OSError):
            # NVRTC looks for it by its name alone, and finds what is loaded.
            for builtins in sorted(path.parent.glob("libnvrtc-builtins.so*")):
                ctypes.CDLL(str(builtins))
            return ctypes.CDLL(str(path))
    raise Failure("there is no NVRTC: install torch's wheel for CUDA, or nvidia-cuda-nvrtc")


def _places() -> list[Path]:
    """Return where NVRTC may be, the likeliest first."""
    import torch

    major = (torch.version.cuda or "").partition(".")[0]
    names = [f"libnvrtc.so.{major}"] if major else []
    folders = [
        folder
        for packages in map(Path, sys.path)
        for pattern in ("nvidia/cu[0-9]*/lib", "nvidia/cuda_nvrtc/lib")
        for folder in sorted(packages.glob(pattern), reverse=True)
    ]
    found = [
        path for folder in folders for path in sorted(folder.glob("libnvrtc.so.*"), reverse=True)
    ]
    # The one of torch's own CUDA first: two versions in one process would only cost memory.
    found.sort(key=lambda path: path.name not in names)
    return [*found, *map(Path, names), Path("libnvrtc.so")]


def _by_nvrtc(
    library: ctypes.CDLL, name: str, source: Path, architecture: str, options: Sequence[str]
) -> bytes:
    headers = _read(sorted(source.parent.glob("*.cuh")))
    program = ctypes.c_void_p()
    made = library.nvrtcCreateProgram(
        ctypes.byref(program), _read([source])[0][1], source.name.encode(), len(headers),
        _texts([text for _, text in headers]), _texts([path.name.encode() for path, _ in headers]),
    )  # fmt: skip
    if made:
        raise Failure(f"{name} fails: {_meaning(library, made)}")
    try:
        given = [f"--gpu-architecture={architecture}", _STANDARD, *options]
        refused = library.nvrtcCompileProgram(
            program, len(given), _texts([option.encode() for option in given])
        )
        if refused:
            log = _text(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program)
            why = _first_error(log.rstrip(b"\0").decode(errors="replace"))
            raise Failure(
                f"{name} does not compile {source.name} for {architecture}: "
                f"{why or _meaning(library, refused)}"
            )
        return _text(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(size: Any, get: Any, program: ctypes.c_void_p) -> bytes:
    length = ctypes.c_size_t()
    if size(program, ctypes.byref(length)):
        return b""
    text = ctypes.create_string_buffer(length.value)
    return b"" if get(program, text) else text.raw


def _texts(texts: list[bytes]) -> Any:
    return (ctypes.c_char_p * len(texts))(*texts)


def _meaning(library: ctypes.CDLL, result: int) -> str:
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library.nvrtcGetErrorString(result).decode()


def _read(files: list[Path]) -> list[tuple[Path, bytes]]:
    try:
        return [(path, path.read_bytes()) for path in files]
    except OSError as error:
        raise Failure(f"the CUDA sources cannot be read: {error}") from error


def _nvcc_name(program: str) -> str:
    said = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release ([\d.]+)", said)
    return f"nvcc {found[1]}" if found else "nvcc"


def _by_nvcc(program: str, source: Path, architecture: str, options: Sequence[str]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="lorafast-cuda-") as folder:
        made = Path(folder) / "form.cubin"
        words = ["-cubin", f"-arch={architecture}", _STANDARD, *options, source.name]
        words += ["-o", str(made)]
        # From its folder, because nvcc takes the path apart as a shell does.
        done = subprocess.run([program, *words], cwd=source.parent, capture_output=True, text=True)
        if done.returncode:
            why = _first_error(done.stderr + done.stdout) or f"it ends with {done.returncode}"
            name = _nvcc_name(program)
            raise Failure(f"{name} does not compile {source.name} for {architecture}: {why}")
        return made.read_bytes()


def _first_error(log: str) -> str:
    """Return the first line of a compiler's output that names an error, else the first."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "")
