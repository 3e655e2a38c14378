"""A GPU that is not there, and a stand-in for the child that tries kernels on it."""

import sys
import time
from pathlib import Path

from lorafast.engine import host, trial, trial_process
from lorafast.engine.kernels import measured
from lorafast.engine.trial_forms import CUDA, ENTRIES, GEMMS, TRITON, Verdict, backend_of
from lorafast.runtime import devices

FACTS = {"gpu": "Pretended 9000", "architecture": "sm_90", "triton": "3.7.1", "driver": "1.2"}
CHILD = (sys.executable, str(Path(__file__).parent / "trial_child.py"))


# What the child may be told to do at a form, and what is then said of it.
DEEDS = {
    "crash": "crashed by SIGSEGV",
    "kill": "crashed by SIGKILL, as by a system without memory",
    "raise": "crashed with status 1: RuntimeError: no luck with project bfloat16",
    "half": "crashed by SIGSEGV",
    "out of memory": "out of memory",
    "errs 3 times what eager errs": "errs 3 times what eager errs",
    "poisoned": "poisoned",
}


class Pretended:
    """What a test changes and asks of the pretended GPU's trial."""

    def __init__(self, monkeypatch, folder):
        self.monkeypatch, self.cache = monkeypatch, folder / "cache"
        self.runs_file = folder / "runs"
        self.facts = dict(FACTS)
        monkeypatch.setenv("LORAFAST_CACHE", str(self.cache))
        # A trial builds the host path where there is none, which takes a minute.
        monkeypatch.setenv("LORAFAST_HOST", "0")
        monkeypatch.setenv("STAND_IN_RUNS", str(self.runs_file))
        monkeypatch.setattr(trial, "gpu_of", lambda device: trial.Gpu(dict(self.facts), "GPU-1"))
        monkeypatch.setattr(trial_process, "COMMAND", CHILD)
        # It would be built anew into that folder.
        monkeypatch.setattr(host, "linear", host._declined)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        self.does("")
        self.forget()

    def does(self, deeds):
        """Let the child do these deeds."""
        self.monkeypatch.setenv("STAND_IN", deeds)

    def forget(self):
        """Be a process that has asked nothing yet."""
        self.monkeypatch.setattr(trial, "_known", {})
        self.monkeypatch.setattr(trial, "_began", time.time())

    @property
    def runs(self):
        """A line of every child that has run."""
        return self.runs_file.read_text().splitlines() if self.runs_file.exists() else []

    @property
    def file(self):
        """The file of the verdict."""
        return self.cache / f"gpu-{trial.Gpu(self.facts, '').sha16}.json"


def take_tensors_for(arch, monkeypatch):
    """Take all tensors that have memory for those of a device of an architecture."""
    of = devices.of
    # The host path tells a CPU by its tensors.
    monkeypatch.setattr(host, "linear", host._declined)
    monkeypatch.setattr(devices, "of", lambda device: of(device) if device.type == "meta" else arch)


# Seconds for a stream's bytes at 4 TB/s by our kernels, and by eager as many times more.
_BY_EAGER = {
    "project": 1.0, "project dropped": 4.0, "grad_project": 1.0, "grad_project dropped": 4.0,
    "grad_output": 2.0, "grad_output kept": 6.0, "low_rank_add dropped": 4.0, "row_norm": 9.0,
}  # fmt: skip
# What the cuda backend adds to products, and its drop.
_ADDED_BY_EAGER = {
    "linear": 0.8, "linear gained": 3.0, "linear gained kept": 4.0, "grad_input": 0.8,
    "grad_input dropped": 4.0, "drop dropped": 1.0,
}  # fmt: skip


def rates(gemm=0.95, **by_eager):
    """Constants as a trial might measure them on a large GPU.

    gemm: the speed of both forms of our GEMM. by_eager: how many times longer eager takes than a
    kernel, by the stream's name with _ for a space, where that is to be changed.
    """
    found = {measured.COPY: 4e12, measured.PRODUCT: 7e14, measured.SMALL_PRODUCT: 5e14}
    found |= dict.fromkeys(GEMMS, gemm)
    for name, times in _BY_EAGER.items():
        times = by_eager.get(name.replace(" ", "_"), times)
        found[measured.rate(name, measured.KERNELS)] = 4e12
        found[measured.rate(name, measured.EAGER)] = 4e12 / times
        found[measured.least(name, measured.KERNELS)] = 20e-6
        found[measured.least(name, measured.EAGER)] = 20e-6 * min(times, 2)
    return found


def verdicts(wrong=(), **changes):
    """A verdict for every entry of Triton's: all forms are right but those in `wrong`, a dict of
    reasons.
    """
    return _verdicts(TRITON, wrong, rates(**changes))


def cuda_verdicts(wrong=(), **times):
    """Verdicts for the entries of the cuda backend, which takes 0.8 of the seconds of Triton's
    kernels in `rates`, or as `times` says of a stream by its name with _ for a space. What it adds
    to dx is a small part of a product, and takes 0.2 of them.
    """
    times = {"grad_input_dropped": 0.2} | times
    found = {measured.COPY: 4e12, measured.PRODUCT: 7e14, measured.SMALL_PRODUCT: 5e14}
    for name, by_eager in (_BY_EAGER | _ADDED_BY_EAGER).items():
        found[measured.rate(name, measured.CUDA)] = 4e12 / times.get(name.replace(" ", "_"), 0.8)
        found[measured.rate(name, measured.EAGER)] = 4e12 / by_eager
    del found[measured.rate("low_rank_add dropped", measured.CUDA)]
    return _verdicts(CUDA, wrong, found)


def _verdicts(by, wrong, constants):
    wrong, found = dict(wrong), {}
    for entry, forms in ENTRIES.items():
        if backend_of(entry) == by:
            tried = {form.kernel for form in forms}
            known = {name: rate for name, rate in constants.items() if name not in {*GEMMS} - tried}
            found[entry] = Verdict({str(form): wrong.get(str(form), "") for form in forms}, known)
    return found
