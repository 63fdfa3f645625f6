"""Reads NVIDIA machine code (SASS): its loops, what lies in them, and how many clocks each part of an SM needs for one pass.

The clocks are a count, not a simulation: instructions of a loop's body times the lanes per clock that the hardware has for them
(CUDA C++ Programming Guide, table of arithmetic throughput, compute capability 9.0). What they leave out (latency, bank
conflicts, memory) only makes a kernel slower, so a share of the tensor cores computed from them is an upper bound.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_BRANCHES = {"BRA", "JMP", "BRX", "JMX"}
_ENDS = {"EXIT", "RET", "BRX", "JMX"}  # control does not fall through; where an indirect branch goes is not known


@dataclass(frozen=True)
class Instruction:
    """One instruction: its predicate ("@!P0" or ""), its name with modifiers ("HGMMA.64x128x16.F32.BF16"), its operands."""

    predicate: str
    name: str
    operands: str

    @property
    def opcode(self) -> str:
        """The name without modifiers: "HGMMA"."""
        return self.name.partition(".")[0]

    @property
    def target(self) -> str | None:
        """The label that a branch goes to."""
        found = _TARGET.search(self.operands) if self.opcode in _BRANCHES else None
        return found[1] if found else None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may run after this one."""
        if self.predicate:
            return True
        if self.opcode in ("BRA", "JMP"):
            return not self.operands.startswith("`(")  # "BRA.U UP0, `(.L)" and "BRA.DIV UR4, `(.L)" have a condition
        return self.opcode not in _ENDS


@dataclass(frozen=True)
class Loop:
    """A natural loop: the blocks from which its first block is reached again without leaving it."""

    header: int
    blocks: frozenset[int]


class Listing:
    """A kernel's instructions in basic blocks, with its loops."""

    def __init__(self, text: str) -> None:
        """text: what `nvdisasm -c` prints for a cubin of one kernel."""
        self.blocks: list[list[Instruction]] = [[]]
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if found := _LABEL.match(line):
                self._new_block()
                labels[found[1]] = len(self.blocks) - 1
            elif found := _INSTRUCTION.match(line):
                instruction = Instruction(found[1] or "", found[2], found[3])
                self.blocks[-1].append(instruction)
                if instruction.opcode in _BRANCHES or instruction.opcode in _ENDS:
                    self._new_block()
        self.successors: list[list[int]] = []
        for number, block in enumerate(self.blocks):
            onward = [number + 1] if number + 1 < len(self.blocks) and (not block or block[-1].falls_through) else []
            target = block[-1].target if block else None
            self.successors.append(onward + ([labels[target]] if target in labels else []))

    def _new_block(self) -> None:
        if self.blocks[-1]:
            self.blocks.append([])

    @cached_property
    def instructions(self) -> list[Instruction]:
        """All of them, in the order of the code."""
        return [instruction for block in self.blocks for instruction in block]

    @cached_property
    def counts(self) -> Counter[str]:
        """How often each opcode stands in the code."""
        return Counter(instruction.opcode for instruction in self.instructions)

    @cached_property
    def loops(self) -> list[Loop]:
        """Every natural loop (Aho, Sethi, Ullman 10.4); loops with the same first block are one."""
        dominators = self._dominators()
        bodies: dict[int, set[int]] = {}
        for source, targets in enumerate(self.successors):
            for header in targets:
                if dominators[source] is not None and header in dominators[source]:
                    bodies.setdefault(header, {header}).update(self._reaching(source, header))
        return [Loop(header, frozenset(body)) for header, body in bodies.items()]

    def in_loops(self, *opcodes: str) -> int:
        """How many instructions of these opcodes lie inside some loop."""
        inside = set().union(*(loop.blocks for loop in self.loops))
        return sum(instruction.opcode in opcodes for block in inside for instruction in self.blocks[block])

    def matrix_loops(self) -> list[list[Instruction]]:
        """The bodies of the innermost loops with matrix instructions; what waits in a loop of its own is not in them."""
        found = []
        for loop in self.loops:
            inner = [other for other in self.loops if other.blocks < loop.blocks]
            if any(_is_matrix(i) for other in inner for block in other.blocks for i in self.blocks[block]):
                continue
            waiting = set().union(*(other.blocks for other in inner))
            body = [i for block in sorted(loop.blocks - waiting) for i in self.blocks[block]]
            if any(map(_is_matrix, body)):
                found.append(body)
        return found

    def _predecessors(self) -> list[list[int]]:
        predecessors: list[list[int]] = [[] for _ in self.blocks]
        for source, targets in enumerate(self.successors):
            for target in targets:
                predecessors[target].append(source)
        return predecessors

    def _dominators(self) -> list[set[int] | None]:
        """For each block those that every way to it passes, itself among them; None for a block that no way leads to."""
        predecessors, dominators = self._predecessors(), [None] * len(self.blocks)
        dominators[0] = {0}
        changed = True
        while changed:
            changed = False
            for block in range(1, len(self.blocks)):
                known = [dominators[p] for p in predecessors[block] if dominators[p] is not None]
                new = {block} | set.intersection(*known) if known else None
                changed |= new != dominators[block]
                dominators[block] = new
        return dominators

    def _reaching(self, source: int, header: int) -> set[int]:
        predecessors, found, waiting = self._predecessors(), {source}, [source]
        while waiting:
            block = waiting.pop()
            for before in predecessors[block] if block != header else ():
                if before not in found:
                    found.add(before)
                    waiting.append(before)
        return found


# ---- clocks

MATRIX = ("HGMMA", "QGMMA", "HMMA", "UTCHMMA", "UTCQMMA")
# Dense FMAs a clock an SM: 989.4 TFLOP/s of bf16 = 132 SMs x 1.83 GHz x 2 x 2,048; fp8 is twice that (H100 data sheet and white
# paper). One HGMMA of 64 x N x 16 so takes N / 2 clocks of the four tensor cores together, and a QGMMA of 64 x N x 32 as many.
FMAS_A_CLOCK = {"HGMMA": 2048, "QGMMA": 4096}
# Lanes a clock an SM: fp32 add, multiply, fused 128; compare, select, min, max, convert, logic and integers 64; exp2 and the
# other special functions 16; shuffles 32 (CUDA C++ Programming Guide). Shared memory moves 128 bytes a clock.
_FP32 = {"FADD", "FMUL", "FFMA", "HADD2", "HMUL2", "HFMA2"}
_SPECIAL = {"MUFU", "I2F", "F2I", "I2FP"}
_MULTIPLY = {"IMAD", "IMUL"}  # half rate, on the lanes of fp32
_SHARED = {"LDS", "STS", "LDSM", "STSM", "ATOMS"}
_ALU = {
    "FMNMX", "FSETP", "FSET", "FSEL", "FCHK", "F2F", "F2FP", "IADD3", "VIADD", "VIADDMNMX", "VIMNMX", "ISETP", "IMNMX", "LEA",
    "LOP3", "SHF", "SEL", "PRMT", "IABS", "PLOP3", "SGXT", "BMSK", "P2R", "R2P", "LOP", "FMNMX3",
}  # fmt: skip


@dataclass(frozen=True)
class Clocks:
    """Clocks that one pass of a loop needs, for all warps of a block together, of each part of an SM; they run side by side."""

    tensor: float
    special: float
    fp32: float
    alu: float
    shared: float
    shuffle: float
    issue: float

    @property
    def others(self) -> float:
        """The busiest part but the tensor cores."""
        return max(self.special, self.fp32, self.alu, self.shared, self.shuffle, self.issue)

    @property
    def serialized(self) -> float:
        """The tensor cores' share when nothing else runs while they do: one block an SM whose warps march in step."""
        return self.tensor / (self.tensor + self.others)

    @property
    def overlapped(self) -> float:
        """The tensor cores' share when everything else hides behind them as far as it can."""
        return self.tensor / max(self.tensor, self.others)


def clocks(body: list[Instruction], warps: int) -> Clocks:
    """Counts a loop's body, which each of a block's `warps` runs; a matrix instruction is one for four warps."""
    counts = Counter(instruction.opcode for instruction in body)

    def lanes(opcodes: set[str], a_clock: int) -> float:
        return warps * 32 / a_clock * sum(counts[opcode] for opcode in opcodes)

    return Clocks(
        tensor=warps / 4 * sum(map(_matrix_clocks, body)),
        special=lanes(_SPECIAL, 16),
        fp32=lanes(_FP32, 128) + lanes(_MULTIPLY, 64),
        alu=lanes(_ALU, 64),
        shared=warps * sum(_shared_bytes(i) for i in body if i.opcode in _SHARED) / 128,
        shuffle=lanes({"SHFL"}, 32),
        issue=warps * len(body) / 4,  # four schedulers, each an instruction of a warp a clock
    )


def hottest(listing: Listing, warps: int) -> Clocks | None:
    """The matrix loop with the least other work: in attention the one without a mask, which most blocks of a sequence run."""
    found = [clocks(body, warps) for body in listing.matrix_loops()]
    found = [each for each in found if each.tensor]
    return max(found, key=lambda each: each.serialized, default=None)


def _is_matrix(instruction: Instruction) -> bool:
    return instruction.opcode in MATRIX


def _matrix_clocks(instruction: Instruction) -> float:
    """0 for what is not warpgroup-wide (HMMA runs on an older path, which the gate refuses on sm_90)."""
    if instruction.opcode not in FMAS_A_CLOCK:
        return 0.0
    rows, columns, depth = map(int, re.search(r"(\d+)x(\d+)x(\d+)", instruction.name).groups())  # type: ignore[union-attr]
    return rows * columns * depth / FMAS_A_CLOCK[instruction.opcode]


def _shared_bytes(instruction: Instruction) -> int:
    """Bytes that a warp's access to shared memory moves."""
    if instruction.opcode in ("LDSM", "STSM"):
        matrices = re.search(r"\.([124])(?:\.|$)", instruction.name.replace("M88", ""))
        return 128 * int(matrices[1] if matrices else 1)
    width = re.search(r"\.(64|128)\b", instruction.name)
    return 32 * (int(width[1]) // 8 if width else 4)
