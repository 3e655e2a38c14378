"""The device to measure, and the facts of the machine that are stored with every result."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path

import psutil
import torch

import lorafast
from lorafast.bench.errors import BenchError
from lorafast.runtime import instruction_sets

PACKAGES = ("torch", "triton", "peft", "transformers", "numpy")


def device(asked: str | None) -> torch.device:
    """Return the device that --device names; without one the GPU, or else the CPU.

    Raises BenchError, with the reason, if it cannot be used.
    """
    if asked is None:
        return _default_device()
    try:
        wanted = torch.device(asked)
    except RuntimeError as error:
        raise BenchError(f"--device {asked}: must be cpu, cuda or cuda:INDEX") from error
    if wanted.type not in ("cpu", "cuda"):
        raise BenchError(f"--device {asked}: the bench measures cpu and cuda devices")
    if wanted.type == "cpu":
        return wanted
    if not torch.cuda.is_available():
        why = unseen_gpu() or "torch sees no GPU, and neither does nvidia-smi"
        raise BenchError(f"--device {asked}: {why}")
    index = torch.cuda.current_device() if wanted.index is None else wanted.index
    if index >= torch.cuda.device_count():
        raise BenchError(f"--device {asked}: torch sees {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)


def _default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if why := unseen_gpu():
        raise BenchError(f"{why}. --device cpu measures the CPU all the same")
    return torch.device("cpu")


def unseen_gpu() -> str | None:
    """Return why torch does not see a GPU that nvidia-smi sees; None if that sees none either."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line.strip() for line in said.stdout.splitlines() if line.strip()]
    if said.returncode or not lines:
        return None
    name, _, driver = lines[0].partition(", ")
    built = f"torch {torch.__version__} is"
    if torch.version.cuda is None and torch.version.hip is None:
        why = f"{built} a build without CUDA; install one with it"
    else:
        cuda = torch.version.cuda
        why = f"{built} built for CUDA {cuda}, the driver is {driver}: {_cuda_error()}"
    return f"nvidia-smi sees {name}, torch does not: {why}"


def _cuda_error() -> str:
    try:
        torch.cuda.init()
    except Exception as error:
        return str(error).splitlines()[0]
    return "CUDA_VISIBLE_DEVICES may hide the GPU"


def environment(where: torch.device, command: str) -> dict:
    """Return versions, device, processor, memory and settings. No path and no host name."""
    facts = {
        "lorafast": lorafast.__version__,
        "commit": _commit(),
        "command": command,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.machine()}",
        **{name: _version(name) for name in PACKAGES},
        "device": str(where),
        "device_name": device_name(where),
        "cpu": _cpu(),
        "cores": psutil.cpu_count(logical=False),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "matmul_precision": torch.get_float32_matmul_precision(),
    }
    return facts | (_gpu(where) if where.type == "cuda" else {})


def device_name(where: torch.device) -> str:
    """Return the device's name in titles; a CPU's has its instruction set and number of threads."""
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    threads = torch.get_num_threads()
    # Processors of one name differ by as much as those of two.
    isa = instruction_sets.available()[0]
    return f"{_cpu()} ({isa}), {threads} thread{'' if threads == 1 else 's'}"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the checkout's commit, with a + if files are changed; None outside a checkout."""
    root = Path(lorafast.__file__).resolve().parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)

    head = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "-uno").stdout.strip()
    return None if head.returncode else head.stdout.strip() + ("+" if changed else "")


def _gpu(where: torch.device) -> dict:
    facts = torch.cuda.get_device_properties(where)
    known = {
        "cuda": torch.version.cuda,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "gpu_memory_bytes": facts.total_memory,
        "l2_bytes": facts.L2_cache_size,
    }
    try:
        import pynvml

        pynvml.nvmlInit()
        # NVML counts every GPU of the machine, and torch only the visible ones. The uuid is the
        # same in both.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{facts.uuid}")
        limit = pynvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000
        known |= {
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "sm_clock_mhz": pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "power_limit_w": limit,
        }
    except Exception as error:
        known["nvml"] = f"{type(error).__name__}: {error}"
    return known
