"""The verdict on the Triton kernels of one GPU: which forms are right there, and how fast they are.

A kernel that is wrong on a GPU may poison the process's context or hang it. Therefore they are
tried in a child process (trial_process, trial_checks), once for each GPU, driver, torch, triton and
version of the kernels. The verdict is a file in LORAFAST_CACHE. Processes of one host share it: one
runs the trial, and the others wait for its file. So all ranks with equal GPUs choose alike.

A form is a kernel in one dtype; one for ranks above RANKS is a form of its own. An entry of the
file has the forms that are tried together. Imports no triton.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lorafast.engine import trial_process
from lorafast.engine.trial_process import SPEED
from lorafast.runtime import build_cache, devices, env, extension, whole_file
from lorafast.runtime.fallback import Provisional

# In the order of trust: what is tried first is the simplest, and the most useful.
STREAMS = ("drop", "project", "grad_output", "grad_project", "low_rank_add", "row_norm")
GEMMS = ("gemm_pointers", "gemm_tma")
HALVES = (torch.bfloat16, torch.float16)
# The largest rank of the forms that are tried first.
RANKS = 64
# Of each vendor the architectures that the kernels are compiled for; AMD's by how they begin.
ARCHS = {
    "nvidia": (
        "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120",
        "sm_121",
    ),
    "amd": ("gfx90a", "gfx942", "gfx950", "gfx11", "gfx12"),
    "xpu": ("xpu",),
}  # fmt: skip
# What a reason begins with where a form ran out of memory.
OUT_OF_MEMORY = "out of memory"
# Bytes of the device that every trial can be done in, and its child's context.
ENOUGH_MEMORY = 4 << 30
# The version of the file's content.
_FORMAT = 1
_ENGINE = Path(__file__).parent


class Form(NamedTuple):
    """One kernel in one dtype, for ranks up to RANKS or for more (wide). str() is its name."""

    kernel: str
    dtype: torch.dtype
    wide: bool = False

    def __str__(self) -> str:
        ranks = f" R>{RANKS}" if self.wide else ""
        return f"{self.kernel} {str(self.dtype).removeprefix('torch.')}{ranks}"


# The forms that are tried together, in this order. A name that the process never needs costs it
# nothing.
ENTRIES: dict[str, tuple[Form, ...]] = {
    "streams": tuple(Form(kernel, dtype) for kernel in STREAMS for dtype in HALVES),
    "gemm": tuple(Form(kernel, dtype) for kernel in GEMMS for dtype in HALVES),
    "fp32": tuple(Form(kernel, torch.float32) for kernel in (*STREAMS, GEMMS[0])),
    "ranks": tuple(
        Form(kernel, dtype, wide=True)
        for dtype in (*HALVES, torch.float32)
        for kernel in STREAMS[1:]
    ),
}


# Compared by identity, so that what follows from a verdict can be remembered by it.
@dataclass(frozen=True, eq=False)
class Verdict:
    """What is known of one entry's forms on one GPU.

    forms: each form's name, with "" if it is right and the reason in words if it does not serve.
    rates: constants that were measured; kernels/measured.py says what they mean.
    reason: why a form does not serve that `forms` does not name.
    seconds: how long the trial took. when: the time of its end, in seconds since 1970. free: the
    bytes of the device that were free when it began, if a form ran out of memory.
    """

    forms: dict[str, str] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    reason: str = "has not been tried on this GPU"
    seconds: float = 0.0
    when: float = 0.0
    free: int = 0

    @property
    def was_short(self) -> bool:
        """True if a form ran out of memory on a device that had little of it."""
        short = any(reason.startswith(OUT_OF_MEMORY) for reason in self.forms.values())
        return short and self.free < ENOUGH_MEMORY

    def why_not(self, form: Form) -> str:
        """Why the form does not serve; "" if it does."""
        return self.forms.get(str(form), self.reason)


class Gpu(NamedTuple):
    """A device as a trial sees it: what tells it from others, and the name that finds it."""

    facts: dict[str, str]
    uuid: str

    @property
    def name(self) -> str:
        """The name that the vendor gives it."""
        return self.facts["gpu"]

    @property
    def sha16(self) -> str:
        """The hash that names its file."""
        return hashlib.sha256(repr(sorted(self.facts.items())).encode()).hexdigest()[:16]


_NONE = Verdict()
# Set by `assuming`: the verdicts that hold for every device, by entry.
_assumed: list[dict[str, Verdict]] = []
# The verdicts of this process.
_known: dict[tuple[torch.device, str], Verdict] = {}
# LORAFAST_TRIAL=again is content with a verdict that another process found since this one began.
_began = time.time()


def why_not(kernel: str, dtype: torch.dtype, R: int, device: torch.device) -> str:
    """Why a kernel may not serve unasked on this device, in words; "" if it may.

    The first question about a GPU runs the trial, and blocks meanwhile. A Provisional may be
    answered otherwise the next time. ValueError for an unknown LORAFAST_TRIAL.

    R: the largest rank of the call; 0 for a kernel without one.
    """
    entry, form = entry_of(kernel, dtype, R)
    found = verdict(device, entry)
    return found if isinstance(found, Provisional) else found.why_not(form)


@functools.lru_cache(maxsize=256)
def entry_of(kernel: str, dtype: torch.dtype, R: int = 0) -> tuple[str, Form]:
    """The entry that has the verdict on a kernel, and the form there."""
    form = Form(kernel, dtype, kernel in STREAMS[1:] and R > RANKS)
    for entry, forms in ENTRIES.items():
        if form in forms:
            return entry, form
    return "streams", form


def verdict(
    device: torch.device | None, entry: str = "streams", since: float = 0.0
) -> Verdict | Provisional:
    """The verdict on an entry's forms on a device; the first question runs the trial.

    During a capture or a trace nothing is run: without a verdict the answer is Provisional.
    device: None if the process has seen none of the kind that is asked about. since: a verdict
    found before, in seconds since 1970, does not count.
    """
    found = known(device, entry)
    if found is not None and found.when >= since:
        return found
    if device is None or device.type not in ("cuda", "xpu"):
        return Verdict(reason=f"is tried on GPUs, and {device or 'none'} is here")
    asked = env.trial()
    if asked == "0":
        return Verdict(reason=f"{env.TRIAL.name}=0: no kernel serves unasked")
    since = max(since, _began if asked == "again" else 0.0)
    gpu = gpu_of(device)
    if refusal := why_not_device(gpu):
        return Verdict(reason=refusal)
    with contextlib.suppress(OSError, _Damaged):
        found = _read(_file(Path(env.cache()), gpu), entry)
    if found is None or not _holds(found, since, device):
        if devices.traced():
            return Provisional(
                "has not been tried on this GPU, and nothing is tried during a capture or a trace"
            )
        found = _tried(device, gpu, entry, since)
    _known[device, entry] = found
    return found


def known(device: torch.device | None, entry: str) -> Verdict | None:
    """The verdict if this process has one; nothing is read or run."""
    if _assumed:
        return _assumed[-1].get(entry, _NONE)
    return None if device is None else _known.get((device, entry))


@contextlib.contextmanager
def assuming(verdicts: dict[str, Verdict]) -> Iterator[None]:
    """Return a context in which these verdicts hold for every device, by entry; nothing is run."""
    _assumed.append(verdicts)
    try:
        yield
    finally:
        _assumed.pop()


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The facts that a verdict on this device rests on."""
    properties = torch.get_device_module(device).get_device_properties(device)
    facts = {
        "gpu": properties.name,
        "architecture": devices.of(device).name,
        "multiprocessors": devices.of(device).multiprocessors,
        "driver": getattr(properties, "driver_version", None) or _driver(),
        "runtime": torch.version.cuda or torch.version.hip or getattr(torch.version, "xpu", None),
        "torch": torch.__version__,
        "triton": _triton_version(),
        # An import of the package's own names is not for what lies below them.
        "lorafast": sys.modules["lorafast"].__version__,
        "kernels": _sources(),
        "format": _FORMAT,
    }
    uuid = str(getattr(properties, "uuid", ""))
    return Gpu({name: str(fact) for name, fact in facts.items()}, uuid)


def why_not_device(gpu: Gpu) -> str:
    """Why no kernel of ours runs on a device, so that none is tried there; "" if they may."""
    if env.triton_interprets():
        return "TRITON_INTERPRET=1 is set, and interprets kernels on CPU tensors alone"
    return why_not_architecture(gpu.facts["architecture"])


def why_not_architecture(name: str) -> str:
    """Why the kernels are not compiled for an architecture; "" if they are."""
    if name in (*ARCHS["nvidia"], *ARCHS["xpu"]) or name.startswith(ARCHS["amd"]):
        return ""
    nvidia, amd = (", ".join(ARCHS[vendor]) for vendor in ("nvidia", "amd"))
    return f"is compiled for NVIDIA {nvidia}, AMD {amd} and Intel's GPUs; this is {name}"


def _holds(found: Verdict, since: float, device: torch.device) -> bool:
    """True if a verdict from a file counts.

    One of a trial that was short of memory does until there is enough, and then one trial decides:
    it is short of memory no more. A process has its first verdict for good.
    """
    if found.when < since:
        return False
    return not found.was_short or devices.traced() or _free_memory(device) < ENOUGH_MEMORY


def _free_memory(device: torch.device) -> int:
    """The bytes of a device that no process uses; 0 if that is not known."""
    try:
        return torch.get_device_module(device).mem_get_info(device)[0]
    except Exception:
        return 0


def _driver() -> str:
    """The version of the GPU's driver, as the operating system gives it."""
    for file in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError):
            return Path(file).read_text().split("\n")[0].strip()
    # amdgpu and xe may be parts of the kernel.
    return platform.release()


def _triton_version() -> str:
    """triton's version, read from its file without importing it; "none" if it is not installed."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return "none"
    found = re.search(r"__version__ = ['\"](.+?)['\"]", Path(spec.origin).read_text())
    return found[1] if found else "unknown"


@functools.cache
def _sources() -> str:
    """A hash of what is tried, and of what tries it."""
    folders = (_ENGINE, _ENGINE / "kernels", _ENGINE / "backends")
    files = [file for folder in folders for file in folder.glob("*.py")]
    files += (_ENGINE / "csrc" / "launch").glob("*")
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _tried(device: torch.device, gpu: Gpu, entry: str, since: float) -> Verdict:
    """Run the trial, unless another process or thread does so meanwhile."""
    if sys.platform != "linux":
        return Verdict(reason=f"is tried on Linux only, not on {sys.platform}")
    if gpu.facts["triton"] == "none":
        return Verdict(reason="triton is not installed")
    folder, unusable = _writable_folder()
    if folder is None:
        return Verdict(reason=f"cannot be tried: {unusable}")
    file = _file(folder, gpu)
    try:
        with build_cache.locked(file.with_suffix(".lock")):
            why = unusable or f"no verdict on it is in {folder}"
            try:
                own, written = known(device, entry), _read(file, entry)
                if own is not None and own.when >= since:
                    return own
                if written is not None and _holds(written, since, device):
                    return written
                if own is not None or written is not None:
                    why = "it was to be tried again"
                if written is not None and written.was_short:
                    why = "memory ran out when it was tried, and there is enough now"
            except _Damaged as damage:
                why = str(damage)
            found = _run(folder, why, device, gpu, entry)
            # Here, for the threads that wait: not every verdict is in the file.
            _known[device, entry] = found
            return found
    except OSError as error:
        return Verdict(reason=f"could not be tried: {error}")


def _run(folder: Path, why: str, device: torch.device, gpu: Gpu, entry: str) -> Verdict:
    """Run the trial here and now, and say on stderr what happens, why, and how long it took."""
    forms = [str(form) for form in ENTRIES[entry]]
    # The child launches by csrc/launch, as this process will. It is built here: the child's time is
    # limited, and none of a trial's.
    on_nvidia = gpu.facts["architecture"].startswith("sm_")
    in_cpp = on_nvidia and not isinstance(extension.launcher(), str)
    _say(f"lorafast: trying its Triton kernels ({entry}) once on {gpu.name} because {why} ... ")
    begin, free = time.monotonic(), _free_memory(device)
    outcome = trial_process.run(gpu.uuid, entry, [*forms, SPEED], folder, in_cpp)
    took = time.monotonic() - begin
    if outcome.unusable:
        # Whatever prevents the child from beginning is no fault of a kernel: it may be gone when
        # the next process asks.
        _say(f"{took:.1f} s; none serves: {outcome.unusable}\n")
        return Verdict(reason=f"could not be tried: {outcome.unusable}")
    found = Verdict(
        outcome.reasons, outcome.rates, seconds=round(took, 1), when=time.time(), free=free
    )
    with contextlib.suppress(OSError):
        _write(_file(folder, gpu), gpu, entry, found)
    _say(f"{took:.1f} s; {_summary(forms, found)}\n")
    return found


def _summary(forms: list[str], found: Verdict) -> str:
    wrong = [f"{form}: {found.forms[form]}" for form in forms if found.forms[form]]
    right = f"{len(forms) - len(wrong)} of {len(forms)} forms are right"
    if found.forms.get(SPEED):
        wrong.append(f"{SPEED}: {found.forms[SPEED]}")
    if not wrong:
        return right
    later = f"{env.TRIAL.name}=again tries anew"
    if found.was_short:
        later += f", and so does a process that finds {ENOUGH_MEMORY >> 30} GiB free"
    return f"{right}, not {'; '.join(wrong)} ({later})"


def _say(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


class _Damaged(Exception):
    """A file that is there and holds no verdict."""


def _file(folder: Path, gpu: Gpu) -> Path:
    return folder / f"gpu-{gpu.sha16}.json"


def _writable_folder() -> tuple[Path | None, str]:
    """The folder for the verdict, or a temporary one and why; None if there is neither."""
    cache = Path(env.cache())
    try:
        if str(cache).startswith("~"):
            raise FileNotFoundError(2, "there is no home folder")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return cache, ""
    except OSError as error:
        why = f"{env.CACHE.name}: {cache} cannot be used ({error.strerror or error})"
    try:
        return build_cache.temporary_folder(), f"{why}, and no verdict is in a temporary folder"
    except OSError as error:
        return None, f"{why}, and neither can a temporary folder: {error.strerror or error}"


def _read(file: Path, entry: str) -> Verdict | None:
    """An entry of the file; None if there is none. _Damaged if the file holds something else."""
    try:
        content = json.loads(file.read_text())["entries"]
        if entry not in content:
            return None
        found = Verdict(**content[entry])
        complete = {str(form) for form in ENTRIES[entry]} <= found.forms.keys()
        if not complete or not all(isinstance(rate, float) for rate in found.rates.values()):
            raise ValueError(entry)
        return found
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _Damaged(f"{file} is damaged") from error


def _write(file: Path, gpu: Gpu, entry: str, found: Verdict) -> None:
    """Add an entry to the file, which readers see whole or not at all."""
    content: dict[str, Any] = {"gpu": gpu.facts, "entries": {}}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        content["entries"] = dict(json.loads(file.read_text())["entries"])
    content["entries"][entry] = {
        "forms": found.forms,
        "rates": found.rates,
        "seconds": found.seconds,
        "when": found.when,
        "free": found.free,
    }
    whole_file.write(file, json.dumps(content, indent=1) + "\n")
