"""The verdicts on the kernels of one GPU: which forms are right there, and how fast they are.

A kernel that is wrong on a GPU may poison the process's context or hang it. Therefore they are
tried in a child process (trial_process, trial_checks), once for each GPU, driver, torch, triton,
compiler of CUDA C++ and version of the kernels. There are two sets of kernels, Triton's and those
of the `cuda` backend, with entries of their own (trial_forms): one that cannot be tried leaves the
other. The verdict is a file in LORAFAST_CACHE (trial_file). Processes of one host share it: one
runs the trial, and the others wait for its file. So all ranks with equal GPUs choose alike.

Imports no triton.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import platform
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from lorafast.engine import cuda_forms, trial_file, trial_process
from lorafast.engine.trial_forms import (
    CUDA,
    ENOUGH_MEMORY,
    ENTRIES,
    RANKS,
    STREAMS,
    TRITON,
    Form,
    Verdict,
    backend_of,
    speed_of,
    together,
)
from lorafast.runtime import build_cache, cuda_compiler, devices, env, extension
from lorafast.runtime.fallback import Provisional

# Of each vendor the architectures that Triton's kernels are compiled for; AMD's by how they begin.
ARCHS = {
    "nvidia": (
        "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120",
        "sm_121",
    ),
    "amd": ("gfx90a", "gfx942", "gfx950", "gfx11", "gfx12"),
    "xpu": ("xpu",),
}  # fmt: skip
# The sets of kernels, in words.
_WORDS = {TRITON: "Triton", CUDA: "CUDA"}
# The version of the file's content.
_FORMAT = 1
_ENGINE = Path(__file__).parent


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


def why_not(kernel: str, dtype: torch.dtype, R: int, device: torch.device, by: str = TRITON) -> str:
    """Why a backend's kernel may not serve unasked on this device, in words; "" if it may.

    The first question about a GPU runs the trial, and blocks meanwhile. A Provisional may be
    answered otherwise the next time. ValueError for an unknown LORAFAST_TRIAL.

    R: the largest rank of the call; 0 for a kernel without one.
    """
    entry, form = entry_of(kernel, dtype, R, by)
    found = verdict(device, entry)
    return found if isinstance(found, Provisional) else found.why_not(form)


@functools.lru_cache(maxsize=256)
def entry_of(kernel: str, dtype: torch.dtype, R: int = 0, by: str = TRITON) -> tuple[str, Form]:
    """The entry that has the verdict on a backend's kernel, and the form there."""
    form = Form(kernel, dtype, kernel in STREAMS[1:] and R > RANKS, by)
    for entry, forms in ENTRIES.items():
        if form in forms:
            return entry, form
    return next(entry for entry in ENTRIES if backend_of(entry) == by), form


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
    if refusal := why_not_device(gpu, backend_of(entry)):
        return Verdict(reason=refusal)
    with contextlib.suppress(OSError, trial_file.Damaged):
        found = trial_file.read(trial_file.path(Path(env.cache()), gpu.sha16), entry)
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
        "cuda compiler": _cuda_compiler(),
        # An import of the package's own names is not for what lies below them.
        "lorafast": sys.modules["lorafast"].__version__,
        "kernels": _sources(),
        "format": _FORMAT,
    }
    uuid = str(getattr(properties, "uuid", ""))
    return Gpu({name: str(fact) for name, fact in facts.items()}, uuid)


def why_not_device(gpu: Gpu, by: str = TRITON) -> str:
    """Why a backend's kernels do not run on a device, so that none is tried there; "" if they may.

    by: the backend.
    """
    if by == CUDA:
        return cuda_forms.why_not_architecture(gpu.facts["architecture"])
    if env.triton_interprets():
        return "TRITON_INTERPRET=1 is set, and interprets kernels on CPU tensors alone"
    return why_not_architecture(gpu.facts["architecture"])


def why_not_architecture(name: str) -> str:
    """Why Triton's kernels are not compiled for an architecture; "" if they are."""
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


def _cuda_compiler() -> str:
    """The name of what compiles CUDA C++ here, or why there is none."""
    found = cuda_compiler.find()
    return found if isinstance(found, str) else found.name


@functools.cache
def _sources() -> str:
    """A hash of what is tried, and of what tries it."""
    folders = (_ENGINE, _ENGINE / "kernels", _ENGINE / "backends")
    files = [file for folder in folders for file in folder.glob("*.py")]
    files += [file for name in ("launch", "cuda") for file in (_ENGINE / "csrc" / name).glob("*")]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _tried(device: torch.device, gpu: Gpu, entry: str, since: float) -> Verdict:
    """Run the trial, unless another process or thread does so meanwhile."""
    if sys.platform != "linux":
        return Verdict(reason=f"is tried on Linux only, not on {sys.platform}")
    if refusal := _why_not_now(gpu, entry):
        return Verdict(reason=refusal)
    folder, unusable = trial_file.writable_folder()
    if folder is None:
        return Verdict(reason=f"cannot be tried: {unusable}")
    file = trial_file.path(folder, gpu.sha16)
    try:
        with build_cache.locked(file.with_suffix(".lock")):
            settled, why = _settled(device, file, entry, since)
            if settled is not None:
                return settled
            entries = tuple(
                one
                for one in together(entry)
                if one == entry
                or not (
                    why_not_device(gpu, backend_of(one))
                    or _why_not_now(gpu, one)
                    or _settled(device, file, one, since)[0]
                )
            )
            found = _run(folder, unusable or why, device, gpu, entries)
            # Here, for the threads that wait: not every verdict is in the file.
            _known.update({(device, one): verdict for one, verdict in found.items()})
            return found[entry]
    except OSError as error:
        return Verdict(reason=f"could not be tried: {error}")


def _why_not_now(gpu: Gpu, entry: str) -> str:
    """Why an entry cannot be tried by this process, "" if it can; it may build the launcher."""
    if backend_of(entry) == CUDA:
        return cuda_forms.why_not()
    return "triton is not installed" if gpu.facts["triton"] == "none" else ""


def _settled(
    device: torch.device, file: Path, entry: str, since: float
) -> tuple[Verdict | None, str]:
    """An entry's verdict that was found meanwhile, or None and why a trial is due."""
    try:
        own, written = known(device, entry), trial_file.read(file, entry)
    except trial_file.Damaged as damage:
        return None, str(damage)
    if own is not None and own.when >= since:
        return own, ""
    if written is None and own is None:
        return None, f"no verdict on it is in {file.parent}"
    if written is not None and _holds(written, since, device):
        return written, ""
    if written is not None and written.was_short:
        return None, "memory ran out when it was tried, and there is enough now"
    return None, "it was to be tried again"


def _run(
    folder: Path, why: str, device: torch.device, gpu: Gpu, entries: tuple[str, ...]
) -> dict[str, Verdict]:
    """Run the trial here and now, and say on stderr what happens, why, and how long it took."""
    # The child launches by csrc/launch, as this process will. It is built here: the child's time is
    # limited, and none of a trial's.
    on_nvidia = gpu.facts["architecture"].startswith("sm_")
    in_cpp = on_nvidia and not isinstance(extension.launcher(), str)
    kernels = " and ".join(_WORDS[backend_of(entry)] for entry in entries)
    _say(f"lorafast: trying its {kernels} kernels ({', '.join(entries)}) ")
    _say(f"once on {gpu.name} because {why} ... ")
    begin, free = time.monotonic(), _free_memory(device)
    steps = {entry: [*map(str, ENTRIES[entry]), speed_of(backend_of(entry))] for entry in entries}
    outcome = trial_process.run(gpu.uuid, steps, folder, in_cpp)
    took = time.monotonic() - begin
    if outcome.unusable:
        # Whatever prevents the child from beginning is no fault of a kernel: it may be gone when
        # the next process asks.
        _say(f"{took:.1f} s; none serves: {outcome.unusable}\n")
        return dict.fromkeys(entries, Verdict(reason=f"could not be tried: {outcome.unusable}"))
    found = {
        entry: Verdict(
            {step: outcome.reasons[step] for step in own}, outcome.rates.get(own[-1], {}),
            seconds=round(took, 1), when=time.time(), free=free,
        )
        for entry, own in steps.items()
    }  # fmt: skip
    with contextlib.suppress(OSError):
        trial_file.write(trial_file.path(folder, gpu.sha16), gpu.facts, found)
    _say(f"{took:.1f} s; {_summary(found)}\n")
    return found


def _summary(found: dict[str, Verdict]) -> str:
    parts, any_wrong, any_short = [], False, False
    for entry, verdict in found.items():
        forms, speed = [str(form) for form in ENTRIES[entry]], speed_of(backend_of(entry))
        wrong = [f"{one}: {verdict.forms[one]}" for one in (*forms, speed) if verdict.forms[one]]
        right = sum(not verdict.forms[form] for form in forms)
        part = f"{right} of {len(forms)} forms are right"
        parts.append(f"{part}, not {'; '.join(wrong)}" if wrong else part)
        any_wrong, any_short = any_wrong or bool(wrong), any_short or verdict.was_short
    if len(found) > 1:
        parts = [f"{entry}: {part}" for entry, part in zip(found, parts, strict=True)]
    said = "; ".join(parts)
    if not any_wrong:
        return said
    later = f"{env.TRIAL.name}=again tries anew"
    if any_short:
        later += f", and so does a process that finds {ENOUGH_MEMORY >> 30} GiB free"
    return f"{said} ({later})"


def _say(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)
