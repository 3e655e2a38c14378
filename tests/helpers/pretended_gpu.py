"""A GPU that is not there, and a stand-in for the child that tries kernels on it."""

import sys
from pathlib import Path

from lorafast.engine import trial, trial_process

FACTS = {"gpu": "Pretended 9000", "triton": "3.7.1", "driver": "1.2"}
CHILD = (sys.executable, str(Path(__file__).parent / "trial_child.py"))


class Pretended:
    """What a test changes and asks of the pretended GPU's trial."""

    def __init__(self, monkeypatch, folder):
        self.monkeypatch, self.cache = monkeypatch, folder / "cache"
        self.runs_file = folder / "runs"
        self.facts = dict(FACTS)
        monkeypatch.setenv("LORAFAST_CACHE", str(self.cache))
        monkeypatch.setenv("STAND_IN_RUNS", str(self.runs_file))
        monkeypatch.setattr(trial, "gpu_of", lambda device: trial.Gpu(dict(self.facts), "GPU-1"))
        monkeypatch.setattr(trial_process, "COMMAND", CHILD)
        self.does("")
        self.forget()

    def does(self, deeds):
        """Let the child do these deeds."""
        self.monkeypatch.setenv("STAND_IN", deeds)

    def forget(self):
        """Be a process that has asked nothing yet."""
        self.monkeypatch.setattr(trial, "_known", {})

    @property
    def runs(self):
        """A line of every child that has run."""
        return self.runs_file.read_text().splitlines() if self.runs_file.exists() else []

    @property
    def file(self):
        """The file of the verdict."""
        return self.cache / f"gpu-{trial.Gpu(self.facts, '').sha16}.json"
