"""PTX text as a Program: parameters, registers, and basic blocks in scheduling order."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

BITS = {"p": 1, "b16": 16, "b32": 32, "b64": 64}
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", re.S)
_VARIABLE = re.compile(r"\.shared \.align (\d+) \.b(\d+) ([\w$]+)\[(\d+)\];")
_LABEL = re.compile(r"([\w$]+):(?!:)")


@dataclass
class Instruction:
    """One statement. pred: the register that guards it, or None; negated: @!p; args: operands."""

    text: str
    op: str
    args: list[str]
    pred: str | None = None
    negated: bool = False

    @property
    def parts(self) -> list[str]:
        """The opcode between its dots."""
        return [part for part in self.op.split(".") if part]

    @property
    def ends_block(self) -> bool:
        """True for a branch, a return and a barrier of the CTA."""
        return self.parts[0] in ("bra", "ret", "exit", "bar", "barrier") and "warp" not in self.op


@dataclass
class Block:
    """Code without branches; nexts: the blocks that it may continue with, -1 for the end."""

    labels: list[str]
    code: list[Instruction] = field(default_factory=list)
    nexts: list[int] = field(default_factory=list)


@dataclass
class Program:
    """One kernel.

    params: (name, bits, True for a tensor map) in order. registers: the kind of each by its name.
    blocks: in scheduling order, the entry first. variables: the offsets of those in shared memory
    that are declared with a size, by name. static: the bytes that they take together.
    """

    name: str
    params: list[tuple[str, int, bool]]
    registers: dict[str, str]
    blocks: list[Block]
    threads: int
    variables: dict[str, int]
    static: int


def parse(text: str) -> Program:
    """Return the one kernel of a module that Triton or nvcc compiled."""
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"^[ \t]*\.(loc|file|section)\b[^\n]*$", "", text, flags=re.M)
    entry = _ENTRY.search(text)
    name, params, directives = entry.groups()
    threads = int(re.search(r"\.(?:req|max)ntid\s+(\d+)", directives).group(1))
    statements, registers = _Body(text, entry.end()).statements()
    return Program(
        name,
        [_param(param) for param in params.split(",")],
        registers,
        _blocks(statements),
        threads,
        *_variables(text),
    )


def _variables(text: str) -> tuple[dict[str, int], int]:
    """Return the shared variables' offsets, and the bytes that they take."""
    offsets, end = {}, 0
    for alignment, bits, name, count in _VARIABLE.findall(text):
        end = -(-end // int(alignment)) * int(alignment)
        offsets[name] = end
        end += int(count) * int(bits) // 8
    return offsets, end


def split_operands(text: str) -> list[str]:
    """Return operands, split at the commas outside brackets."""
    operands, depth, start = [], 0, 0
    for place, char in enumerate(text):
        depth += (char in "[{(") - (char in "]})")
        if char == "," and not depth:
            operands.append(text[start:place].strip())
            start = place + 1
    last = text[start:].strip()
    return [*operands, last] if last else operands


def _param(text: str) -> tuple[str, int, bool]:
    words = text.split()
    array = re.search(r"([\w$]+)\[(\d+)\]", text)
    if array:
        return array.group(1), 8 * int(array.group(2)), True
    return words[-1], int(re.search(r"\.[a-z](\d+)\b", text).group(1)), False


class _Body:
    """A reader of a kernel's body. Names declared inside inner braces are made unique."""

    def __init__(self, text: str, place: int):
        self.text, self.place = text, place
        self.scopes, self.count = [0], 0
        self.registers: dict[str, str] = {}
        self.renamed: dict[tuple[int, str], str] = {}
        self.read: list[tuple[str | Instruction, tuple[int, ...]]] = []

    def statements(self) -> tuple[list[str | Instruction], dict[str, str]]:
        """Return labels (str) and Instructions in order, and the registers."""
        while self.scopes:
            self.place += len(self.text[self.place :]) - len(self.text[self.place :].lstrip())
            if self.text[self.place] == "{":
                self.count += 1
                self.scopes.append(self.count)
                self.place += 1
            elif self.text[self.place] == "}":
                self.scopes.pop()
                self.place += 1
            else:
                self._statement()
        for statement, scopes in self.read:
            if isinstance(statement, Instruction) and scopes[-1]:
                self._rename(statement, scopes)
        return [statement for statement, _ in self.read], self.registers

    def _statement(self) -> None:
        if label := _LABEL.match(self.text, self.place):
            self.read.append((self._unique(label.group(1)), tuple(self.scopes)))
            self.place = label.end()
            return
        end = self.text.index(";", self.place)
        statement = " ".join(self.text[self.place : end].split())
        self.place = end + 1
        if declaration := re.match(r"\.reg \.(\w+) (.*)", statement):
            self._declare(*declaration.groups())
        elif not statement.startswith("."):
            self.read.append((_instruction(statement), tuple(self.scopes)))

    def _declare(self, kind: str, names: str) -> None:
        kind = "p" if kind == "pred" else "b" + kind[1:]
        for name in names.split(","):
            name = name.strip()
            if many := re.match(r"(%\w+)<(\d+)>", name):
                numbers = range(int(many.group(2)))
                self.registers |= {f"{many.group(1)}{i}": kind for i in numbers}
            else:
                self.registers[self._unique(name)] = kind

    def _unique(self, name: str) -> str:
        scope = self.scopes[-1]
        if not scope:
            return name
        self.renamed[scope, name] = f"{name}.{scope}"
        return f"{name}.{scope}"

    def _rename(self, statement: Instruction, scopes: tuple[int, ...]) -> None:
        names = {old: new for (scope, old), new in self.renamed.items() if scope in scopes}
        statement.args = [
            re.sub(r"[\w$%]+", lambda match: names.get(match.group(), match.group()), arg)
            for arg in statement.args
        ]
        statement.pred = names.get(statement.pred, statement.pred)


def _instruction(text: str) -> Instruction:
    guard = re.match(r"@(!?)([\w%.]+)\s+(.*)", text)
    negated, pred, rest = (guard[1] == "!", guard[2], guard[3]) if guard else (False, None, text)
    op, _, operands = rest.partition(" ")
    return Instruction(text, op, split_operands(operands), pred, negated)


def _blocks(statements: list[str | Instruction]) -> list[Block]:
    """Return the blocks between labels, branches and barriers, in scheduling order."""
    blocks = [Block([])]
    for statement in statements:
        if isinstance(statement, str):
            if blocks[-1].code:
                blocks.append(Block([]))
            blocks[-1].labels.append(statement)
            continue
        blocks[-1].code.append(statement)
        if statement.ends_block:
            blocks.append(Block([]))
    blocks = [block for block in blocks if block.code or block.labels]
    if not blocks[-1].code:
        blocks[-1].code.append(Instruction("ret", "ret", []))
    named = {label: i for i, block in enumerate(blocks) for label in block.labels}
    for i, block in enumerate(blocks):
        last = block.code[-1]
        if last.parts[0] == "bra":
            block.nexts = [named[last.args[0]]] + ([i + 1] if last.pred else [])
        elif last.parts[0] not in ("ret", "exit") or last.pred:
            block.nexts = [i + 1]
    edges = {i: list(block.nexts) for i, block in enumerate(blocks)}
    order = _order(list(range(len(blocks))), 0, edges)
    ranks = {old: new for new, old in enumerate(order)}
    for block in blocks:
        block.nexts = [ranks.get(old, -1) for old in block.nexts]
    return [blocks[i] for i in order]


def _order(nodes: list[int], entry: int, edges: dict[int, list[int]]) -> list[int]:
    """Return the nodes in topological order, every loop in one piece.

    A thread that leaves a loop early then waits behind it until all others have left.
    """
    ordered = []
    for part in reversed(_strong_components(nodes, entry, edges)):
        if len(part) == 1:
            ordered += part
            continue
        members = set(part)
        outside = set(nodes) - members
        heads = [n for n in part if n == entry or any(n in edges[other] for other in outside)]
        head = heads[0] if heads else part[0]
        inner = {n: [other for other in edges[n] if other != head] for n in part}
        ordered += _order(part, head, inner)
    return ordered


def _strong_components(nodes: list[int], entry: int, edges: dict[int, list[int]]):
    """Return the strongly connected components that the entry reaches (Tarjan), last ones first.

    Without recursion: a kernel may have thousands of blocks in a row.
    """
    inside, done, stack, components = set(nodes), set(), [], []
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    path = [(entry, iter(edges[entry]))]
    while path:
        node, others = path[-1]
        if node not in index:
            index[node] = low[node] = len(index)
            stack.append(node)
        for other in others:
            if other in inside and other not in index:
                path.append((other, iter(edges[other])))
                break
            if other in inside and other not in done:
                low[node] = min(low[node], low[other])
        else:
            path.pop()
            if path:
                parent = path[-1][0]
                low[parent] = min(low[parent], low[node])
            if low[node] == index[node]:
                place = stack.index(node)
                components.append(stack[place:])
                done.update(stack[place:])
                del stack[place:]
    return components
