"""A program that stands in for the child of a trial, and does as $STAND_IN says.

STAND_IN is a list of "step=deed" separated by semicolons; a step without a deed is right. "start"
is every run's first step, "restart" comes next in one that goes on. Each run of the program adds a
line to $STAND_IN_RUNS.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from lorafast.engine import trial_process
from lorafast.engine.trial_forms import SPEED

RATES = {"copy": 2.5e12}


def main():
    parser = argparse.ArgumentParser()
    for name in ("device", "entries", "out"):
        parser.add_argument(f"--{name}", required=True)
    asked = parser.parse_args()
    with open(os.environ["STAND_IN_RUNS"], "a") as runs:
        runs.write(f"{asked.device} {asked.entries} {os.environ['LORAFAST_TRIAL']}\n")
    deeds = dict(one.split("=") for one in filter(None, os.environ["STAND_IN"].split(";")))
    report = trial_process.Report(Path(asked.out))
    do(deeds.get("start"), report, "start")
    if report.reasons:
        do(deeds.get("restart"), report, "restart")
    for step in report.left:
        report.write(begin=step)
        reason = do(deeds.get(step), report, step) or ""
        rates = RATES if step.endswith(SPEED) else {}
        report.write(end=step, reason=reason, rates=rates)
        if reason == "poisoned":
            sys.exit(3)


def do(deed, report, step):
    """Do what is to happen in a step, and return why the step is wrong."""
    if deed == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif deed == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif deed == "raise":
        raise RuntimeError(f"no luck with {step}")
    elif deed == "hang":
        time.sleep(600)
    elif deed == "half":
        # Half a line of the next report, as of a process that is ended while it writes.
        report.path.open("a").write('{"end": "' + step)
        os.kill(os.getpid(), signal.SIGSEGV)
    elif deed == "unusable":
        report.write(unusable="the device is not visible")
        sys.exit(0)
    elif deed == "slow":
        time.sleep(1)
    else:
        return deed
    return None


if __name__ == "__main__":
    main()
