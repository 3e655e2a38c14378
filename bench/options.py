"""The options of lorafast-bench and the words they take."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch

from lorafast import checks
from lorafast.bench import impl as impls
from lorafast.bench import shapes
from lorafast.bench.encoder import PACKAGES
from lorafast.testing import SHORT

DTYPES = {name: dtype for dtype, name in SHORT.items() if dtype != torch.float64}


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    main = argparse.ArgumentParser("lorafast-bench", description="What an adapted layer costs, and whether it is right.")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    linear = commands.add_parser("linear", help="one layer, by tokens, rank and dropout", formatter_class=_Help)
    linear.add_argument("--shape", type=_each(shapes.parse), default="1024x4096", help="INxOUT, or a model's linears, or several")
    linear.add_argument("--rank", type=_each(_count), default="16", help="ranks R")
    linear.add_argument("--tokens", type=_each(_count), help="tokens per batch M; default 64,256,1024, on a GPU 512,2048,8192")
    linear.add_argument("--dropout", type=_each(_probability), default="0,0.05", help="of the adapter's input")
    linear.add_argument("--bias", action="store_true", help="a layer with a bias")
    _common(linear, rounds=15)
    model = commands.add_parser("model", help="a whole pretrained model: trained, and stepped by batch size", formatter_class=_Help)
    model.add_argument("--model", choices=PACKAGES, default="minilm", help="which; its weights come with a package")
    model.add_argument("--batch-sizes", type=_each(_count), default="1,4,16", help="batch sizes to step at")
    model.add_argument("--seq", type=_count, default=16, help="tokens per text")
    model.add_argument("--rank", type=_count, default=16, help="rank R")
    model.add_argument("--dropout", type=_probability, default=0.0, help="of the adapters' input")
    model.add_argument("--steps", type=_whole, default=200, help="training steps; 0 trains nothing")
    model.add_argument("--train-batch", type=_count, default=8, help="batch size of training")
    model.add_argument("--lr", type=_positive, help="learning rate of the adapters; default by method")
    _common(model, rounds=7)
    report = commands.add_parser("report", help="tables and one page of files measured before", formatter_class=_Help)
    report.add_argument("files", nargs="+", type=Path, help="JSON files")
    _outputs(report, json=False)
    report.add_argument("--plots", type=Path, help="write every figure into this folder, as SVG")
    env = commands.add_parser("env", help="the machine, as it stands beside every figure", formatter_class=_Help)
    env.add_argument("--device", help="cpu, cuda or cuda:INDEX; default the GPU if there is one")
    return main


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults are told, except those that are none."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def _common(command: argparse.ArgumentParser, rounds: int) -> None:
    command.add_argument("--methods", type=_methods, default="lora,dora,lamda", help=f"all, or some of {', '.join(impls.METHODS)}")
    command.add_argument("--impl", type=_each(impls.parse), help=f"some of {', '.join(impls.BASES)}, each also as NAME+compile")
    command.add_argument("--dropout-on", choices=checks.DROPOUT_ON, default="adapter", help="what lorafast's DoRA drops")
    command.add_argument("--dtype", type=_dtype, help=f"one of {', '.join(DTYPES)}; default fp32, on a GPU bf16")
    command.add_argument("--device", help="cpu, cuda or cuda:INDEX; default the GPU if there is one")
    command.add_argument("--threads", type=_count, help="threads of torch on the CPU")
    command.add_argument("--rounds", type=_count, default=rounds, help="timed rounds")
    command.add_argument("--seconds", type=_positive, default=math.inf, help="begin no more rounds of one problem after so long")
    command.add_argument("--warmup", type=_count, default=2, help="runs before the rounds")
    command.add_argument("--seed", type=_whole, default=0, help="of every random number")
    _outputs(command)


def _outputs(command: argparse.ArgumentParser, json: bool = True) -> None:
    if json:
        command.add_argument("--json", type=Path, help="write the rows here, after every problem")
    command.add_argument("--html", type=Path, help="write one page with figures and tables here")


def _each(parse: Callable[[str], object]) -> Callable[[str], tuple]:
    """A comma-separated list; what one word stands for several things is laid flat; nothing twice."""

    def parsed(text: str) -> tuple:
        found = []
        for word in text.split(","):
            value = parse(word.strip())
            found += value if isinstance(value, tuple) and not hasattr(value, "_fields") else [value]
        return tuple(dict.fromkeys(found))

    parsed.__name__ = "list"
    return _told(parsed)


def _told(parse: Callable[[str], object]) -> Callable[[str], object]:
    """argparse keeps the words of its own errors alone."""

    def told(text: str) -> object:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return told


def _number(text: str, kind: type, least: float, what: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not value >= least or value == math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be {what}")
    return value


def _count(text: str) -> int:
    return _number(text, int, 1, "a whole number of at least 1")


def _whole(text: str) -> int:
    return _number(text, int, 0, "a whole number of at least 0")


def _positive(text: str) -> float:
    value = _number(text, float, 0, "a number above 0")
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")
    return value


@_told
def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} must be a number in [0, 1)") from None
    checks.probability(value)
    return value


@_told
def _dtype(text: str) -> torch.dtype:
    if text not in DTYPES:
        raise ValueError(f"{text!r} is none of {', '.join(DTYPES)}")
    return DTYPES[text]


@_told
def _methods(text: str) -> tuple[str, ...]:
    if text == "all":
        return tuple(impls.METHODS)
    words = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
    for word in words:
        if word not in impls.METHODS:
            raise ValueError(f"{word!r} is none of {', '.join(impls.METHODS)}, nor all")
    return words
