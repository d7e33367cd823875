"""Optimized HLO text to data: what the compiler scheduled, in which order, and what it said of each operation.

Text, because it is the one form that every jax and libtpu hands out. Only what a cost model reads is kept. Imports
nothing of jax.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator

import numpy as np

ITEM_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64,
    "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
    "f8e4m3fn": 8, "f8e5m2": 8, "f8e4m3": 8, "f8e4m3b11fnuz": 8, "f4e2m1fn": 4,
}  # fmt: skip
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_OPCODE = re.compile(r"\s*([a-z][a-z0-9\-]*)\(")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_METADATA = re.compile(r'metadata=\{(?:[^}"]|"[^"]*")*\}')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_SOURCE = re.compile(r'source_file="([^"]*)"(?:.*?source_line=(\d+))?')
_CALLED = re.compile(r"(calls|body|condition|to_apply|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: element type, dimensions, and memory space (0: HBM, others on chip or semaphores)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        return self.elements * ITEM_BITS.get(self.dtype, 0) / 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a type's text, tuples flattened."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        found.append(Shape(dtype, sizes, int(space[1]) if space else 0))
    return tuple(found)


@dataclasses.dataclass(eq=False)
class Instruction:
    """One operation in its computation's schedule.

    text: everything after the operands, from which the properties below are read when asked for.
    """

    name: str
    opcode: str
    result: tuple[Shape, ...]
    operands: tuple[str, ...]
    arguments: str
    text: str

    @functools.cached_property
    def called(self) -> dict[str, str]:
        """Role (calls, body, condition, ...) to the name of the computation it calls; branches are branch0, ..."""
        found = dict(_CALLED.findall(self.text))
        for names in _BRANCHES.findall(self.text):
            found |= {f"branch{i}": name for i, name in enumerate(_NAME.findall(names))}
        return found

    @functools.cached_property
    def op_name(self) -> str:
        """The traced operation it came from, as jax names it; empty if the compiler made it up."""
        metadata = _METADATA.search(self.text)
        name = _OP_NAME.search(metadata[0]) if metadata else None
        return name[1] if name else ""

    @functools.cached_property
    def frame(self) -> int | str:
        """Its stack frame's number in the module's table, or "file:line" where the text carries that; 0 if neither."""
        metadata = _METADATA.search(self.text)
        if metadata is None:
            return 0
        if frame := _FRAME.search(metadata[0]):
            return int(frame[1])
        source = _SOURCE.search(metadata[0])
        return f"{source[1]}:{source[2]}" if source else 0

    @functools.cached_property
    def cycles(self) -> float | None:
        """The compiler's own estimate of its clock cycles; None where it made none."""
        found = re.search(r'"estimated_cycles":"?(\d+)', self.text)
        # A fusion that the compiler could not estimate carries the largest integer.
        return None if found is None or int(found[1]) >= 2**62 else float(found[1])

    @functools.cached_property
    def rendezvous(self) -> str:
        """What a send and the recv of its other end have in common; its own name if the compiler wrote none."""
        found = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', self.text)
        return found[1] if found else self.name

    @functools.cached_property
    def target(self) -> str:
        """A custom call's target."""
        found = re.search(r'custom_call_target="([^"]*)"', self.text)
        return found[1] if found else ""

    @functools.cached_property
    def algorithm(self) -> dict[str, str]:
        """What the TPU compiler chose for a collective: {"emitter", "strategy", "debug"}; empty if it does not say."""
        start = self.text.find('"collective_algorithm_config":')
        if start < 0:
            return {}
        found, _ = json.JSONDecoder().raw_decode(self.text, self.text.index("{", start))
        return found

    @functools.cached_property
    def groups(self) -> np.ndarray | None:
        """A collective's replica groups, int [groups, size], as positions in the mesh; None if it names none."""
        at = self.text.find("replica_groups=")
        if at < 0:
            return None
        text = self.text[at + len("replica_groups=") :]
        if text.startswith("mesh["):
            return _mesh_groups(text)
        if text.startswith("["):
            found = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
            assert found is not None, text[:80]
            shape, source, order = ([int(n) for n in part.split(",")] if part else None for part in found.groups())
            assert shape is not None and source is not None
            ids = np.arange(math.prod(source)).reshape(source)
            return (ids if order is None else ids.transpose(order)).reshape(shape)
        if text.startswith("{}"):
            return None
        rows = text[1 : text.index("}}") + 1]
        return np.array([[int(n) for n in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", rows)])

    @functools.cached_property
    def pairs(self) -> np.ndarray | None:
        """A collective permute's (source, target) pairs, int [pairs, 2]."""
        at = self.text.find("source_target_pairs=")
        if at < 0:
            return None
        text = self.text[at : self.text.index("}}", at) + 1]
        return np.array([[int(n) for n in row.split(",")] for row in re.findall(r"\{(\d+,\d+)\}", text)])

    @property
    def transfers_to_host(self) -> bool:
        """Whether a send or recv goes through the host: on TPU, the network between slices."""
        return "is_host_transfer=true" in self.text


def _mesh_groups(text: str) -> np.ndarray:
    """Groups written as a mesh and the axes that a group spans: mesh['a'=2,'b'=4] {'b'}. Raises ValueError for the
    forms with device lists or parts of axes, which nothing here has met.
    """
    found = re.match(r"mesh\[([^\]]*)\] ?\{([^}]*)\}", text)
    if found is None or ":" in found[2] or "device_ids" in found[1]:
        raise ValueError(f"replica groups in an unknown form: {text[:120]}")
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
    spanned = re.findall(r"'([^']+)'", found[2])
    ids = np.arange(math.prod(axes.values())).reshape(*axes.values())
    names = list(axes)
    kept = [i for i, name in enumerate(names) if name not in spanned]
    order = [*kept, *(names.index(name) for name in spanned)]
    return ids.transpose(order).reshape(-1, math.prod(axes[name] for name in spanned))


@dataclasses.dataclass(eq=False)
class Computation:
    """A computation: its instructions in the order of the schedule, the root's name and the inlined callers' view."""

    name: str
    instructions: list[Instruction]
    root: str = ""

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {i.name: i for i in self.instructions}


@dataclasses.dataclass
class Module:
    """A compiled module. computations: by name. frames: stack frame number to "file:line" of the user's code."""

    computations: dict[str, Computation]
    entry: str
    frames: dict[int, str]

    def walk(self, computation: str) -> Iterator[Instruction]:
        """Every instruction of a computation and of the fusions it calls, not of loops' bodies."""
        for instruction in self.computations[computation].instructions:
            yield instruction
            if instruction.opcode in ("fusion", "call", "async-start"):
                for called in instruction.called.values():
                    yield from self.walk(called)

    @functools.cached_property
    def _all(self) -> dict[str, Instruction]:
        return {i.name: i for computation in self.computations.values() for i in computation.instructions}

    def find(self, name: str) -> Instruction | None:
        """The instruction called `name`, in whichever computation."""
        return self._all.get(name)

    def named(self, instruction: Instruction) -> Instruction:
        """The instruction, or where a fusion has no traced name, the one nearest its root inside that has."""
        if instruction.op_name or instruction.opcode != "fusion":
            return instruction
        inside = self.computations[instruction.called["calls"]].instructions
        return next((i for i in reversed(inside) if i.op_name), instruction)

    def source(self, instruction: Instruction) -> str:
        """ "file:line" of the user's code that an instruction came from; empty if unknown."""
        frame = instruction.frame
        return frame if isinstance(frame, str) else self.frames.get(frame, "")

    def trips(self, loop: Instruction) -> int:
        """How often a while loop's body runs: the compiler's own count, else the constant its condition compares with.

        Raises ValueError if neither is there; guessing would misplace most of a step.
        """
        known = re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.text)
        if known:
            return int(known[1])
        condition = self.computations[loop.called["condition"]]
        bounds = [
            int(i.arguments)
            for i in self.walk(condition.name)
            if i.opcode == "constant" and i.result and i.result[0].dims == () and i.arguments.lstrip("-").isdigit()
        ]
        compare = next((i for i in self.walk(condition.name) if i.opcode == "compare"), None)
        if compare is None or not bounds:
            raise ValueError(f"loop {loop.name}: its condition compares with no constant, so its trips are unknown")
        return max(bounds) + ("direction=LE" in compare.text)


def parse(text: str) -> Module:
    """The module of an optimized HLO text. Raises ValueError if it has no entry computation."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    tables: dict[str, list[str]] = {}
    table: list[str] | None = None
    for line in text.splitlines():
        if not line.startswith(" "):
            table = tables.setdefault(line, []) if line in _TABLES else (table if table is not None and line else None)
            if table is not None and line and line not in _TABLES:
                table.append(line)
            header = _HEADER.match(line)
            if header:
                current = computations[header[2]] = Computation(header[2], [])
                entry = header[2] if header[1] else entry
            continue
        if current is None:
            continue
        instruction = _instruction(line)
        if instruction is not None:
            current.instructions.append(instruction)
            if line.lstrip().startswith("ROOT "):
                current.root = instruction.name
    if not entry:
        raise ValueError("the HLO text has no ENTRY computation")
    return Module(computations, entry, _frames(tables))


_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


def _instruction(line: str) -> Instruction | None:
    head, equals, rest = line.strip().partition(" = ")
    if not equals:
        return None
    end = _close(rest, 0) if rest.startswith("(") else _array_end(rest)
    opcode = _OPCODE.match(rest, end)
    if opcode is None:
        return None
    last = _close(rest, opcode.end() - 1)
    arguments = rest[opcode.end() : last - 1]
    return Instruction(
        name=head.removeprefix("ROOT ").lstrip("%"),
        opcode=opcode[1],
        result=shapes(rest[:end]),
        operands=tuple(_NAME.findall(arguments)),
        arguments=arguments,
        text=rest[last:],
    )


def _array_end(text: str) -> int:
    found = _ARRAY.match(text)
    if found:
        return found.end()
    return text.index(" ") if " " in text else len(text)  # token[] and opaque[]


_BRACKET = re.compile(r"[()]")


def _close(text: str, start: int) -> int:
    """The position after the bracket that closes the one at `start`."""
    depth = 0
    for found in _BRACKET.finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)


def _frames(tables: dict[str, list[str]]) -> dict[int, str]:
    """Stack frame number -> "file:line", from the text's tables of files, locations and frames.

    A frame in an installed library, or in the two modules of ours where every matmul comes by, gives way to its caller.
    """
    files = {int(n): name for n, name in re.findall(r'^(\d+) "(.*)"$', "\n".join(tables.get("FileNames", [])), re.M)}
    rows = {name: {} for name in _TABLES}
    for name in ("FileLocations", "StackFrames"):
        for row in tables.get(name, []):
            number, _, fields = row.partition(" ")
            rows[name][int(number)] = {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", fields)}

    # The first frame has no parent; where it is printed as its own, parents are printed one too high.
    shift = 1 if rows["StackFrames"].get(1, {}).get("parent_frame_id") == 1 else 0

    def place(number: int) -> str:
        first = ""
        while number in rows["StackFrames"]:
            frame = rows["StackFrames"][number]
            location = rows["FileLocations"].get(frame.get("file_location_id", 0), {})
            file = files.get(location.get("file_name_id", 0), "")
            here = f"{file}:{location.get('line', 0)}"
            first = first or here
            if not any(part in file for part in _PASSED_THROUGH):
                return here
            parent = frame.get("parent_frame_id", 0) - shift
            number = parent if parent < number else 0
        return first

    return {number: place(number) for number in rows["StackFrames"]}


_PASSED_THROUGH = ("site-packages", "palmjax/sharding.py", "palmjax/models/parameters.py")
