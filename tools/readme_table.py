"""Write the generated tables of README.md and docs/: measured results, methods, variables.

    python tools/readme_table.py            rewrite every table in place
    python tools/readme_table.py --check    print the files that differ; exit status 1 if any does

A table stands between two comments, `<!-- table: NAME -->` and `<!-- end of table -->`. Results
come from every bench/results/*.json of one device, whatever file a record is in, by the name of the
run that measured them. The rows of every table are chosen here.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from results import (
    ESTIMATED,
    NEWER,
    RESULTS,
    Record,
    highest,
    losses,
    measured,
    median,
    size,
)

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- table: (?P<name>[^>]+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)

Row = list[str]

# The implementations of one layer that a reader compares first.
LAYER = ("frozen", "lorafast lora", "eager lora", "peft lora", "lorafast dora", "eager dora")
LAYER += ("peft dora", "lorafast lamda", "eager lamda")
SHAPES = ((1024, 4096), (2048, 2048))
DTYPES = ("bf16", "fp32")
METHODS = ("lora", "lamda", "dora")
# The implementations of the encoder's table, and those of a PEFT model before and after accelerate.
ENCODER = ("frozen", "lorafast lora", "peft lora", "lorafast dora", "peft dora", "lorafast lamda")
ACCELERATED = ("peft lora", "accelerated lora", "peft dora", "accelerated dora")

# The implementations whose memory is estimated, the methods, and what PEFT lacks of them.
MEMORY = {"peft": "PEFT", "peft-bf16": "PEFT, bf16 adapters", "lorafast": "lorafast"}
MEMORY_METHODS = ("lora", "lora-fa", "vera", "adalora", "dora", "lamda")
NOT_IN_PEFT = ("peft lamda", "peft-bf16 lamda")


def main(arguments: list[str]) -> int:
    """Rewrite or check every page. Returns the exit status."""
    if "--check" not in arguments:
        write_figures()
    changed = [path for path in pages() if rendered(text := path.read_text()) != text]
    for path in changed:
        sys.stdout.write(f"{path.relative_to(ROOT)}\n")
        if "--check" not in arguments:
            path.write_text(rendered(path.read_text()))
    return int(bool(changed) and "--check" in arguments)


def pages() -> Iterator[Path]:
    """Every page that may hold a table."""
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").rglob("*.md"))


def rendered(text: str) -> str:
    """The page with each of its tables as it is to be."""
    return MARKED.sub(lambda found: f"{found[1]}\n{table(found['name'])}\n\n{found[3]}", text)


def table(name: str) -> str:
    """The table of this name. KeyError if there is none."""
    kind, _, argument = name.partition(" ")
    return TABLES[kind](argument) if argument else TABLES[kind]()


def grid(head: Row, rows: Iterable[Row]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _name(label: str) -> str:
    return f"**{label}**" if label.startswith(("lorafast", "accelerated")) else label


def summary_table() -> str:
    """One layer where an adapter costs most: a short step with dropout, in both dtypes."""
    problem = {"bench": "linear", "K": 1024, "N": 4096, "M": 2048, "R": 16, "dropout": 0.05}
    head = ["1024 → 4096, 2048 tokens", "step ÷ frozen, bf16", "fp32"]
    head += ["kept for backward, bf16", "peak of a step, bf16", "error ratio, bf16"]

    def row(label: str) -> Row:
        bf16, fp32 = (
            measured(label, f"dropout-{dtype}", dtype=dtype, **problem) for dtype in DTYPES
        )
        ratios = [median(found, "ratio_to_frozen") for found in (bf16, fp32)]
        sizes = [size(bf16, field) for field in ("saved_bytes", "peak_bytes")]
        return [_name(label), *ratios, *sizes, highest(bf16, "error_ratio")]

    return grid(head, map(row, LAYER))


def layer_table() -> str:
    """One layer without dropout and with it, every implementation, fp32."""
    labels = ("frozen", "full", "lorafast lora", "peft lora", "lorafast dora", "peft dora")
    head = ["1024 → 4096, M = 1024, fp32", "error ratio", "× frozen", "kept", "peak"]
    head += ["× frozen, dropout 0.05", "kept", "peak"]

    def row(label: str) -> Row:
        problem = {"bench": "linear", "K": 1024, "N": 4096, "M": 1024, "R": 16, "dtype": "fp32"}
        both = [measured(label, "layer", dropout=p, **problem) for p in (0.0, 0.05)]
        cells = [_name(label), highest([*both[0], *both[1]], "error_ratio")]
        for found in both:
            cells += [median(found, "ratio_to_frozen"), size(found, "saved_bytes")]
            cells.append(size(found, "peak_bytes"))
        return cells

    return grid(head, map(row, (*labels, "lorafast lamda")))


def _dropout_problems() -> Iterator[tuple[str, dict[str, Any]]]:
    for dtype in DTYPES:
        for K, N in SHAPES:
            problem = {"bench": "linear", "K": K, "N": N, "M": 2048, "R": 16, "dropout": 0.05}
            yield f"{K} → {N}, {dtype}", problem | {"dtype": dtype}


def dropout_table() -> str:
    """2048 tokens with dropout, by shape and dtype: medians over runs, and the upper ends."""
    head = ["M = 2048, dropout 0.05", *(f"**{method}**" for method in METHODS)]
    head += ["eager lora", "eager dora", "peft lora", "peft dora", "lower bound, lora"]

    def row(label: str, problem: dict[str, Any]) -> Row:
        run = f"dropout-{problem['dtype']}"
        ours = [measured(f"lorafast {method}", run, **problem) for method in METHODS]
        cells = [
            f"{median(found, 'ratio_to_frozen')} (≤ {highest(found, 'ratio_high')})"
            for found in ours
        ]
        for other in ("eager lora", "eager dora", "peft lora", "peft dora"):
            cells.append(median(measured(other, run, **problem), "ratio_to_frozen"))
        return [label, *cells, highest(ours[0], "floor")]

    return grid(head, (row(*one) for one in _dropout_problems()))


def bias_table() -> str:
    """The same layers with a bias, in bf16."""
    head = ["M = 2048, dropout 0.05, with a bias", *(f"**{method}**" for method in METHODS)]
    head += ["peft lora", "peft dora"]
    labels = (*(f"lorafast {method}" for method in METHODS), "peft lora", "peft dora")

    def row(label: str, problem: dict[str, Any]) -> Row:
        found = [measured(other, "bias-bf16", bias=True, **problem) for other in labels]
        return [label, *(median(one, "ratio_to_frozen") for one in found)]

    return grid(head, (row(*one) for one in _dropout_problems() if one[1]["dtype"] == "bf16"))


def compiled_table() -> str:
    """PEFT through torch.compile."""
    head = ["M = 2048, dropout 0.05", "peft lora", "peft lora, compiled"]
    head += ["peft dora", "peft dora, compiled"]
    labels = ("peft lora", "peft+compile lora", "peft dora", "peft+compile dora")

    def row(label: str, problem: dict[str, Any]) -> Row:
        run = f"compiled-{problem['dtype']}"
        found = [measured(other, run, **problem) for other in labels]
        return [label, *(median(one, "ratio_to_frozen") for one in found)]

    return grid(head, (row(*one) for one in _dropout_problems()))


def tokens_table() -> str:
    """The same layers at other numbers of tokens."""
    sizes = (64, 512, 8192)
    head = ["dropout 0.05", *(f"**M = {M}**" for M in sizes), *(f"peft, M = {M}" for M in sizes)]

    def row(K: int, N: int, dtype: str, method: str) -> Row:
        problem = {"bench": "linear", "K": K, "N": N, "R": 16, "dropout": 0.05, "dtype": dtype}
        cells = [
            median(
                measured(f"{impl} {method}", f"tokens-{dtype}", M=M, **problem), "ratio_to_frozen"
            )
            for impl in ("lorafast", "peft")
            for M in sizes
        ]
        return [f"{K} → {N}, {dtype}, {method}", *cells]

    problems = itertools.product(DTYPES, SHAPES, ("lora", "dora"))
    return grid(head, (row(K, N, dtype, method) for dtype, (K, N), method in problems))


def half_table() -> str:
    """Half precision on a processor for which torch has no quick product in it."""
    head = ["1024 → 1024", "M = 64, bf16", "M = 256, bf16", "M = 256, fp16", "peak, M = 256, bf16"]
    head.append("error ratio")
    problem = {"bench": "linear", "K": 1024, "N": 1024, "R": 16, "dropout": 0.0}

    def row(label: str) -> Row:
        found = [
            measured(label, f"half-{dtype}", M=M, dtype=dtype, **problem)
            for M, dtype in ((64, "bf16"), (256, "bf16"), (256, "fp16"))
        ]
        cells = [_name(label), *(median(one, "ratio_to_frozen") for one in found)]
        cells.append(size(found[1], "peak_bytes"))
        return [*cells, highest(list(itertools.chain(*found)), "error_ratio")]

    labels = ("frozen", "full", "lorafast lora", "eager lora", "peft lora")
    return grid(head, map(row, (*labels, "lorafast dora", "eager dora", "peft dora")))


def generation_table() -> str:
    """Greedy generation beside the model without adapters."""
    head = ["generate()", "512 wide, two threads", "384 wide, one thread", "error ratio"]

    def row(label: str) -> Row:
        found = [
            measured(label, run, NEWER, bench="generate")
            for run in ("generate", "generate-384-1-thread")
        ]
        cells = [_name(label), *(median(one, "ratio_to_frozen") for one in found)]
        return [*cells, highest(list(itertools.chain(*found)), "error_ratio")]

    labels = ("frozen", "lorafast lora", "accelerated lora", "peft lora", "merged lora")
    return grid(head, map(row, labels))


def quantised_table() -> str:
    """MiniLM's step on dense and on quantised weights."""
    problem = {"run": "minilm-quantised", "bench": "step", "batch_size": 16}
    bases = {"dense": "dense", "NF4": "nf4", "int8": "int8"}
    columns = {name: problem | {"base_format": base} for name, base in bases.items()}
    labels = ("frozen", "lorafast lora", "peft lora", "lorafast dora", "peft dora")
    return _ratios_and_peaks("MiniLM, 16 × 16 tokens", labels, columns)


def experts_table(dropout: str) -> str:
    """A layer of experts beside the frozen grouped product, at one dropout."""
    problem = {"routing": "balanced", "dropout": float(dropout)}
    columns = {dtype: problem | {"run": f"experts-{dtype}"} for dtype in ("fp32", "bf16")}
    # PEFT has no dropout there.
    labels = ("frozen", "lorafast lora", "lorafast dora", "peft lora")
    labels = labels[: 3 if problem["dropout"] else 4]
    return _ratios_and_peaks("32 experts, 1024 → 512, 2048 tokens, top 2", labels, columns)


def block_table() -> str:
    """A block of a Llama, with and without its gated MLP computed again."""
    columns = {dtype: {"run": f"block-{dtype}"} for dtype in ("fp32", "bf16")}
    impls = ("lorafast", "lorafast-mlp", "peft")
    labels = ["frozen", *(f"{impl} {method}" for method in ("lora", "dora") for impl in impls)]
    return _ratios_and_peaks("a block, 1024 wide, 2048 tokens", labels, columns)


def _ratios_and_peaks(title: str, labels: Iterable[str], columns: dict[str, dict[str, Any]]) -> str:
    """The step's time ÷ the frozen one's, and the peak, of each label in each column's problem."""

    def row(label: str) -> Row:
        found = [measured(label, devices=NEWER, **problem) for problem in columns.values()]
        cells = [f"{median(one, 'ratio_to_frozen')}, {size(one, 'peak_bytes')}" for one in found]
        return [_name(label), *cells]

    return grid([title, *(f"{name}: step ÷ frozen, peak" for name in columns)], map(row, labels))


def encoder_table() -> str:
    """A real encoder, trained."""
    head = ["MiniLM", "error ratio", "loss, first 10 → last 10 steps", "held-out accuracy"]
    head += ["step ÷ frozen", "peak, batch 16"]

    def row(label: str) -> Row:
        trained = measured(label, "minilm", bench="training", batch_size=8)
        stepped = measured(label, "minilm", bench="step", batch_size=16)
        cells = [highest(trained, "error_ratio"), losses(trained), median(trained, "accuracy")]
        cells += [median(trained, "ratio_to_frozen"), size(stepped, "peak_bytes")]
        return [_name(label), *cells]

    return grid(head, map(row, ENCODER))


def trained_methods_table() -> str:
    """Every method, trained on the encoder."""
    head = ["method", "lr", "loss, first 10 → last 10 steps", "held-out accuracy", "trained"]
    head += ["step ÷ frozen", "optimizer state", "peak"]

    def row(name: str) -> Row:
        label = "frozen" if name == "frozen" else f"lorafast {name}"
        found = measured(label, "minilm-methods", bench="training", batch_size=8)
        rate = found[0].get("lr")
        cells = [name, "" if rate is None else f"{rate:g}", losses(found)]
        cells += [median(found, "accuracy"), median(found, "trainable", ",.0f")]
        cells += [median(found, "ratio_to_frozen"), size(found, "optimizer_bytes")]
        return [*cells, size(found, "peak_bytes")]

    return grid(head, map(row, ("frozen", *(method.name for method in _methods()))))


def accelerated_table() -> str:
    """A PEFT model before and after lorafast.accelerate."""
    head = ["MiniLM, 16 × 128 tokens", "error ratio", "step ÷ frozen", "kept", "activations"]
    head.append("peak")

    def row(label: str) -> Row:
        found = measured(label, "minilm-accelerated", bench="step", batch_size=16)
        cells = [highest(found, "error_ratio"), median(found, "ratio_to_frozen")]
        cells += [size(found, f"{name}_bytes") for name in ("saved", "activation", "peak")]
        return [_name(label), *cells]

    return grid(head, map(row, ACCELERATED))


def memory_table(batches: str) -> str:
    """BART-large's memory by method, implementation and batch size. batches: 1,4,16 for example."""
    sizes = [int(one) for one in batches.split(",")]
    head = ["method", "by", *(f"batch {one}" for one in sizes), "× lorafast's LaMDA"]
    head.append("largest batch on 80 GB")
    lamda = _memory("lorafast lamda", sizes[-1])["total_bytes"]

    def row(label: str) -> Row:
        found = [_memory(label, one) for one in sizes]
        impl, _, method = label.partition(" ")
        cells = [method or impl, "" if impl == method or not method else impl]
        cells += [f"{one['total_bytes'] / 2**30:.1f} GiB" for one in found]
        cells += [f"{found[-1]['total_bytes'] / lamda:.2f}", str(found[-1]["largest_batch"])]
        return [f"**{cell}**" for cell in cells] if impl == "lorafast" else cells

    labels = ["full", *(f"{impl} {one}" for one in MEMORY_METHODS for impl in MEMORY)]
    return grid(head, map(row, (one for one in labels if one not in NOT_IN_PEFT)))


def short_memory_table(batch: str) -> str:
    """BART-large's memory by three methods at one batch size."""
    head = [f"BART-large, {batch} × 512 tokens", *MEMORY.values(), "PEFT ÷ lorafast"]

    def row(method: str) -> Row:
        found = {
            impl: _memory(label, int(batch))["total_bytes"]
            for impl in MEMORY
            if (label := f"{impl} {method}") not in NOT_IN_PEFT
        }
        sizes = [f"{found[one] / 2**30:.1f} GiB" if one in found else "–" for one in MEMORY]
        times = f"{found['peft'] / found['lorafast']:.2f}" if "peft" in found else "–"
        return [method, sizes[0], sizes[1], f"**{sizes[2]}**", times]

    return grid(head, map(row, ("lora", "dora", "lamda")))


def measured_memory_table() -> str:
    """The peak of BART-large's step, estimated and taken on a CPU."""

    def row(label: str) -> Row:
        found = measured(label, "bart-measured", ESTIMATED, batch_size=1)
        sizes = (size(found, name) for name in ("peak_bytes", "measured_peak_bytes"))
        return [_name(label), *sizes]

    head = ["BART-large, fp32, one text", "step's peak, estimated", "taken"]
    return grid(head, map(row, ("frozen", "full", "lorafast lora", "lorafast dora")))


def _memory(label: str, batch: int) -> Record:
    """The estimate of one implementation and method of BART-large."""
    (found,) = measured(label, "lamda-memory", ESTIMATED, batch_size=batch)
    return found


def write_figures() -> None:
    """Draw BART-large's memory by batch size."""
    from lorafast.bench.report import plots
    from lorafast.bench.report.record import Results

    found = Results.read(RESULTS / "lamda-memory.json").records
    rows = [r for r in found if r.run == "lamda-memory"]
    figure = plots.memory_by_method(rows, MEMORY)
    figure.suptitle("BART-large, estimated", fontsize=11)
    (RESULTS / "lamda-memory.svg").write_text(plots.svg(figure))


def method_table() -> str:
    """Every method there is, with its page."""
    head = ["method", "paper", "trains", "kept for backward", "how to ask"]
    return grid(head, ([f"[{m.name}](methods/{slug(m.name)}.md)", *_facts(m)] for m in _methods()))


def facts_table(name: str) -> str:
    """One method's facts."""
    (method,) = (m for m in _methods() if m.name == name)
    return grid(["paper", "trains", "kept for backward", "how to ask"], [_facts(method)])


def environment_table() -> str:
    """Every environment variable that lorafast reads."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name, default, meaning in _variables():
        rows.append(f"| `{name}` | {f'`{default}` ' if default else ''}| {meaning} |")
    return "\n".join(rows)


def slug(name: str) -> str:
    """The name of a method's page: "lora+" is lora-plus, "lamda++" is lamda-plus-plus."""
    return name.replace("+", "-plus")


def _facts(method: Any) -> Row:
    paper = re.fullmatch(r"arXiv[ :](\S+)", method.paper)
    linked = f"[{method.paper}](https://arxiv.org/abs/{paper[1]})" if paper else method.paper
    return [linked, method.trains, method.keeps, f"`{method.ask}`"]


def _methods() -> list[Any]:
    from lorafast import list_methods

    return list_methods()


def _variables() -> tuple[Any, ...]:
    from lorafast.runtime import env

    return env.VARIABLES


TABLES: dict[str, Callable[..., str]] = {
    "summary": summary_table,
    "layer": layer_table,
    "dropout": dropout_table,
    "bias": bias_table,
    "compiled": compiled_table,
    "tokens": tokens_table,
    "half": half_table,
    "encoder": encoder_table,
    "generation": generation_table,
    "quantised": quantised_table,
    "experts": experts_table,
    "block": block_table,
    "trained-methods": trained_methods_table,
    "accelerated": accelerated_table,
    "memory": memory_table,
    "short-memory": short_memory_table,
    "measured-memory": measured_memory_table,
    "methods": method_table,
    "method": facts_table,
    "environment": environment_table,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
