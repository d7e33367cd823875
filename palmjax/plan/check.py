"""`palmjax plan --check FILE.gin ...`: a config that names a pod keeps the plan it had when it was written.

Two lines in the file's header are the record: the command, and what it said.

    # palmjax plan gin/exp/palm_540b.gin --topology v4:12x16x16 --slices 2
    #   18.2 s a step, MFU 44.7 %, 10.8 of 32 GiB a device (libtpu 0.0.51)

Check plans anew and fails if the step no longer fits, or a figure has moved by more than the tolerance.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Sequence

from palmjax.config import ConfigError
from palmjax.files import write_whole
from palmjax.plan import compiler
from palmjax.plan.build import Plan

TOLERANCE = 0.03
"""Relative change of a recorded figure that passes, besides the half digit that it was rounded by."""

_COMMAND = re.compile(r"^# palmjax plan (?P<arguments>\S+\.gin .*--topology.*)$")
_FIGURES = re.compile(
    r"^#   (?P<step>[\d.]+) s a step, MFU (?P<mfu>[\d.]+) %, (?P<held>[\d.]+) of [\d.]+ GiB a device "
    r"\((?P<compiler>.*)\)$"
)


@dataclasses.dataclass(frozen=True)
class Record:
    """A plan in a file's header. line: of the command, from 0. arguments: behind `palmjax plan`."""

    line: int
    arguments: str
    step: float
    mfu: float
    held: float
    compiler: str


def figures(plan: Plan) -> str:
    """The second line of a record. Raises ValueError for a plan without a time."""
    if plan.time is None or plan.mfu is None or plan.hbm_bytes is None:
        raise ValueError(f"{plan.topology}: no time to record")
    return (
        f"#   {plan.time.step:.3g} s a step, MFU {100 * plan.mfu:.1f} %, {plan.usage.total / 2**30:.1f} of "
        f"{plan.hbm_bytes / 2**30:.0f} GiB a device ({plan.compiler})"
    )


def records(path: str) -> list[Record]:
    """The plans in a file's header. Raises ConfigError, naming file and line, for a command without its figures."""
    try:
        with open(path) as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    found = []
    for number, line in enumerate(lines):
        command = _COMMAND.match(line)
        if command is None:
            continue
        said = _FIGURES.match(lines[number + 1]) if number + 1 < len(lines) else None
        if said is None:
            raise ConfigError(
                f"{path}:{number + 2}: after the plan's command come its figures, as in\n"
                "  #   18.2 s a step, MFU 44.7 %, 10.8 of 32 GiB a device (libtpu 0.0.51)"
            )
        step, mfu, held = (float(said[name]) for name in ("step", "mfu", "held"))
        found.append(Record(number, command["arguments"], step, mfu, held, said["compiler"]))
    return found


def differences(record: Record, plan: Plan) -> list[str]:
    """What no longer holds of a record, in words; empty if all does."""
    if not plan.fits:
        return [f"no longer fits: {plan.problem}"]
    if plan.time is None or plan.mfu is None:
        return [f"{plan.topology} has no time to compare"]
    triples = (
        ("step", record.step, plan.time.step, "s", 0.0),
        ("MFU", record.mfu, 100 * plan.mfu, "%", 0.05),
        ("memory", record.held, plan.usage.total / 2**30, "GiB", 0.05),
    )
    return [
        f"{name} was {old:.3g} {unit}, is {new:.3g} {unit}"
        for name, old, new, unit, rounded in triples
        if abs(new - old) > TOLERANCE * old + rounded
    ]


Replan = Callable[[str, str], Plan]
"""Plans a file (its path) as a record's command says (what stands behind `palmjax plan`)."""


def check(files: Sequence[str], replan: Replan, update: bool = False) -> int:
    """Plans every file that has a record; a line for each. Returns 1 if one changed or failed, else 0.

    update: writes the new figures into the headers instead of failing. Raises ConfigError for a record that can't be
    planned.
    """
    if not files:
        raise ConfigError("--check: name the files, as in: palmjax plan --check gin/exp/*.gin")
    failed = False
    for path in files:
        found = records(path)
        if not found:
            print(f"{path}: no plan in its header", flush=True)
        for record in found:
            try:
                plan = replan(path, record.arguments)
            except compiler.CompilerError as error:
                print(f"{path}: FAILED {error}", file=sys.stderr, flush=True)
                failed = True
                continue
            changed = differences(record, plan)
            if update and plan.fits:
                _rewrite(path, record, plan)
                print(f"{path}: {figures(plan).lstrip('# ')}, recorded", flush=True)
            elif changed:
                failed = True
                print(f"{path}: CHANGED on {plan.topology}: {'; '.join(changed)}", flush=True)
            else:
                print(f"{path}: {figures(plan).lstrip('# ')}, as recorded", flush=True)
    return int(failed)


def _rewrite(path: str, record: Record, plan: Plan) -> None:
    with open(path) as file:
        lines = file.read().split("\n")
    lines[record.line + 1] = figures(plan)
    write_whole(path, "\n".join(lines))
