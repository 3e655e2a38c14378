"""The child of a trial: every form of the kernels checked on one device, then measured.

    python -m lorafast.engine.trial_checks --device UUID --entries NAME,… --out FILE

It reads from FILE which steps are left, and appends what it finds (trial_process.Report). Triton's
kernels and those of the `cuda` backend are checked alike, each by its backend's own functions. One
is right if its dropout bits are those of philox, its error against float64 obeys the error rule,
two runs agree bit for bit, and it writes its outputs whole and nothing beside them.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from lorafast.engine import error_rule, philox, trial, trial_forms, trial_process, trial_rates
from lorafast.engine.guarded_allocations import GuardedAllocations
from lorafast.engine.kernel_cases import PRODUCTS, KernelCase, Sizes, backend_named, kernel_cases
from lorafast.engine.kernels import gemm_routing, measured
from lorafast.engine.kernels.gemm_routing import Route
from lorafast.engine.trial_forms import CUDA, GEMMS, TRITON, Form
from lorafast.engine.trial_process import Report
from lorafast.runtime import devices

P = 0.05
# Of the kernel of the mask: seeds with a high word and without, and the least p, the usual one and
# the most even one; M and K.
SEEDS = (1, 2**31 - 1, 2**62 + 12345)
PROBABILITIES = (1 / philox.STEPS, P, 0.5)
MASKS = ((37, 1003), (64, 1024))
# The ranks of narrow forms and of wide ones. Triton has one block of ranks for 17 to 64. The cuda
# backend's forms are compiled apart: for up to 8, 16, 32 and 64, and for 128 in one block or more;
# and for factors that are read as they are, in whole blocks or in multiples of four ranks.
RANKS = {
    TRITON: ((16, 24), (72, 200)),
    CUDA: ((5, 8, 12, 16, 21, 32, 50, 64), (72, 256)),
}
# More tokens than these are tried with every form; so few with the one that launches another kernel
# for them.
FEW = 16
# A child whose context a kernel has poisoned ends with this status, and is started again.
POISONED = 3


def main(arguments: list[str] | None = None) -> int:
    """Do the steps that are left, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lorafast.engine.trial_checks")
    for name, kind in (("device", str), ("entries", str), ("out", Path)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    asked = parser.parse_args(arguments)
    report = Report(asked.out)
    try:
        device = find(asked.device)
    except Exception as error:
        report.write(unusable=_first_line(error))
        return 0
    # torch.empty then yields NaN. Only warn of an operation of torch that does not repeat.
    torch.use_deterministic_algorithms(True, warn_only=True)
    return steps(report, asked.entries.split(","), device, problems(device))


def find(uuid: str) -> torch.device:
    """Return the device with a UUID, ready to compute. RuntimeError if there is none here."""
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind)
        for index in range(module.device_count()):
            device = torch.device(kind, index)
            if trial.gpu_of(device).uuid == uuid:
                module.set_device(device)
                torch.zeros(1, device=device).item()
                return device
    raise RuntimeError(f"a child process does not see the device {uuid}")


def problems(device: torch.device) -> list[Sizes]:
    """The sizes that the forms are checked in, of rank 16.

    As many rows as fill the device, few rows with long sums, which are split, both in multiples of
    16, and odd sizes. The compiled code depends on whether sizes are multiples of 16, not on how
    large they are. The last ones are of few tokens, in one tile and two, with sums over K that are
    split or not.
    """
    many = 32 * (devices.of(device).multiprocessors or 128)
    return [
        Sizes(many + 64, 512, 384, 16, 0.0),
        Sizes(many + 64, 512, 384, 16, P),
        Sizes(192, 2048, 1024, 16, P),
        Sizes(203, 1019, 517, 16, P),
        *(Sizes(M, K, N, 16, 0.0) for M in (5, FEW) for K, N in ((520, 392), (4096, 72))),
    ]


def steps(report: Report, entries: list[str], device: torch.device, sizes: list[Sizes]) -> int:
    """Check the forms that are left, measure the right ones, and return the exit status."""
    forms = {str(form): form for entry in entries for form in trial_forms.ENTRIES[entry]}
    speeds = {trial_forms.speed_of(form.by): form.by for form in forms.values()}
    for step in report.left:
        report.write(begin=step)
        rates: dict[str, float] = {}
        try:
            if step in speeds:
                reasons = Report(report.path).reasons
                own = {name: form for name, form in forms.items() if form.by == speeds[step]}
                right = [form for name, form in own.items() if not reasons[name]]
                rates, reason = speed(right, reasons, device), ""
            else:
                reason = check(forms[step], device, sizes)
        except Exception as error:
            reason = _first_line(error)
            if devices.is_out_of_memory(error):
                reason = f"{trial_forms.OUT_OF_MEMORY}: {reason}"
        report.write(end=step, reason=reason, rates=rates)
        if reason and not _still_computes(device):
            return POISONED
    return 0


def speed(right: list[Form], reasons: dict[str, str], device: torch.device) -> dict[str, float]:
    """Return the constants of the forms that are right, beside eager as it will run."""
    if not right:
        return {}
    mask = reasons.get(str(Form("drop", right[0].dtype)))
    if mask is None:
        # Another entry has the verdict on it.
        mask = _why_not_mask(device, right[0].dtype)
    return trial_rates.measure(right, device, not mask)


def check(form: Form, device: torch.device, sizes: list[Sizes]) -> str:
    """Return why a form is wrong on a device, in words; "" if it is right."""
    if form.kernel == "drop":
        return check_drop(device, form.dtype, form.by)
    ran = False
    for size, factors in _settings(form, sizes):
        for case in kernel_cases(size, form.dtype, device, 7, form.by, factors):
            if runs := _runs(form, case):
                ran = True
                if reason := _check_case(case, runs, form.dtype):
                    shape = f"M={size.M} K={size.K} N={size.N} R={size.R} p={size.p:g}"
                    return f"{reason} ({' '.join((case.primitive, case.variant, shape))})"
    return "" if ran else "does not run on this device"


def _settings(form: Form, sizes: list[Sizes]) -> list[tuple[Sizes, torch.dtype]]:
    """Return the sizes that a form is checked in, and the dtypes of factors."""
    ranks, fp32 = RANKS[form.by][form.wide], torch.float32
    if not _has_few(form):
        sizes = [one for one in sizes if one.M > FEW]
    if form.by == CUDA:
        # What drops and what does not are different forms.
        shapes = [*dict.fromkeys(one._replace(p=0.0) for one in sizes)]
        pairs = [(one, fp32) for one in shapes]
        if form.dtype in trial_forms.HALVES:
            pairs.append((shapes[0], form.dtype))
        return [
            (one._replace(R=R, p=p), own) for one, own in pairs for R in ranks for p in (0.0, P)
        ]
    if form.kernel in GEMMS:
        # Their forms are many, and differ by neither.
        ranks, sizes = ranks[-1:], [one for one in sizes if one.p]
    return [(one._replace(R=R), fp32) for one in sizes for R in ranks]


def _has_few(form: Form) -> bool:
    """True if a form's primitive is computed otherwise of few tokens: by decode of the backend."""
    of_decode = form.by == CUDA and form.kernel == "low_rank_add"
    return of_decode and not form.wide and form.dtype in trial_forms.HALVES


def _check_case(
    case: KernelCase, runs: list[Callable[[], list[torch.Tensor]]], dtype: torch.dtype
) -> str:
    truth, chain = case.chain(torch.float64), case.chain(dtype)
    for run in runs:
        with GuardedAllocations() as guarded:
            found = error_rule.compare(run, truth, chain, dtype)
        if not guarded.whole:
            return "writes beside its outputs"
        if found.why_wrong:
            return found.why_wrong
    return ""


def _runs(form: Form, case: KernelCase) -> list[Callable[[], list[torch.Tensor]]]:
    """The runs of a case that launch the form's kernel."""
    if form.by == CUDA:
        # Its products are torch's, and what it adds to them is one kernel's.
        kernel = "low_rank_add" if case.primitive in PRODUCTS else case.primitive
        differs = not case.sizes.p or case.primitive in measured.DROPPED
        return [case.run] if kernel == form.kernel and differs else []
    if form.kernel == case.primitive:
        return [case.run]
    if case.query is None:
        return []
    routes: list[Route] = []
    if form.kernel == "low_rank_add" and case.query.masked:
        routes = [Route("low first"), Route("base first")]
    elif form.kernel in GEMMS:
        wanted = form.kernel.removeprefix("gemm_")
        routes = [one for one in gemm_routing.candidates(case.query) if one.form == wanted]
        if not case.query.aligned:
            # One tile stands for all: what differs is how the ends are masked.
            routes = routes[:1]
    return [functools.partial(_forced, case, route) for route in routes]


def _forced(case: KernelCase, route: Route) -> list[torch.Tensor]:
    with gemm_routing.forcing(route):
        return case.run()


def check_drop(device: torch.device, dtype: torch.dtype, by: str = TRITON) -> str:
    """Return why a backend's kernel of the mask drops other elements than philox does, or ""."""
    backend, into = backend_named(by), _drop_into(by)
    for seed, p in ((seed, p) for seed in SEEDS for p in PROBABILITIES):
        for M, K in MASKS:
            # The bits by torch on the CPU, whose integers no GPU has to be trusted for.
            kept = philox.keep_mask(torch.tensor([seed]), p, slice(0, M), K)
            x = torch.where(kept, 1.0, torch.nan).to(device, dtype)
            on_device, scale = torch.tensor([seed], device=device), philox.scale(p)
            with GuardedAllocations() as guarded:
                results = [backend.drop(x, on_device, p)]
                # Rows that lie beyond element 2³¹ of their activation.
                first = 2**31 // K + 1
                results.append(torch.empty_like(x))
                into(results[-1], torch.ones_like(x), on_device, p, first, scaled=False)
                if by == TRITON:
                    # A masked product is fp32 beside any dtype; `cuda` has a kernel for that.
                    results += [torch.empty_like(x), torch.ones_like(x)]
                    into(results[-2], x.float(), on_device, p)
                    into(results[-1], x.float(), on_device, p, accumulate=True)
            far = philox.keep_mask(torch.tensor([seed]), p, slice(first, first + M), K)
            truths = kept * scale, far * 1.0, kept * scale, 1 + kept * scale
            for found, truth in zip(results, truths, strict=False):
                if not torch.equal(found.cpu(), truth.to(dtype)):
                    return f"drops other elements than philox (seed={seed} p={p:g} M={M} K={K})"
            if not guarded.whole:
                return "writes beside its outputs"
    return ""


def _drop_into(by: str) -> Callable:
    """Return the launch of a backend's kernel of the mask."""
    if by == CUDA:
        return importlib.import_module("lorafast.engine.cuda_kernels").drop_into
    return importlib.import_module("lorafast.engine.kernels.drop").drop


def _why_not_mask(device: torch.device, dtype: torch.dtype) -> str:
    """Return why eager cannot drop by Triton's kernel; "" if it can."""
    try:
        return check_drop(device, dtype)
    except Exception as error:
        # Without Triton, or where its kernel has no verdict yet and fails.
        return _first_line(error)


def _still_computes(device: torch.device) -> bool:
    """False if an error has poisoned the context of the process."""
    try:
        return torch.ones(2, device=device).sum().item() == 2
    except Exception:
        return False


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:300] if lines else type(error).__name__


if __name__ == "__main__":
    # A child whose parent was killed ends by itself, even while it hangs in a driver's call.
    faulthandler.dump_traceback_later(trial_process.LIMIT + 10, exit=True)
    sys.exit(main())
