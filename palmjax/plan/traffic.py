"""Bytes that an operation reads from and writes to a device's memory, from its shapes; slices and in-place updates
count what they touch, not what they are cut from.
"""

from __future__ import annotations

import functools

from palmjax.plan import hlo

_VIEWS = ("bitcast", "reshape", "copy-start", "get-tuple-element", "tuple", "convert")


def moved(module: hlo.Module, computation: hlo.Computation, instruction: hlo.Instruction) -> float:
    """Bytes read and written by one run of an instruction. What stays on the chip (other memory spaces) is free."""
    if instruction.opcode == "custom-call" and instruction.target in _MARKERS:
        return 0.0
    if instruction.opcode == "fusion":
        inside = module.computations[instruction.called["calls"]]
        return _written(inside, inside.by_name[inside.root]) + _read(computation, instruction, inside)
    operands = [computation.by_name[n] for n in instruction.operands if n in computation.by_name]
    if instruction.opcode == "dynamic-update-slice" and len(operands) > 1:
        return 2.0 * _size(operands[1])
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * _size(instruction)
    return _size(instruction) + sum(map(_size, operands))


_MARKERS = frozenset(
    ("AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "SliceId", "ZeroCrop", "Sharding")
)


def _size(instruction: hlo.Instruction) -> float:
    return sum(shape.bytes for shape in instruction.result if shape.space == 0)


def _written(inside: hlo.Computation, root: hlo.Instruction) -> float:
    """Of a fusion's root: an update in place writes only the slice."""
    operands = [inside.by_name[name] for name in root.operands if name in inside.by_name]
    if root.opcode == "tuple":
        return sum(_written(inside, operand) for operand in operands)
    if root.opcode == "dynamic-update-slice" and len(operands) > 1:
        return sum(shape.bytes for shape in operands[1].result)
    if root.opcode in _VIEWS and operands and operands[0].opcode == "dynamic-update-slice":
        return _written(inside, operands[0])
    return _size(root)


def _read(computation: hlo.Computation, instruction: hlo.Instruction, inside: hlo.Computation) -> float:
    users = _users(inside)
    parameters = {int(i.arguments): i for i in inside.instructions if i.opcode == "parameter"}
    total = 0.0
    for number, name in enumerate(instruction.operands):
        operand = computation.by_name.get(name)
        if operand is None or number not in parameters:
            continue
        total += min(
            _size(operand),
            sum(_touched(inside, users, u, parameters[number].name) for u in _of(users, parameters[number])),
        )
    return total


def _of(users: dict[str, list[hlo.Instruction]], instruction: hlo.Instruction) -> list[hlo.Instruction]:
    return users.get(instruction.name, [])


def _touched(
    inside: hlo.Computation, users: dict[str, list[hlo.Instruction]], user: hlo.Instruction, name: str
) -> float:
    """Bytes of the value `name` that one of its users looks at."""
    if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
        return sum(shape.bytes for shape in user.result)
    if user.opcode == "dynamic-update-slice" and user.operands[0] == name:
        return 0.0
    if user.opcode in _VIEWS and _of(users, user):
        return sum(_touched(inside, users, after, user.name) for after in _of(users, user))
    return sum(shape.bytes for shape in inside.by_name[name].result)


@functools.lru_cache(maxsize=4096)
def _users(inside: hlo.Computation) -> dict[str, list[hlo.Instruction]]:
    found: dict[str, list[hlo.Instruction]] = {}
    for instruction in inside.instructions:
        for name in dict.fromkeys(instruction.operands):
            found.setdefault(name, []).append(instruction)
    return found
