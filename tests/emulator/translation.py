"""Instructions as Python: every basic block becomes one function block(S, R, m).

No array is ever changed in place, so a move is an alias. Arithmetic is done for every thread, and
kept for those that run.
"""

from __future__ import annotations

import re

import numpy as np

from emulator import arithmetic, tensor_cores
from emulator.memory_translation import MemoryInstructions
from emulator.operands import kind_of, vector
from emulator.parser import BITS, Block, Instruction

_MATH = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "and": "{0} & {1}",
    "or": "{0} | {1}", "xor": "{0} ^ {1}", "min": "np.minimum({0}, {1})",
    "max": "np.maximum({0}, {1})", "neg": "-{0}", "not": "~{0}", "abs": "np.abs({0})",
    "mov": "{0}", "cvta": "{0}", "mad": "{0} * {1} + {2}", "div": "divided({0}, {1})",
    "rem": "{0} - divided({0}, {1}) * {1}", "sqrt": "np.sqrt({0})", "rcp": "1 / {0}",
    "ex2": "np.exp2({0})", "lg2": "np.log2({0})", "rsqrt": "1 / np.sqrt({0})",
}  # fmt: skip
_COMPARE = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=",
    "hi": ">", "hs": ">=", "equ": "==", "neu": "!=", "ltu": "<", "leu": "<=", "gtu": ">",
    "geu": ">=",
}  # fmt: skip
_TYPE = re.compile(r"([bsuf])(8|16|32|64)$|pred$|(bf16|f16|bf16x2|f16x2|tf32)$")
_HALVES = ("bf16", "f16", "bf16x2", "f16x2")
# Instructions that have no effect here.
_NOTHING = ("griddepcontrol", "setmaxnreg", "membar", "prefetch", "nanosleep", "discard")


class Translator(MemoryInstructions):
    """Translates one program."""

    def functions(self) -> list:
        """Return a function for each block."""
        for i, block in enumerate(self.program.blocks):
            self.lines.append(f"def block_{i}(S, R, m):")
            for instruction in block.code:
                self._instruction(instruction, block)
            if not block.code[-1].ends_block:
                self.lines.append(f" return {block.nexts[0]}")
        names = arithmetic.NAMES | self.constants
        names |= {"np": np, "where": np.where, "mma": tensor_cores.mma}
        exec(compile("\n".join(self.lines), self.program.name, "exec"), names)
        return [names[f"block_{i}"] for i in range(len(self.program.blocks))]

    def _instruction(self, instruction: Instruction, block: Block) -> None:
        parts, args, head = instruction.parts, instruction.args, instruction.parts[0]
        guard, condition = "m", ""
        if instruction.pred:
            condition = ("~" if instruction.negated else "") + self.value(instruction.pred, "pred")
            guard = f"({condition} if m is None else {condition} & m)"
        if head in ("bra", "ret", "exit"):
            jump = block.nexts[0] if head == "bra" else -1
            fall = block.nexts[-1] if condition else -1
            both = f"S.branch({condition}, m, {jump}, {fall})"
            self.lines.append(f" return {both if condition else jump}")
        elif instruction.ends_block:
            self.call("barrier", "m", args[0], args[1] if len(args) > 1 else 0)
            self.lines.append(f" return {block.nexts[0]}")
        elif handler := getattr(self, f"_{head}", None):
            handler(instruction, parts, args, guard)
        elif head in _MATH:
            self._math(instruction, parts, args, guard)
        elif head not in (*_NOTHING, "bar", "barrier"):
            raise NotImplementedError(instruction.text)

    def _math(self, instruction, parts, args, guard) -> None:
        head, kind = parts[0], parts[-1]
        if head == "mov" and ("{" in args[0] or "{" in args[1]):
            self._packed(args, guard)
        elif not _TYPE.match(kind):
            raise NotImplementedError(instruction.text)
        elif kind in _HALVES:
            pattern = "b32" if "x2" in kind else "b16"
            values = ", ".join(self.value(arg, pattern) for arg in args[1:])
            self.put(args[0], f"half_math('{head}', '{kind}', {values})", pattern, guard)
        elif "hi" in parts[1:-1]:
            self._high_product(instruction, kind, args, guard)
        elif "wide" in parts:
            letter, bits = kind_of(kind)
            wide = f"{'i' if letter == 's' else 'u'}{bits // 4}"
            a, b = (f"{self.value(arg, kind)}.astype({wide})" for arg in args[1:3])
            third = f" + {self.value(args[3], f'{letter}{2 * bits}')}" if head == "mad" else ""
            self.put(args[0], f"{a} * {b}{third}", f"{letter}{2 * bits}", guard)
        else:
            value = _MATH[head].format(*(self.value(arg, kind) for arg in args[1:]))
            if kind[0] == "f":  # of a number and NaN the number
                value = value.replace("np.minimum", "np.fmin").replace("np.maximum", "np.fmax")
            if "ftz" in parts:
                value = f"flushed({value})"
            if kind != "pred" and all(arg not in self.index for arg in args[1:]):
                value = f"S.full({value})"
            self.put(args[0], value, kind, guard)

    def _high_product(self, instruction, kind, args, guard) -> None:
        letter, bits = kind_of(kind)
        wide = f"{'i' if letter == 's' else 'u'}8"
        if bits != 32 or instruction.parts[0] != "mul":
            raise NotImplementedError(instruction.text)
        a, b = (f"{self.value(arg, kind)}.astype({wide})" for arg in args[1:3])
        self.put(args[0], f"(({a} * {b}) >> {wide}(32)).astype({wide[0]}4)", kind, guard)

    def _packed(self, args, guard) -> None:
        """Write the mov of a register to or from {halves}."""
        if args[0].startswith("{"):
            names, have = vector(args[0]), BITS[self.kinds[args[1]]]
            small = have // len(names)
            for i, name in enumerate(names):
                shifted = f"{self.register(args[1])} >> u{have // 8}({i * small})"
                self.put(name, f"({shifted}).astype(u{small // 8})", f"b{small}", guard)
            return
        names, have = vector(args[1]), BITS[self.kinds[args[0]]]
        small, number = have // len(names), f"u{have // 8}"
        values = [
            f"(S.full({self.value(name, f'b{small}')}).astype({number}) << {number}({i * small}))"
            for i, name in enumerate(names)
        ]
        self.put(args[0], " | ".join(values), f"b{have}", guard)

    def _fma(self, instruction, parts, args, guard) -> None:
        if parts[-1] != "f32":
            self._math(instruction, parts, args, guard)
            return
        a, b, c = (self.value(arg, "f32") for arg in args[1:])
        self.put(args[0], f"f4(f8({a}) * {b} + {c})", "f32", guard)

    def _lop3(self, instruction, parts, args, guard) -> None:
        values = ", ".join(f"S.full({self.value(arg, 'b32')})" for arg in args[1:4])
        self.put(args[0], f"looked_up({values}, {int(args[4], 0)})", "b32", guard)

    def _shl(self, instruction, parts, args, guard) -> None:
        self._shift("<<", parts[-1], args, guard)

    def _shr(self, instruction, parts, args, guard) -> None:
        self._shift(">>", parts[-1], args, guard)

    def _shift(self, operator, kind, args, guard) -> None:
        letter, bits = kind_of(kind)
        a, number = self.value(args[1], kind), f"{'i' if letter == 's' else 'u'}{bits // 8}"
        if args[2] in self.index:
            b = self.value(args[2], "u32")
            inside = f"({a}) {operator} np.minimum({b}, {bits - 1}).astype({number})"
            value = inside if letter == "s" else f"where({b} < {bits}, {inside}, {number}(0))"
        else:
            count = int(args[2], 0)
            most = min(count, bits - 1)
            shifted = f"{a} {operator} {number}({most})"
            value = shifted if count < bits or letter == "s" else f"S.full({number}(0))"
        self.put(args[0], value, kind, guard)

    def _shf(self, instruction, parts, args, guard) -> None:
        """Write a funnel shift in its wrapping form."""
        if parts[2] != "wrap":
            raise NotImplementedError(instruction.text)
        low, high, by = (f"S.full({self.value(arg, 'u32')}).astype(u8)" for arg in args[1:4])
        both, by = f"({high} << u8(32) | {low})", f"({by} & u8(31))"
        value = f"({both} << {by}) >> u8(32)" if parts[1] == "l" else f"{both} >> {by}"
        self.put(args[0], f"({value}).astype(u4)", "b32", guard)

    def _bfe(self, instruction, parts, args, guard) -> None:
        letter, bits = kind_of(parts[-1])
        start, length = int(args[2], 0), int(args[3], 0)
        number = f"{'i' if letter == 's' else 'u'}{bits // 8}"
        top = f"({self.value(args[1], f'{letter}{bits}')} << {number}({bits - start - length}))"
        value = f"{top} >> {number}({bits - length})" if length else "S.full(u4(0))"
        self.put(args[0], value, parts[-1], guard)

    def _bfi(self, instruction, parts, args, guard) -> None:
        start, length = int(args[3], 0), int(args[4], 0)
        mask = self.constant(np.uint32(((1 << length) - 1) << start & 0xFFFFFFFF))
        a, b = (self.value(arg, "b32") for arg in args[1:3])
        self.put(args[0], f"({a} << u4({start})) & {mask} | {b} & ~{mask}", "b32", guard)

    def _prmt(self, instruction, parts, args, guard) -> None:
        values = ", ".join(f"S.full({self.value(arg, 'b32')})" for arg in args[1:])
        self.put(args[0], f"permuted({values})", "b32", guard)

    def _selp(self, instruction, parts, args, guard) -> None:
        kind = "b" + parts[-1][1:]
        a, b = (self.value(arg, kind) for arg in args[1:3])
        self.put(args[0], f"where({self.value(args[3], 'pred')}, {a}, {b})", kind, guard)

    def _setp(self, instruction, parts, args, guard) -> None:
        kind, how = parts[-1], parts[1]
        if kind in ("bf16", "f16"):
            a, b = (f"widened({self.value(arg, 'b16')}, '{kind}')" for arg in args[1:3])
        else:
            a, b = (self.value(arg, kind) for arg in args[1:3])
        unordered = f"(np.isnan({a}) | np.isnan({b}))"
        if how in ("num", "nan"):
            value = unordered if how == "nan" else f"~{unordered}"
        else:
            value = f"({a} {_COMPARE[how]} {b})"
        if "f" in kind and (how == "ne" or how[-1] == "u"):
            value = f"({value} & ~{unordered})" if how == "ne" else f"({value} | {unordered})"
        if len(args) > 3:
            operator = {"and": "&", "or": "|", "xor": "^"}[parts[2]]
            value = f"{value} {operator} {self.value(args[3], 'pred')}"
        self.put(args[0], value, "pred", guard)

    def _cvt(self, instruction, parts, args, guard) -> None:
        to, source = parts[-2], parts[-1]
        if to in ("bf16x2", "f16x2"):
            high, low = (
                f"S.full(rounded({self.value(arg, 'f32')}, '{to[:-2]}')).astype(u4)"
                for arg in args[1:3]
            )
            self.put(args[0], f"{low} | {high} << u4(16)", "b32", guard)
            return
        if source in ("bf16", "f16"):
            value = f"widened({self.value(args[1], 'b16')}, '{source}')"
        else:
            value = self.value(args[1], source)
        if to in ("bf16", "f16"):
            value = value if source == "f32" else f"f4({value})"
            self.put(args[0], f"rounded({value}, '{to}')", "b16", guard)
            return
        if to == "tf32":
            self.put(args[0], f"tf32_nearest({value})", "b32", guard)
            return
        letter, bits = kind_of(to)
        number = f"{'i' if letter == 's' else 'u'}{bits // 8}"
        if letter == "f":
            value = f"({value}).astype(f{bits // 8})"
        elif source in ("f32", "bf16", "f16"):
            value = f"whole({value}, '{parts[1]}', {number})"
        else:
            value = f"({value}).astype({number})"
        if args[1] not in self.index:
            value = f"S.full({value})"
        self.put(args[0], value, to, guard)
