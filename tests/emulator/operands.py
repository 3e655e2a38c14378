"""Operands and results of instructions as Python expressions over S, R and m.

S is the machine, R the list of registers as unsigned patterns (predicates bool), m the mask of the
threads that run, None for all of them.
"""

from __future__ import annotations

import re

import numpy as np

from emulator.memory import BASE
from emulator.parser import BITS, Instruction, Program

TYPES = {1: "u1", 8: "u1", 16: "u2", 32: "u4", 64: "u8"}
_SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.([xyz])|%(laneid|warpid)")


def kind_of(kind: str) -> tuple[str, int]:
    """Return the letter and the bits of a type such as s32; ("b", ·) for halves."""
    match = re.match(r"([bsuf])(\d+)$", kind)
    return (match[1], int(match[2])) if match else ("b", 16 if "x2" not in kind else 32)


def view(letter: str, bits: int) -> str:
    """Return the call that turns a pattern into a number of a type."""
    return (
        f".view({'i' if letter == 's' else 'f'}{bits // 8})" if letter in "sf" and bits > 8 else ""
    )


def split_pair(text: str) -> tuple[str, str]:
    """Return the two halves of [%rd1, {%r1, %r2}]."""
    first, _, second = text.strip("[] ").partition(",")
    return first.strip(), second.strip()


def vector(text: str) -> list[str]:
    """Return the registers of {…}, or the only one."""
    return (
        [name.strip() for name in text.strip("{}").split(",")] if text.startswith("{") else [text]
    )


class Operands:
    """Writes operands and assignments of one program. lines: the code so far."""

    def __init__(self, program: Program):
        self.program = program
        self.index = {name: i for i, name in enumerate(program.registers)}
        self.kinds = program.registers
        self.params = {name: i for i, (name, _, _) in enumerate(program.params)}
        self.constants: dict[str, object] = {}
        self.texts: list[str] = []
        # The bytes of the smallest access to shared memory.
        self.cell = 16
        self.lines: list[str] = []

    def register(self, name: str) -> str:
        """Return a register."""
        return f"R[{self.index[name]}]"

    def constant(self, value: np.generic) -> str:
        """Return the name of a number."""
        name = f"k_{type(value).__name__}_{value.tobytes().hex()}"
        self.constants[name] = value
        return name

    def value(self, text: str, kind: str) -> str:
        """Return an operand as a type such as s32, f32, b64, pred, bf16."""
        if kind == "pred":
            return self._predicate(text)
        letter, bits = kind_of(kind)
        if text in self.index:
            narrow = f".astype({TYPES[bits]})" if BITS[self.kinds[text]] > bits else ""
            return self.register(text) + narrow + view(letter, bits)
        if special := _SPECIAL.match(text):
            axis = f"[{'xyz'.index(special[2])}]" if special[2] else ""
            return f"S.{special[3] or special[1]}{axis}"
        if text == "global_smem":
            return self.constant(np.uint32(BASE))
        if text in self.program.variables:
            return self.constant(
                np.dtype(f"u{bits // 8}").type(BASE + self.program.variables[text])
            )
        if text in self.params:
            return f"S.address({self.params[text]})"
        return self.constant(_literal(text, letter, bits))

    def _predicate(self, text: str) -> str:
        name = text.lstrip("!")
        if name in self.index:
            return ("~" if text[0] == "!" else "") + self.register(name)
        return "S.all" if int(text, 0) else "S.none"

    def address(self, text: str) -> str:
        """Return the address [%r1 + 16]."""
        name, _, offset = text.strip("[]").strip().partition("+")
        name, offset = name.strip(), int(offset or 0)
        bits = BITS[self.kinds[name]] if name in self.index else 32
        base = self.value(name, f"b{bits}")
        if not offset:
            return base
        number = np.dtype(f"u{bits // 8}").type(offset & (1 << bits) - 1)
        return f"({base} + {self.constant(number)})"

    def numbers(self, text: str) -> str:
        """Return a tuple of register numbers."""
        return "(" + "".join(f"{self.index[name]}," for name in vector(text)) + ")"

    def put(self, target: str, value: str, kind: str, guard: str) -> None:
        """Write target = value for the threads of the guard, widened by the sign of kind."""
        if target == "_":
            return
        if kind != "pred":
            letter, bits = kind_of(kind)
            have = BITS[self.kinds[target]]
            if have > bits:
                sign = "i" if letter == "s" else "u"
                value = f"({value}).astype({sign}{have // 8}).view({TYPES[have]})"
            elif letter in "sf":
                value = f"({value}).view({TYPES[bits]})"
        place = self.register(target)
        if guard == "m":
            self.lines.append(f" v = {value}")
            self.lines.append(f" {place} = v if m is None else where(m, v, {place})")
        else:
            self.lines.append(f" {place} = where({guard}, {value}, {place})")

    def call(self, method: str, *arguments: object) -> None:
        """Write a call of a method of the machine."""
        self.lines.append(f" S.{method}({', '.join(map(str, arguments))})")

    def note(self, instruction: Instruction) -> str:
        """Return the number by which the machine finds the text of an instruction."""
        self.texts.append(instruction.text)
        return str(len(self.texts) - 1)

    def touches(self, size: int) -> None:
        """Note an access of `size` bytes to shared memory."""
        self.cell = min(self.cell, size)


def _literal(text: str, letter: str, bits: int) -> np.generic:
    if text.startswith(("0f", "0F")):
        pattern = np.uint32(int(text[2:], 16))
        return pattern.view(np.float32) if letter == "f" else pattern
    pattern = np.dtype(f"u{bits // 8}").type(int(text.rstrip("U"), 0) & (1 << bits) - 1)
    if letter == "s":
        return pattern.view(f"i{bits // 8}")
    return pattern.view("f4") if letter == "f" else pattern
