"""Instructions of a warp, of memory and of the tensor cores, as calls of the machine."""

from __future__ import annotations

import re

from emulator.operands import Operands, kind_of, split_pair, vector, view
from emulator.parser import BITS


class MemoryInstructions(Operands):
    """Writes them for one program. The name of a method is an opcode's first part."""

    def _shfl(self, instruction, parts, args, guard) -> None:
        target, _, flag = args[0].partition("|")
        self.call("together", "m", self.note(instruction))
        by, clamp = (self.value(arg, "b32") for arg in args[2:4])
        value = f"S.shuffled('{parts[2]}', {self.register(args[1])}, {by}, {clamp}, m)"
        self.put(target, value, "b32", guard)
        if flag:  # no lane reads beyond its warp
            self.put(flag, "S.all", "pred", guard)

    def _redux(self, instruction, parts, args, guard) -> None:
        if parts[2] != "add":
            raise NotImplementedError(instruction.text)
        self.call("together", "m", self.note(instruction))
        value, members = (self.value(arg, "b32") for arg in args[1:3])
        self.put(args[0], f"S.warp_sum({value}, {members}, m)", "b32", guard)

    def _elect(self, instruction, parts, args, guard) -> None:
        self.call("together", "m", self.note(instruction))
        lane, _, flag = args[0].partition("|")
        self.put(flag, "(S.laneid == 0)", "pred", guard)
        if lane in self.index:
            self.put(lane, "S.full(u4(0))", "b32", guard)

    def _ld(self, instruction, parts, args, guard) -> None:
        kind, (letter, bits) = parts[-1], kind_of(parts[-1])
        targets = vector(args[0])
        if parts[1] == "param":
            name, _, offset = args[1].strip("[] ").partition("+")
            for i, target in enumerate(targets):
                at = int(offset or 0) + i * bits // 8
                value = f"S.param({self.params[name]}, {at}, {bits // 8}){view(letter, bits)}"
                self.put(target, value, kind, guard)
            return
        have = BITS[self.kinds[targets[0]]]
        if parts[1] == "shared":
            self.touches(bits // 8 * len(targets))
        self.call(
            f"load_{self._space(instruction)}", "R", self.numbers(args[0]), self.address(args[1]),
            guard, bits // 8, have // 8, letter == "s" and have > bits, self.note(instruction),
        )  # fmt: skip

    def _st(self, instruction, parts, args, guard) -> None:
        _, bits = kind_of(parts[-1])
        values = [f"S.full({self.value(name, f'b{bits}')})" for name in vector(args[1])]
        if parts[1] == "shared":
            self.touches(bits // 8 * len(values))
        address, listed = self.address(args[0]), f"[{', '.join(values)}]"
        space = self._space(instruction)
        self.call(f"store_{space}", address, listed, guard, self.note(instruction))

    def _space(self, instruction) -> str:
        for part in instruction.parts[1:]:
            if part.startswith(("global", "shared")):
                return part.split("::")[0]
        raise NotImplementedError(instruction.text)

    def _cp(self, instruction, parts, args, guard) -> None:
        bulk = "bulk" in parts
        if "tensor" in parts:
            self._tma(instruction, parts, args, guard)
        elif "commit_group" in parts:
            self.call("bulk_commit" if bulk else "commit", guard)
        elif "wait_group" in parts or "wait_all" in parts:
            most = int(args[0], 0) if args else 0
            self.call("bulk_wait" if bulk else "wait", most, guard)
        elif parts[2] in ("ca", "cg"):
            size = int(args[2], 0)
            self.touches(size)
            kept = self.value(args[3], "b32") if len(args) > 3 else f"u4({size})"
            to, source = self.address(args[0]), self.address(args[1])
            self.call("copy", to, source, size, f"S.full({kept})", guard, self.note(instruction))
        else:
            raise NotImplementedError(instruction.text)

    def _tma(self, instruction, parts, args, guard) -> None:
        note = self.note(instruction)
        if parts[parts.index("tensor") + 2].startswith("shared"):
            tensor_map, corner = split_pair(args[1])
            target, barrier = self.address(args[0]), self.address(args[2])
            tensor_map = self.value(tensor_map, "b64")
            self.call("tma_load", target, tensor_map, self._corner(corner), barrier, guard, note)
        else:
            tensor_map, corner = split_pair(args[0])
            tensor_map, source = self.value(tensor_map, "b64"), self.address(args[1])
            self.call("tma_store", tensor_map, self._corner(corner), source, guard, note)

    def _corner(self, text: str) -> str:
        numbers = [f"S.full({self.value(name, 's32')})" for name in reversed(vector(text))]
        return f"[{', '.join(numbers)}]"

    def _mbarrier(self, instruction, parts, args, guard) -> None:
        note = self.note(instruction)
        if parts[1] == "init":
            count = f"S.full({self.value(args[1], 'b32')})"
            self.call("mbarrier_init", self.address(args[0]), count, guard)
        elif parts[1] == "arrive":
            expected = self.value(args[2], "b32") if "expect_tx" in parts else "u4(0)"
            barrier = self.address(args[1])
            self.call("mbarrier_arrive", barrier, f"S.full({expected})", guard, note)
        elif parts[1] in ("try_wait", "test_wait"):
            barrier, parity = self.address(args[1]), f"S.full({self.value(args[2], 'b32')})"
            value = f"S.mbarrier_wait({barrier}, {parity}, m, {note})"
            self.put(args[0], value, "pred", guard)
        elif parts[1] != "inval":
            raise NotImplementedError(instruction.text)

    def _fence(self, instruction, parts, args, guard) -> None:
        if parts[1] == "proxy":
            self.call("fence", guard)

    def _ldmatrix(self, instruction, parts, args, guard) -> None:
        self.touches(16)
        targets, address = self.numbers(args[0]), self.address(args[1])
        self.call("ldmatrix", "R", targets, address, "m", "trans" in parts, self.note(instruction))

    def _stmatrix(self, instruction, parts, args, guard) -> None:
        self.touches(16)
        address, sources = self.address(args[0]), self.numbers(args[1])
        trans, note = "trans" in parts, self.note(instruction)
        self.call("stmatrix", "R", address, sources, guard, trans, note)

    def _mma(self, instruction, parts, args, guard) -> None:
        shape, kind = parts[3], parts[-2]
        if not shape.startswith("m16n8") or parts[-1] != "f32":
            raise NotImplementedError(instruction.text)
        self.call("together", "m", self.note(instruction))
        a, b = (f"[R[i] for i in {self.numbers(arg)}]" for arg in args[1:3])
        c = ", ".join(f"S.full({self.value(name, 'b32')})" for name in vector(args[3]))
        self.lines.append(f" d = mma('{kind}', {shape[5:].lstrip('k')}, {a}, {b}, [{c}])")
        for i, name in enumerate(vector(args[0])):
            self.put(name, f"d[{i}]", "b32", guard)

    def _wgmma(self, instruction, parts, args, guard) -> None:
        note = self.note(instruction)
        if parts[1] == "fence":
            self.call("together", "m", note)
            return
        if parts[1] == "commit_group":
            self.call("wgmma_commit", "m")
            return
        if parts[1] == "wait_group":
            self.call("wgmma_wait", "R", int(args[0], 0), "m")
            return
        shape = next(part for part in parts if re.match(r"m64n\d+k\d+$", part))
        flags = [int(arg) for arg in args[4:]]
        if not shape.endswith("k16") or parts[-1] not in ("bf16", "f16") or flags[:2] != [1, 1]:
            raise NotImplementedError(instruction.text)
        in_registers = args[1].startswith("{")
        a = self.numbers(args[1]) if in_registers else self.value(args[1], "b64")
        b, adds = self.value(args[2], "b64"), self.value(args[3], "pred")
        across = [0, *flags[2:]] if in_registers else flags[2:]
        self.call(
            "wgmma", "R", self.numbers(args[0]), a, b, adds, across, f"'{parts[-1]}'",
            shape[4:-3], "m", note,
        )  # fmt: skip
