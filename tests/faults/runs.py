"""Runs of the tiny job in this process, with a guard that watches a short window."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from palmjax import configure, train
from palmjax.metrics import in_force, read_metrics
from palmjax.run import Description
from tests.e2e.jobs import GIN, Job

STEPS = 80
SPIKE = (
    "GuardConfig.spike=@SpikeRule()",
    "SpikeRule.window=16",
    "SpikeRule.steps=2",
    "SpikeRule.rewind_steps=10",
    "SpikeRule.skip_steps=30",
)
POISON = (50 * 16, 62 * 16)
"""Rows of the batches of steps 50..61, as long as nothing is skipped."""


def bindings(job: Job, folder: Path, *more: str) -> list[str]:
    given = [f"MODEL_DIR='{folder}'", f"TRAIN_FILES='{job.text}'", f"STORE_DIR='{job.stores}'", f"TRAIN_STEPS={STEPS}"]
    return [*given, "EVAL_STEPS=None", *more]


def run(job: Job, folder: Path, *more: str) -> int:
    """`palmjax train` of the job, in this process; returns its exit code."""
    loaded = configure.load([GIN], bindings(job, folder, *more))
    flat = {name: repr(value) for name, value in loaded.flat().items()}
    return train.train(loaded.experiment, Description(operative=loaded.operative, flat=flat))


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The records of a kind that no rewind has taken back."""
    return [record for record in in_force(read_metrics(folder)) if record["kind"] == kind]


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    return [record for record in records(folder, "event") if record["event"] == name]


def losses(folder: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(folder, "train")}


def heldout(folder: Path) -> float:
    return records(folder, "eval")[-1]["loss"]


@dataclasses.dataclass(frozen=True)
class Runs:
    """MODEL_DIRs of one job: clean data; poisoned rows with no guard; poisoned rows with one."""

    clean: Path
    undefended: Path
    defended: Path
