"""The command line of lorafast-bench: options, and the values they accept. Imports no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

import lorafast
from lorafast.bench.cases import cards, implementations, model_presets, shapes
from lorafast.bench.cases.choices import (
    BASE_FORMATS,
    DENSE,
    DROPOUT_ON,
    DTYPES,
    ENCODERS,
    ENGINES,
    ENTRIES,
    ESTIMATED_BASES,
    EXPERIMENTS,
    EXPERT_IMPLS,
    EXPERT_METHODS,
    LAYERS,
    METHODS,
    PASSES,
    ROUTINGS,
    SWITCH,
)
from lorafast.bench.option_values import count, dtype, list_of, positive, probability, whole, width
from lorafast.runtime import command_line
from lorafast.runtime.command_line import Command, one_of, with_message

_DEVICE = "cpu, cuda or cuda:INDEX (default: the GPU if there is one)"
# The path that stands for stdout.
STDOUT = Path("-")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the command and its options, as command_line.parse does."""
    return command_line.parse(*_parsers(), arguments)


def _parsers() -> tuple[Command, dict[str, Command]]:
    """Return the parser of the whole command line, and that of each command."""
    main = Command(
        "lorafast-bench", description="Measure the cost of an adapted layer, and check its results."
    )
    main.add_argument("--version", action="version", version=f"lorafast {lorafast.__version__}")
    parsers = main.add_subparsers(dest="command", metavar="COMMAND")
    commands = {}
    for name, (add_options, does) in _COMMANDS.items():
        commands[name] = parsers.add_parser(
            name, help=does, description=does, formatter_class=_Help
        )
        add_options(commands[name])
    return main, commands


def _linear(command: Command) -> None:
    _shapes(command, "1024x4096")
    add = command.add_argument
    add("--rank", type=list_of(count), default="16", metavar="R,…", help="ranks; alpha is 2R")
    help_text = "tokens per batch (default: 64,256,1024, on a GPU 512,2048,8192)"
    add("--tokens", type=list_of(count), metavar="M,…", help=help_text)
    _dropouts(command)
    help_text = "train: forward and backward; inference: forward in eval mode without gradients"
    words = {"type": list_of(one_of(PASSES)), "metavar": "PASS,…", "dest": "passes"}
    add("--pass", **words, default="train", help=help_text)
    add("--bias", action="store_true", help="a layer with a bias")
    default = "frozen,full,lorafast,eager,peft; in half precision peft-bf16 too, on a GPU "
    default += "peft+compile"
    _common(command, LAYERS, 15, default)


def _model(command: Command) -> None:
    add = command.add_argument
    help_text = f"{', '.join(ENCODERS)}: its weights come with a package"
    add("--model", type=one_of(ENCODERS), default="minilm", metavar="NAME", help=help_text)
    help_text = f"some of {', '.join(BASE_FORMATS)}: how its linears hold their weights"
    words = {"type": list_of(one_of(BASE_FORMATS)), "metavar": "FORMAT,…"}
    add("--base", **words, default=DENSE, help=help_text)
    help_text = "batch sizes to step at"
    add("--batch-sizes", type=list_of(count), default="1,4,16", metavar="B,…", help=help_text)
    add("--seq", type=count, default=16, metavar="TOKENS", help="tokens per text")
    add("--rank", type=count, default=16, metavar="R", help="one rank; alpha is 2R")
    help_text = "one, on the adapters' input"
    add("--dropout", type=probability, default=0.0, metavar="P", help=help_text)
    add("--steps", type=whole, default=200, help="training steps; 0 trains nothing")
    add("--train-batch", type=count, default=8, metavar="B", help="batch size of training")
    help_text = "learning rate of the adapters, or of the encoder under full (default: by method); "
    add("--lr", type=positive, help=help_text + "the head's is 1e-3")
    _common(command, METHODS, 7, "frozen,lorafast,peft")


def _generate(command: Command) -> None:
    add = command.add_argument
    add("--layers", type=count, default=4, metavar="L", help="layers of the Llama")
    help_text = "its width, a multiple of 64; 64 to a head"
    add("--hidden", type=width, default=512, metavar="WIDTH", help=help_text)
    add("--prompt", type=count, default=16, metavar="TOKENS", help="tokens of the prompt")
    add("--tokens", type=count, default=32, metavar="TOKENS", help="tokens to generate")
    add("--rank", type=count, default=16, metavar="R", help="one rank; alpha is 2R")
    _methods(command, LAYERS)
    help_text = f"some of {', '.join(implementations.GENERATING)}; frozen, the model without "
    help_text += "adapters, always runs"
    parse = list_of(implementations.parse_one_of(implementations.GENERATING))
    default = "frozen,lorafast,accelerated,peft,merged"
    add("--impl", type=parse, default=default, metavar="NAME,…", help=help_text)
    _measured(command, 15)
    _page(command)


def _experts(command: Command) -> None:
    _shapes(command, "2048x768")
    add = command.add_argument
    add("--experts", type=list_of(count), default="8,64", metavar="E,…", help="numbers of experts")
    add("--top-k", type=count, default=2, metavar="K", help="experts that get each token")
    help_text = f"some of {', '.join(ROUTINGS)}: how rows are distributed over experts"
    words = {"type": list_of(one_of(ROUTINGS)), "metavar": "NAME,…"}
    add("--routing", **words, default=",".join(ROUTINGS), help=help_text)
    add("--rank", type=list_of(count), default="16", metavar="R,…", help="ranks; alpha is 2R")
    add("--tokens", type=list_of(count), default="512", metavar="M,…", help="tokens per batch")
    _dropouts(command)
    _methods(command, EXPERT_METHODS, "lora,dora")
    help_text = f"some of {', '.join(EXPERT_IMPLS)}; frozen, torch's grouped product, always runs"
    parse = list_of(implementations.parse_one_of(EXPERT_IMPLS))
    add("--impl", type=parse, default="frozen,lorafast,peft", metavar="NAME,…", help=help_text)
    _measured(command, 15)
    _page(command)


def _estimate(command: Command) -> None:
    add = command.add_argument
    help_text = f"{', '.join(model_presets.PRESETS)}, a folder with a config.json, or a JSON file"
    parse = with_message(model_presets.find)
    add("--model", type=parse, default="llama3-8b", metavar="NAME", help=help_text)
    help_text = f"{', '.join(cards.CARDS)}, or {cards.CPU}"
    parse = one_of((*cards.CARDS, cards.CPU))
    add("--device", type=parse, default="h100-80g", metavar="CARD", help=help_text)
    _methods(command, METHODS)
    help_text = f"some of {', '.join(implementations.ESTIMATED)}; frozen always runs"
    parse = list_of(implementations.parse_one_of(implementations.ESTIMATED))
    default = "full,lorafast,peft,peft-bf16"
    add("--impl", type=parse, default=default, metavar="NAME,…", help=help_text)
    help_text = "texts in a batch"
    add("--batch-sizes", type=list_of(count), default="1,8,32", metavar="B,…", help=help_text)
    add("--seq", type=count, default=2048, metavar="TOKENS", help="tokens per text")
    help_text = "tokens per text of a decoder beside an encoder (default: --seq)"
    add("--target-seq", type=count, metavar="TOKENS", help=help_text)
    add("--rank", type=count, default=16, metavar="R", help="one rank; alpha is 2R; VeRA's is 256")
    help_text = "one, on the adapters' input"
    add("--dropout", type=probability, default=0.0, metavar="P", help=help_text)
    add("--dtype", type=dtype, default="bf16", help=", ".join(DTYPES))
    help_text = "off, on or both: blocks keep their input alone"
    parse = list_of(one_of(SWITCH))
    add("--checkpointing", type=parse, default="off,on", metavar="SWITCH,…", help=help_text)
    help_text = f"some of {', '.join(ESTIMATED_BASES)}: how frozen linears hold their weights"
    parse = list_of(one_of(ESTIMATED_BASES))
    add("--base", type=parse, default=DENSE, metavar="FORMAT,…", help=help_text)
    help_text = "GiB of the card for CUDA's context, cuBLAS and the allocator's gaps"
    add("--reserve", type=positive, default=1.0, metavar="GIB", help=help_text)
    help_text = "on cpu: take the same steps on this machine, too"
    add("--measure", action="store_true", help=help_text)
    help_text = f"one of {', '.join(EXPERIMENTS)}: sets what other options do not"
    add("--experiment", type=one_of(EXPERIMENTS), metavar="NAME", help=help_text)
    help_text = "write the rows here; - is stdout, and tables go to stderr"
    add("--json", type=Path, metavar="FILE", help=help_text)
    _page(command)


def _block(command: Command) -> None:
    add = command.add_argument
    add("--hidden", type=count, default=1024, metavar="WIDTH", help="width of the block")
    add("--heads", type=count, default=8, metavar="H", help="heads of its attention")
    help_text = "width of its MLP (default: 3.5 times --hidden)"
    add("--intermediate", type=count, metavar="WIDTH", help=help_text)
    add("--tokens", type=count, default=2048, metavar="M", help="tokens of one text")
    add("--rank", type=count, default=16, metavar="R", help="one rank; alpha is 2R")
    _dropouts(command)
    _methods(command, LAYERS, "lora,dora")
    help_text = f"some of {', '.join(implementations.OF_BLOCK)}; frozen always runs"
    parse = list_of(implementations.parse_one_of(implementations.OF_BLOCK))
    default = "frozen,lorafast,lorafast-mlp,peft"
    add("--impl", type=parse, default=default, metavar="NAME,…", help=help_text)
    _measured(command, 15)
    _page(command)


def _tune(command: Command) -> None:
    _shapes(command, "4096x4096")
    add = command.add_argument
    add("--rank", type=list_of(count), default="16", metavar="R,…", help="ranks")
    help_text = "tokens per batch"
    add("--tokens", type=list_of(count), default="16,512,8192", metavar="M,…", help=help_text)
    _dropouts(command)
    _measured(command, 15)


def _trial(command: Command) -> None:
    add = command.add_argument
    help_text = f"all, or some of {', '.join(ENTRIES)}"
    words_of = list_of(one_of(ENTRIES, everything="all"))
    default = "streams,cuda-bf16"
    add("--entries", type=words_of, default=default, metavar="NAME,…", help=help_text)
    add("--device", help=_DEVICE)
    add("--again", action="store_true", help="try anew what has a verdict")
    help_text = "write the verdicts here; - is stdout, and tables go to stderr"
    add("--json", type=Path, metavar="FILE", help=help_text)


def _report(command: Command) -> None:
    add = command.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="JSON files")
    _page(command)
    add("--plots", type=Path, metavar="FOLDER", help="write every figure, as SVG")


def _check(command: Command) -> None:
    add = command.add_argument
    add("folder", type=Path, metavar="DIR", help="an adapter's folder; no pickle is opened")
    parse = list_of(one_of(ENGINES))
    help_text = f"some of {', '.join(ENGINES)}"
    default = ",".join(ENGINES)
    words = {"type": parse, "dest": "engines", "metavar": "ENGINE,…"}
    add("--for", **words, default=default, help=help_text)
    help_text = "write what is found here; - is stdout, and the table goes to stderr"
    add("--json", type=Path, metavar="FILE", help=help_text)


def _env(command: Command) -> None:
    command.add_argument("--device", help=_DEVICE)


def _shapes(command: Command, default: str) -> None:
    help_text = f"or the linears of {', '.join(shapes.MODELS)}"
    command.add_argument(
        "--shape", type=list_of(shapes.parse), default=default, metavar="INxOUT,…", help=help_text
    )


def _dropouts(command: Command) -> None:
    command.add_argument(
        "--dropout",
        type=list_of(probability),
        default="0,0.05",
        metavar="P,…",
        help="on the adapter's input",
    )


def _page(command: Command) -> None:
    help_text = "write one page with figures and tables"
    command.add_argument("--html", type=Path, metavar="FILE", help=help_text)


def _common(
    command: Command, methods: tuple[str, ...], rounds: int, default_implementations: str
) -> None:
    """Add the options that linear and model share."""
    add = command.add_argument
    _methods(command, methods)
    help_text = f"some of {', '.join(implementations.BASES)}, each also as NAME+compile; "
    help_text += f"frozen always runs (default: {default_implementations})"
    add("--impl", type=list_of(implementations.parse), metavar="NAME,…", help=help_text)
    help_text = f"what lorafast's DoRA drops, {' or '.join(DROPOUT_ON)}; PEFT's is always both"
    words = {"type": one_of(DROPOUT_ON), "metavar": "WHAT"}
    add("--dropout-on", **words, default="adapter", help=help_text)
    _measured(command, rounds)
    _page(command)


def _methods(command: Command, methods: tuple[str, ...], default: str = "lora,dora,lamda") -> None:
    help_text = f"all, or some of {', '.join(methods)}"
    words_of = list_of(one_of(methods, everything="all"))
    command.add_argument(
        "--methods", type=words_of, default=default, metavar="NAME,…", help=help_text
    )


def _measured(command: Command, rounds: int) -> None:
    """Add the options of every command that measures."""
    add = command.add_argument
    add("--dtype", type=dtype, help=f"{', '.join(DTYPES)} (default: fp32, on a GPU bf16)")
    add("--device", help=_DEVICE)
    add("--threads", type=count, help="torch's threads on the CPU")
    add("--rounds", type=count, default=rounds, help="timed rounds")
    help_text = "begin no more rounds of one problem after this time, but not before 6"
    add("--seconds", type=positive, help=help_text)
    add("--warmup", type=count, default=2, help="runs before the rounds")
    add("--seed", type=whole, default=0, help="of weights, inputs, masks and the order of texts")
    help_text = "write the rows here, after every problem; - is stdout, and tables go to stderr"
    add("--json", type=Path, metavar="FILE", help=help_text)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """A formatter that shows defaults, except None and False."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


# Each command: the function that adds its options, and what it does.
_COMMANDS = {
    "linear": (
        _linear,
        "Measure one layer, by tokens, rank and dropout. Lists are separated by commas.",
    ),
    "model": (
        _model,
        "Train a whole pretrained model, then step it by batch size. "
        "Lists are separated by commas.",
    ),
    "generate": (
        _generate,
        "Let a small Llama with random weights generate text, next to the same model without "
        "adapters. Lists are separated by commas.",
    ),
    "experts": (
        _experts,
        "Measure one layer of experts, by their number, tokens and routing. Lists are separated by "
        "commas.",
    ),
    "estimate": (
        _estimate,
        "Count the memory of a whole model's training step, and the largest batch that fits a "
        "card: no GPU, no weights. Lists are separated by commas.",
    ),
    "block": (
        _block,
        "Measure one block of a Llama with random weights. Lists are separated by commas.",
    ),
    "tune": (
        _tune,
        "Check every Triton kernel, time every route of a product, and print rows for the table of "
        "routes.",
    ),
    "trial": (
        _trial,
        "Check Triton's kernels on this GPU in a child process, or read the verdict that is there. "
        "What it finds decides which kernels serve unasked.",
    ),
    "report": (_report, "Print the tables of JSON files measured before, and draw them."),
    "check": (
        _check,
        "Say what serving engines would refuse or misread in an adapter's folder. The exit status "
        "is 1 if there is anything.",
    ),
    "env": (_env, "Print the facts of this machine that are stored with every result, as JSON."),
}
