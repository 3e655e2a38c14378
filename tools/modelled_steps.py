"""Write the modelled time of a training step on an H200 into docs/modelled-steps.md.

    python tools/modelled_steps.py           count the kernels' loops, and write the page
    python tools/modelled_steps.py --print   print both, and write nothing

A model, and no measurement: nothing here needs a GPU. lorafast.engine.step_model is the model. What
the loops do is counted in the machine code that Triton compiles, and nvcc of csrc/cuda, and written
to kernels/loop_counts.py, from which the package reads it; the page says how all is counted. Where
nvcc is not on PATH, the counts of csrc/cuda stay as they are.
"""

# ruff: noqa: T201
from __future__ import annotations

import argparse
import importlib
import itertools
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from lorafast.engine import step_model

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "modelled-steps.md"
COUNTS = ROOT / "kernels" / "loop_counts.py"
BEGIN, END = "<!-- modelled: begin -->", "<!-- modelled: end -->"
TABLE = "LOOPS: dict[tuple[str, int], Counts] = {\n"
FORMS_TABLE = "FORMS: dict[tuple[str, int], FormCounts] = {\n"
CAPABILITY = 90
RANK, DROPOUT = 16, 0.05
SHAPES = ((1024, 1024), (4096, 4096))
TOKENS = (2048, 8192)
METHODS = ("LoRA", "DoRA", "LaMDA")
BF16 = torch.bfloat16


class Setting(NamedTuple):
    """One layer and its call."""

    method: str
    N: int
    K: int
    M: int
    p: float


def counts() -> str:
    """Return the source of kernels/loop_counts.py, with the loops as they compile now."""
    from helpers.reference_launches import CALLS, WITHOUT_LOOP, figures_of

    from lorafast.engine.kernels.configs import BLOCKS_R

    lines = []
    for call, (kernel, _) in CALLS.items():
        for R in BLOCKS_R[:1] if kernel in WITHOUT_LOOP else BLOCKS_R:
            found = figures_of(call, R, CAPABILITY)
            in_flight = round(found.bytes_in_flight or 0)
            numbers = f"{found.instructions:.4g}, {found.alu:.4g}, {in_flight}"
            lines.append(f'    ("{call}", {R}): Counts({numbers}),\n')
    before, _, rest = COUNTS.read_text().partition(TABLE)
    between, _, forms = rest.partition("}\n")[2].partition(FORMS_TABLE)
    if shutil.which("nvcc"):
        forms = _form_counts()
    return f"{before}{TABLE}{''.join(lines)}}}\n{between}{FORMS_TABLE}{forms}"


def _form_counts() -> str:
    """Return the entries of FORMS in kernels/loop_counts.py, as nvcc compiles them now."""
    from helpers.cuda_figures import FORMS, counts_of

    lines = []
    for stem, flags in FORMS:
        numbers = ", ".join(f"{number:g}" for number in counts_of(stem, flags, CAPABILITY))
        lines.append(f'    ("{stem}", {flags}): FormCounts({numbers}),\n')
    return "".join(lines) + "}\n"


def ours(setting: Setting, way: str) -> tuple[float, dict[str, str]]:
    """Return the modelled seconds of our layer's step, and which way its primitives took.

    way: "torch" for eager with masks by torch's operations, "eager" with those of the kernel,
    "chosen" among the kernels and eager, or "cuda" for the backend of that name.
    """
    from lorafast.engine import step_model
    from lorafast.engine.kernels import modelled

    layer = _layer(setting)
    if way == "cuda":
        return step_model.cuda_step(layer, modelled.H200), {}
    served = None if way == "chosen" else frozenset[str]()
    return step_model.step(layer, modelled.H200, served, way != "torch")


def _layer(setting: Setting) -> step_model.Layer:
    """Return a setting's layer, as the model takes it."""
    from lorafast.engine import step_model
    from lorafast.engine.problem import CallOptions, GradMask, LayerTensors

    method, N, K, M, p = setting

    def factor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    tensors = LayerTensors(
        factor(N, K, dtype=BF16), None, factor(RANK, K), factor(N, RANK),
        factor(RANK, RANK) if method == "LaMDA" else None,
        factor(N) if method == "DoRA" else None,
    )  # fmt: skip
    options = CallOptions(2.0, p, keep="output" if method == "DoRA" else "none")
    needs = GradMask(
        x=True, lora_A=method != "LaMDA", lora_B=True, core=method == "LaMDA",
        magnitude=method == "DoRA",
    )  # fmt: skip
    return step_model.layer_of(M, tensors, options, needs)


def frozen(setting: Setting) -> float:
    """Return the modelled seconds of the frozen layer's step: y, and the gradient of x."""
    from lorafast.engine import step_model
    from lorafast.engine.kernels import modelled

    _, N, K, M, _ = setting
    weight = step_model.Part((N, K), (K, 1), BF16)
    return step_model.frozen(M, weight, False, modelled.H200)


def peft(setting: Setting, bf16: bool) -> float | None:
    """Return the modelled seconds of PEFT's step, None for what PEFT lacks.

    bf16: the factors are bf16 too, and not fp32 as by default.
    """
    from lorafast.engine import step_model
    from lorafast.engine.kernels import modelled
    from lorafast.integrations.peft_cost import Setting as PeftSetting
    from lorafast.integrations.peft_cost import peft_seconds

    method, N, K, M, p = setting
    if method == "LaMDA":
        return None
    weight, factor = step_model.Part((N, K), (K, 1), BF16), BF16 if bf16 else torch.float32
    # PEFT's magnitude has the dtype of its factors.
    dtypes = factor, factor, factor if method == "DoRA" else None
    one = PeftSetting(M, weight, RANK, dtypes, (False, False), (True, True), p)
    return peft_seconds(one, modelled.H200)


def tables() -> str:
    """Return the tables in Markdown, one for each shape and number of tokens."""
    lines = []
    for (N, K), M in itertools.product(SHAPES, TOKENS):
        base = 1e6 * frozen(Setting("", N, K, M, 0.0))
        lines += [
            f"{M} tokens, {K} → {N}; the frozen layer's step is modelled as {base:.0f} µs:",
            "",
            "| method | dropout | torch alone | eager | chosen | cuda | PEFT | PEFT, bf16 "
            "| by kernels |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for method, p in itertools.product(METHODS, (0.0, DROPOUT)):
            lines.append(_row(Setting(method, N, K, M, p)))
        lines.append("")
    return "\n".join(lines)


def _row(setting: Setting) -> str:
    base = frozen(setting)
    (alone, _), (eager, _), (cuda, _), (chosen, took) = (
        ours(setting, way) for way in ("torch", "eager", "cuda", "chosen")
    )
    theirs = [peft(setting, bf16) for bf16 in (False, True)]
    cells = [
        f"{seconds / base:.2f}" if seconds else "–"
        for seconds in (alone, eager, chosen, cuda, *theirs)
    ]
    kernels = ", ".join(f"`{name}`" for name, way in took.items() if way == "kernels") or "–"
    return f"| {setting.method} | {setting.p:g} | {' | '.join(cells)} | {kernels} |"


def main(argv: list[str] | None = None) -> None:
    """Write the counts and the page, or print them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--print", action="store_true", help="print them, and write nothing")
    asked = parser.parse_args(argv)
    # The launches of the tests, compiled and not interpreted, are those that are counted.
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    os.environ.pop("TRITON_INTERPRET", None)
    counted = counts()
    if asked.print:
        print(counted)
        print(tables())
        return
    COUNTS.write_text(counted)
    loop_counts = importlib.reload(importlib.import_module("lorafast.engine.kernels.loop_counts"))
    from lorafast.engine import modelled_forms
    from lorafast.engine.kernels import modelled

    modelled.LOOPS = loop_counts.LOOPS
    modelled_forms.FORMS = loop_counts.FORMS
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables()}\n{END}{after}")


if __name__ == "__main__":
    main()
