"""Forms of the CUDA kernels in csrc/cuda, compiled by nvcc, which needs no GPU."""

from __future__ import annotations

import functools
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from lorafast.engine.cuda_forms import ALIGNED, SOURCES, Form

ARCHS = (80, 90, 100, 120)
_folder = functools.cache(lambda: tempfile.TemporaryDirectory(prefix="lorafast-cuda-"))


class Usage(NamedTuple):
    """What ptxas says of a form: registers of a thread, bytes of its stack, bytes that spill."""

    registers: int
    stack: int
    spills: int


# The kernels: the tiles that they are compiled for, and the names of their flags.
KERNELS = {
    "project": ((1, 2, 4, 8, 16), ("drops", "aligned", "parts", "raw")),
    "project_finish": ((1, 2, 4, 8, 16), ()),
    "decode": ((1, 2), ("", "", "parts")),
    "decode_finish": ((2,), ()),
    "grad_project": ((1, 2, 4, 8), ("drops", "aligned")),
    "grad_output": ((1, 2, 4), ("u", "aligned", "P", "sums", "dot")),
    "grad_output_finish": ((1, 2), ()),
    "low_rank_add": (
        (2, 4, 8, 16),
        ("drops", "aligned", "adds", "gains", "keeps", "raw", "across"),
    ),
    "row_norm": ((2, 4, 8, 16), ("by row", "aligned", "across")),
    "sum_parts": ((2,), ("root",)),
    "drop": ((2,), ("", "aligned", "accumulates")),
    "scale": ((2,), ("", "aligned")),
    "quotient": ((2,), ()),
}
NO_PRODUCT = ("sum_parts", "drop", "scale", "quotient", "decode_finish")


@functools.cache
def forms(stem: str, dtype: torch.dtype, tf32: bool = False) -> list[Form]:
    """Return every form of a kernel in a dtype, or in tf32."""
    tiles, flags = KERNELS[stem]
    sums = itertools.product(*((0, 1 << i) if name else (0,) for i, name in enumerate(flags)))
    every = [Form(stem, dtype, *one, tf32) for one in itertools.product(tiles, map(sum, sums))]
    return [form for form in every if _is_used(form)]


def _is_used(form: Form) -> bool:
    """True unless no launch has the flags of a form, or its tiles beside them."""
    wide, asked = form.dtype == torch.float32, form.flags & ~ALIGNED
    if form.stem == "project":
        # A factor as it is: of up to 64 ranks, beside 16-bit numbers.
        raw = bool(form.flags & 8)
        return not (wide and raw) and (form.tiles <= 8 or not (wide or raw))
    if form.stem == "decode":
        return not wide
    if form.stem == "grad_project":
        return form.tiles <= 4 or (bool(form.flags & ALIGNED) and not wide)
    if form.stem == "grad_output":
        # u goes with P, at most sixteen ranks and aligned rows; Σ dy⊙kept with Σ dy, and with P
        # where rows are aligned and not fp32.
        aligned = bool(form.flags & ALIGNED)
        tiles = {0: (2,), 4: (1, 2, 4), 5: (1, 2) if aligned else ()}.get(asked & 5, ())
        sums = (0, 8, 24) if asked & 5 == 0 or (aligned and not wide) else (0, 8)
        return form.tiles in tiles and asked & 24 in sums and asked != 0
    if form.stem == "low_rank_add":
        # dx is written, or added to by several adapters; y is written, with a bias or without, but
        # with a gain it is added to, with z beside it or without.
        if form.flags & 96:
            # A factor as it is: B by rows, and A across.
            if not form.flags & ALIGNED or form.tiles > (4 if wide else 8):
                return False
            return asked - 32 in (0, 4, 8, 4 + 8, 4 + 8 + 16) or asked - 96 in (0, 1, 4, 1 + 4)
        return asked in (0, 1, 4, 1 + 4, 8, 4 + 8, 4 + 8 + 16)
    if form.stem == "row_norm" and form.flags & 4:
        return form.flags == 7 and form.tiles <= (4 if wide else 8)
    return True


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


def skip_without_nvcc() -> None:
    """Skip the test where nvcc is missing."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")


@functools.cache
def ptx(form: Form, capability: int) -> str:
    """Return the PTX of a form."""
    return _ptx_file(form, capability).read_text()


def cubin(form: Form, capability: int) -> Path:
    """Return the file of a form's machine code."""
    return _cubin_file(form, capability)[0]


def usage(form: Form, capability: int) -> Usage:
    """Return what a form takes."""
    said = _cubin_file(form, capability)[1]
    registers, stack, *spills = (
        sum(map(int, re.findall(rf"(\d+) {what}", said)))
        for what in ("registers", "bytes stack frame", "bytes spill stores", "bytes spill loads")
    )
    return Usage(registers, stack, sum(spills))


@functools.cache
def _ptx_file(form: Form, capability: int) -> Path:
    target = Path(_folder().name, "-".join(map(str, (*form, capability))) + ".ptx")
    _nvcc("-ptx", capability, "-std=c++17", *form.options, SOURCES / f"{form.stem}.cu", target)
    return target


@functools.cache
def _cubin_file(form: Form, capability: int) -> tuple[Path, str]:
    """Return the file of machine code, and what ptxas says of it."""
    source = _ptx_file(form, capability)
    target = source.with_suffix(".cubin")
    return target, _nvcc("-cubin", capability, "-Xptxas=-v", source, target)


def _nvcc(kind: str, capability: int, *options: str | Path) -> str:
    """Compile; the last option is the file to write. Return what nvcc says."""
    skip_without_nvcc()
    command = ["nvcc", kind, f"-arch=sm_{capability}", *options[:-1], "-o", options[-1]]
    # The sanitizers' libraries, which `make sanitize` preloads, are not for the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr
