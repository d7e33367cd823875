"""A run that everything happened to, as the lines that it would have logged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from palmjax.metrics.lines import encode

SAVE = 100


def write(folder: Path, steps: int = 1200) -> None:
    """metrics.jsonl of a run with a kill, a spike that is rewound, a refused step, a preemption and evaluations."""
    rng = np.random.default_rng(0)
    lines: list[dict[str, Any]] = []
    now = 1_700_000_000.0

    def event(name: str, **fields: Any) -> None:
        lines.append({"kind": "event", "event": name, "time": now, **fields})

    def born(step: int, origin: str, rewinds: int = 0) -> None:
        nonlocal now
        now += 9.0
        event("start", step=step, origin=origin, rewinds=rewinds)

    def train(first: int, last: int, high: range = range(0), bad: int | None = None, again: bool = False) -> None:
        nonlocal now
        for step in range(first, last + 1):
            loss = 2.1 + 4.5 * math.exp(-step / 220) + 0.04 * rng.standard_normal() + (3.5 if step in high else 0.0)
            seconds = 0.5 * (1 + 0.03 * abs(rng.standard_normal())) + (12.0 if step == first else 0.0)
            waits = {
                "data_wait": 0.6 if step % 211 == 0 else 0.0,
                "checkpoint_block": 0.3 * (step % SAVE == 1 and step > first),
            }
            seconds += sum(waits.values())
            now += seconds
            values = {"loss": loss, "nonfinite": 0.0 if step != bad else 3.0, "tokens": 65536, "seconds": seconds}
            rates = {"tokens_per_second": 65536 / seconds, "mfu": 0.46 * 0.5 / seconds, "hfu": None}
            lines.append({"kind": "train", "step": step, **values, **rates, **waits})
            if step == first and not again:
                phases = {"imports": 4.0, "data": 2.0, "state": 3.0, "compile": 11.0, "step": 1.0}
                event("first step", step=step, seconds=phases)
            if step == bad:
                event("nonfinite", step=step, rows=[1, 2], tensor="loss", why=f"loss is not finite at step {step}")
            if step % 200 == 0:
                now += 6.0
                scores = {"loss": loss + 0.07, "bits_per_byte": (loss + 0.07) / 3, "accuracy": 0.5 - loss / 20}
                lines.append({"kind": "eval", "step": step, "task": "held_out", **scores, "seconds": 6.0})

    born(0, "scratch")
    train(1, 337)
    lost = [line for line in lines if line.get("step", 0) > 300]
    lines[:] = [line for line in lines if line.get("step", 0) <= 300]
    seconds = sum(line["seconds"] for line in lost)
    lines.append({"kind": "event", "event": "lost", "time": now, "after": 300, "steps": len(lost), "seconds": seconds})
    lines[-1] |= {"evaluations": 0.0, "startup": 0.0}
    now += 60.0
    born(300, "checkpoint_300")
    train(301, 640, high=range(630, 641), bad=512)
    event("spike", step=640, first_step=630, rows=[5, 9], loss=6.0, median=2.4, z=31.0, why="loss 6.0 at step 640")
    why = "back from step 640 to step 500, past 2000 rows"
    event("rewind", step=640, to=500, number=1, skips=[[500, 2000]], why=why)
    event("summary", steps=300)
    now += 3.0
    event("start", step=500, origin="checkpoint_500", rewinds=1)
    train(501, 900, again=True)
    event("preempted", step=900)
    event("summary", steps=700)
    now += 240.0
    born(900, "checkpoint_900", rewinds=1)
    train(901, steps)
    event("done", step=steps)
    event("summary", steps=300)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(encode(line) for line in lines) + '{"kind": "tra')
    (folder / "config.gin").write_text("TRAIN_STEPS = 1200 # <not a tag>\n")
