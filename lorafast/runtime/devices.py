"""Facts about devices, looked up only for the device of a tensor that exists."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

# Parts of the messages of torch's CPU allocator, of CUDA, and of cuBLAS, which allocates its
# workspace itself.
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class Arch(NamedTuple):
    """An architecture, and the kind of device.

    vendor: cpu, nvidia, amd or the device type. name: as the vendor's compilers spell it, such as
    sm_90 or gfx942. multiprocessors: those of a GPU, which devices of one architecture differ in; 0
    for any other device. model: a GPU's name as its vendor gives it: what is measured of one kind
    holds for no other.
    """

    vendor: str
    name: str
    multiprocessors: int = 0
    model: str = ""

    @property
    def words(self) -> str:
        """Vendor and name, once where they are the same."""
        return self.vendor if self.name == self.vendor else f"{self.vendor} {self.name}"


class StandIn(NamedTuple):
    """What meta tensors stand for while a step on a GPU is modelled (engine.step_model).

    arch: that of the GPU. backend: what computes every primitive. drop: the kernel of the dropout
    mask; None: torch's operations make it. launch: takes what the cuda backend would launch: a
    form, a grid and the arguments.
    """

    arch: Arch
    backend: Any
    drop: Any
    launch: Any = None


stand_in: ContextVar[StandIn | None] = ContextVar("stand_in", default=None)
# The first device that was seen of each kind.
_seen: dict[Arch, torch.device] = {}


@functools.cache
def of(device: torch.device) -> Arch:
    """The architecture behind a device."""
    arch = _arch_of(device)
    _seen.setdefault(arch, device)
    return arch


def seen(arch: Arch) -> torch.device | None:
    """The first device of a kind that this process has computed on; None if none."""
    return _seen.get(arch)


def _arch_of(device: torch.device) -> Arch:
    if device.type == "xpu":
        xpu = torch.xpu.get_device_properties(device)
        return Arch("xpu", "xpu", getattr(xpu, "gpu_subslice_count", 0), xpu.name)
    if device.type != "cuda":
        return Arch(device.type, device.type)
    facts = torch.cuda.get_device_properties(device)
    kind = facts.multi_processor_count, facts.name
    if torch.version.hip:
        return Arch("amd", facts.gcnArchName.split(":")[0], *kind)
    return Arch("nvidia", f"sm_{facts.major}{facts.minor}", *kind)


def multiprocessors(device: torch.device) -> int:
    """The multiprocessors of a GPU, or of the one that meta tensors stand for; 0 if unknown."""
    modelled = stand_in.get() if device.type == "meta" else None
    return (modelled.arch if modelled else of(device)).multiprocessors


def capturing(tensor: torch.Tensor) -> bool:
    """True if a CUDA graph is being captured on the tensor's current stream."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def traced() -> bool:
    """True while a CUDA graph is captured on the current stream, or a compiler traces."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def has_mixed_gemm(device: torch.device) -> bool:
    """True if torch.mm there multiplies half-precision operands into an fp32 result."""
    if device.type == "meta":
        modelled = stand_in.get()
        return modelled is not None and modelled.arch.vendor == "nvidia"
    return device.type == "cuda" and torch.version.hip is None


def has_fp64(device: torch.device) -> bool:
    """True if the device computes in float64."""
    return device.type not in ("mps", "xla")


def is_out_of_memory(error: BaseException) -> bool:
    """True if the exception means that a device or the machine has no memory left."""
    message = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(part in message for part in _OUT_OF_MEMORY)
    )
