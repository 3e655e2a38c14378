"""For pytest, inside PEFT's tests: every lora.Linear that is built is lorafast's, and its calls are counted by their way."""

import collections
import contextlib
import json
import os
from pathlib import Path

import lorafast
from lorafast.models import peft as ours

_counts = collections.Counter()
_patched = contextlib.ExitStack()


def pytest_configure(config):
    """Before any test is imported."""
    _patched.enter_context(lorafast.patch_peft())
    fast, fallback = ours.fast, ours.fallback

    def counted(layer, x):
        y = fast(layer, x)
        _counts["fast"] += 1
        return y

    def told(layer, why, *args, **kwargs):
        _counts[why] += 1
        return fallback(layer, why, *args, **kwargs)

    ours.fast, ours.fallback = counted, told


def pytest_sessionfinish(session):
    """Each worker for itself."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    Path(os.environ["CONFORMANCE_COUNTS"], f"{worker}.json").write_text(json.dumps(_counts))


def pytest_unconfigure(config):
    """As it was."""
    _patched.close()
