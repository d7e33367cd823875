"""Rows of noise in a run's data, and a process that kills itself at a chosen instant of a rewind.

`python -m tests.faults.poison FIRST END INSTANT FILE.gin ...` is `palmjax train FILE.gin ...` with the global rows
FIRST..END of its training data scrambled, which SIGKILL ends at INSTANT (see `interrupted`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from palmjax import checkpoint, guard
from palmjax.data import feed


@contextlib.contextmanager
def scrambled(first: int, end: int) -> Iterator[None]:
    """Training rows [first, end) of the global order, whoever reads them at whichever step, are uniform noise."""
    original = feed.Dataset.read

    def read(self: feed.Dataset, step: int, skips: Any = (), rows: slice | None = None) -> Any:
        batch = original(self, step, skips, rows)
        numbers = (self.first_row(step, skips) + np.arange(self.batch_size(step)))[rows or slice(None)]
        bad = np.flatnonzero((numbers >= first) & (numbers < end))
        if self.config.split != "train" or not bad.size:
            return batch
        targets, tokens = np.array(batch.targets), np.array(batch.tokens)
        for row in bad:
            noise = np.random.default_rng(int(numbers[row])).integers(3, self.vocabulary.size, targets.shape[1])
            targets[row], tokens[row, 1:] = noise, noise[:-1]
        return dataclasses.replace(batch, targets=targets, tokens=tokens)

    feed.Dataset.read = read  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        feed.Dataset.read = original


@contextlib.contextmanager
def interrupted(instant: str, end: Callable[[], Any]) -> Iterator[None]:
    """Calls `end`, which does not return, when the first rewind comes to `instant`: "before the record" of it is
    written, "after the record", "amid the removal" of void checkpoints, "before the next save".
    """
    from palmjax.guard import record

    write, remove_one = guard.write_rewinds, record._remove
    save = checkpoint.Checkpointer.save
    removed: list[Any] = []

    def writing(*given: Any) -> None:
        if instant == "before the record":
            end()
        write(*given)
        if instant == "after the record":
            end()

    def removing(path: Any) -> None:
        remove_one(path)
        removed.append(path)
        if instant == "amid the removal":
            end()

    def saving(self: Any, *given: Any, **named: Any) -> Any:
        if instant == "before the next save" and removed:
            end()
        return save(self, *given, **named)

    guard.write_rewinds, record._remove = writing, removing
    checkpoint.Checkpointer.save = saving  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        guard.write_rewinds, record._remove = write, remove_one
        checkpoint.Checkpointer.save = save


if __name__ == "__main__":
    from palmjax import train
    from palmjax.cli import run_main

    with (
        scrambled(int(sys.argv[1]), int(sys.argv[2])),
        interrupted(sys.argv[3], lambda: os.kill(os.getpid(), signal.SIGKILL)),
    ):
        raise SystemExit(run_main(train.main, sys.argv[4:]))
