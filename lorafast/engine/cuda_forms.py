"""Forms of the CUDA kernels in csrc/cuda: compiled and loaded when first needed, and launched.

A form is one compilation of one kernel. It is compiled by runtime.cubins, loaded by CUDA's driver
and launched by csrc/launch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from lorafast.runtime import cubins, cuda_compiler, cuda_driver, devices, extension, torch_internals
from lorafast.runtime.toolchain import Failure

SOURCES = Path(__file__).parent / "csrc" / "cuda"
# As csrc/cuda/types.cuh numbers them.
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
# The device that tensors have to be on. A test sets it to "cpu".
LAUNCHED_TENSORS = "cuda"
# Flags of every kernel that has them; each .cu names its own.
DROPS, ALIGNED = 1, 2
# grad_output's, with which a block has twice as many warps.
U = 1
_OLDEST = 80


class Kernel(NamedTuple):
    """What a launch has to know of a kernel: threads of a block, where Form.threads says no other,
    and its parameters in order.

    A letter each: p an address, q int64, i int32 or uint32, f fp32.
    """

    threads: int
    parameters: str


KERNELS = {
    "project": Kernel(128, "pppppp" + "qqqqqqq" + "iii" + "if" + "ii"),
    "project_finish": Kernel(32, "pppp" + "qqq" + "ii" + "f" + "ii"),
    "decode": Kernel(512, "ppppppppppp" + "qqqqqqqq" + "iii" + "iiiii" + "f"),
    "decode_finish": Kernel(256, "pppppp" + "qq" + "iii"),
    "grad_output": Kernel(128, "pppppppppp" + "qqqqqqqqq" + "iii" + "ii" + "f"),
    "grad_output_finish": Kernel(
        256, "pppppp" + "ppppppppppp" + "qqqqqq" + "iiiiiiiii" + "iiii" + "ii" + "f"
    ),
    "grad_project": Kernel(128, "pppp" + "qqqqqq" + "ii" + "if"),
    "sum_parts": Kernel(256, "pp" + "qif"),
    "low_rank_add": Kernel(128, "ppppppppp" + "qqqq" + "iii" + "iiiff"),
    "row_norm": Kernel(256, "ppppp" + "qqqqq" + "iiiiii" + "f"),
    "quotient": Kernel(256, "pppppp" + "ii"),
    "scale": Kernel(256, "ppppp" + "qqqqq" + "iiiiii" + "f"),
    "drop": Kernel(256, "ppp" + "qqqqqq" + "ii" + "f"),
}


class Form(NamedTuple):
    """One compilation of one kernel; csrc/cuda/form.cuh says what each field is."""

    stem: str
    dtype: torch.dtype
    tiles: int = 2
    flags: int = 0
    tf32: bool = False

    @property
    def threads(self) -> int:
        """Those of a block."""
        # As many as there are registers for.
        if self.stem == "row_norm" and self.tiles <= 2 and self.dtype.itemsize == 2:
            return 384
        if self.stem == "grad_output" and self.flags & U:
            return 256
        return KERNELS[self.stem].threads

    @property
    def options(self) -> tuple[str, ...]:
        """What the compiler is given."""
        values = {"DTYPE": DTYPES[self.dtype], "TILES": self.tiles, "FLAGS": self.flags}
        values["TF32"] = int(self.tf32)
        return tuple([f"-DLORAFAST_{name}={value}" for name, value in values.items()])


def of(stem: str, dtype: torch.dtype, tiles: int = 2, flags: int = 0) -> Form:
    """Return the form of a kernel that multiplies: fp32 in tf32 where torch's own products do."""
    return Form(stem, dtype, tiles, flags, dtype == torch.float32 and in_tf32())


def in_tf32() -> bool:
    """True if torch multiplies fp32 in tf32 on GPUs."""
    # allow_tf32, the older name of this setting, raises once the newer name has been used.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def why_not_architecture(name: str) -> str:
    """Return why the kernels do not run on an architecture; "" if they do."""
    if not name.startswith("sm_"):
        return f"runs on NVIDIA GPUs; this is {name}"
    # The first tensor cores that multiply bf16.
    if int(name.removeprefix("sm_")) >= _OLDEST:
        return ""
    return f"runs on sm_{_OLDEST} and later; this is {name}"


def why_not() -> str:
    """Return why no kernel can be compiled or launched in this process; "" if they can."""
    compiler, module = cuda_compiler.find(), extension.launcher()
    return next((why for why in (compiler, module) if isinstance(why, str)), "")


def launch(form: Form, device: torch.device, grid: tuple[int, ...], *arguments: object) -> None:
    """Launch a form on torch's current stream of a device.

    arguments: tensors or None, ints and floats, in the order of the kernel's parameters. A Failure
    if it cannot be compiled, or CUDA refuses it.
    """
    loaded(form, device)(grid, *arguments)


def _model(form: Form, grid: tuple[int, ...], *arguments: object) -> None:
    """Give a launch to the model of a step, in which meta tensors stand for a GPU's."""
    modelled = devices.stand_in.get()
    assert modelled is not None, "no backend serves meta tensors elsewhere"
    modelled.launch(form, grid, *arguments)


def _current(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context in which a GPU is the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.lru_cache(maxsize=4096)
def function(form: Form, device: torch.device) -> int:
    """Return the address of a form, loaded on a device; the first call may compile it."""
    source = SOURCES / f"{form.stem}.cu"
    code = cubins.cubin(source, devices.of(device).name, form.options)
    with _current(device):
        return cuda_driver.load(code, form.stem)


@functools.lru_cache(maxsize=4096)
def loaded(form: Form, device: torch.device) -> Callable[..., None]:
    """Return the function that launches a form on a device; the first call may compile it."""
    if device.type == "meta":
        return functools.partial(_model, form)
    module = extension.launcher()
    if isinstance(module, str):
        raise Failure(f"the CUDA kernels are launched in C++ alone: {module}")
    kernel = KERNELS[form.stem]
    return module.CudaKernel(
        cuda_driver.launch_address(),
        function(form, device),
        form.threads,
        kernel.parameters,
        torch_internals.raw_stream(),
        LAUNCHED_TENSORS,
    )
