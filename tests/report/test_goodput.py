"""Where a run's time went: every case with its seconds added up by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from palmjax.metrics.lines import JsonLines, drop_after
from palmjax.report import goodput as causes
from palmjax.report.goodput import Ledger
from palmjax.report.read import marks, read

PHASES = {"imports": 3.0, "data": 1.0, "state": 2.0, "compile": 10.0, "step": 1.0}


def event(name: str, time: float, **fields: Any) -> dict[str, Any]:
    return {"kind": "event", "event": name, "time": time, **fields}


def step(number: int, seconds: float = 1.0, **fields: Any) -> dict[str, Any]:
    line = {"kind": "train", "step": number, "loss": 5.0 - 0.01 * number, "tokens": 1000, "seconds": seconds}
    return {
        **line,
        "tokens_per_second": 1000 / seconds,
        "mfu": None,
        "data_wait": 0.0,
        "checkpoint_block": 0.0,
    } | fields


def first(start: float, number: int) -> list[dict[str, Any]]:
    """A process that was born 6 s before `start` and whose first step took 11 s with compilation."""
    return [
        event("start", start, step=number - 1, rewinds=0),
        event("first step", start + 11, step=number, seconds=PHASES),
    ]


def seconds(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Causes that took any time."""
    return {cause: pytest.approx(spent) for cause, spent in Ledger(records).goodput().seconds.items() if spent > 1e-9}


def test_an_undisturbed_run():
    records = [
        *first(1006.0, 1),
        step(1, 11.0),
        *(step(n) for n in range(2, 9)),
        {"kind": "eval", "step": 8, "task": "held", "loss": 4.0, "seconds": 5.0},
        step(9, 3.0, data_wait=2.0),
        step(10, 2.5, checkpoint_block=1.5),
        event("done", 1006 + 11 + 7 + 5 + 3 + 2.5 + 0.5, step=10),
        event("summary", 1006 + 11 + 7 + 5 + 3 + 2.5 + 0.5),
    ]
    found = Ledger(records).goodput()
    assert found.seconds == {
        causes.USEFUL: pytest.approx(1 + 7 + 1 + 1),
        causes.STARTUP: pytest.approx(6 + 10),
        causes.DATA: pytest.approx(2.0),
        causes.SAVING: pytest.approx(1.5),
        causes.EVALUATION: pytest.approx(5.0),
        causes.REFUSED: 0.0,
        causes.REWOUND: 0.0,
        causes.REDONE: 0.0,
        causes.DOWN: 0.0,
        causes.OTHER: pytest.approx(0.5),
    }
    assert found.wall == pytest.approx(6 + 11 + 7 + 5 + 3 + 2.5 + 0.5)
    assert found.share == pytest.approx(10 / 35)


def test_a_run_killed_twice_counts_what_was_done_again(tmp_path):
    """Through the file itself: each start drops the lines behind its checkpoint, and the last line is torn."""
    path = tmp_path / "metrics.jsonl"

    def process(start_step: int, records: list[dict[str, Any]], torn: str = "") -> None:
        writer = JsonLines(str(path), start_step)
        for record in records:
            writer.write(record)
        writer.close()
        with path.open("a") as file:
            file.write(torn)

    # Born at 1000, dies at 1000 + 6 + 11 + 6 = 1023 with checkpoint_5: steps 6 and 7 are lost.
    process(0, [*first(1006.0, 1), step(1, 11.0), *(step(n) for n in range(2, 8))], '{"kind": "train", "step": 8, "se')
    # Born at 1053, killed before its first checkpoint: its 11 + 2 seconds of steps and 6 of start-up are lost.
    process(5, [*first(1059.0, 6), step(6, 11.0), step(7), step(8)])
    # Born at 1082, goes through.
    process(5, [*first(1088.0, 6), step(6, 11.0), *(step(n) for n in range(7, 11)), event("done", 1103.0, step=10)])

    run = read(str(tmp_path))
    assert [line["step"] for line in run.steps] == list(range(1, 11))
    assert run.lost_steps == 2 + 3
    found = run.goodput.seconds
    assert found[causes.USEFUL] == pytest.approx(10.0)
    assert found[causes.STARTUP] == pytest.approx(3 * 6 + 10 + 10)
    assert found[causes.REDONE] == pytest.approx(2 + 11 + 2)
    assert found[causes.DOWN] == pytest.approx((1053 - 1023) + (1082 - (1059 + 13)))
    assert found[causes.OTHER] == pytest.approx(0.0)
    assert run.goodput.wall == pytest.approx(1103 - 1000)
    assert [mark.kind for mark in run.marks] == ["lost", "restart", "lost", "restart"]
    assert [process.ended for process in run.processes] == [None, None, "done"]


def test_a_hundred_kills_add_up(tmp_path):
    """Each process saves after 10 steps and dies after 14."""
    path, clock = tmp_path / "metrics.jsonl", 5000.0
    for number in range(100):
        writer = JsonLines(str(path), 10 * number)
        for record in first(clock + 6, 10 * number + 1):
            writer.write(record)
        writer.write(step(10 * number + 1, 11.0))
        for n in range(10 * number + 2, 10 * number + 15):
            writer.write(step(n))
        writer.close()
        clock += 6 + 11 + 13 + 4  # the launcher waits 4 s
    run = read(str(tmp_path))
    assert len(run.steps) == 1004 and len(run.processes) == 100 and run.lost_steps == 99 * 4
    want = {
        causes.USEFUL: 1004.0,
        causes.STARTUP: 100 * 16.0,
        causes.REDONE: 99 * 4.0,
        causes.DOWN: 99 * 4.0,
    }
    assert {cause: spent for cause, spent in run.goodput.seconds.items() if spent > 1e-6} == {
        cause: pytest.approx(spent) for cause, spent in want.items()
    }
    assert run.goodput.wall == pytest.approx(clock - 4 - 5000)


def test_a_rewind_takes_steps_back_and_the_same_process_goes_on():
    spike = {"first_step": 12, "rows": [10, 20], "loss": 9.0, "median": 5.0, "z": 30.0, "why": "high"}
    begun = 1006 + 11 + 13
    records = [
        *first(1006.0, 1),
        step(1, 11.0),
        *(step(n) for n in range(2, 15)),
        {"kind": "eval", "step": 12, "task": "held", "loss": 9.0, "seconds": 0.0},
        event("spike", begun, step=14, **spike),
        event("rewind", begun, step=14, to=10, number=1, why="back from step 14 to step 10", skips=[[10, 80]]),
        event("summary", begun, steps=13),
        event("start", begun + 2, step=10, rewinds=1, origin="checkpoint_10"),
        step(11, 1.5),
        step(12),
        event("done", begun + 2 + 2.5, step=12),
    ]
    ledger = Ledger(records)
    assert [done.line["step"] for done in ledger.steps] == list(range(1, 13))
    assert [done.line["step"] for done in ledger.taken_back] == [14, 13, 12, 11]
    assert len(ledger.processes) == 1
    assert seconds(records) == {
        causes.USEFUL: 10 + 2,
        causes.STARTUP: 6 + 10 + 0.5,
        causes.REWOUND: 4 + 2,
    }
    assert [mark.kind for mark in marks(records, ledger.processes)] == ["spike", "rewind"]


def test_refused_steps_are_useful_to_nobody():
    records = [*first(1006.0, 1), step(1, 11.0), step(2), step(3, loss=math.nan, nonfinite=4.0), step(4)]
    assert seconds(records) == {causes.USEFUL: 3.0, causes.STARTUP: 16.0, causes.REFUSED: 1.0}


def test_steps_logged_twice_count_once():
    """Where nothing was dropped (a copied folder, another program's file) the later line counts."""
    records = [*first(1006.0, 1), step(1, 11.0), *(step(n) for n in range(2, 6)), event("start", 1028.0, step=3)]
    records += [step(4, 2.0), step(5), step(6)]
    ledger = Ledger(records)
    assert [done.line["step"] for done in ledger.steps] == [1, 2, 3, 4, 5, 6]
    found = seconds(records)
    assert found[causes.REDONE] == 2.0 and found[causes.USEFUL] == 6.0
    # Alive until 1006 + 15; the next one was first seen at 1028.
    assert found[causes.DOWN] == 7.0


def test_a_clock_that_jumps_back_makes_no_negative_time():
    records = [*first(1006.0, 1), step(1, 11.0), step(2), event("preempted", 1018.0, step=2)]
    records += [*first(506.0, 3), step(3, 11.0), step(4)]
    found = Ledger(records).goodput()
    assert all(spent >= 0 for spent in found.seconds.values())
    assert found.wall == pytest.approx(6 + 12 + 6 + 12)
    assert found.seconds[causes.USEFUL] == pytest.approx(4.0)


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_a_clock_that_jumps_under_a_run_moves_no_second(jump):
    """Amid the first of two processes, 7 s apart."""

    def told(shifts: tuple[float, ...]) -> list[dict[str, Any]]:
        records = [*first(1006.0, 1), step(1, 11.0), step(2), event("checkpoint", 1018.5, step=2), step(3)]
        records += [event("rewind", 1020.0, to=2), event("summary", 1020.5), event("start", 1024.0, step=2, rewinds=1)]
        records += [step(3, 2.0), event("preempted", 1026.5, step=3)]
        records += [*first(1039.5, 4), step(4, 11.0), step(5), event("done", 1052.0, step=5)]
        events = [record for record in records if record["kind"] == "event"]
        for record, shift in zip(events, shifts, strict=True):
            record |= {"time": record["time"] + shift, "monotonic": record["time"] - 900}
        return records

    calm = Ledger(told((0.0,) * 10)).goodput()
    assert calm.seconds[causes.DOWN] == pytest.approx(7.0) and calm.wall == pytest.approx(52.0)
    moved = Ledger(told((0.0, 0.0, *(jump,) * 8))).goodput()
    assert moved.seconds == pytest.approx(calm.seconds)


def test_a_run_without_a_step_or_of_an_older_palmjax_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(event("start", 1000.0, step=0)) + "\n")
    assert read(str(tmp_path)).goodput.wall == 0.0 and read(str(tmp_path)).goodput.share == 0.0
    path.write_text(
        "".join(json.dumps({"kind": "train", "step": n, "loss": 1.0, "seconds": 2.0}) + "\n" for n in (1, 2, 3))
    )
    run = read(str(tmp_path))
    assert len(run.steps) == 3 and run.goodput.wall == pytest.approx(6.0)


# --------------------------------------------------------------------------------------- what a start drops


def test_what_is_dropped_is_told_with_the_file_that_replaces_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [
        *first(1006.0, 1),
        step(1, 11.0),
        step(2),
        step(3),
        {"kind": "eval", "step": 3, "task": "t", "seconds": 4.0},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"torn')
    assert drop_after(str(path), 2) == 3
    lost = json.loads(path.read_text().splitlines()[-1])
    assert {name: lost[name] for name in ("after", "steps", "seconds", "evaluations", "startup")} == {
        "after": 2,
        "steps": 1,
        "seconds": 1.0,
        "evaluations": 4.0,
        "startup": 0.0,
    }
    # It outlives a start from an older checkpoint, which drops more.
    assert drop_after(str(path), 0) == 3
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["event"] for record in kept] == ["start", "lost", "lost"]
    assert (kept[2]["steps"], kept[2]["seconds"], kept[2]["startup"]) == (2, 12.0, 6.0)
    assert drop_after(str(path), 0) == 0


def test_a_torn_line_alone_is_no_lost_work(tmp_path):
    path = Path(tmp_path / "metrics.jsonl")
    path.write_text(json.dumps(step(1)) + "\n{")
    assert drop_after(str(path), 1) == 1
    assert path.read_text() == json.dumps(step(1)) + "\n"
