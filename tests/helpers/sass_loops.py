"""What the loops of compiled kernels do: instructions by pipe, loads, and bytes on their way.

Nothing here is a time: instructions are counted, and bytes in flight follow from their order.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Opcodes by pipe; what is in no group counts as control.
_PIPES = {
    "alu": (
        "LOP3 IADD3 IADD VIADD ISETP SHF SHL SHR SEL PRMT LEA IMNMX VIMNMX ICMP BMSK SGXT FLO POPC "
        "PLOP3 FSETP FMNMX FSEL MOV IABS LOP P2R R2P FCHK F2FP VABSDIFF CSEL HMNMX2 BREV"
    ),
    "multiply": "IMAD IMUL",
    "float": "FFMA FADD FMUL HFMA2 HADD2 HMUL2",
    "memory": (
        "LDG LDGSTS LDS LDSM STS STG LD ST STSM UTMALDG UTMASTG ATOM RED LDC ULDC SHFL LDL STL"
    ),
    "tensor": "HGMMA HMMA IMMA QGMMA UTCHMMA",
    "conversion": "MUFU F2F I2F F2I S2R CS2R",
}
_PIPE_OF = {op: pipe for pipe, ops in _PIPES.items() for op in ops.split()}
# Instructions whose operands are all read.
_WITHOUT_RESULT = ("STG", "STS", "ST", "STSM", "LDGSTS", "BAR", "BRA", "RED", "UTMASTG", "STL")
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?(.*?)\s*;", re.M)
# By compute capability: bytes of shared memory and threads of a multiprocessor.
MULTIPROCESSORS = {
    80: (167936, 2048), 86: (102400, 1536), 89: (102400, 1536), 90: (233472, 2048),
    100: (233472, 2048), 120: (102400, 1536),
}  # fmt: skip
REGISTERS = 65536
# The share of a step after which copies for the next one begin too late to overlap with it.
SOON = 0.25
# A load used in its own step is late unless this share of the step lies between.
LATE = 0.5


@dataclass(frozen=True)
class Instruction:
    """One instruction of SASS. text: without its predicate."""

    address: int
    text: str

    @property
    def op(self) -> str:
        """The opcode without its modifiers."""
        return self.text.split()[0].split(".")[0]

    @property
    def pipe(self) -> str:
        """The pipe that executes it."""
        if self.op.startswith("U") and self.op not in _PIPE_OF:
            return "uniform"
        return _PIPE_OF.get(self.op, "control")

    @property
    def width(self) -> int:
        """The bytes that a load or a copy moves for each thread."""
        sizes = re.findall(r"\.(?:U|S)?(8|16|32|64|128)\b", self.text.split()[0])
        return int(sizes[-1]) // 8 if sizes else 4

    @property
    def sources(self) -> set[int]:
        """The registers that it names as operands."""
        _, _, operands = self.text.partition(" ")
        if self.op not in _WITHOUT_RESULT:
            operands = operands.partition(",")[2]
        return {int(number) for number in re.findall(r"\bR(\d+)\b", operands)}

    @property
    def results(self) -> set[int]:
        """The registers that a load writes."""
        number = re.search(r"\bR(\d+)\b", self.text)
        first = int(number.group(1)) if number else -1
        return set(range(first, first + max(1, self.width // 4)))


@dataclass(frozen=True)
class Load:
    """A load of global memory to registers in a loop.

    bytes: for each thread. ahead: the iterations between it and its first use; below 1 and not
    `carried` if that is in its own iteration.
    """

    bytes: int
    ahead: float
    carried: bool


def instructions(dump: str) -> list[Instruction]:
    """Return the instructions in a dump of cuobjdump or nvdisasm."""
    return [Instruction(int(match[1], 16), match[3]) for match in _LINE.finditer(dump)]


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Return the innermost loops, the longest first."""
    spans = []
    for instruction in code:
        target = re.match(r"BRA(?:\.\S+)?\s+(?:!?U?P\w+,\s*)?`?\(?(?:\.L_\w+\)|0x([0-9a-f]+))",
                          instruction.text)  # fmt: skip
        if target and target[1] and int(target[1], 16) < instruction.address:
            spans.append((int(target[1], 16), instruction.address))
    inner = [
        (low, high)
        for low, high in set(spans)
        if not any(low <= a and b <= high and (a, b) != (low, high) for a, b in spans)
    ]
    bodies = [[one for one in code if low <= one.address <= high] for low, high in inner]
    return sorted(bodies, key=len, reverse=True)


def pipes(code: list[Instruction]) -> Counter[str]:
    """Return the number of instructions by pipe."""
    return Counter(instruction.pipe for instruction in code)


def loads(loop: list[Instruction]) -> list[Load]:
    """Return the loads of global memory to registers in a loop."""
    found = []
    for place, load in enumerate(loop):
        if load.op not in ("LDG", "LD"):
            continue
        following = [*loop[place + 1 :], *loop[:place]]
        uses = (i for i, other in enumerate(following, 1) if other.sources & load.results)
        distance = next(uses, len(loop))
        carried = place + distance >= len(loop)
        found.append(Load(load.width, distance / len(loop), carried))
    return found


def copies(loop: list[Instruction]) -> tuple[int, int, float]:
    """Return what a loop copies by cp.async.

    The bytes for each thread, the groups that may be on their way while it computes, and where in
    the loop, counted from the wait, the first copy begins (0 to 1).
    """
    begins = [i for i, one in enumerate(loop) if one.op == "LDGSTS"]
    if not begins:
        return 0, 0, 0.0
    waits = [i for i, one in enumerate(loop) if re.match(r"DEPBAR\.LE SB0", one.text)]
    wait = waits[0] if waits else 0
    groups = int(re.search(r"SB0, (0x\w+)", loop[wait].text)[1], 16) if waits else 0
    first = min((i - wait) % len(loop) for i in begins)
    return sum(loop[i].width for i in begins), groups, first / len(loop)


def blocks_per_multiprocessor(capability: int, registers: int, shared: int, warps: int) -> int:
    """Return how many programs a multiprocessor holds."""
    most_shared, most_threads = MULTIPROCESSORS[capability]
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = most_shared // (shared + 1024)
    return min(by_registers, by_shared, most_threads // (32 * warps), 32)


@dataclass(frozen=True)
class Figures:
    """What gates are held against.

    instructions, alu: for each element of the large operand, counted in one thread. registers: of a
    thread. spills: the bytes of its stack. blocks: the programs that a multiprocessor holds.
    bytes_in_flight: on one multiprocessor, on average over a step of the loop; None without a loop.
    single_buffered: True if a step's copies begin when most of the step before is done. late_loads:
    the bytes of loads to registers that their own step soon waits for. serialized: True if ptxas
    makes every wgmma wait for the one before. barriers: in a step.
    """

    instructions: float
    alu: float
    registers: int
    spills: int
    blocks: int
    bytes_in_flight: float | None
    single_buffered: bool
    late_loads: int
    serialized: bool
    barriers: int


def of_kernel(
    files: dict[str, Path], capability: int, elements: int, in_loop: bool, warps: int, shared: int,
    programs: float,
) -> Figures:  # fmt: skip
    """Return the figures of a compiled kernel.

    files: its .cubin, and its .ptx if it may have wgmma. elements: those of the large operand in a
    step of the loop, or in the whole kernel if not in_loop. programs: of the grid, for each
    multiprocessor.
    """
    said = _run("cuobjdump", "-sass", "--dump-resource-usage", files[".cubin"])
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    code, threads = instructions(said), 32 * warps
    longest = loops(code)
    step = longest[0] if in_loop else code
    counted = pipes(step)
    copied, groups, begin = copies(step)
    register_loads = loads(step) if in_loop else []
    blocks = blocks_per_multiprocessor(capability, used["REG"], shared, warps)
    in_flight = copied * (groups + 1 - begin) + sum(one.bytes * one.ahead for one in register_loads)
    return Figures(
        instructions=sum(counted.values()) * threads / elements,
        alu=counted["alu"] * threads / elements,
        registers=used["REG"],
        spills=used["STACK"] + used["LOCAL"],
        blocks=blocks,
        bytes_in_flight=in_flight * threads * min(blocks, programs) if in_loop else None,
        single_buffered=bool(copied) and groups == 0 and begin > SOON,
        late_loads=sum(one.bytes for one in register_loads if not one.carried and one.ahead < LATE),
        serialized=".ptx" in files and "C7515" in _remarks(files[".ptx"], capability),
        barriers=sum(one.op == "BAR" for one in step),
    )


def missing_tools(capability: int) -> list[str]:
    """Return the tools that Triton's wheel lacks here."""
    return [name for name in ("cuobjdump", _ptxas(capability)) if not (TOOLS / name).exists()]


def _ptxas(capability: int) -> str:
    return "ptxas-blackwell" if capability >= 100 else "ptxas"


def _remarks(ptx: Path, capability: int) -> str:
    """Return what ptxas says of a program, remarks about performance included."""
    target = re.search(r"\.target (sm_\w+)", ptx.read_text())[1]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        return _run(_ptxas(capability), "-v", f"--gpu-name={target}", ptx, "-o", file.name)


def _run(tool: str, *options: str | Path) -> str:
    done = subprocess.run([TOOLS / tool, *options], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool}: {done.stderr[-1000:]}")
    return done.stdout + done.stderr
