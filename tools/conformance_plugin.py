"""A pytest plugin for PEFT's tests: replaces lora.Linear by lorafast's class and counts calls."""

import collections
import contextlib
import json
import os
from pathlib import Path

from conformance import OP_CALLS

import lorafast
from lorafast.integrations import peft_linear

_counts = collections.Counter()
_patches = contextlib.ExitStack()


def pytest_configure(config):
    """Patch PEFT and count calls, before any test is imported."""
    _patches.enter_context(lorafast.patch_peft())
    op_forward, peft_forward = peft_linear.op_forward, peft_linear.peft_forward
    host_forward = peft_linear.host_forward

    def count_host_call(layer, x):
        y = host_forward(layer, x)
        _counts[OP_CALLS] += y is not None
        return y

    def count_op_call(layer, x, *usual):
        y = op_forward(layer, x, *usual)
        _counts[OP_CALLS] += 1
        return y

    def count_peft_call(layer, why, *args, **kwargs):
        _counts[why] += 1
        return peft_forward(layer, why, *args, **kwargs)

    peft_linear.op_forward, peft_linear.peft_forward = count_op_call, count_peft_call
    peft_linear.host_forward = count_host_call


def pytest_sessionfinish(session):
    """Write the counts of this worker."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    Path(os.environ["CONFORMANCE_COUNTS"], f"{worker}.json").write_text(json.dumps(_counts))


def pytest_unconfigure(config):
    """Undo the patch of PEFT."""
    _patches.close()
