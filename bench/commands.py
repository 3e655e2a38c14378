"""The commands of lorafast-bench. Results go to stdout and files, progress and errors to stderr."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import torch

from lorafast.bench import machine, options, output, trial
from lorafast.bench.cases import (
    block,
    estimate,
    experts,
    generate,
    implementations,
    linear,
    model,
)
from lorafast.bench.cases.candidate import Problem
from lorafast.bench.cases.cards import CPU
from lorafast.bench.cases.choices import EXPERIMENTS
from lorafast.bench.cases.generate_task import Size
from lorafast.bench.errors import BenchError
from lorafast.bench.options import STDOUT
from lorafast.bench.report import html_report, plots, tables
from lorafast.bench.report.progress import Progress
from lorafast.bench.report.record import Record, Results
from lorafast.checkpoint import serving
from lorafast.engine import checks
from lorafast.runtime import extras
from lorafast.testing import SHORT

# Exit status.
RIGHT, WRONG, FAILED, INTERRUPTED = 0, 1, 2, 130

# Implementations that run by default.
_LAYER_DEFAULTS = ("frozen", "full", "lorafast", "eager", "peft")
_MODEL_DEFAULTS = ("frozen", "lorafast", "peft")
_DTYPES = {name: dtype for dtype, name in SHORT.items()}
_GPU_TOKENS, _CPU_TOKENS = (512, 2048, 8192), (64, 256, 1024)


def run(asked: argparse.Namespace, arguments: list[str]) -> int:
    """Run one command and return its exit status. arguments: the words that were parsed.

    0: no row is wrong. 1: a row is wrong. 2: the request cannot be served, or a file cannot be
    written. 130: interrupted; finished rows are kept.
    """
    try:
        return _COMMANDS[asked.command](asked, arguments)
    except BenchError as error:
        output.complain(f"lorafast-bench {asked.command}: {error}", style=None)
        return FAILED


def _linear(asked: argparse.Namespace, arguments: list[str]) -> int:
    device, dtype = _prepare(asked)
    tokens = asked.tokens or (_GPU_TOKENS if device.type == "cuda" else _CPU_TOKENS)
    # Inference drops nothing.
    dropouts = {"train": asked.dropout, "inference": (0.0,)}
    problems = tuple(
        Problem(shape.K, shape.N, R, M, p, dtype, device, asked.bias, one == "inference")
        for one in asked.passes
        for shape, R, p, M in itertools.product(asked.shape, asked.rank, dropouts[one], tokens)
    )
    plan = linear.Plan(
        problems=problems,
        impls=asked.impl or _default_impls(device, dtype),
        methods=asked.methods,
        dropout_on=asked.dropout_on,
        **_pace(asked),
    )
    with Progress(linear.progress_total(plan)) as progress:
        return _collect(linear.run(plan, progress), asked, device, arguments, progress)


def _model(asked: argparse.Namespace, arguments: list[str]) -> int:
    device, dtype = _prepare(asked)
    plan = model.Plan(
        model=asked.model,
        impls=asked.impl or tuple(map(implementations.parse, _MODEL_DEFAULTS)),
        methods=asked.methods,
        batch_sizes=asked.batch_sizes,
        seq=asked.seq,
        device=device,
        dtype=dtype,
        R=asked.rank,
        dropout=asked.dropout,
        dropout_on=asked.dropout_on,
        steps=asked.steps,
        train_batch=asked.train_batch,
        lr=asked.lr,
        **_pace(asked),
        base_formats=asked.base,
    )
    with Progress(model.progress_total(plan)) as progress:
        return _collect(model.run(plan, progress), asked, device, arguments, progress)


def _generate(asked: argparse.Namespace, arguments: list[str]) -> int:
    device, dtype = _prepare(asked)
    plan = generate.Plan(
        size=Size(asked.layers, asked.hidden),
        prompt=asked.prompt,
        tokens=asked.tokens,
        impls=asked.impl,
        methods=asked.methods,
        R=asked.rank,
        device=device,
        dtype=dtype,
        **_pace(asked),
    )
    with Progress(generate.progress_total(plan)) as progress:
        return _collect(generate.run(plan, progress), asked, device, arguments, progress)


def _experts(asked: argparse.Namespace, arguments: list[str]) -> int:
    device, dtype = _prepare(asked)
    sizes = itertools.product(
        asked.shape, asked.rank, asked.experts, asked.routing, asked.dropout, asked.tokens
    )
    plan = experts.Plan(
        problems=experts.problems(sizes, dtype, device, asked.top_k),
        impls=asked.impl,
        methods=asked.methods,
        **_pace(asked),
    )
    with Progress(experts.progress_total(plan)) as progress:
        return _collect(experts.run(plan, progress), asked, device, arguments, progress)


def _estimate(asked: argparse.Namespace, arguments: list[str]) -> int:
    if asked.experiment:
        # What the user says beside the experiment's name comes later, and counts.
        words = [*EXPERIMENTS[asked.experiment], *arguments[1:]]
        asked = options.parse(["estimate", *words])
    output.check_files(asked.json, asked.html)
    if asked.measure and asked.device != CPU:
        raise BenchError(f"--measure: what is taken on this machine is compared on --device {CPU}")
    name, preset = asked.model
    plan = estimate.Plan(
        name=name,
        preset=preset,
        impls=asked.impl,
        methods=asked.methods,
        batch_sizes=asked.batch_sizes,
        seq=asked.seq,
        target=asked.target_seq or asked.seq,
        card=asked.device,
        dtype=_DTYPES[asked.dtype],
        R=asked.rank,
        dropout=asked.dropout,
        checkpointing=tuple(word == "on" for word in asked.checkpointing),
        base_formats=asked.base,
        reserve=int(asked.reserve * (1 << 30)),
        measure=asked.measure,
    )
    if preset.targets:
        output.complain(f"{name}: adapters on {preset.layers}; experts are frozen", style=None)
    device, facts = torch.device("cpu"), {"device_name": estimate.NO_DEVICE}
    with Progress(estimate.progress_total(plan)) as progress:
        groups = estimate.run(plan, progress)
        return _collect(groups, asked, device, arguments, progress, facts)


def _block(asked: argparse.Namespace, arguments: list[str]) -> int:
    device, dtype = _prepare(asked)
    intermediate = asked.intermediate or asked.hidden * 7 // 2
    plan = block.Plan(
        size=block.Size(asked.hidden, asked.heads, intermediate),
        tokens=asked.tokens,
        impls=asked.impl,
        methods=asked.methods,
        dropouts=asked.dropout,
        R=asked.rank,
        device=device,
        dtype=dtype,
        **_pace(asked),
    )
    with Progress(block.progress_total(plan)) as progress:
        return _collect(block.run(plan, progress), asked, device, arguments, progress)


def _tune(asked: argparse.Namespace, arguments: list[str]) -> int:
    device, dtype = _prepare(asked)
    try:
        with extras.required("triton"):
            from lorafast.bench import tune
            from lorafast.engine.kernel_cases import backend_named

            backend_named("triton")
    except ImportError as error:
        raise BenchError(f"its kernels cannot be loaded: {error}") from error
    tune.check_device(device)
    problems = itertools.product(asked.shape, asked.rank, asked.dropout, asked.tokens)
    sizes = [tune.Sizes(M, shape.K, shape.N, R, p) for shape, R, p, M in problems]
    timings, chosen = [], {}
    facts = machine.environment(device, output.command_line(arguments))
    with Progress(tune.progress_total(sizes)) as progress:
        pace = tune.Pace(asked.rounds, asked.warmup, asked.seconds or math.inf)
        for some, rows in tune.run(sizes, dtype, device, pace, asked.seed, progress):
            timings.append(some)
            chosen |= rows
            text = tune.document(facts, list(itertools.chain(*timings)), chosen)
            if asked.json and asked.json != STDOUT:
                asked.json.write_text(text)
    if asked.json == STDOUT:
        output.print_json(text)
    console = output.tables_console(asked.json)
    tables.show([tune.table(some) for some in timings], console, tune.LEGEND)
    lines = ["rows for TABLE in kernels/gemm_routing.py:", *tune.lines(chosen)]
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    return WRONG if any(one.status == "wrong" for some in timings for one in some) else RIGHT


def _trial(asked: argparse.Namespace, arguments: list[str]) -> int:
    output.check_files(asked.json, None)
    device = machine.device(asked.device)
    found = trial.run(device, asked.entries, asked.again)
    facts = machine.environment(device, output.command_line(arguments))
    if asked.json == STDOUT:
        output.print_json(trial.document(facts, found))
    elif asked.json:
        asked.json.write_text(trial.document(facts, found))
    tables.show(trial.tables(found), output.tables_console(asked.json), trial.LEGEND)
    return RIGHT if trial.all_right(found) else WRONG


def _report(asked: argparse.Namespace, _: list[str]) -> int:
    results = [Results.read(file) for file in asked.files]
    if asked.html:
        output.check_files(None, asked.html)
        asked.html.write_text(html_report.page(results))
    if asked.plots:
        output.make_folder("--plots", asked.plots)
        for name, figure in plots.figures(results).items():
            (asked.plots / f"{name}.svg").write_text(plots.svg(figure))
    tables.show(tables.tables(results), output.tables_console(), tables.legend(results))
    return _verdict([record for one in results for record in one.records])


def _check(asked: argparse.Namespace, _: list[str]) -> int:
    output.check_files(asked.json, None)
    try:
        found = serving.check(asked.folder, asked.engines)
    except (ValueError, OSError) as error:
        raise BenchError(str(error)) from error
    text = json.dumps({"findings": [one._asdict() for one in found]}, indent=1) + "\n"
    if asked.json == STDOUT:
        output.print_json(text)
    elif asked.json:
        asked.json.write_text(text)
    console = output.tables_console(asked.json)
    for engine in asked.engines:
        own = [one for one in found if one.engine == engine]
        lines = [f"{one.verdict}: {one.what}. {one.remedy}" for one in own]
        known = "nothing known is refused or misread"
        said = "\n".join(f"  {line}" for line in lines or [known])
        console.print(f"{engine}\n{said}", markup=False, soft_wrap=True)
    return WRONG if any(one.verdict != serving.UNSURE for one in found) else RIGHT


def _env(asked: argparse.Namespace, arguments: list[str]) -> int:
    facts = machine.environment(machine.device(asked.device), output.command_line(arguments))
    output.tables_console().print_json(json.dumps(facts))
    return RIGHT


def _pace(asked: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of a plan that say how long to measure, and its seed."""
    seconds = asked.seconds or math.inf
    return {
        "rounds": asked.rounds, "seconds": seconds, "warmup": asked.warmup, "seed": asked.seed,
    }  # fmt: skip


def _prepare(asked: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Return device and dtype, after checking the files to write and the dropout."""
    output.check_files(asked.json, getattr(asked, "html", None))
    dropout = getattr(asked, "dropout", ())
    for p in dropout if isinstance(dropout, tuple) else (dropout,):
        try:
            checks.probability(p)
        except ValueError as error:
            raise BenchError(f"--dropout: {error}") from error
    device = machine.device(asked.device)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    default = torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, _DTYPES[asked.dtype] if asked.dtype else default


def _default_impls(device: torch.device, dtype: torch.dtype) -> tuple[implementations.Impl, ...]:
    """Return the implementations that `linear` measures by default.

    peft-bf16 is left out where it is the same as peft, and compiled PEFT where compiling takes
    longer than the rounds.
    """
    names = _LAYER_DEFAULTS
    if dtype in (torch.bfloat16, torch.float16):
        names += ("peft-bf16",)
    if device.type == "cuda":
        names += ("peft+compile",)
    return tuple(map(implementations.parse, names))


def _collect(
    groups: Iterator[list[Record]],
    asked: argparse.Namespace,
    device: torch.device,
    arguments: list[str],
    progress: Progress,
    more_facts: dict | None = None,
) -> int:
    """Collect, write and show the rows; an interruption keeps those that are finished."""
    facts = machine.environment(device, output.command_line(arguments))
    results = Results(facts | (more_facts or {}), [])
    interrupted, unwritten = False, []
    file = None if asked.json == STDOUT else asked.json
    try:
        for rows in groups:
            results.records += rows
            # Written after every problem, because the next one may crash the machine. Only the last
            # failure is reported: a full disk may have space later.
            unwritten = output.write("--json", file, results.write)
    except KeyboardInterrupt:
        interrupted = True
    progress.end()
    # Before the tables, because the reader of a pipe may close it.
    if results.records:
        page = html_report.page([results]) if asked.html else ""
        unwritten += output.write("--html", asked.html, lambda path: path.write_text(page))
    if asked.json == STDOUT:
        output.print_json(results.text())
    console = output.tables_console(asked.json)
    tables.show(tables.tables([results]), console, tables.legend([results]))
    for complaint in unwritten:
        output.complain(complaint)
    if interrupted:
        output.complain(f"interrupted; {len(results.records)} finished rows are kept", style=None)
        return INTERRUPTED
    return _verdict(results.records) or (FAILED if unwritten else RIGHT)


def _verdict(records: list[Record]) -> int:
    """Print every wrong row, and return the exit status."""
    wrong = [record for record in records if record.status == "wrong"]
    for record in wrong:
        output.complain(f"WRONG {record.label}: {record.reason}")
    return WRONG if wrong else RIGHT


_COMMANDS = {
    "linear": _linear,
    "model": _model,
    "generate": _generate,
    "experts": _experts,
    "block": _block,
    "estimate": _estimate,
    "tune": _tune,
    "trial": _trial,
    "report": _report,
    "check": _check,
    "env": _env,
}
