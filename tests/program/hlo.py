"""Reads what XLA compiled: the kernels that one run of a program starts, and what they write."""

import dataclasses
import math
import re
from collections.abc import Iterator

# These move no data: XLA gives them no kernel.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while call conditional after-all "
    "opt-barrier add-dependency partition-id replica-id domain".split()
)
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:body|condition|to_apply|calls)=\{?%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Result:
    """An array that an instruction makes."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return self.size * _BITS.get(self.dtype, int(bits[0]) if bits else 8) // 8


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One instruction that runs on the device.

    `does` are the operations inside of it, its own opcode if it is no fusion; `root` is what it
    ends with, bitcasts left out.
    """

    name: str
    opcode: str
    results: tuple[Result, ...]
    does: frozenset[str]
    root: str

    @property
    def in_place(self) -> bool:
        """Whether it writes a part of an array that is there already."""
        return self.root in ("dynamic-update-slice", "scatter")

    @property
    def nbytes(self) -> int:
        return sum(result.nbytes for result in self.results)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    results: tuple[Result, ...]
    rest: str
    is_root: bool


class Program:
    """An optimized HLO module, from its text (`compiled.as_text()`)."""

    def __init__(self, text: str):
        self._computations, self._entry = _parse(text)

    def kernels(self) -> list[Kernel]:
        """Of the whole program; those inside of a loop once."""
        return self._below(self._entry)

    def loops(self) -> list[list[Kernel]]:
        """Of each loop's body, in the order of the loops; those inside of an inner loop too."""
        bodies = [
            re.search(r"\bbody=%?([\w.\-]+)", instruction.rest)
            for computation in self._executed(self._entry)
            for instruction in self._computations[computation]
            if instruction.opcode == "while"
        ]
        return [self._below(body[1]) for body in bodies if body]

    def _below(self, start: str) -> list[Kernel]:
        return [
            self._kernel(instruction)
            for computation in self._executed(start)
            for instruction in self._computations[computation]
            if instruction.opcode not in _FREE
            and not instruction.opcode.endswith(("-done", "-update"))
        ]

    def _executed(self, start: str) -> list[str]:
        """Computations whose instructions run one by one: not those of fusions and reductions."""
        found, waiting = [], [start]
        while waiting:
            name = waiting.pop(0)
            if name not in found:
                found.append(name)
                for instruction in self._computations[name]:
                    if instruction.opcode in ("while", "call", "conditional"):
                        waiting.extend(self._called(instruction))
        return found

    def _called(self, instruction: _Instruction) -> Iterator[str]:
        branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
        names = branches[1].split(",") if branches else _CALLED.findall(instruction.rest)
        for name in names:
            name = name.strip().lstrip("%")
            if name in self._computations:
                yield name

    def _kernel(self, instruction: _Instruction) -> Kernel:
        opcode = root = instruction.opcode
        does = {opcode}
        if opcode.startswith("fusion"):
            for name in self._called(instruction):
                inside = self._computations[name]
                does = {i.opcode for i in inside}
                root = _root(inside)
        return Kernel(instruction.name, opcode, instruction.results, frozenset(does), root)


def _root(computation: list[_Instruction]) -> str:
    by_name = {instruction.name: instruction for instruction in computation}
    last = next(i for i in computation if i.is_root)
    while last.opcode == "bitcast":
        operand = re.match(r"(?:[^%)]*\s)?%?([\w.\-]+)", last.rest)
        if operand is None or operand[1] not in by_name:
            break
        last = by_name[operand[1]]
    return last.opcode


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            root, name, arrays, opcode, rest = found.groups()
            arrays = _ARRAY.findall(re.sub(r"\{[^{}]*\}", "", arrays))  # without layouts
            results = tuple(
                Result(dtype, tuple(int(d) for d in dims.split(",") if d)) for dtype, dims in arrays
            )
            current.append(_Instruction(name, opcode, results, rest, bool(root)))
    if not entry:
        raise ValueError("expected the text of an HLO module, got one without ENTRY")
    return computations, entry
