"""The machine a run happens on, the facts of it that go beside every figure, and a GPU that torch does not see."""

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
from lorafast.bench.refusal import Refused

PACKAGES = ("torch", "triton", "peft", "transformers", "numpy")


def device(asked: str | None) -> torch.device:
    """The device to measure: the one asked for, else the GPU, else the CPU. Refused with the reason if that cannot be."""
    if asked is None:
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        if why := unseen_gpu():
            raise Refused(f"{why}. --device cpu measures the CPU all the same")
        return torch.device("cpu")
    try:
        wanted = torch.device(asked)
    except RuntimeError as error:
        raise Refused(f"--device {asked}: must be cpu, cuda or cuda:INDEX") from error
    if wanted.type not in ("cpu", "cuda"):
        raise Refused(f"--device {asked}: the bench measures cpu and cuda devices")
    if wanted.type == "cuda":
        if not torch.cuda.is_available():
            raise Refused(
                f"--device {asked}: {unseen_gpu() or 'torch sees no GPU, and neither does nvidia-smi'}"
            )
        index = torch.cuda.current_device() if wanted.index is None else wanted.index
        if index >= torch.cuda.device_count():
            raise Refused(f"--device {asked}: torch sees {torch.cuda.device_count()} GPUs")
        wanted = torch.device("cuda", index)
    return wanted


def unseen_gpu() -> str | None:
    """Why torch does not see a GPU that nvidia-smi sees, or None if it sees none either."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    asked = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line.strip() for line in said.stdout.splitlines() if line.strip()]
    if said.returncode or not lines:
        return None
    name, _, driver = lines[0].partition(", ")
    if torch.version.cuda is None and torch.version.hip is None:
        why = f"torch {torch.__version__} is a build without CUDA; install one with it"
    else:
        why = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, the driver is {driver}: {_complaint()}"
    return f"nvidia-smi sees {name}, torch does not: {why}"


def _complaint() -> str:
    try:
        torch.cuda.init()
    except Exception as error:
        return str(error).splitlines()[0]
    return "CUDA_VISIBLE_DEVICES may hide the GPU"


def environment(where: torch.device, command: str) -> dict:
    """What a reader needs to judge the figures: versions, device, processor, memory, settings. Names no path and no host."""
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
    """As a table's head calls it."""
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    return f"{_cpu()}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)}"


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
    """The checkout's commit, with a + if it has changes; None outside one."""
    root = Path(lorafast.__file__).resolve().parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    git = ["git", "-C", str(root)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
    )
    return None if head.returncode else head.stdout.strip() + "+" * bool(changed.stdout.strip())


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
        # NVML counts every GPU of the machine, torch only those it may see: the uuid is what both know.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{facts.uuid}")
        known |= {
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "sm_clock_mhz": pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "power_limit_w": pynvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000,
        }
    except Exception as error:
        known["nvml"] = f"{type(error).__name__}: {error}"
    return known
