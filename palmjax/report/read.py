"""A MODEL_DIR as values: its steps, evaluations, what happened on the way, and its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from palmjax import model_dir
from palmjax.metrics import read_metrics
from palmjax.report.goodput import Goodput, Ledger, Process

STATES = {"done": "done", "preempted": "preempted", "stopped": "stopped by its guard", "hang": "hung"}
"""Why a run's last process ended, in words."""

ROUTINE = {"start", "first step", "summary", "checkpoint", "done"}
"""Events that every run has; what is left is worth a line in the report."""


@dataclasses.dataclass(frozen=True)
class Mark:
    """Something that happened. step: after which it is drawn; time: wall-clock seconds, None where not told."""

    kind: str
    step: int
    time: float | None
    text: str
    to: int | None = None
    """Of a rewind, the step that the run went back to."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run has left behind.

    steps: train lines whose result is part of the run, in order. taken_back: those that a rewind or a kill undid.
    evaluations: task to its lines. damaged: what is left out of the metrics, and why. shares: (task, share of the rows
    read, rows that it has), None where unknown.
    """

    folder: str
    steps: Sequence[Mapping[str, Any]]
    taken_back: Sequence[Mapping[str, Any]]
    evaluations: Mapping[str, Sequence[Mapping[str, Any]]]
    marks: Sequence[Mark]
    processes: Sequence[Process]
    goodput: Goodput
    lost_steps: int
    summary: Mapping[str, Any]
    config: str
    model_info: str
    checkpoints: str
    damaged: Sequence[str] = ()
    total_steps: int | None = None
    row_length: int | None = None
    shares: Sequence[tuple[str, float, int]] | None = None

    @property
    def state(self) -> str:
        """How it stands, in words."""
        ended = self.processes[-1].ended if self.processes else None
        return STATES.get(ended, "running, or killed") if ended else "running, or killed"

    def count(self, kind: str) -> int:
        return sum(mark.kind == kind for mark in self.marks)


def read(folder: str) -> Run:
    """The run in `folder`, finished or not. Raises ConfigError if it has no metrics."""
    damaged: list[str] = []
    records = [record for record in read_metrics(folder, damaged.append) if "kind" in record]
    ledger = Ledger(records)
    path = model_dir.as_path(folder)
    evaluations: dict[str, dict[int, Mapping[str, Any]]] = {}
    for record in records:
        if record["kind"] == "eval":  # a step scored twice: the later one counts
            evaluations.setdefault(record["task"], {})[record["step"]] = record
        elif record.get("event") == "rewind":
            for lines in evaluations.values():
                for step in [step for step in lines if step > record["to"]]:
                    del lines[step]
    summaries = [record for record in records if record.get("event") == "summary"]
    lost = [record for record in records if record.get("event") == "lost"]
    return Run(
        folder=str(folder),
        steps=[done.line for done in ledger.steps],
        taken_back=[done.line for done in ledger.taken_back],
        evaluations={task: [lines[step] for step in sorted(lines)] for task, lines in evaluations.items()},
        marks=marks(records, ledger.processes),
        processes=ledger.processes,
        goodput=ledger.goodput(),
        lost_steps=sum(record["steps"] for record in lost),
        summary=summaries[-1] if summaries else {},
        config=_text(path / "config.gin"),
        model_info=_text(path / "model-info.txt"),
        checkpoints=model_dir.inventory(path),
        damaged=damaged,
    )


def marks(records: Sequence[Mapping[str, Any]], processes: Sequence[Process]) -> list[Mark]:
    """What happened on the way, in order: events that are not routine, and restarts."""
    out, step, began = [], 0, {process.began for process in processes[1:]}
    for record in records:
        step = record.get("step", step)
        name, when = record.get("event"), record.get("time")
        if name == "restart":  # the launcher's word, behind the "start"
            if out and out[-1].kind == "restart" and record.get("exit_code") is not None:
                text = f"{out[-1].text}; the one before ended with exit code {record['exit_code']}"
                out[-1] = dataclasses.replace(out[-1], text=text)
        elif name == "start" and when in began:
            out.append(Mark("restart", step, when, f"from {_last_part(record.get('origin', 'a checkpoint'))}"))
        elif name == "lost":
            text = f"{record['steps']} steps ({record['seconds']:.1f} s) after step {record['after']} to be done again"
            out.append(Mark("lost", record["after"], when, text))
        elif name is not None and name not in ROUTINE:
            out.append(Mark(name, step, when, _words(record), record.get("to")))
    return out


def _last_part(origin: str) -> str:
    """Of a checkpoint in this run's own folder its name; "scratch" as it is."""
    return origin.rsplit("/", 1)[-1]


def _words(record: Mapping[str, Any]) -> str:
    """An event's own sentence, or what came with it."""
    if "why" in record:
        return str(record["why"])
    known = ("kind", "event", "time", "monotonic", "step")
    rest = {name: value for name, value in record.items() if name not in known}
    return ", ".join(f"{name} {value}" for name, value in rest.items())


def _text(path: Any) -> str:
    return path.read_bytes().decode(errors="replace") if path.is_file() else ""
