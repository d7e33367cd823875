"""Memory of one device from the compiler's own buffer assignment: what is held for the state, and what at the peak.

XLA gives all temporary values one allocation and says, for each value, its place in it; a second table says when each
value is alive. The buffers reported are those that stand together at the moment when the most of it is occupied.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from typing import Any

from palmjax.plan import hlo

_ALLOCATION = re.compile(r"allocation \d+: size (\d+)(.*):$")
_PARAMETER = re.compile(r"parameter (\d+),")
_VALUE = re.compile(r" value: <\d+ ([^ ]+?)(\{[\d,]*\})?(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)$")
_RANGE = re.compile(r"    (.+?)(\{[\d,]*\}):(\d+)-(\d+)$")
LARGEST = 5


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One buffer alive at the peak: bytes, type, the traced operation that made it and its line in the source."""

    bytes: int
    shape: str
    op_name: str
    source: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """Bytes of one device's memory.

    parameters, optimizer, inputs: held between steps (inputs: the batch, the step and the key). activations: made by
    the forward pass and alive at the peak. temporaries: the rest of the compiler's temporary allocation: gradients,
    gathered weights, space between buffers. program: the compiled code. largest: buffers at the peak, largest first.
    """

    parameters: int = 0
    optimizer: int = 0
    inputs: int = 0
    activations: int = 0
    temporaries: int = 0
    program: int = 0
    largest: tuple[Buffer, ...] = ()

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.inputs + self.activations + self.temporaries + self.program

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Usage:
        return cls(**{**values, "largest": tuple(Buffer(**buffer) for buffer in values["largest"])})


@dataclasses.dataclass
class _Value:
    name: str
    index: str
    size: int
    offset: int
    shape: str


def read(assignment: str, ranges: str, text: str, program_bytes: int = 0) -> Usage:
    """The usage from XLA's dumps: buffer assignment, live ranges, and the HLO they belong to.

    ranges: may be empty (backends that write none): then every temporary value counts as alive at the peak.
    """
    module = hlo.parse(text)
    held: collections.Counter[str] = collections.Counter()
    temporary: list[_Value] = []
    temporaries = 0
    names = {}
    for instruction in module.computations[module.entry].instructions:
        if instruction.opcode == "parameter":
            names[int(instruction.arguments)] = instruction.op_name
    collecting = False
    for line in assignment.splitlines():
        allocation = _ALLOCATION.match(line)
        if allocation:
            size, rest = int(allocation[1]), allocation[2]
            parameter = _PARAMETER.search(rest)
            collecting = "preallocated-temp" in rest and "color" not in rest
            if "color" in rest or "thread-local" in rest:
                continue
            if parameter:
                held[_held_as(names.get(int(parameter[1]), ""))] += size
            elif collecting:
                temporaries += size
            elif "constant" not in rest:
                held["inputs"] += size  # results that reuse no argument: the metrics
        elif collecting and (value := _VALUE.match(line)):
            temporary.append(_Value(value[1], value[2] or "{}", int(value[3]), int(value[4]), value[5]))
        elif not line.startswith(" "):
            collecting = False
    sharing = collections.defaultdict(list)
    for value in temporary:
        sharing[value.offset, value.size].append(value.name)
    buffers = [_buffer(v, [v.name, *sharing[v.offset, v.size]], module) for v in _peak(temporary, ranges)]
    forward = sum(b.bytes for b in buffers if is_forward(b.op_name))
    return Usage(
        parameters=held["parameters"],
        optimizer=held["optimizer"],
        inputs=held["inputs"],
        activations=min(forward, temporaries),
        temporaries=max(temporaries - forward, 0),
        program=program_bytes,
        largest=tuple(sorted(buffers, key=lambda b: -b.bytes)[:LARGEST]),
    )


def is_forward(op_name: str) -> bool:
    """Whether a traced operation belongs to the forward pass and is not a part of it made again for the backward."""
    return "jvp(" in op_name and "transpose(" not in op_name and "rematted_computation" not in op_name


def _held_as(name: str) -> str:
    if name.startswith("state.params"):
        return "parameters"
    return "optimizer" if name.startswith("state.opt_state") else "inputs"


def _peak(values: list[_Value], ranges: str) -> list[_Value]:
    """The values alive when most is occupied, one for each place."""
    alive: dict[tuple[str, str], tuple[int, int]] = {}
    for line in ranges.splitlines():
        if found := _RANGE.match(line):
            alive[found[1], found[2]] = (int(found[3]), int(found[4]))
    if not alive:
        alive = {(v.name, v.index): (0, 0) for v in values}
    # Tuples' index tables and scalars come by the thousand and weigh nothing.
    big = [v for v in values if v.size >= 2**16 and (v.name, v.index) in alive]
    best: list[_Value] = []
    most = -1
    for moment in sorted({alive[v.name, v.index][0] for v in big}):
        here = [v for v in big if alive[v.name, v.index][0] <= moment <= alive[v.name, v.index][1]]
        places = _places(here)
        occupied = sum(value.size for value in places)
        if occupied > most:
            most, best = occupied, places
    return best


def _places(values: list[_Value]) -> list[_Value]:
    """The first and largest of the values that overlap in the allocation."""
    places: list[_Value] = []
    for value in sorted(values, key=lambda v: (v.offset, -v.size)):
        if not places or value.offset >= places[-1].offset + places[-1].size:
            places.append(value)
    return places


def _buffer(value: _Value, names: list[str], module: hlo.Module) -> Buffer:
    """What a place holds. names: of all values that stand there at some time; one inside a loop says more than the loop
    that carries it.
    """
    shape = str(next(iter(hlo.shapes(value.shape)), value.shape))
    found = [i for name in dict.fromkeys(names) if (i := module.find(name)) is not None]
    made_by = [i for i in map(module.named, found) if i.op_name and shape in map(str, i.result)]
    if not made_by:
        return Buffer(value.size, shape, value.name)
    forward = is_forward(made_by[0].op_name)
    best = max((i for i in made_by if is_forward(i.op_name) == forward), key=lambda i: len(i.op_name))
    return Buffer(value.size, shape, best.op_name, module.source(best))
