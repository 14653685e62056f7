"""What the text of a program that XLA has optimised says of its work.

Both figures go through the program as it runs: the instructions of its entry, a loop's body as
often as XLA knows that it turns (once where it does not), of a branch the costliest way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

# Pieces of memory under another name, and what is there before the program starts.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
SLICES = {"slice", "dynamic-slice", "gather"}
BITS = {"pred": 8, "token": 0, "opaque": 0}


class Instruction(NamedTuple):
    name: str
    result: str
    """its type, such as f32[2,3]{1,0}, or several in parentheses"""
    op: str
    operands: tuple[str, ...]
    attributes: str
    """the rest of the line"""
    is_root: bool

    @property
    def size(self) -> float:
        """Bytes of the result."""
        return sum(map(math.prod, _arrays(self.result)))

    def called(self, role: str) -> list[str]:
        """The computations that it names as its `role`, such as `body`."""
        found = re.search(rf"\b{role}=\{{?(%[^\s}}]+(?:, %[^\s}}]+)*)", self.attributes)
        return [name.rstrip(",") for name in found[1].split(", ")] if found else []


class Computation:
    """Instructions by name, in order."""

    def __init__(self) -> None:
        self.instructions: dict[str, Instruction] = {}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Who reads an instruction's result, bitcasts looked through."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for each in reversed(self.instructions.values()):
            for operand in each.operands:
                found[operand] += found[each.name] if each.op == "bitcast" else [each]
        return found

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.is_root)


class Program:
    """A program by its text, as `compiled.as_text()` gives it."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current = Computation()
        for line in text.splitlines():
            if line.endswith("{") and (head := re.match(r"(ENTRY )?(%\S+) ", line)):
                current = self.computations[head[2]] = Computation()
                self.entry = head[2] if head[1] else self.entry
            elif read := _instruction(line):
                current.instructions[read.name] = read

    def bytes_moved(self) -> float:
        """An estimate of the bytes that a run reads and writes: operands and results.

        Each instruction reads its operands from memory and writes its result there, but for slices,
        which touch what they take. What a cache keeps, or a kernel reads twice, is not known here.
        """
        return self._total(self.entry, self._moved)

    def product_flops(self) -> float:
        """Floating-point operations of the matrix products, 2 a multiply-add.

        Those inside kernels that are not XLA's, such as attention's, are not among them.
        """
        return self._total(self.entry, _flops, open_fusions=True)

    def products(self) -> int:
        """How many matrix products there are, kernels that are not XLA's left out."""
        return int(self._total(self.entry, lambda _, i: i.op == "dot", open_fusions=True))

    def _total(
        self,
        name: str,
        cost: Callable[[Computation, Instruction], float],
        *,
        open_fusions: bool = False,
    ) -> float:
        computation = self.computations[name]

        def inside(each: Instruction, role: str) -> list[float]:
            names = each.called(role)
            return [self._total(name, cost, open_fusions=open_fusions) for name in names]

        total = 0.0
        for each in computation.instructions.values():
            if each.op == "while":
                turns = re.search(r'known_trip_count":\{"n":"(\d+)"', each.attributes)
                total += sum(inside(each, "body")) * (int(turns[1]) if turns else 1)
            elif each.op == "conditional":
                roles = ("branch_computations", "true_computation", "false_computation")
                total += max(cost for role in roles for cost in inside(each, role))
            elif each.op == "call" or each.op.endswith("-start"):
                total += sum(inside(each, "to_apply") + inside(each, "calls"))
                total += cost(computation, each) if each.op == "copy-start" else 0
            elif each.op == "fusion" and open_fusions:
                total += sum(inside(each, "calls"))
            else:
                total += cost(computation, each)
        return total

    def _moved(self, computation: Computation, each: Instruction) -> float:
        if each.op in FREE or each.op.endswith("-done"):
            return 0
        operands = [computation.instructions[name] for name in each.operands]
        if each.op in SLICES:
            return 2 * each.size
        if each.op == "dynamic-update-slice":
            return 2 * operands[1].size
        if each.op != "fusion":
            return each.size + sum(operand.size for operand in operands)
        inner = self.computations[each.called("calls")[0]]
        parameters = {
            int(i.attributes.split(")")[0]): i
            for i in inner.instructions.values()
            if i.op == "parameter"
        }
        read = sum(_read(inner, parameters[n]) for n in range(len(operands)))
        return read + sum(_written(inner, root) for root in _roots(inner))


def _flops(computation: Computation, each: Instruction) -> float:
    if each.op != "dot":
        return 0
    (left,) = _arrays(computation.instructions[each.operands[0]].result)
    (out,) = _arrays(each.result)
    summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.attributes)
    axes = [int(axis) for axis in summed[1].split(",") if axis] if summed else []
    return 2 * math.prod(out[:-1]) * math.prod(left[axis] for axis in axes)


def _read(inner: Computation, parameter: Instruction) -> float:
    """Bytes that a fusion reads of a parameter."""
    users = inner.users[parameter.name]
    total = 0.0
    for user in users:
        source = inner.instructions[user.operands[0]]
        while source.op == "bitcast":
            source = inner.instructions[source.operands[0]]
        if user.op in SLICES and source is parameter:
            total += user.size
        elif user.op != "dynamic-update-slice" or source is not parameter:
            return parameter.size
    return min(total, parameter.size)


def _roots(inner: Computation) -> Iterator[Instruction]:
    root = inner.root
    for each in [inner.instructions[n] for n in root.operands] if root.op == "tuple" else [root]:
        source = each
        while source.op == "bitcast":
            source = inner.instructions[source.operands[0]]
        yield source


def _written(inner: Computation, root: Instruction) -> float:
    """Bytes that a fusion writes of a result: an update in place is all that is written."""
    if root.op == "dynamic-update-slice":
        return inner.instructions[root.operands[1]].size
    return root.size


def _instruction(line: str) -> Instruction | None:
    read = re.match(r"\s+(ROOT )?(%\S+) = (.*?) ([a-z][\w\-]*)\(", line)
    if read is None:
        return None
    # The operands end where their parenthesis does; none of them has one of its own.
    inside, _, after = line[read.end() :].partition(")")
    operands = tuple(re.findall(r"%[^\s,()]+", inside))
    rest = inside + ")" + after if read[4] in ("parameter", "constant") else after
    return Instruction(read[2], read[3], read[4], operands, rest, read[1] is not None)


def _arrays(result: str) -> list[list[float]]:
    """The lengths of the axes of every array in a type, and last the bytes of an entry."""
    found = []
    for kind, axes in re.findall(r"([a-z]\w*)\[([\d,]*)\]", result):
        digits = re.search(r"\d+", kind)
        bits = BITS[kind] if kind in BITS else int(digits[0]) if digits else 8
        found.append([*(int(n) for n in axes.split(",") if n), bits / 8])
    return found
