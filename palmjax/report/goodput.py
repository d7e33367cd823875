"""Where a run's time went: every second of the wall clock under one cause.

Steps tell how long they took and events when they were, so a process's life is rebuilt from what it logged, up to the
last step before it was killed. Seconds are of the clocks that the run itself read: a wall clock that jumps moves what
lies between processes, and nothing else.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

USEFUL = "useful steps"
STARTUP = "start-up and compilation"
DATA = "waiting for data"
SAVING = "waiting for a save"
EVALUATION = "evaluation"
REFUSED = "steps refused (not finite)"
REWOUND = "steps taken back by a rewind"
REDONE = "steps lost by a kill, done again"
DOWN = "no process running"
OTHER = "other"

CAUSES = (USEFUL, STARTUP, DATA, SAVING, EVALUATION, REFUSED, REWOUND, REDONE, DOWN, OTHER)


@dataclasses.dataclass(frozen=True)
class Goodput:
    """seconds: of each of CAUSES. They add up to `wall`, from the first process's start to the last sign of life."""

    seconds: Mapping[str, float]

    @property
    def wall(self) -> float:
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """Goodput: time in steps whose result is part of the run, over all time; 0 for a run that has done nothing."""
        return self.seconds[USEFUL] / self.wall if self.wall else 0.0


@dataclasses.dataclass
class Process:
    """One process's life. began: wall-clock time of its "start" event, before: seconds from its birth to that.

    first, last: steps done when it began and at its end. ended: why, None for one that was killed or still runs.
    seen: time of the last sign of life, an event or what steps and evaluations since `anchor` add up to. All times but
    `began` are `began` plus what has passed since by the monotonic clock, which stood at `ticks` then; `ahead` is how
    far the wall clock has gone from that.
    """

    began: float
    first: int
    last: int
    anchor: float
    seen: float
    before: float = 0.0
    busy: float = 0.0
    ended: str | None = None
    ticks: float | None = None
    ahead: float = 0.0

    def when(self, event: Mapping[str, Any]) -> float:
        """The time of an event of this process; of an older palmjax's, which logged no monotonic clock, the wall's."""
        wall = event.get("time", 0.0)
        now = wall
        if self.ticks is not None and "monotonic" in event:
            now = self.began + event["monotonic"] - self.ticks
        self.ahead = wall - now
        return now

    def live(self, seconds: float) -> None:
        """Steps or evaluations that took `seconds`, one after the other since `anchor`."""
        self.busy += seconds
        self.seen = max(self.seen, self.anchor + self.busy)

    @property
    def born(self) -> float:
        return self.began - self.before


@dataclasses.dataclass
class Done:
    """A step that was done: its line, the process's or attempt's first or not, and the seconds by cause."""

    line: Mapping[str, Any]
    seconds: dict[str, float]


class Ledger:
    """Takes a run's records in order. steps: those whose result is part of the run, taken_back: the others."""

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        records = list(records)
        self.processes: list[Process] = []
        self.steps: list[Done] = []
        self.taken_back: list[Done] = []
        self._seconds: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
        self._usual = _usual_seconds(records)
        self._first, self._leaving, self._going_on = True, False, False
        for record in records:
            match record["kind"]:
                case "train":
                    self._train(record)
                case "eval":
                    self._seconds[EVALUATION] += record.get("seconds", 0.0)
                    self._live(record.get("seconds", 0.0))
                case "event":
                    self._event(record)

    def goodput(self) -> Goodput:
        """All of it, under its causes."""
        seconds = dict(self._seconds)
        for done in (*self.steps, *self.taken_back):
            for cause, spent in done.seconds.items():
                seconds[cause] += spent
        if self.processes:
            for before, after in itertools.pairwise(self.processes):
                seconds[DOWN] += max(0.0, after.born - before.seen - before.ahead)
            alive = sum(process.seen - process.born for process in self.processes)
            seconds[OTHER] += max(0.0, alive + seconds[DOWN] - sum(seconds.values()))
        return Goodput(seconds)

    def _train(self, line: Mapping[str, Any]) -> None:
        step, seconds = line["step"], line.get("seconds", 0.0)
        self._take_back(step - 1, REDONE)  # logged twice: the later one counts
        self._live(seconds)
        if self.processes:
            self.processes[-1].last = step
        spent: dict[str, float] = dict.fromkeys((STARTUP, DATA, SAVING), 0.0)
        if self._first:  # an attempt's first step begins when its recorder does: before compilation
            spent[STARTUP] = max(0.0, seconds - self._usual.get(line.get("tokens"), 0.0))
        self._first = False
        left = seconds - spent[STARTUP]
        for cause, name in ((DATA, "data_wait"), (SAVING, "checkpoint_block")):
            spent[cause] = min(left, line.get(name, 0.0))
            left -= spent[cause]
        refused = line.get("nonfinite", 0) > 0
        self.steps.append(Done(line, {**spent, REFUSED if refused else USEFUL: left}))

    def _event(self, record: Mapping[str, Any]) -> None:
        name = record["event"]
        if name == "start":
            self._start(record)
            return
        if name == "lost":  # written by the next process, of the one before
            self._seconds[REDONE] += record["seconds"]
            self._seconds[EVALUATION] += record["evaluations"]
            self._seconds[STARTUP] += record["startup"]
            if self.processes:
                self.processes[-1].before += record["startup"]
                self._live(record["seconds"] + record["evaluations"])
            return
        if self.processes:
            self.processes[-1].seen = max(self.processes[-1].seen, self.processes[-1].when(record))
        if name == "rewind":
            self._take_back(record["to"], REWOUND)
        elif name == "first step" and self.processes:
            before = sum(record["seconds"].get(phase, 0.0) for phase in ("imports", "data", "state"))
            self.processes[-1].before += before
            self._seconds[STARTUP] += before
        elif name in ("done", "preempted", "stopped", "hang") and self.processes:
            self.processes[-1].ended = name
        # A process that begins anew by itself closes its recorder, which writes a summary, and starts once more.
        self._going_on = self._leaving and name == "summary"
        self._leaving = name in ("rewind", "overrides") or (self._leaving and name != "summary")

    def _start(self, record: Mapping[str, Any]) -> None:
        if self._going_on and self.processes:
            cause = REWOUND if record.get("rewinds", 0) else STARTUP
            process = self.processes[-1]
            now = process.when(record)
            self._seconds[cause] += max(0.0, now - process.seen)
            process.anchor, process.busy, process.seen = now, 0.0, max(process.seen, now)
        else:
            step, now, ticks = record.get("step", 0), record.get("time", 0.0), record.get("monotonic")
            self.processes.append(Process(began=now, first=step, last=step, anchor=now, seen=now, ticks=ticks))
        self._first, self._leaving, self._going_on = True, False, False

    def _take_back(self, step: int, cause: str) -> None:
        """Moves the steps after `step` to those whose work is gone."""
        while self.steps and self.steps[-1].line["step"] > step:
            done = self.steps.pop()
            for name in (USEFUL, REFUSED):
                done.seconds[cause] = done.seconds.get(cause, 0.0) + done.seconds.pop(name, 0.0)
            self.taken_back.append(done)

    def _live(self, seconds: float) -> None:
        if self.processes:
            self.processes[-1].live(seconds)


def _usual_seconds(records: Iterable[Mapping[str, Any]]) -> dict[Any, float]:
    """The median seconds of steps of so many tokens, first steps of an attempt left out."""
    first, found = True, collections.defaultdict(list)
    for record in records:
        if record.get("event") == "start":
            first = True
        elif record["kind"] == "train":
            if not first:
                found[record.get("tokens")].append(record.get("seconds", 0.0))
            first = False
    return {tokens: statistics.median(seconds) for tokens, seconds in found.items()}
