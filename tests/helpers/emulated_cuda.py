"""The `cuda` backend on the emulator: forms compiled by nvcc, launched as csrc/launch would."""

from __future__ import annotations

import contextlib
import functools
import os
import struct
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from emulator import driver, machine

from helpers import cuda_compiler
from helpers.emulated_device import nvidia
from lorafast.engine import cuda_forms, cuda_grad_output, cuda_kernels
from lorafast.engine.cuda_forms import Form


@functools.cache
def code(form: Form, capability: int) -> machine.Code:
    """Return a form, ready to run."""
    return machine.Code(cuda_compiler.ptx(form, capability))


@contextlib.contextmanager
def emulating(capability: int, parts: int | None = None, tf32: bool = False) -> Iterator[None]:
    """Return a context in which LORAFAST_BACKEND=cuda runs on CPU tensors.

    parts: those of every sum; None: what the package chooses. tf32: fp32 is multiplied in tf32.
    """
    split = cuda_kernels.split

    def split_so(blocks: int, steps: int, device: torch.device, *busy: int) -> cuda_kernels.Split:
        if parts is None:
            return split(blocks, steps, device, *busy)
        return cuda_kernels.Split(parts, -(-steps // parts))

    with contextlib.ExitStack() as stubs:
        stubs.enter_context(mock.patch.dict(os.environ, {"LORAFAST_BACKEND": "cuda"}))
        stubs.enter_context(mock.patch.object(cuda_forms, "why_not", return_value=""))
        stubs.enter_context(mock.patch.object(cuda_forms, "in_tf32", return_value=tf32))
        loaded = functools.partial(_loaded, capability)
        stubs.enter_context(mock.patch.object(cuda_forms, "loaded", loaded))
        stubs.enter_context(mock.patch.object(cuda_kernels, "split", split_so))
        stubs.enter_context(mock.patch.object(cuda_grad_output, "split", split_so))
        stubs.enter_context(nvidia(capability))
        yield


def _loaded(capability: int, form: Form, device: torch.device) -> Callable[..., None]:
    """Return what stands for a loaded form: a run of its PTX, with its arguments checked."""
    kernel, program = cuda_forms.KERNELS[form.stem], code(form, capability).program
    letters = kernel.parameters
    # A tf32 that no product asks for makes no difference to a form.
    every = cuda_compiler.forms(form.stem, form.dtype, form.tf32)
    assert form in every, f"{form} is not among the forms that are known to compile"
    sizes = [32 if letter in "if" else 64 for letter in letters]
    assert [bits for _, bits, _ in program.params] == sizes, (form, letters)

    def run(grid: tuple[int, ...], *arguments: object) -> None:
        values = bits_of(form, arguments)
        spans = [driver.span(value) for value in arguments if isinstance(value, torch.Tensor)]
        if all(grid):
            whole = (*grid, 1, 1)[:3]
            machine.launch(code(form, capability), whole, values, program.static, spans)

    return run


def bits_of(form: Form, arguments: tuple[object, ...]) -> list[int]:
    """Return the bits of each parameter of a form that is launched with some arguments."""
    letters = cuda_forms.KERNELS[form.stem].parameters
    assert len(arguments) == len(letters), (form, len(arguments), len(letters))
    return [_bits(value, letter) for value, letter in zip(arguments, letters, strict=True)]


def _bits(value: object, letter: str) -> int:
    """Return a parameter's value as csrc/launch/cuda_kernel.cpp makes it."""
    if letter == "p":
        assert value is None or isinstance(value, torch.Tensor), value
        return 0 if value is None else value.data_ptr()
    if letter == "f":
        assert isinstance(value, float), value
        return int.from_bytes(struct.pack("<f", value), "little")
    assert isinstance(value, int), value
    return value & (1 << (64 if letter == "q" else 32)) - 1
